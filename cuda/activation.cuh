// The activations, by the codes of moekern/backends/activations.py: 0 swiglu, 1 geglu (erf), 2 geglu_tanh, 3 reglu, 4
// swiglu_oai (gpt-oss), 5 silu, 6 gelu (erf), 7 gelu_tanh, 8 relu, 9 relu2. Codes below 5 are gated: they read gate and
// up. ACTIVATION selects one at compile time.
#pragma once
#include "base.cuh"

constexpr bool GATED = ACTIVATION < 5;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float OAI_SLOPE = 1.702f, OAI_BOUND = 7.0f;

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The smaller and the larger one, and NaN where either is: fminf and fmaxf give the other one, which would hide it.
DEVICE float min_or_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// What the sigmoid of this activation is taken of; the activation is then slope * value, or value * up, of it.
DEVICE float sigmoid_argument(float g) {
  if (ACTIVATION == 4) return OAI_SLOPE * g;
  if (ACTIVATION == 2 || ACTIVATION == 7)  // gelu_tanh(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    return 1.5957691216057308f * (g + 0.044715f * g * g * g);
  return g;
}

constexpr bool BY_SIGMOID = ACTIVATION == 0 || ACTIVATION == 2 || ACTIVATION == 4 || ACTIVATION == 5 || ACTIVATION == 7;

DEVICE float bounded_gate(float g) { return ACTIVATION == 4 ? min_or_nan(g, OAI_BOUND) : g; }

// The factor beside the nonlinearity of the gate.
DEVICE float linear_factor(float u) {
  if (!GATED) return 1.0f;
  if (ACTIVATION == 4) return min_or_nan(max_or_nan(u, -OAI_BOUND), OAI_BOUND) + 1.0f;
  return u;
}

// Two activations at once. Those by a sigmoid share one reciprocal, 1 / (a b): three special-function operations for
// two outputs. The exponent is bounded at 62 so that the product cannot overflow, and so that a NaN stays out of its
// neighbour; sigmoid(-43) is then 2^-62 instead of 0.
DEVICE void activate_two(float g0, float u0, float g1, float u1, float& first, float& second) {
  g0 = bounded_gate(g0), g1 = bounded_gate(g1);
  const float f0 = linear_factor(u0), f1 = linear_factor(u1);
  if constexpr (BY_SIGMOID) {
    const float a = 1.0f + exp2_fast(fminf(-LOG2_E * sigmoid_argument(g0), 62.0f));
    const float b = 1.0f + exp2_fast(fminf(-LOG2_E * sigmoid_argument(g1), 62.0f));
    const float r = reciprocal_fast(a * b);
    first = g0 * f0 * (b * r), second = g1 * f1 * (a * r);
  } else if constexpr (ACTIVATION == 1 || ACTIVATION == 6) {
    first = 0.5f * g0 * (1.0f + erff(g0 * 0.70710678118654752f)) * f0;
    second = 0.5f * g1 * (1.0f + erff(g1 * 0.70710678118654752f)) * f1;
  } else {
    g0 = max_or_nan(g0, 0.0f), g1 = max_or_nan(g1, 0.0f);
    first = ACTIVATION == 9 ? g0 * g0 : g0 * f0;
    second = ACTIVATION == 9 ? g1 * g1 : g1 * f1;
  }
}

// Packed pairs: two gates and two ups give two activations.
template <class Element> DEVICE u32 activate_packed(u32 gates, u32 ups) {
  float first, second;
  activate_two(Element::low(gates), Element::low(ups), Element::high(gates), Element::high(ups), first, second);
  return Element::pack(first, second);
}

// Interleaved columns g0 u0 | g1 u1.
template <class Element> DEVICE u32 activate_interleaved(u32 pair0, u32 pair1) {
  float first, second;
  activate_two(Element::low(pair0), Element::high(pair0), Element::low(pair1), Element::high(pair1), first, second);
  return Element::pack(first, second);
}
