// rows[inverse[t, k]] = x[t], and zero for sentinels, whose rows are those past offsets[E]. Elements are not looked at,
// so it serves every dtype.
//
// A warp takes 1 KB of a token, reads it once and writes it to the token's K rows: so x is read once, where a gather by
// row would read it K times, mostly from memory.
//
// Macros: VECTOR (bytes: vectors.cuh).
#include "vectors.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Params {
  const u8* x;         // [T, H]
  const int* inverse;  // slot -> row
  const int* offsets;  // [E + 1]
  u8* rows;            // [S, H]
  int vectors;         // of a row
  int tokens, top_k, experts;
};

constexpr int SPAN = 1024;           // bytes of a token that a warp takes
constexpr int PIECE = 32 * VECTOR;   // bytes of a warp's load or store
constexpr int LOADS = SPAN / PIECE;  // of a lane, in flight at once

extern "C" __global__ void __launch_bounds__(THREADS) permute(const __grid_constant__ Params p) {
  const u32 lane = threadIdx.x & 31;
  const int end = __ldg(p.offsets + p.experts);
  const u64 row_bytes = (u64)p.vectors * VECTOR, spans = (row_bytes + SPAN - 1) / SPAN, units = (u64)p.tokens * spans;
  for (u64 unit = (u64)blockIdx.x * WARPS + threadIdx.x / 32; unit < units; unit += (u64)gridDim.x * WARPS) {
    const u64 token = unit / spans, byte = unit % spans * SPAN + lane * VECTOR;
    const u8* source = p.x + token * row_bytes + byte;
    Vector<VECTOR> v[LOADS];
    bool inside[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      inside[i] = byte + i * PIECE < row_bytes;
      if (inside[i]) v[i] = Vector<VECTOR>::load(source + i * PIECE);
    }
    for (int first = 0; first < p.top_k; first += 32) {
      const int count = min(32, p.top_k - first);
      const int mine = (int)lane < count ? __ldg(p.inverse + token * p.top_k + first + lane) : 0;
#pragma unroll 4
      for (int k = 0; k < count; k++) {
        const int row = __shfl_sync(ALL_LANES, mine, k);
        u8* target = p.rows + (u64)(u32)row * row_bytes + byte;
        const bool real = row < end;
#pragma unroll
        for (int i = 0; i < LOADS; i++)
          if (inside[i]) (real ? v[i] : Vector<VECTOR>{}).store(target + i * PIECE);
      }
    }
  }
}
