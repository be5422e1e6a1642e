// The gradients of combine.cu in one pass: drows[r] = s[slot] * dout[t] and ds[slot] = <rows[r], dout[t]>, for r =
// inverse[slot] and slot = (t, k). Zero for sentinels, whose rows, those past offsets[E], are never read. Sums are in
// float32, without atomics and in an order that depends on the sizes alone.
//
// A warp takes `share` slots of a token. It goes through them in windows of up to 2 KB: dout's window stays in
// registers while each slot's is read, multiplied, summed over the warp and written. Lane k keeps the sum of the k-th
// slot.
//
// Macros: ELEMENT (Bf16, F16, F32), VECTOR (bytes: vectors.cuh).
#include "vectors.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Params {
  const u8* dout;       // [T, H]
  const u8* rows;       // [S, H], not read without dscores
  const float* scores;  // [T, K], or null for ones
  const int* inverse;   // slot -> row
  const int* offsets;   // [E + 1]
  u8* drows;            // [S, H], or null
  float* dscores;       // [T, K], or null
  int tokens, hidden, top_k, experts;
  int share;  // slots of a token that a warp takes, at most 32
};

typedef Elements<ELEMENT, VECTOR> Values;

constexpr int LOADS = VECTOR == 16 ? 4 : 8;  // of a lane, in flight at once
constexpr int PIECE = 32 * VECTOR;           // bytes of a warp's load or store
constexpr int SPAN = LOADS * PIECE;          // bytes of a window

DEVICE float dot(const Vector<VECTOR>& a, const Vector<VECTOR>& b, float sum) {
#pragma unroll
  for (int i = 0; i < Values::COUNT; i++) sum = fmaf(Values::at(a, i), Values::at(b, i), sum);
  return sum;
}

DEVICE Vector<VECTOR> scaled(float score, const Vector<VECTOR>& v) {
  float x[Values::COUNT];
#pragma unroll
  for (int i = 0; i < Values::COUNT; i++) x[i] = score * Values::at(v, i);
  return Values::narrow(x);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) combine_backward(const __grid_constant__ Params p) {
  const u32 lane = threadIdx.x & 31;
  const int end = __ldg(p.offsets + p.experts);
  const u64 row_bytes = (u64)p.hidden * Values::SIZE;
  const u64 shares = (p.top_k + p.share - 1) / p.share, units = (u64)p.tokens * shares;
  for (u64 unit = (u64)blockIdx.x * WARPS + threadIdx.x / 32; unit < units; unit += (u64)gridDim.x * WARPS) {
    const u64 token = unit / shares;
    const int first = (int)(unit % shares) * p.share, count = min(p.share, p.top_k - first);
    const u64 slot = token * p.top_k + first + lane;
    const bool exists = (int)lane < count;
    const int my_row = exists ? __ldg(p.inverse + slot) : 0;
    const float my_score = exists && p.scores ? __ldg(p.scores + slot) : 1.0f;
    float total = 0.0f;
    for (u64 byte = lane * VECTOR; byte < row_bytes + lane * VECTOR; byte += SPAN) {
      const u8* source = p.dout + token * row_bytes + byte;
      Vector<VECTOR> d[LOADS];
      bool inside[LOADS];
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        inside[i] = byte + i * PIECE < row_bytes;
        d[i] = inside[i] ? Vector<VECTOR>::load(source + i * PIECE) : Vector<VECTOR>{};
      }
      for (int k = 0; k < count; k++) {
        const int row = __shfl_sync(ALL_LANES, my_row, k);
        const float score = __shfl_sync(ALL_LANES, my_score, k);
        const u64 place = (u64)(u32)row * row_bytes + byte;
        const bool real = row < end;
        if (p.dscores && real) {
          Vector<VECTOR> y[LOADS];
#pragma unroll
          for (int i = 0; i < LOADS; i++)
            y[i] = inside[i] ? Vector<VECTOR>::load(p.rows + place + i * PIECE) : Vector<VECTOR>{};
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < LOADS; i++) sum = dot(d[i], y[i], sum);
          sum = sum_of_warp(sum);
          if ((int)lane == k) total += sum;
        }
        if (p.drows) {
#pragma unroll
          for (int i = 0; i < LOADS; i++)
            if (inside[i]) (real ? scaled(score, d[i]) : Vector<VECTOR>{}).store(p.drows + place + i * PIECE);
        }
      }
    }
    if (p.dscores && exists) p.dscores[slot] = total;
  }
}
