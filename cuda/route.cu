// A token's experts and their weights from its router logits: the K largest, the lowest index first among equals, as
// moekern.route chooses them, and their weights by its formulas, all in fp32.
//
// A warp takes a token and keeps its logits in registers as integers that order like floats (NaN above everything, as
// torch sorts it; the two zeros equal). K times: every lane finds its best, five exchanges find the warp's.
//
// Macros: PER_LANE, logits a lane holds: E is at most 32 * PER_LANE.
#include "base.cuh"

struct Params {
  const float* logits;  // [T, E]
  int* ids;             // [T, K]
  float* weights;       // [T, K]
  int tokens, experts, top_k;
  int formula;     // 0 softmax of the chosen, 1 softmax of all, 2 sigmoid, 3 root of softplus
  int normalised;  // 2, 3: weights are divided by their sum
  float scale;
};

constexpr int TOKENS = 8;  // of a block, a warp each
constexpr int THREADS = 32 * TOKENS;
constexpr int MOST_TOP_K = 64;

DEVICE u32 ordered(float value) {
  if (value != value) return 0xffffffffu;
  const u32 bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

DEVICE float score(const Params& p, float logit, float largest) {
  if (p.formula == 2) return 1.0f / (1.0f + expf(-logit));
  if (p.formula == 3) return sqrtf(logit > 20.0f ? logit : log1pf(expf(logit)));
  return expf(logit - largest);
}

extern "C" __global__ void __launch_bounds__(THREADS) route(const __grid_constant__ Params p) {
  const int lane = threadIdx.x & 31;
  const long long token = (long long)blockIdx.x * TOKENS + threadIdx.x / 32;
  if (token >= p.tokens) return;
  const float* logits = p.logits + token * p.experts;
  u32 key[PER_LANE];  // 0, below every number, for none
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int expert = i * 32 + lane;
    key[i] = expert < p.experts ? ordered(__ldg(logits + expert)) : 0;
  }

  // Lane k holds the choices k and k + 32.
  int expert[MOST_TOP_K / 32] = {};
  u32 chosen[MOST_TOP_K / 32] = {};
  for (int k = 0; k < p.top_k; k++) {
    u32 best = 0;
    int index = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (key[i] > best) best = key[i], index = i * 32 + lane;
#pragma unroll
    for (int step = 16; step; step /= 2) {
      const u32 other = __shfl_xor_sync(ALL_LANES, best, step);
      const int other_index = __shfl_xor_sync(ALL_LANES, index, step);
      if (other > best || (other == best && other_index < index)) best = other, index = other_index;
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (index == i * 32 + lane) key[i] = 0;
#pragma unroll
    for (int i = 0; i < MOST_TOP_K / 32; i++)
      if (k == i * 32 + lane) expert[i] = index, chosen[i] = best;
  }

  const float largest = value_of(__shfl_sync(ALL_LANES, chosen[0], 0));
  float weight[MOST_TOP_K / 32], sum = 0;
#pragma unroll
  for (int i = 0; i < MOST_TOP_K / 32; i++) {
    weight[i] = i * 32 + lane < p.top_k ? score(p, value_of(chosen[i]), largest) : 0.0f;
    sum += weight[i];
  }
  float divisor = 1;
  if (p.formula == 0) divisor = sum_of_warp(sum);
  if (p.formula >= 2 && p.normalised) divisor = sum_of_warp(sum) + 1e-20f;
  if (p.formula == 1) {  // the others' share too: what the loop left of their keys
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (key[i]) sum += expf(value_of(key[i]) - largest);
    divisor = sum_of_warp(sum);
  }
#pragma unroll
  for (int i = 0; i < MOST_TOP_K / 32; i++) {
    const int k = i * 32 + lane;
    if (k < p.top_k) {
      p.ids[token * p.top_k + k] = expert[i];
      p.weights[token * p.top_k + k] = weight[i] / divisor * p.scale;
    }
  }
}
