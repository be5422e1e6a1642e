// The sum of the input gradient's rows over a token, out[t] = sum over k of rows[inverse[t, k]], in the registers that
// the weight gradients leave free: it runs beside them on a second stream.
//
// An SM has four partitions of 16384 registers. A GEMM of three warps a partition launched with 160 registers a thread
// leaves 16384 - 3 * 32 * 160 = 1024 of them: one warp of 32 registers. So this kernel has 128 threads of 32 registers,
// a block an SM. Eight bytes a lane and row, because eight rows of 16 would not fit; the next token's row numbers are
// loaded while this one's rows are on their way.
//
// Macros: ELEMENT, TOP_K (1, 2, 4, 8).
#include "base.cuh"

constexpr int THREADS = 128, FEATURES = 4 * THREADS;  // of a block

struct Params {
  const u8* rows;      // [S, H]
  const int* inverse;  // slot -> row
  const int* offsets;  // [E + 1]
  u8* out;             // [T, H]
  int tokens, hidden, experts;
  int span;  // blocks that share a token: ceil(hidden / FEATURES)
};

// Eight bytes of a row, zeros where there is none (row < 0).
DEVICE uint2 load_row(const u8* column, int row, u32 pitch) {
  uint2 v;
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ge.s32 exists, %3, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@exists ld.global.cs.v2.u32 {%0, %1}, [%2];\n"
      "}"
      : "=&r"(v.x), "=&r"(v.y)
      : "l"(column + (u64)(u32)row * pitch), "r"(row));
  return v;
}

// A warp keeps to 128 features; `span` neighbouring blocks have all of a token's, so that rows are read whole while
// their DRAM pages are open. Lane k < TOP_K holds the row of the token's k-th slot, -1 for sentinels.
extern "C" __global__ void __maxnreg__(32) combine_beside(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, part = blockIdx.x % p.span * 4 + threadIdx.x / 32;
  const u32 pitch = p.hidden * 2, byte = part * 256 + lane * 8;
  const int step = gridDim.x / p.span;
  int token = blockIdx.x / p.span;
  if (token >= step || part * 256 >= (int)pitch) return;
  const u8* column = p.rows + (byte < pitch ? byte : 0);
  auto row_of = [&](int t) {
    const int row = lane < TOP_K && t < p.tokens ? __ldg(p.inverse + (u64)(u32)t * TOP_K + lane) : -1;
    return row < __ldg(p.offsets + p.experts) ? row : -1;  // loaded every time: no register is left to keep it
  };
  int row = row_of(token);
  for (; token < p.tokens; token += step) {
    uint2 v[TOP_K];
#pragma unroll
    for (int k = 0; k < TOP_K; k++) v[k] = load_row(column, __shfl_sync(ALL_LANES, row, k), pitch);
    row = row_of(token + step);
    float sum[4] = {};
#pragma unroll
    for (int k = 0; k < TOP_K; k++) {
      sum[0] += ELEMENT::low(v[k].x), sum[1] += ELEMENT::high(v[k].x);
      sum[2] += ELEMENT::low(v[k].y), sum[3] += ELEMENT::high(v[k].y);
    }
    if (byte < pitch)
      asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p.out + (u64)(u32)token * pitch + byte),
                   "r"(ELEMENT::pack(sum[0], sum[1])), "r"(ELEMENT::pack(sum[2], sum[3]))
                   : "memory");
  }
}
