// What the backward pass needs of the activation chosen by ACTIVATION: its value and its slopes, from the
// pre-activation.
#pragma once
#include "activation.cuh"

struct Slopes {
  float value, gate, up;  // a, da/dg, da/du
};

DEVICE float sigmoid_slope(float g) {  // derivative of sigmoid_argument
  if (ACTIVATION == 4) return OAI_SLOPE;
  if (ACTIVATION == 2 || ACTIVATION == 7) return 1.5957691216057308f * fmaf(3.0f * 0.044715f * g, g, 1.0f);
  return 1.0f;
}

// The nonlinearity f(g) and f'(g); the activation is f(g) times linear_factor(u).
DEVICE void nonlinearity(float g, float& f, float& slope) {
  if constexpr (BY_SIGMOID) {  // f = g q, f' = q + g q (1 - q) z'
    const float q = reciprocal_fast(1.0f + exp2_fast(-LOG2_E * sigmoid_argument(g)));
    f = g * q;
    slope = fmaf(fmaf(-f, q, f), sigmoid_slope(g), q);
  } else if constexpr (ACTIVATION == 1 || ACTIVATION == 6) {  // f = g cdf(g), f' = cdf(g) + g pdf(g)
    const float cdf = fmaf(0.5f, erff(g * 0.70710678118654752f), 0.5f);
    f = g * cdf;
    slope = fmaf(g * 0.39894228040143268f, exp2_fast(-0.5f * LOG2_E * g * g), cdf);
  } else {
    const float positive = max_or_nan(g, 0.0f);
    f = ACTIVATION == 9 ? positive * positive : positive;
    slope = ACTIVATION == 9 ? 2.0f * positive : g > 0.0f ? 1.0f : 0.0f;
  }
}

// A value held at a bound is a constant: slope zero outside and, as in torch.clamp from 2.14 on, at the bound itself.
// That is no rare place: in bfloat16 all from 6.984 to 7.016 rounds to 7.
DEVICE Slopes slopes(float g, float u) {
  float f, slope;
  nonlinearity(bounded_gate(g), f, slope);
  const float factor = linear_factor(u);
  const bool gate_free = ACTIVATION != 4 || g < OAI_BOUND, up_free = ACTIVATION != 4 || fabsf(u) < OAI_BOUND;
  return {f * factor, gate_free ? slope * factor : 0.0f, up_free ? f : 0.0f};
}
