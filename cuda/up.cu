// Up projection for many rows per expert: gather, grouped GEMM, activation; stores the activation and, to train, the
// pre-activation. A warpgroup of its own runs the epilogue of tile i while the consumers multiply tile i + 1.
//
// 512 threads, one block an SM, clusters of two. Roles, and the registers they keep (56 + 2 * 168 + 120 = 512 a lane):
//   warpgroup 0   56   gathers token rows (all 128 threads); thread 0 also starts the weights' copies
//   warpgroup 1,2 168  consumers: multiply, round to 16 bits, hand over through shared memory
//   warpgroup 3   120  epilogue: copies the pre-activation out, activates, stores; thread 0 of block 0 draws tickets
//
// Barriers              arrivals                               completes when
//   full[stage]         128 copies + 1 expecting 32768 bytes   the stage holds weights and rows
//   empty[stage]        4 (2 consumer warpgroups x 2 blocks)   both blocks have multiplied it
//   handed              8 (lane 0 of each consumer warp)       the tile is in the hand-off buffer
//   taken               4 (lane 0 of each epilogue warp)       the buffer may be overwritten
//   ring[16]            1 + 16 bytes                           a tile was drawn (tickets.cuh)
//
// Shared memory: 3 stages of 50176, the hand-off of 69632 = 4 blocks of [136 rows][64 weight rows] in 16 bits, 128-byte
// swizzled, then barriers. The hand-off rounds gate and up before the activation: the activation is exactly that of the
// pre-activation a backward pass will read.
#include "up.cuh"

constexpr int THREADS = 512, STAGES = 3;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = ROWS > 136 ? 176 : 168;
constexpr int EPILOGUE_REGISTERS = 512 - PRODUCER_REGISTERS - 2 * CONSUMER_REGISTERS;
constexpr u32 TILE_BYTES = ROWS * 128, HAND_OFF_BYTES = 4 * TILE_BYTES;  // one block of the hand-off, all of it
constexpr u32 SHARED_BYTES = STAGES * STAGE_BYTES + HAND_OFF_BYTES + FRAME_BYTES;

typedef UpShape<STAGES> Shape;

DEVICE void consume(const Params& p, Pipeline pipe, TileReader tiles, u32 rank, u32 warpgroup, u32 hand_off, u32 handed,
                    u32 taken) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const int k_blocks = (p.hidden + 63) / 64;
  const u32 own_blocks = hand_off + warpgroup * 2 * TILE_BYTES;
  u32 parity = 1;
  Tile tile;
  while (tiles.next(tile)) {
    const Share own = share_of(tile, rank, FEATURES);
    Accumulators<Shape> sums;
    multiply_class<Shape>(own.width, sums, pipe, warpgroup * 2 * BLOCK_BYTES, k_blocks);
    BiasRows bias;
    bias.load(p, own, warpgroup, warp, lane);
    barrier_wait(taken, parity);
    parity ^= 1;
#pragma unroll
    for (int column = 0; column < ROWS; column += 16)
      if (column < own.rows) {
#pragma unroll
        for (int m = 0; m < 2; m++)
          store_token_columns<ELEMENT, ROWS>(own_blocks + m * TILE_BYTES, column, warp, lane, &sums[m][column / 2],
                                             bias.value[m][0], bias.value[m][1]);
      }
    fence_async_shared();
    __syncwarp();
    if (lane == 0) barrier_arrive(handed);
  }
}

// The pre-activation leaves as it lies: four boxes of [136 rows][64 weight rows], clipped at the expert's last row.
DEVICE void store_pre_activation(const TensorMap* map, u32 hand_off, const Share& own, int inter) {
#pragma unroll
  for (int block = 0; block < 4; block++) {
    const u32 source = hand_off + block * TILE_BYTES;
    if constexpr (HALVES)
      tma_store_4d(map, source, own.feature + (block >> 1) * 64, block & 1, RAGGED_STORE - own.rows,
                   own.row + own.rows);
    else
      tma_store_3d(map, source, own.feature * (GATED ? 2 : 1) + block * 64, RAGGED_STORE - own.rows,
                   own.row + own.rows);
  }
  tma_store_commit();
}

// Eight activations from the hand-off: the features 64 part + 8 chunk … of a token.
DEVICE uint4 activate_chunk(u32 hand_off, u32 part, u32 token, u32 chunk) {
  uint4 out;
  if constexpr (HALVES) {
    const u32 at = hand_off + part * 2 * TILE_BYTES + swizzled(token, chunk);
    const uint4 g = load_shared(at), u = load_shared(at + TILE_BYTES);
    out.x = activate_packed<ELEMENT>(g.x, u.x), out.y = activate_packed<ELEMENT>(g.y, u.y);
    out.z = activate_packed<ELEMENT>(g.z, u.z), out.w = activate_packed<ELEMENT>(g.w, u.w);
  } else if constexpr (GATED) {
    const u32 tile = hand_off + (part * 2 + (chunk >> 2)) * TILE_BYTES;
    const uint4 a = load_shared(tile + swizzled(token, (chunk & 3) * 2));
    const uint4 b = load_shared(tile + swizzled(token, (chunk & 3) * 2 + 1));
    out.x = activate_interleaved<ELEMENT>(a.x, a.y), out.y = activate_interleaved<ELEMENT>(a.z, a.w);
    out.z = activate_interleaved<ELEMENT>(b.x, b.y), out.w = activate_interleaved<ELEMENT>(b.z, b.w);
  } else {
    const uint4 g = load_shared(hand_off + part * TILE_BYTES + swizzled(token, chunk));
    out.x = activate_packed<ELEMENT>(g.x, 0), out.y = activate_packed<ELEMENT>(g.y, 0);
    out.z = activate_packed<ELEMENT>(g.z, 0), out.w = activate_packed<ELEMENT>(g.w, 0);
  }
  return out;
}

DEVICE void finish(const Params& p, const TensorMap* pre, TileReader tiles, u32 rank, u32 ring, u32 hand_off,
                   u32 handed, u32 taken) {
  const u32 thread = threadIdx.x & 127, lane = thread & 31, chunk = thread & 7, first_token = thread >> 3;
  const u64 row_bytes = (u64)p.inter * 2;
  const bool draws = thread == 0 && rank == 0;
  TileScheduler scheduler;
  if (draws) {
    scheduler.begin(ring, p.table, p.columns, p.counter);
    scheduler.advance<2>();
    if (scheduler.more) scheduler.advance<2>();
  }
  u32 parity = 0;
  Tile tile;
  while (tiles.next(tile)) {
    const Share own = share_of(tile, rank, FEATURES);
    if (draws && scheduler.more) scheduler.advance<2>();  // two tiles ahead of this one
    barrier_wait(handed, parity);
    parity ^= 1;
    if (SAVE && thread == 0) store_pre_activation(pre, hand_off, own, p.inter);
#pragma unroll
    for (int part = 0; part < FEATURES / 64; part++) {
      const int feature = own.feature + part * 64 + chunk * 8;
      u8* target = p.activated + (u64)(own.row + (int)first_token) * row_bytes + (u64)feature * 2;
#pragma unroll 4
      for (int step = 0; step < (ROWS + 15) / 16; step++) {
        const u32 token = step * 16 + first_token;
        if ((int)token < own.rows && feature < p.inter)
          store_global(target + (u64)step * 16 * row_bytes, activate_chunk(hand_off, part, token, chunk));
      }
    }
    if (SAVE && thread == 0) tma_store_wait_read<0>();
    __syncwarp();
    if (lane == 0) barrier_arrive(taken);
  }
  if (SAVE && thread == 0) tma_store_wait<0>();
  __syncwarp();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    up(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap pre,
       const __grid_constant__ Params p) {
  extern __shared__ u8 shared[];
  const Frame<Shape, HAND_OFF_BYTES, FULL_ARRIVALS, 8, 4> frame(shared);
  const u32 handed = frame.barrier(0), taken = frame.barrier(1);
  if (frame.warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    gather_rows<Shape, true>(p, &weights, frame.pipe, frame.tiles, frame.rank);
    __syncwarp();
  } else if (frame.warpgroup == 3) {
    give_registers<EPILOGUE_REGISTERS>();
    finish(p, &pre, frame.tiles, frame.rank, frame.ring(), frame.buffers(), handed, taken);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, frame.pipe, frame.tiles, frame.rank, frame.warpgroup - 1, frame.buffers(), handed, taken);
    __syncwarp();
  }
  frame.end();
}
