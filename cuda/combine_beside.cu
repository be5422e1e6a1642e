// The sum of the input gradient's rows over a token, out[t] = sum over k of rows[inverse[t, k]], in the registers that the
// weight gradients leave free: it runs beside them on a second stream.
//
// An SM has four partitions of 16384 registers. A GEMM of three warps a partition launched with 160 registers a thread
// leaves 16384 - 3 * 32 * 160 = 1024 of them: one warp of 32 registers. So this kernel has 128 threads of 32 registers, a
// block an SM. Eight bytes a lane and row, because eight rows of 16 would not fit; the next token's row numbers are loaded
// while this one's rows are on their way.
//
// Macros: ELEMENT, TOP_K (1, 2, 4, 8).
#include "hopper.cuh"

struct Params {
  const u8* rows;      // [S, H]
  const int* inverse;  // slot -> row
  const int* offsets;  // [E + 1]
  u8* out;             // [T, H]
  int tokens, hidden, experts, unused;
};
static_assert(sizeof(Params) == 48, "filled by the launcher");

DEVICE uint2 load_8_streamed(const u8* address) {
  uint2 v;
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}

// A warp takes a token, 128 features at a time. Lane k < TOP_K holds the row of the token's k-th slot, -1 for sentinels.
extern "C" __global__ void __maxnreg__(32) combine_beside(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31, step = gridDim.x * 4, end = __ldg(p.offsets + p.experts);
  const u32 pitch = p.hidden * 2;
  int token = blockIdx.x * 4 + threadIdx.x / 32;
  auto row_of = [&](int t) {
    const int row = lane < TOP_K && t < p.tokens ? __ldg(p.inverse + (u64)(u32)t * TOP_K + lane) : end;
    return row < end ? row : -1;
  };
  int next = row_of(token);
  for (; token < p.tokens; token += step) {
    const int row = next;
    const u32 real = __ballot_sync(0xffffffffu, row >= 0);
    next = row_of(token + step);
    for (u32 first = 0; first < pitch; first += 256) {
      const u32 byte = first + lane * 8;
      const u8* column = p.rows + (byte < pitch ? byte : 0);
      uint2 v[TOP_K];  // unconditional loads, a sentinel's from row 0, so that all are in flight at once
#pragma unroll
      for (int k = 0; k < TOP_K; k++) v[k] = load_8_streamed(column + (u64)(u32)max(__shfl_sync(0xffffffffu, row, k), 0) * pitch);
      float sum[4] = {};
#pragma unroll
      for (int k = 0; k < TOP_K; k++)
        if (real >> k & 1) {
          sum[0] += ELEMENT::low(v[k].x), sum[1] += ELEMENT::high(v[k].x);
          sum[2] += ELEMENT::low(v[k].y), sum[3] += ELEMENT::high(v[k].y);
        }
      if (byte < pitch)
        asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p.out + (u64)(u32)token * pitch + byte),
                     "r"(ELEMENT::pack(sum[0], sum[1])), "r"(ELEMENT::pack(sum[2], sum[3]))
                     : "memory");
    }
  }
}
