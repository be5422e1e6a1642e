// The router's logits of few tokens, out[t, e] = <x[t], weight[e]> + bias[e] in fp32: for a product this small a launch
// in the layer's program costs a quarter of a call of a library.
//
// A block takes 16 tokens and 8 experts, the shape of one mma.sync, and cuts the features among its 8 warps; their sums
// meet in shared memory and are added in order. A lane's 16 bytes hold eight neighbouring features: which of them a
// lane multiplies together is the same for tokens and weights, so the order within a sum is all that differs.
//
// Macros: ELEMENT.
#include "base.cuh"

struct Params {
  const u8* x;       // [T, H]
  const u8* weight;  // [E, H]
  const u16* bias;   // [E], or null
  float* out;        // [T, E]
  int tokens, hidden, experts;
  int expert_blocks;  // blocks that share a token
};

constexpr int WARPS = 8, TOKENS = 16, EXPERTS = 8;  // of a block
constexpr int THREADS = 32 * WARPS;

template <class Element> DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);

template <> DEVICE void multiply<Bf16>(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <> DEVICE void multiply<F16>(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE uint4 load(const u8* row, int feature, int hidden) {
  return feature < hidden ? __ldg((const uint4*)(row + 2 * feature)) : make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS) logits(const __grid_constant__ Params p) {
  __shared__ float partial[WARPS][TOKENS * EXPERTS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, group = lane / 4, quad = lane & 3;
  const int token = blockIdx.x / p.expert_blocks * TOKENS, expert = blockIdx.x % p.expert_blocks * EXPERTS;
  // Past the ends the last row is read again, and the sums are dropped.
  const u64 row_bytes = 2 * (u64)p.hidden;
  const u8* upper = p.x + (u64)min(token + group, p.tokens - 1) * row_bytes;
  const u8* lower = p.x + (u64)min(token + group + 8, p.tokens - 1) * row_bytes;
  const u8* weight = p.weight + (u64)min(expert + group, p.experts - 1) * row_bytes;
  float even[4] = {}, odd[4] = {};
#pragma unroll 4
  for (int block = warp * 32; block < p.hidden; block += 32 * WARPS) {
    const int feature = block + quad * 8;
    const uint4 a = load(upper, feature, p.hidden), b = load(lower, feature, p.hidden);
    const uint4 w = load(weight, feature, p.hidden);
    multiply<ELEMENT>(even, a.x, b.x, a.y, b.y, w.x, w.y);
    multiply<ELEMENT>(odd, a.z, b.z, a.w, b.w, w.z, w.w);
  }
  float* mine = partial[warp] + group * EXPERTS + 2 * quad;
  mine[0] = even[0] + odd[0], mine[1] = even[1] + odd[1];
  mine[8 * EXPERTS] = even[2] + odd[2], mine[8 * EXPERTS + 1] = even[3] + odd[3];
  __syncthreads();
  const int i = threadIdx.x;
  if (i >= TOKENS * EXPERTS) return;
  const int t = token + i / EXPERTS, e = expert + i % EXPERTS;
  if (t >= p.tokens || e >= p.experts) return;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += partial[w][i];
  if (p.bias) sum += ELEMENT::low(__ldg(p.bias + e));
  p.out[(u64)t * p.experts + e] = sum;
}
