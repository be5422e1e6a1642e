// Up projection for few rows per expert: the consumers run the epilogue themselves, which leaves room for a fourth
// stage, and the activation is taken of fp32 sums. For gate and up halves.
//
// 512 threads, one block an SM, clusters of two. Roles, and the registers they keep (56 + 2 * 208 + 40 = 512 a lane):
//   warpgroup 0   56   gathers token rows (all 128 threads)
//   warpgroup 1,2 208  consumers: multiply, activate, store
//   warpgroup 3   40   warp 0: one thread starts the weights' copies; warp 1: one thread of block 0 draws tickets
//
// Barriers              arrivals                               completes when
//   full[stage]         128 copies + 1 expecting 32768 bytes   the stage holds weights and rows
//   empty[stage]        4 (2 consumer warpgroups x 2 blocks)   both blocks have multiplied it
//   begun               1                                      the copies of another tile have begun: publish the next
//   ring[16]            1 + 16 bytes                           a tile was drawn (tickets.cuh)
//
// Shared memory: 4 stages of 51200, for each consumer warpgroup [96 rows][64 features] to store from, then barriers.
// There is no room for all 144 rows: the last of a wide tile leave in a second store.
#include "up.cuh"

static_assert(HALVES, "other layouts use up.cu");
static_assert(ROWS % 16 == 0, "the epilogue takes sixteen rows at a time");

constexpr int THREADS = 512, STAGES = 4;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 208, LOADER_REGISTERS = 40;
constexpr int STORE_ROWS = 96;
constexpr u32 STORE_BYTES = STORE_ROWS * 128;  // of a consumer warpgroup
constexpr u32 SHARED_BYTES = STAGES * STAGE_BYTES + 2 * STORE_BYTES + FRAME_BYTES;

typedef UpShape<STAGES> Shape;

// One thread of each block.
DEVICE void load(const Params& p, const TensorMap* weights, Pipeline pipe, TileReader tiles, u32 rank, u32 begun) {
  const int k_blocks = (p.hidden + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    if (rank == 0) barrier_arrive(begun);
    const Share own = share_of(tile, rank, FEATURES);
    for (int block = 0; block < k_blocks; block++) {
      pipe.wait_empty();
      load_weights(pipe.address<Shape>(), weights, pipe.full_barrier(), own, block * 64, rank);
      pipe.advance<Shape>();
    }
  }
}

// Sixteen columns of gate and up sums as rows of a [rows][64 features] tile.
DEVICE void store_activated(u32 tile, int column, u32 warp, u32 lane, const float* gate, const float* up,
                            const BiasRows& bias) {
  u32 out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float g = bias.value[0][i & 1], u = bias.value[1][i & 1];
    float first, second;
    activate_two(biased(gate[2 * i], g), biased(up[2 * i], u), biased(gate[2 * i + 1], g), biased(up[2 * i + 1], u),
                 first, second);
    out[i] = ELEMENT::pack(first, second);
  }
  const u32 chunk = warp * 2 + ((lane >> 3) & 1);
  store_matrices_transposed(tile + swizzled(column + (lane & 7) + ((lane >> 4) << 3), chunk), out[0], out[1], out[2],
                            out[3]);
}

// Gate and up, then the activation: each through the buffer, by the threads. The copy engine would be waited for at
// every part, because the buffer is as small as four stages leave it.
DEVICE void store_all(const Params& p, const Share& own, const Accumulators<Shape>& sums, const BiasRows& bias,
                      u32 warpgroup, u32 buffer) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const int feature = own.feature + (int)warpgroup * 64;
#pragma unroll
  for (int first = 0; first < ROWS; first += STORE_ROWS)
#pragma unroll
    for (int part = 0; part < 3; part++)
      if (first < own.rows) {
        sync_consumers(warpgroup);  // the other warps have read what is overwritten
#pragma unroll
        for (int column = first; column < first + STORE_ROWS && column < ROWS; column += 16)
          if (column < own.rows) {
            const float *gate = &sums[0][column / 2], *up = &sums[1][column / 2];
            if (part == 2)
              store_activated(buffer, column - first, warp, lane, gate, up, bias);
            else
              store_token_rows<ELEMENT>(buffer, column - first, warp, lane, part ? up : gate, bias.value[part][0],
                                        bias.value[part][1]);
          }
        sync_consumers(warpgroup);
        if (part == 2)
          store_by_threads<STORE_ROWS>(buffer, p.activated, p.inter, feature, p.inter - feature, own, first);
        else
          store_by_threads<STORE_ROWS>(buffer, p.pre, 2 * p.inter, part * p.inter + feature, p.inter - feature, own,
                                       first);
      }
}

// The activation alone, by the copy engine.
DEVICE void store_activation(const TensorMap* activated, const Share& own, const Accumulators<Shape>& sums,
                             const BiasRows& bias, u32 warpgroup, u32 buffer) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const bool storing = (threadIdx.x & 127) == 0;
#pragma unroll
  for (int first = 0; first < ROWS; first += STORE_ROWS)
    if (first < own.rows) {
      if (storing) tma_store_wait_read<0>();  // the buffer's last store has left
      sync_consumers(warpgroup);
#pragma unroll
      for (int column = first; column < first + STORE_ROWS && column < ROWS; column += 16)
        if (column < own.rows)
          store_activated(buffer, column - first, warp, lane, &sums[0][column / 2], &sums[1][column / 2], bias);
      fence_async_shared();
      sync_consumers(warpgroup);
      if (storing) {
        tma_store_3d(activated, buffer, own.feature + warpgroup * 64, RAGGED_STORE - own.rows + first,
                     own.row + own.rows);
        tma_store_commit();
      }
    }
}

DEVICE void consume(const Params& p, const TensorMap* activated, Pipeline pipe, TileReader tiles, u32 rank,
                    u32 warpgroup, u32 stores) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, buffer = stores + warpgroup * STORE_BYTES;
  const int k_blocks = (p.hidden + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    const Share own = share_of(tile, rank, FEATURES);
    Accumulators<Shape> sums;
    multiply_class<Shape>(own.width, sums, pipe, warpgroup * 2 * BLOCK_BYTES, k_blocks);
    BiasRows bias;
    bias.load(p, own, warpgroup, warp, lane);
    if constexpr (SAVE)
      store_all(p, own, sums, bias, warpgroup, buffer);
    else
      store_activation(activated, own, sums, bias, warpgroup, buffer);
  }
  if (!SAVE && (threadIdx.x & 127) == 0) tma_store_wait<0>();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    up_consumers(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap activated,
                 const __grid_constant__ Params p) {
  extern __shared__ u8 shared[];
  const Frame<Shape, 2 * STORE_BYTES, FULL_ARRIVALS, 1> frame(shared);
  const u32 begun = frame.barrier(0);
  if (frame.warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    gather_rows<Shape, false>(p, &weights, frame.pipe, frame.tiles, frame.rank);
  } else if (frame.warpgroup == 3) {
    give_registers<LOADER_REGISTERS>();
    if (threadIdx.x == 384) load(p, &weights, frame.pipe, frame.tiles, frame.rank, begun);
    if (threadIdx.x == 416 && frame.rank == 0) draw_tickets(p.table, p.columns, p.counter, frame.ring(), begun);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, &activated, frame.pipe, frame.tiles, frame.rank, frame.warpgroup - 1, frame.buffers());
  }
  __syncwarp();
  frame.end();
}
