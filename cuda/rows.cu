// Small kernels of the backward pass that go over rows or slots once.
//   row_values       token and router weight of every row, from those of the slots
//   score_gradient   dS of every slot: the sum of its row's partial sums (dh.cu), plus <dO_t, b_down[e]>
//   bias_gradient    db[e] = sum over the expert's rows of s_r * source row
// No atomics: every sum has a fixed order.
//
// Macros: ELEMENT.
#include "base.cuh"

constexpr int THREADS = 256;

struct RowParams {
  const int* order;     // row -> slot
  const float* scores;  // [T, K], or null for ones
  int* row_token;       // [S]
  float* row_score;     // [S]
  int slots, top_k;
};

extern "C" __global__ void __launch_bounds__(THREADS) row_values(const __grid_constant__ RowParams p) {
  const int row = blockIdx.x * 256 + threadIdx.x;
  if (row >= p.slots) return;
  const int slot = __ldg(p.order + row);
  p.row_token[row] = slot / p.top_k;
  p.row_score[row] = p.scores ? __ldg(p.scores + slot) : 1.0f;
}

struct ScoreParams {
  const float* partials;  // [S, columns]
  const int* inverse;     // slot -> row
  const int* offsets;     // [E + 1]
  const u8* dout;         // [T, H]
  const u8* bias;         // [E, H], or null
  float* out;             // [T, K]
  int slots, top_k, experts, columns, hidden;
};

// The expert whose rows include `row`: the last one that begins at or before it and is not empty.
DEVICE int expert_of(const int* offsets, int experts, int row) {
  int low = 0, high = experts;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (__ldg(offsets + middle) <= row)
      low = middle;
    else
      high = middle;
  }
  return low;
}

DEVICE float dot_of_words(u32 a, u32 b, float sum) {
  return fmaf(ELEMENT::high(a), ELEMENT::high(b), fmaf(ELEMENT::low(a), ELEMENT::low(b), sum));
}

// Without a bias a thread has a slot; with one, a warp has it.
extern "C" __global__ void __launch_bounds__(THREADS) score_gradient(const __grid_constant__ ScoreParams p) {
  const int slot = p.bias ? blockIdx.x * 8 + threadIdx.x / 32 : blockIdx.x * 256 + threadIdx.x, lane = threadIdx.x & 31;
  if (slot >= p.slots) return;
  const int row = __ldg(p.inverse + slot);
  const bool real = row < __ldg(p.offsets + p.experts);
  float sum = 0.0f;
  if (real) {
    if (p.bias) {
      const u64 pitch = (u64)p.hidden * 2;
      const u8* x = p.dout + (u64)(slot / p.top_k) * pitch;
      const u8* b = p.bias + (u64)expert_of(p.offsets, p.experts, row) * pitch;
      for (u64 byte = lane * 16; byte < pitch; byte += 512) {
        const uint4 v = __ldg((const uint4*)(x + byte)), w = __ldg((const uint4*)(b + byte));
        sum = dot_of_words(v.w, w.w, dot_of_words(v.z, w.z, dot_of_words(v.y, w.y, dot_of_words(v.x, w.x, sum))));
      }
      sum = sum_of_warp(sum);
    }
    for (int i = 0; i < p.columns; i++) sum += __ldg(p.partials + (u64)row * p.columns + i);
  }
  if (!p.bias || lane == 0) p.out[slot] = sum;
}

struct BiasParams {
  const u8* source;        // [S, N], or [T, N] with row_token
  const int* row_token;    // [S], or null
  const float* row_score;  // [S], or null for ones
  const int* offsets;      // [E + 1]
  u8* out;                 // [E, N]
  int features, columns;   // columns: ceil(N / 64)
};

// A block sums 64 features of an expert: thread (row lane, chunk) has 8 features of every 32nd row, so that eight
// threads read 128 bytes of a row. The 32 row lanes are then added, within warps first, then over the warps.
extern "C" __global__ void __launch_bounds__(THREADS) bias_gradient(const __grid_constant__ BiasParams p) {
  __shared__ float warps[8][64];
  const int expert = blockIdx.x / p.columns, column = blockIdx.x % p.columns;
  const int chunk = threadIdx.x & 7, feature = column * 64 + chunk * 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int end = __ldg(p.offsets + expert + 1);
  float sum[8] = {};
  if (feature < p.features) {
#pragma unroll 4
    for (int row = __ldg(p.offsets + expert) + (threadIdx.x >> 3); row < end; row += 32) {
      const u32 from = p.row_token ? __ldg(p.row_token + row) : row;
      const float score = p.row_score ? __ldg(p.row_score + row) : 1.0f;
      const uint4 v = __ldg((const uint4*)(p.source + ((u64)from * (u32)p.features + feature) * 2));
      const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[2 * i] = fmaf(score, ELEMENT::low(word[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(score, ELEMENT::high(word[i]), sum[2 * i + 1]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 8);
    sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 16);
    if (lane < 8) warps[warp][chunk * 8 + i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x < 8 && feature < p.features) {
    float total[8] = {};
#pragma unroll
    for (int w = 0; w < 8; w++)
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] += warps[w][chunk * 8 + i];
    store_global(p.out + ((u64)expert * p.features + feature) * 2,
                 make_uint4(ELEMENT::pack(total[0], total[1]), ELEMENT::pack(total[2], total[3]),
                            ELEMENT::pack(total[4], total[5]), ELEMENT::pack(total[6], total[7])));
  }
}
