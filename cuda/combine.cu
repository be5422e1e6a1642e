// out[t] = sum over k of scores[t, k] * rows[inverse[t, k]]: fp32, k ascending, no atomics. The end of the forward pass
// (rows of the down projection) and, with scores of one, of the input gradient.
//
// A warp takes 32 vectors of a token, 256 features of 16 bits: 16 bytes a lane and row, eight rows in flight (a token's
// K rows in batches of eight, or 8 / K tokens at once where K < 8), so that a block of 8 warps keeps 32 KB moving. Rows
// past offsets[E] belong to sentinels: never read, zero.
//
// Macros: ELEMENT (Bf16, F16, F32), VECTOR (bytes: vectors.cuh), TOP_K (1, 2, 4, 8, or 0 for any).
#include "vectors.cuh"

constexpr int THREADS = 256;

struct Params {
  const u8* rows;       // [S, H]
  const int* inverse;   // slot -> row
  const int* offsets;   // [E + 1]
  const float* scores;  // [T, K], or null for ones
  u8* out;              // [T, H]
  int tokens, hidden, top_k, experts;
};

constexpr int IN_FLIGHT = 8;

typedef Elements<ELEMENT, VECTOR> Values;

DEVICE void add_scaled(float (&sum)[Values::COUNT], float score, const Vector<VECTOR>& v) {
#pragma unroll
  for (int i = 0; i < Values::COUNT; i++) sum[i] = fmaf(score, Values::at(v, i), sum[i]);
}

DEVICE u64 pitch_of(const Params& p) { return (u64)(p.hidden * Values::SIZE); }

// Lane l holds the row and the score of slot first + l, for l < count; -1 and 0 where there is none.
struct Slots {
  int row;
  float score;

  DEVICE Slots(const Params& p, u64 first, int count, u32 lane, int end) {
    const bool exists = (int)lane < count;
    row = exists ? __ldg(p.inverse + first + lane) : -1;
    score = exists && p.scores ? __ldg(p.scores + first + lane) : 1.0f;
    if (row >= end) row = -1, score = 0.0f;  // NaN times the zeros that stand for the row would be NaN
  }
};

DEVICE Vector<VECTOR> load_row(const Params& p, int row, u64 byte, bool inside) {
  return row >= 0 && inside ? Vector<VECTOR>::load(p.rows + (u64)(u32)row * pitch_of(p) + byte) : Vector<VECTOR>{};
}

extern "C" __global__ void __launch_bounds__(THREADS, TOP_K ? 4 : 3) combine(const __grid_constant__ Params p) {
  const u32 lane = threadIdx.x & 31;
  const int slices = (p.hidden + 32 * Values::COUNT - 1) / (32 * Values::COUNT), end = __ldg(p.offsets + p.experts);
  constexpr int TOKENS = TOP_K ? IN_FLIGHT / TOP_K : 1;  // of a warp at once
  const u64 units = (u64)((p.tokens + TOKENS - 1) / TOKENS) * slices;
  for (u64 unit = (u64)blockIdx.x * 8 + threadIdx.x / 32; unit < units; unit += (u64)gridDim.x * 8) {
    const u64 token = unit / slices * TOKENS;
    const int feature = (int)(unit % slices) * 32 * Values::COUNT + lane * Values::COUNT;
    const bool inside = feature < p.hidden;
    const u64 byte = (u64)feature * Values::SIZE;
    u8* target = p.out + token * pitch_of(p) + byte;
    if constexpr (TOP_K != 0) {
      const int here = (int)min((u64)TOKENS, (u64)p.tokens - token);
      const Slots slots(p, token * TOP_K, here * TOP_K, lane, end);
      Vector<VECTOR> v[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; i++) v[i] = load_row(p, __shfl_sync(ALL_LANES, slots.row, i), byte, inside);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float sum[Values::COUNT] = {};
#pragma unroll
        for (int k = 0; k < TOP_K; k++)
          add_scaled(sum, __shfl_sync(ALL_LANES, slots.score, t * TOP_K + k), v[t * TOP_K + k]);
        if (t < here && inside) Values::narrow(sum).store(target + (u64)t * pitch_of(p));
      }
    } else {
      float sum[Values::COUNT] = {};
      for (int first = 0; first < p.top_k; first += IN_FLIGHT) {
        const Slots slots(p, token * p.top_k + first, min(IN_FLIGHT, p.top_k - first), lane, end);
        Vector<VECTOR> v[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) v[i] = load_row(p, __shfl_sync(ALL_LANES, slots.row, i), byte, inside);
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
          const float score = __shfl_sync(ALL_LANES, slots.score, i);
          if (first + i < p.top_k) add_scaled(sum, score, v[i]);
        }
      }
      if (inside) Values::narrow(sum).store(target);
    }
  }
}
