// The gradient of a router's logits, from that of the weights it chose (route.cu), plus one that comes from elsewhere,
// such as a balancing loss. Rounded to the type in which the router's two products follow.
//
// A warp takes a token. Lane k holds the choices k and k + 32; the logits of all experts are gone through 32 at a time.
//
// Macros: ELEMENT.
#include "base.cuh"

struct Params {
  const float* logits;     // [T, E]
  const int* ids;          // [T, K]
  const float* weights;    // [T, K]
  const float* dweights;   // [T, K], or null
  const float* elsewhere;  // [T, E], or null
  u8* out;                 // [T, E]
  int tokens, experts, top_k;
  int formula;     // 0 softmax of the chosen, 1 softmax of all, 2 sigmoid, 3 root of softplus
  int normalised;  // 2, 3: weights were divided by their sum
  float scale;
};

constexpr int TOKENS = 8;  // of a block, a warp each
constexpr int THREADS = 32 * TOKENS;
constexpr int HELD = 2;  // choices of a lane

DEVICE float largest_of_warp(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

// A score of formula 2 or 3, and its derivative.
DEVICE float score(int formula, float logit, float& slope) {
  const float sigmoid = 1.0f / (1.0f + expf(-logit));
  if (formula == 2) {
    slope = sigmoid * (1.0f - sigmoid);
    return sigmoid;
  }
  const float root = sqrtf(logit > 20.0f ? logit : log1pf(expf(logit)));
  slope = (logit > 20.0f ? 1.0f : sigmoid) * 0.5f / root;
  return root;
}

extern "C" __global__ void __launch_bounds__(THREADS) route_backward(const __grid_constant__ Params p) {
  extern __shared__ float chosen[];  // of every token: the gradients of the chosen logits, zero elsewhere
  const int lane = threadIdx.x & 31;
  const long long token = (long long)blockIdx.x * TOKENS + threadIdx.x / 32;
  if (token >= p.tokens) return;
  const float* logits = p.logits + token * p.experts;
  float* mine = chosen + threadIdx.x / 32 * p.experts;
  for (int e = lane; e < p.experts; e += 32) mine[e] = 0;
  __syncwarp();

  int expert[HELD];
  float weight[HELD], gradient[HELD], weighted = 0;  // the sum over the chosen of weight times gradient
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int k = i * 32 + lane;
    const bool exists = p.dweights && k < p.top_k;
    expert[i] = exists ? __ldg(p.ids + token * p.top_k + k) : -1;
    weight[i] = exists ? __ldg(p.weights + token * p.top_k + k) : 0.0f;
    gradient[i] = exists ? __ldg(p.dweights + token * p.top_k + k) : 0.0f;
    weighted += weight[i] * gradient[i];
  }
  weighted = sum_of_warp(weighted);

  float shared_by_all = 0, largest = 0;  // formula 1: every logit's share of the softmax takes from the others'
  if (p.formula <= 1) {
    // With w = scale * softmax: dl = w * dw - softmax * sum of w * dw, the latter for all logits that are in the
    // softmax.
#pragma unroll
    for (int i = 0; i < HELD; i++)
      if (expert[i] >= 0)
        mine[expert[i]] = weight[i] * gradient[i] - (p.formula == 0 ? weight[i] / p.scale * weighted : 0.0f);
    if (p.formula == 1 && p.dweights) {
      largest = -__int_as_float(0x7f800000);
      for (int e = lane; e < p.experts; e += 32) largest = fmaxf(largest, __ldg(logits + e));
      largest = largest_of_warp(largest);
      float sum = 0;
      for (int e = lane; e < p.experts; e += 32) sum += expf(__ldg(logits + e) - largest);
      shared_by_all = weighted / sum_of_warp(sum);
    }
  } else {
    float value[HELD], slope[HELD], sum = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      value[i] = slope[i] = 0;
      if (expert[i] >= 0) value[i] = score(p.formula, __ldg(logits + expert[i]), slope[i]);
      sum += value[i];
    }
    sum = sum_of_warp(sum) + 1e-20f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      // With w = scale * v / sum: dv = (scale * dw - sum of w * dw) / sum.
      const float dvalue = p.normalised ? (p.scale * gradient[i] - weighted) / sum : p.scale * gradient[i];
      if (expert[i] >= 0) mine[expert[i]] = dvalue * slope[i];
    }
  }
  __syncwarp();
  for (int e = lane; e < p.experts; e += 32) {
    float total = mine[e];
    if (p.formula == 1 && p.dweights) total -= expf(__ldg(logits + e) - largest) * shared_by_all;
    if (p.elsewhere) total += __ldg(p.elsewhere + token * p.experts + e);
    *(u16*)(p.out + 2 * (token * p.experts + e)) = (u16)ELEMENT::pack(total, 0.0f);
  }
}
