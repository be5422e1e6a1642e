// Grouped GEMM over contiguous rows: out[r] = a[r] @ W_e^T (+ bias), the rows r of expert e; the down projection, the
// input gradient of the up projection, and grouped_mm "nt" and "nn".
//
// A cluster of two blocks computes 256 features x up to 256 rows of one expert, split along the *features*: each block
// loads its own 128 weight rows; the rows are shared, each block loading half of them and multicasting it.
//
// 384 threads, one block an SM. Roles, and the registers they keep (56 + 2 * 224 = 3 * 168, the launch's share):
//   warpgroup 0   56   warp 0: one thread starts all copies; warp 1: one thread of block 0 draws tickets
//   warpgroup 1,2 224  consumers of 64 features x 256 rows: multiply, round, store
//
// Barriers              arrivals                               completes when
//   full[stage]         1 + the stage's bytes                  the stage holds weights and rows
//   empty[stage]        4 (2 consumer warpgroups x 2 blocks)   both blocks have multiplied it
//   begun               1                                      the copies of another tile have begun: draw the next
//   ring[16]            1 + 16 bytes                           a tile was drawn (tickets.cuh)
//
// RING_STAGES 3 and STORE_ROWS 256: a whole tile leaves in one asynchronous store, waited for at the next tile.
// RING_STAGES 4 and STORE_ROWS 128 for few rows per expert: a longer ring, two stores.
//
// Macros: ELEMENT, TRANSPOSED (weights [E, k, features]), BIAS, RING_STAGES, STORE_ROWS.
#include "epilogue.cuh"

constexpr int THREADS = 384;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
constexpr int TILE_ROWS = 256, TILE_FEATURES = 256;
constexpr int FEATURES = TILE_FEATURES / 2, ROWS = TILE_ROWS;  // of a block
// A tile of 256 rows comes in boxes of the one, a shorter one in boxes of the other.
constexpr int BOX_ROWS = ROWS / 2, TAIL_ROWS = 32;
constexpr u32 WEIGHT_BYTES = FEATURES * 128, STAGE_BYTES = WEIGHT_BYTES + ROWS * 128;
constexpr u32 STORE_BYTES = STORE_ROWS * 128;  // of a consumer warpgroup: [rows][64 features]
constexpr u32 SHARED_BYTES = RING_STAGES * STAGE_BYTES + 2 * STORE_BYTES + FRAME_BYTES;

struct Params {
  const int4* table;
  int* counter;
  const u16* bias;  // [E, features], or null
  int columns;      // feature tiles: ceil(features / TILE_FEATURES)
  int inner;        // k
  int features;
};

struct Shape {
  typedef ELEMENT Element;
  static constexpr int STAGES = RING_STAGES;
  static constexpr u32 STAGE_BYTES = ::STAGE_BYTES, B_OFFSET = WEIGHT_BYTES;
  static constexpr int BLOCKS = 1, WIDTH = ROWS, NARROWEST = 32;
  // 32, 64, 96, 128, 144, 160 … 256: an expert split over several tiles has 144 rows in each and more, near 256 if it
  // has many.
  static DEVICE constexpr int wider(int n) { return n < 128 ? n + 32 : n + 16; }
  static constexpr bool A_MN_MAJOR = TRANSPOSED, B_MN_MAJOR = false, GATHERED = false;
};

// One thread of each block.
DEVICE void load(const Params& p, const TensorMap* weights, const TensorMap* rows, const TensorMap* tail, Pipeline pipe,
                 TileReader tiles, u32 rank, u32 begun) {
  const int k_blocks = (p.inner + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    if (rank == 0) barrier_arrive(begun);
    const int boxes = (tile.rows + TAIL_ROWS - 1) / TAIL_ROWS;
    const bool whole = boxes * TAIL_ROWS == ROWS;
    const u32 bytes = WEIGHT_BYTES + boxes * TAIL_ROWS * 128;
    const int feature = tile.column * TILE_FEATURES + rank * FEATURES;
    for (int block = 0; block < k_blocks; block++) {
      pipe.wait_empty();
      const u32 stage = pipe.address<Shape>(), full = pipe.full_barrier(), target = stage + WEIGHT_BYTES;
      const int k = block * 64;
      barrier_arrive_expect(full, bytes);
      if constexpr (TRANSPOSED) {
        tma_load_3d(stage, weights, full, feature, k, tile.expert);
        tma_load_3d(stage + BLOCK_BYTES, weights, full, feature + 64, k, tile.expert);
      } else {
        tma_load_3d(stage, weights, full, k, feature, tile.expert);
      }
      // Rows beyond the tile are the next expert's, or zeros past the tensor's end: columns that are never stored.
      if (whole)
        tma_multicast_2d(target + rank * BOX_ROWS * 128, rows, full, k, tile.row + rank * BOX_ROWS);
      else
        for (int box = rank; box < boxes; box += 2)
          tma_multicast_2d(target + box * TAIL_ROWS * 128, tail, full, k, tile.row + box * TAIL_ROWS);
      pipe.advance<Shape>();
    }
  }
}

DEVICE void consume(const Params& p, const TensorMap* out, Pipeline pipe, TileReader tiles, u32 rank, u32 warpgroup,
                    u32 stores) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const bool storing = (threadIdx.x & 127) == 0;
  const int k_blocks = (p.inner + 63) / 64;
  const u32 buffer = stores + warpgroup * STORE_BYTES;
  Tile tile;
  while (tiles.next(tile)) {
    Accumulators<Shape> sums;
    multiply_class<Shape>(tile.rows, sums, pipe, warpgroup * BLOCK_BYTES, k_blocks);
    const int feature = tile.column * TILE_FEATURES + rank * FEATURES + warpgroup * 64;
    const int own_feature = feature + warp * 16 + lane / 4;
    const float low = bias_of(p.bias, tile.expert, p.features, own_feature, own_feature < p.features);
    const float high = bias_of(p.bias, tile.expert, p.features, own_feature + 8, own_feature + 8 < p.features);
#pragma unroll
    for (int first = 0; first < ROWS; first += STORE_ROWS)
      if (first < tile.rows) {
        if (storing) tma_store_wait_read<0>();  // the buffer's last store has left
        sync_consumers(warpgroup);
#pragma unroll
        for (int row = 0; row < STORE_ROWS; row += 16)
          if (first + row < tile.rows)
            store_token_rows<ELEMENT>(buffer, row, warp, lane, &sums[0][(first + row) / 2], low, high);
        fence_async_shared();
        sync_consumers(warpgroup);
        if (storing) {
          tma_store_3d(out, buffer, feature, RAGGED_STORE - tile.rows + first, tile.row + tile.rows);
          tma_store_commit();
        }
      }
  }
  if (storing) tma_store_wait<0>();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    grouped_mm(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap rows,
               const __grid_constant__ TensorMap tail, const __grid_constant__ TensorMap out,
               const __grid_constant__ Params p) {
  extern __shared__ u8 shared[];
  const Frame<Shape, 2 * STORE_BYTES, 1, 1> frame(shared);
  const u32 begun = frame.barrier(0);
  if (frame.warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) load(p, &weights, &rows, &tail, frame.pipe, frame.tiles, frame.rank, begun);
    if (threadIdx.x == 32 && frame.rank == 0) draw_tickets(p.table, p.columns, p.counter, frame.ring(), begun);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, &out, frame.pipe, frame.tiles, frame.rank, frame.warpgroup - 1, frame.buffers());
  }
  __syncwarp();
  frame.end();
}
