// What grouped_mm.cu computes, in tiles of up to 288 rows: an expert with somewhat more than 256 is one tile, and its
// weights pass once.
//
// A cluster of two blocks computes 256 features x up to 288 rows of one expert, split along the *rows*: each block
// multiplies all 256 weight rows with its own at most 144 rows, loads half of the weights and multicasts it.
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
// Shared memory: 4 stages of 51200, for each consumer warpgroup [96 rows][64 features] to store from, then barriers.
// The threads store: the copy engine would have to be waited for at every part of a tile.
//
// Macros: ELEMENT, TRANSPOSED (weights [E, k, features]), BIAS.
#include "epilogue.cuh"

constexpr int THREADS = 384, STAGES = 4;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
constexpr int TILE_ROWS = 288, TILE_FEATURES = 256;
constexpr int FEATURES = TILE_FEATURES, ROWS = TILE_ROWS / 2;  // of a block
constexpr int BOX_ROWS = 64, TAIL_ROWS = 16;  // rows come in boxes of the one, the last of a tile in boxes of the other
constexpr int STORE_ROWS = 96;
constexpr u32 WEIGHT_BYTES = FEATURES * 128, STAGE_BYTES = WEIGHT_BYTES + ROWS * 128;
constexpr u32 STORE_BYTES = STORE_ROWS * 128;  // of a consumer warpgroup: [rows][64 features]
constexpr u32 SHARED_BYTES = STAGES * STAGE_BYTES + 2 * STORE_BYTES + FRAME_BYTES;

struct Params {
  const int4* table;
  int* counter;
  const u16* bias;  // [E, features], or null
  u8* out;          // [rows, features]
  int columns;      // feature tiles: ceil(features / TILE_FEATURES)
  int inner;        // k
  int features;
};

struct Shape {
  typedef ELEMENT Element;
  static constexpr int STAGES = ::STAGES;
  static constexpr u32 STAGE_BYTES = ::STAGE_BYTES, B_OFFSET = WEIGHT_BYTES;
  static constexpr int BLOCKS = 2, WIDTH = ROWS, NARROWEST = 16;
  static DEVICE constexpr int wider(int n) { return n < 64 ? n + 16 : n + 8; }
  static constexpr bool A_MN_MAJOR = TRANSPOSED, B_MN_MAJOR = false, GATHERED = false;
};

// One thread of each block.
DEVICE void load(const Params& p, const TensorMap* weights, const TensorMap* rows, const TensorMap* tail, Pipeline pipe,
                 TileReader tiles, u32 rank, u32 begun) {
  const int k_blocks = (p.inner + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    if (rank == 0) barrier_arrive(begun);
    const Share own = share_of(tile, rank, FEATURES);
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
      for (; row < loaded; row += TAIL_ROWS) tma_load_2d(target + row * 128, tail, full, k, own.row + row);
      pipe.advance<Shape>();
    }
  }
}

DEVICE void consume(const Params& p, Pipeline pipe, TileReader tiles, u32 rank, u32 warpgroup, u32 stores) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, buffer = stores + warpgroup * STORE_BYTES;
  const int k_blocks = (p.inner + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    const Share own = share_of(tile, rank, FEATURES);
    Accumulators<Shape> sums;
    multiply_class<Shape>(own.width, sums, pipe, warpgroup * 2 * BLOCK_BYTES, k_blocks);
#pragma unroll
    for (int m = 0; m < Shape::BLOCKS; m++) {
      const int feature = tile.column * FEATURES + ((int)warpgroup * 2 + m) * 64;
      const int own_feature = feature + warp * 16 + lane / 4;
      const float low = bias_of(p.bias, tile.expert, p.features, own_feature, own_feature < p.features);
      const float high = bias_of(p.bias, tile.expert, p.features, own_feature + 8, own_feature + 8 < p.features);
#pragma unroll
      for (int first = 0; first < ROWS; first += STORE_ROWS)
        if (first < own.rows) {
          sync_consumers(warpgroup);  // the other warps have read what is overwritten
#pragma unroll
          for (int row = first; row < first + STORE_ROWS && row < ROWS; row += 16)
            if (row < own.rows)
              store_token_rows<ELEMENT>(buffer, row - first, warp, lane, &sums[m][row / 2], low, high);
          sync_consumers(warpgroup);
          store_by_threads<STORE_ROWS>(buffer, p.out, p.features, feature, p.features - feature, own, first);
        }
    }
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    grouped_288(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap rows,
                const __grid_constant__ TensorMap tail, const __grid_constant__ Params p) {
  extern __shared__ u8 shared[];
  const Frame<Shape, 2 * STORE_BYTES, 1, 1> frame(shared);
  const u32 begun = frame.barrier(0);
  if (frame.warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) load(p, &weights, &rows, &tail, frame.pipe, frame.tiles, frame.rank, begun);
    if (threadIdx.x == 32 && frame.rank == 0) draw_tickets(p.table, p.columns, p.counter, frame.ring(), begun);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, frame.pipe, frame.tiles, frame.rank, frame.warpgroup - 1, frame.buffers());
  }
  __syncwarp();
  frame.end();
}
