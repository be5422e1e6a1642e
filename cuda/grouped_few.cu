// Grouped GEMM over contiguous rows where experts have few of them: what grouped_mm.cu computes, in tiles of up to 288 rows,
// so that an expert with somewhat more than 256 rows is one tile and its weights pass once.
//
// A cluster of two blocks computes 256 features x up to 288 rows of one expert, split along the *rows*: each block multiplies
// all 256 weight rows with its own at most 144 rows, loads half of the weights and multicasts it.
//
// 384 threads, one block an SM. Roles, and the registers they keep (56 + 2 * 224 = 3 * 168, the launch's share):
//   warpgroup 0   56   warp 0: one thread starts all copies; warp 1: one thread of block 0 draws tickets
//   warpgroup 1,2 224  consumers of 128 features x 144 rows: multiply, round, store
//
// Barriers              arrivals                               completes when
//   full[stage]         1 + the stage's bytes                  the stage holds weights and rows
//   empty[stage]        4 (2 consumer warpgroups x 2 blocks)   both blocks have multiplied it
//   begun               1                                      the copies of another tile have begun: draw the next
//   ring[16]            1 + 16 bytes                           a tile was drawn (tickets.cuh)
//
// Shared memory: 4 stages of 51200, for each consumer warpgroup [96 rows][64 features] to store from, then barriers. The
// threads store: the copy engine would have to be waited for at every part of a tile.
//
// Macros: ELEMENT, TRANSPOSED (weights [E, k, features]), BIAS.
#include "mainloop.cuh"
#include "tickets.cuh"

constexpr int FEATURES = 256, ROWS = 144;  // of a block
constexpr u32 WEIGHT_BYTES = FEATURES * 128;
constexpr u32 BLOCK_BYTES = 8192;
constexpr int BOX_ROWS = 64, TAIL_ROWS = 16;  // rows come in boxes of the one, the last of a tile in boxes of the other

struct Params {
  const int4* table;
  int* counter;
  const u16* bias;   // [E, features], or null
  u8* out;           // [rows, features]
  int columns;       // feature tiles: ceil(features / 256)
  int inner;         // k
  int features, unused;
};
static_assert(sizeof(Params) == 48, "filled by the launcher");

struct Shape {
  typedef ELEMENT Element;
  static constexpr int STAGES = 4;
  static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + ROWS * 128, B_OFFSET = WEIGHT_BYTES;
  static constexpr int BLOCKS = 2, WIDTH = ROWS, NARROWEST = 16;
  static DEVICE constexpr int wider(int n) { return n < 64 ? n + 16 : n + 8; }
  static constexpr bool A_MN_MAJOR = TRANSPOSED, B_MN_MAJOR = false, GATHERED = false;
};

constexpr int STORE_ROWS = 96;
constexpr u32 STORE_BYTES = STORE_ROWS * 128;  // of a consumer warpgroup: [rows][64 features]
constexpr u32 STORES = Shape::STAGES * Shape::STAGE_BYTES, BARRIERS = STORES + 2 * STORE_BYTES;
constexpr u32 FULL = BARRIERS, EMPTY = FULL + Shape::STAGES * 8, BEGUN = EMPTY + Shape::STAGES * 8;
constexpr u32 RING_AT = (BEGUN + 8 + 15) / 16 * 16;
static_assert(RING_AT + RING_BYTES + 1024 <= SHARED_BYTES, "the launch reserves SHARED_BYTES");

// A cluster's tile as one of its blocks sees it: half of the rows, in multiples of 8. Both blocks multiply the same width; the
// second may own no row.
struct Share {
  int row, rows, width;
};
DEVICE Share share_of(const Tile& tile, u32 rank) {
  const int width = ((tile.rows + 1) / 2 + 7) & ~7, before = (int)rank * width;
  return {tile.row + before, min(max(tile.rows - before, 0), width), width};
}

// One thread of each block.
DEVICE void load(const Params& p, const TensorMap* weights, const TensorMap* rows, const TensorMap* few_rows, Pipeline pipe,
                 TileReader tiles, u32 rank, u32 begun) {
  const int k_blocks = (p.inner + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    if (rank == 0) barrier_arrive(begun);
    const Share own = share_of(tile, rank);
    const int loaded = (own.rows + TAIL_ROWS - 1) / TAIL_ROWS * TAIL_ROWS;
    const u32 bytes = WEIGHT_BYTES + loaded * 128;
    const int feature = tile.column * FEATURES + rank * 128;
    for (int block = 0; block < k_blocks; block++) {
      pipe.wait_empty();
      const u32 stage = pipe.address<Shape>(), full = pipe.full_barrier(), target = stage + WEIGHT_BYTES;
      const u32 own_weights = stage + rank * 2 * BLOCK_BYTES;
      const int k = block * 64;
      barrier_arrive_expect(full, bytes);
      if constexpr (TRANSPOSED) {
        tma_multicast_3d(own_weights, weights, full, feature, k, tile.expert);
        tma_multicast_3d(own_weights + BLOCK_BYTES, weights, full, feature + 64, k, tile.expert);
      } else {
        tma_multicast_3d(own_weights, weights, full, k, feature, tile.expert);
      }
      // Rows beyond the block's share are the next ones, or zeros past the tensor's end: columns that are never stored.
      int row = 0;
      for (; row + BOX_ROWS <= loaded; row += BOX_ROWS) tma_load_2d(target + row * 128, rows, full, k, own.row + row);
      for (; row < loaded; row += TAIL_ROWS) tma_load_2d(target + row * 128, few_rows, full, k, own.row + row);
      pipe.advance<Shape>();
    }
  }
}

DEVICE float bias_of(const Params& p, int expert, int feature) {
  return BIAS && feature < p.features ? ELEMENT::low(__ldg(p.bias + (u64)expert * p.features + feature)) : 0.0f;
}

// What the warpgroup has put into the buffer, rows first … of its share: a warp stores every fourth group of four rows, eight
// lanes a row.
DEVICE void store_by_threads(const Params& p, u32 buffer, int first, const Share& own, int feature, u32 warp, u32 lane) {
  const u32 chunk = lane & 7, line = warp * 4 + lane / 8, pitch = p.features * 2;
  if (feature + (int)chunk * 8 >= p.features) return;
  u8* target = p.out + (u64)(u32)(own.row + first + (int)line) * pitch + (u32)(feature + (int)chunk * 8) * 2;
#pragma unroll
  for (int row = 0; row < STORE_ROWS; row += 16)
    if (first + row + (int)line < own.rows) store_global(target + (u64)((u32)row * pitch), load_shared(buffer + swizzled(row + line, chunk)));
}

DEVICE void consume(const Params& p, Pipeline pipe, TileReader tiles, u32 rank, u32 warpgroup, u32 stores) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, buffer = stores + warpgroup * STORE_BYTES;
  const int k_blocks = (p.inner + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    const Share own = share_of(tile, rank);
    Accumulators<Shape> sums;
    multiply_class<Shape>(own.width, sums, pipe, warpgroup * 2 * BLOCK_BYTES, k_blocks);
#pragma unroll
    for (int m = 0; m < Shape::BLOCKS; m++) {
      const int feature = tile.column * FEATURES + ((int)warpgroup * 2 + m) * 64, own_feature = feature + warp * 16 + lane / 4;
      const float low = bias_of(p, tile.expert, own_feature), high = bias_of(p, tile.expert, own_feature + 8);
#pragma unroll
      for (int first = 0; first < ROWS; first += STORE_ROWS)
        if (first < own.rows) {
          sync_consumers(warpgroup);  // the other warps have read what is overwritten
#pragma unroll
          for (int row = first; row < first + STORE_ROWS && row < ROWS; row += 16)
            if (row < own.rows) store_token_rows<ELEMENT>(buffer, row - first, warp, lane, &sums[m][row / 2], low, high);
          sync_consumers(warpgroup);
          store_by_threads(p, buffer, first, own, feature, warp, lane);
        }
    }
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    grouped_few(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap few_rows,
                const __grid_constant__ Params p) {
  extern __shared__ u8 shared[];
  const u32 base = align_1024(shared_address(shared)), rank = cluster_rank(), warpgroup = warpgroup_index();
  const Pipeline pipe{base + FULL, base + EMPTY, base, 0, 0};
  const TileReader tiles{base + RING_AT, 0};
  if (threadIdx.x == 0) {
    pipeline_init<Shape>(pipe, 1);
    barrier_init(base + BEGUN, 1);
    ring_init(base + RING_AT);
    fence_barrier_init();
  }
  cluster_sync();
  if (warpgroup == 0) {
    give_registers<56>();
    if (threadIdx.x == 0) load(p, &weights, &rows, &few_rows, pipe, tiles, rank, base + BEGUN);
    if (threadIdx.x == 32 && rank == 0) draw_tickets(p.table, p.columns, p.counter, base + RING_AT, base + BEGUN);
  } else {
    take_registers<224>();
    consume(p, pipe, tiles, rank, warpgroup - 1, base + STORES);
  }
  __syncwarp();
  cluster_sync();  // a block must not leave while its peer may still write to it
}
