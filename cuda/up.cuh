// What both forms of the up projection share: the tile of the weights, the gather of token rows, the parameters.
//
// A cluster of two blocks computes 256 weight rows x up to 272 rows of one expert, or 288, split along the *rows*: each
// block multiplies all 256 weight rows with its own at most 136 rows, or 144, loads half of the weights and multicasts
// it, and gathers its own rows of x with cp.async (the copy engine cannot gather rows on Hopper).
//
// Weight rows of a tile, as four blocks of 64 (BLOCK_BYTES each); consumer warpgroup w multiplies blocks 2w and 2w + 1:
//   gated, halves        features f … f + 127: gate rows of f + 64 w, up rows of f + 64 w. The accumulators of a thread
//                        then hold gate and up of the same feature and token.
//   gated, interleaved   256 consecutive rows g u g u … of 128 features
//   plain                256 consecutive rows of 256 features
//
// Macros: ELEMENT, ACTIVATION (activation.cuh), TRANSPOSED (weights [E, H, rows]), INTERLEAVED, BIAS, SAVE (the
// pre-activation is stored), TILE_ROWS (272, or 288 where that spares most experts a second tile).
#pragma once
#include "activation.cuh"
#include "epilogue.cuh"

constexpr bool HALVES = GATED && !INTERLEAVED;
constexpr int FEATURES = GATED ? 128 : 256;  // of the activation, in a tile
constexpr int ROWS = TILE_ROWS / 2;          // of a block
constexpr u32 WEIGHT_BYTES = 256 * 128;
constexpr u32 STAGE_BYTES = WEIGHT_BYTES + ROWS * 128;
constexpr u32 FULL_ARRIVALS = 128 + 1;  // 128 gathering threads, one for the weights' bytes

struct Params {
  const int4* table;
  int* counter;
  const u8* x;       // [T, H]
  const int* order;  // row -> slot
  u8* activated;     // [S, I]
  const u16* bias;   // [E, weight rows], or null
  int columns;       // feature tiles: ceil(I / FEATURES)
  int hidden, inter, top_k;
  u8* pre;  // [S, weight rows], or null
};

template <int Stages> struct UpShape {
  typedef ELEMENT Element;
  static constexpr int STAGES = Stages;
  static constexpr u32 STAGE_BYTES = ::STAGE_BYTES, B_OFFSET = WEIGHT_BYTES;
  static constexpr int BLOCKS = 2, WIDTH = ROWS, NARROWEST = 16;
  // 16, 32, 48, 64, 72, 80 … 136: an expert split over several tiles has 72 rows a block and more.
  static DEVICE constexpr int wider(int n) { return n < 64 ? n + 16 : n + 8; }
  static constexpr bool A_MN_MAJOR = TRANSPOSED, B_MN_MAJOR = false, GATHERED = true;
};

// One thread: this block's half of the weights of 64 k, to both blocks.
DEVICE void load_weights(u32 stage, const TensorMap* map, u32 barrier, const Share& own, int k, u32 rank) {
  barrier_arrive_expect(barrier, WEIGHT_BYTES);
  const u32 target = stage + rank * 2 * BLOCK_BYTES;
  if constexpr (HALVES) {  // box: 64 gate rows, then 64 up rows
    const int feature = own.feature + rank * 64;
    if constexpr (TRANSPOSED)
      tma_multicast_4d(target, map, barrier, feature, k, 0, own.expert);
    else
      tma_multicast_4d(target, map, barrier, k, feature, 0, own.expert);
  } else {
    const int row = own.feature * (GATED ? 2 : 1) + rank * 128;
    if constexpr (TRANSPOSED) {
      tma_multicast_3d(target, map, barrier, row, k, own.expert);
      tma_multicast_3d(target + BLOCK_BYTES, map, barrier, row + 64, k, own.expert);
    } else {
      tma_multicast_3d(target, map, barrier, k, row, own.expert);
    }
  }
}

// The gathering warpgroup; where LoadsWeights, thread 0 starts the weights' copies too.
//
// A thread copies 16-byte chunk `chunk` of the rows first + 16 i: eight lanes read 128 consecutive bytes of a token.
// Rows past the tile's last repeat it: their columns are never stored, so they need no zeros. The pointers of a tile
// are made before its first stage is waited for and advance in place (see copy_rows). Each is made by one wide
// multiply-add, base + 16 * a 32-bit number, which reaches 64 GiB: pointers from 64-bit arithmetic end up in halves
// that every copy has to move together again. Rows leave in groups of 48, as many as hold the width.
template <class Shape, bool LoadsWeights>
DEVICE void gather_rows(const Params& p, const TensorMap* weights, Pipeline pipe, TileReader tiles, u32 rank) {
  constexpr int STEPS = (ROWS + 15) / 16, STRIDE = 16, GROUP = 3;
  static_assert(STEPS == 3 * GROUP);
  const int chunk = threadIdx.x & 7, first = threadIdx.x >> 3;
  const u32 inside = WEIGHT_BYTES + swizzled(first, chunk);
  const int whole_blocks = p.hidden / 64, k_blocks = (p.hidden + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    const Share own = share_of(tile, rank, FEATURES);
    const int any_row = own.rows > 0 ? own.row : tile.row;
    const u8* row[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int r = min(first + i * STRIDE, max(own.rows - 1, 0));
      const u32 token = (u32)__ldg(p.order + any_row + r) / (u32)p.top_k;
      row[i] = p.x + (u64)(token * (u32)(p.hidden / 8) + chunk) * 16;
    }
    for (int block = 0; block < k_blocks; block++) {
      pipe.wait_empty();
      const u32 stage = pipe.address<Shape>(), full = pipe.full_barrier(), to = stage + inside;
      if (block < whole_blocks) {
#pragma unroll
        for (int i = 0; i + GROUP < STEPS; i += GROUP)
          if (own.width > i * STRIDE)
            copy_rows(to + i * 2048, to + (i + 1) * 2048, to + (i + 2) * 2048, row[i], row[i + 1], row[i + 2]);
        if (own.width > 6 * STRIDE) {
          copy_rows(to + 6 * 2048, to + 7 * 2048, row[6], row[7]);
          if (first < ROWS - 8 * STRIDE) copy_16(to + 8 * 2048, row[8]);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) row[i] += 128;
      } else {  // the last k-block of an H that is no multiple of 64: zeros, whatever follows the row in memory
        const bool exists = block * 64 + chunk * 8 < p.hidden;  // H is a multiple of 8: a chunk is in or out
#pragma unroll
        for (int i = 0; i < STEPS; i++)
          if (first + i * STRIDE < own.width) copy_16_or_zero(to + i * 2048, exists ? row[i] : p.x, exists ? 16 : 0);
      }
      if (LoadsWeights && threadIdx.x == 0) load_weights(stage, weights, full, own, block * 64, rank);
      barrier_arrive_after_copies(full);
      pipe.advance<Shape>();
    }
  }
}

// The biases of the two feature rows a consumer thread holds in each of its two m64 tiles.
struct BiasRows {
  float value[2][2];

  DEVICE void load(const Params& p, const Share& own, u32 warpgroup, u32 warp, u32 lane) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int in_block = warp * 16 + lane / 4 + half * 8;
        const int rows = p.inter * (GATED ? 2 : 1);
        int row;
        bool inside;
        if constexpr (HALVES) {
          const int feature = own.feature + warpgroup * 64 + in_block;
          inside = feature < p.inter;
          row = m * p.inter + feature;
        } else {
          row = own.feature * (GATED ? 2 : 1) + (warpgroup * 2 + m) * 64 + in_block;
          inside = row < rows;
        }
        value[m][half] = bias_of(p.bias, own.expert, rows, row, inside);
      }
  }
};
