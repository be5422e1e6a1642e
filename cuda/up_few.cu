// Up projection for few rows an expert: the consumers run the epilogue themselves, which leaves room for a fourth stage, and
// the activation is taken of fp32 sums. For gate and up halves.
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
// Shared memory: 4 stages of 51200, for each consumer warpgroup [96 tokens][64 features] to store from, then barriers. There
// is no room for all 144 tokens: the last of a wide tile leave in a second store.
#include "up.cuh"

static_assert(HALVES, "other layouts use up.cu");
static_assert(TOKENS % 16 == 0, "the epilogue takes sixteen tokens at a time");

typedef UpShape<4> Shape;
constexpr int STORE_TOKENS = 96;
constexpr u32 STORE_BYTES = STORE_TOKENS * 128;
constexpr u32 STORES = Shape::STAGES * STAGE_BYTES, BARRIERS = STORES + 2 * STORE_BYTES;
constexpr u32 FULL = BARRIERS, EMPTY = FULL + Shape::STAGES * 8, BEGUN = EMPTY + Shape::STAGES * 8;
constexpr u32 RING_AT = (BEGUN + 8 + 15) / 16 * 16;
static_assert(RING_AT + RING_BYTES + 1024 <= SHARED_BYTES, "the launch reserves SHARED_BYTES");

// One thread of each block.
DEVICE void load(const Params& p, const TensorMap* weights, Pipeline pipe, TileReader tiles, u32 rank, u32 begun) {
  const int k_blocks = (p.hidden + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    if (rank == 0) barrier_arrive(begun);
    const UpTile own = own_part(tile, rank);
    for (int block = 0; block < k_blocks; block++) {
      pipe.wait_empty();
      load_weights(pipe.address<Shape>(), weights, pipe.full_barrier(), own, block * 64, rank);
      pipe.advance<Shape>();
    }
  }
}

// Sixteen token columns of gate and up sums as rows of a [tokens][64 features] tile.
DEVICE void store_activated(u32 tile, int column, u32 warp, u32 lane, const float* gate, const float* up, const BiasRows& bias) {
  u32 out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float g = bias.value[0][i & 1], u = bias.value[1][i & 1];
    float first, second;
    activate_two(biased(gate[2 * i], g), biased(up[2 * i], u), biased(gate[2 * i + 1], g), biased(up[2 * i + 1], u), first, second);
    out[i] = ELEMENT::pack(first, second);
  }
  const u32 chunk = warp * 2 + ((lane >> 3) & 1);
  store_matrices_transposed(tile + swizzled(column + (lane & 7) + ((lane >> 4) << 3), chunk), out[0], out[1], out[2], out[3]);
}


// What the warpgroup has put into the buffer, tokens first … of its tile, goes to 64 columns of a matrix [S, columns].
DEVICE void store_by_threads(u32 buffer, u8* matrix, u32 columns, u32 column, int columns_left, const UpTile& own, int first) {
  const u32 thread = threadIdx.x & 127, chunk = thread & 7, line = thread >> 3, pitch = columns * 2;
  if ((int)chunk * 8 >= columns_left) return;
  u8* target = matrix + (u64)(u32)(own.row + first + (int)line) * pitch + (column + chunk * 8) * 2;
#pragma unroll
  for (int token = 0; token < STORE_TOKENS; token += 16)
    if (first + token + (int)line < own.rows) store_global(target + (u64)((u32)token * pitch), load_shared(buffer + swizzled(token + line, chunk)));
}

// Gate and up, then the activation: each through the buffer, by the threads. The copy engine would be waited for at every
// part, because the buffer is as small as four stages leave it.
DEVICE void store_all(const Params& p, const UpTile& own, const Accumulators<Shape>& sums, const BiasRows& bias, u32 warpgroup, u32 buffer) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const int feature = own.feature + (int)warpgroup * 64;
#pragma unroll
  for (int first = 0; first < TOKENS; first += STORE_TOKENS)
#pragma unroll
    for (int what = 0; what < 3; what++)
      if (first < own.rows) {
        sync_consumers(warpgroup);  // the other warps have read what is overwritten
#pragma unroll
        for (int column = first; column < first + STORE_TOKENS && column < TOKENS; column += 16)
          if (column < own.rows) {
            const float *gate = &sums[0][column / 2], *up = &sums[1][column / 2];
            if (what == 2)
              store_activated(buffer, column - first, warp, lane, gate, up, bias);
            else
              store_token_rows<ELEMENT>(buffer, column - first, warp, lane, what ? up : gate, bias.value[what][0], bias.value[what][1]);
          }
        sync_consumers(warpgroup);
        if (what == 2)
          store_by_threads(buffer, p.activated, p.inter, feature, p.inter - feature, own, first);
        else
          store_by_threads(buffer, p.pre, 2 * p.inter, what * p.inter + feature, p.inter - feature, own, first);
      }
}

// The activation alone, by the copy engine.
DEVICE void store_activation(const TensorMap* activated, const UpTile& own, const Accumulators<Shape>& sums, const BiasRows& bias,
                             u32 warpgroup, u32 buffer) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const bool storing = (threadIdx.x & 127) == 0;
#pragma unroll
  for (int first = 0; first < TOKENS; first += STORE_TOKENS)
    if (first < own.rows) {
      if (storing) tma_store_wait_read<0>();  // the buffer's last store has left
      sync_consumers(warpgroup);
#pragma unroll
      for (int column = first; column < first + STORE_TOKENS && column < TOKENS; column += 16)
        if (column < own.rows) store_activated(buffer, column - first, warp, lane, &sums[0][column / 2], &sums[1][column / 2], bias);
      fence_async_shared();
      sync_consumers(warpgroup);
      if (storing) {
        tma_store_3d(activated, buffer, own.feature + warpgroup * 64, RAGGED_STORE - own.rows + first, own.row + own.rows);
        tma_store_commit();
      }
    }
}

DEVICE void consume(const Params& p, const TensorMap* activated, Pipeline pipe, TileReader tiles, u32 rank, u32 warpgroup, u32 stores) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, buffer = stores + warpgroup * STORE_BYTES;
  const int k_blocks = (p.hidden + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    const UpTile own = own_part(tile, rank);
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

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(512, 1)
    up_few(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap activated, const __grid_constant__ Params p) {
  extern __shared__ u8 shared[];
  const u32 base = align_1024(shared_address(shared)), rank = cluster_rank(), warpgroup = warpgroup_index();
  const Pipeline pipe{base + FULL, base + EMPTY, base, 0, 0};
  const TileReader tiles{base + RING_AT, 0};
  if (threadIdx.x == 0) {
    pipeline_init<Shape>(pipe, FULL_ARRIVALS);
    barrier_init(base + BEGUN, 1);
    ring_init(base + RING_AT);
    fence_barrier_init();
  }
  cluster_sync();
  if (warpgroup == 0) {
    give_registers<56>();
    gather_rows<Shape, false>(p, &weights, pipe, tiles, rank);
  } else if (warpgroup == 3) {
    give_registers<40>();
    if (threadIdx.x == 384) load(p, &weights, pipe, tiles, rank, base + BEGUN);
    if (threadIdx.x == 416 && rank == 0) {
      TileScheduler scheduler;
      scheduler.begin(base + RING_AT, p.table, p.columns, p.counter);
      scheduler.follow(base + BEGUN);
    }
  } else {
    take_registers<208>();
    consume(p, &activated, pipe, tiles, rank, warpgroup - 1, base + STORES);
  }
  __syncwarp();
  cluster_sync();  // a block must not leave while its peer may still write to it
}
