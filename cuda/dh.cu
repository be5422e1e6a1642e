// Gradient of the pre-activation, with everything else that the same bytes give:
//   dA_r  = dO_token(r) @ W_down[e]              the GEMM; rows of dO gathered inside
//   A_r   = act(pre_r)                           recomputed: the forward pass saved only pre
//   dS_r  = <dA_r, A_r>                          gradient of the router weight, one partial sum for each 256 features
//   dH_r  = s_r dA_r * act'(pre_r)               stored, [S, 2I]
//   A'_r  = s_r A_r                              stored, [S, I]: the operand of the down projection's weight gradient
//
// Macros: ELEMENT, ACTIVATION (activation.cuh), INTERLEAVED (gate and up features alternate), TRANSPOSED (W_down is
// [E, I, H] instead of [E, H, I]), TILE_ROWS (272, or 288 where that spares most experts a second tile).
//
// A cluster of two blocks computes 256 features x up to 272 rows, or 288; the blocks split the rows and share the
// weights: each loads half of them and multicasts, each gathers its own rows. Splitting the features instead would make
// either block gather all rows.
//
// The epilogue moves more bytes than the GEMM (pre in, dH and A' out), so it has a warpgroup of its own that works on
// tile i while tile i + 1 is multiplied. The accumulators cross through shared memory as 16-bit values.
//
// Roles (512 threads)                                                                                registers
//   warp 0         one thread: TMA of W_down and, in block 0, the tickets                               56
//   warps 1-3      gather: 96 threads copy rows of dO with cp.async and do nothing else                 56
//   warps 4-11     two consumer warpgroups, 128 features each: wgmma 2 x m64nNk16, hand-off             168, or 176
//   warps 12-15    epilogue                                                                             120, or 104
//
// Barriers         arrivals                            who releases it
//   full[stage]    97: TMA's bytes, 96 gatherers       TMA; each gathering thread's copies
//   empty[stage]   4                                   the consumer warpgroups of both blocks
//   handed         8                                   the consumer warps, when the hand-off buffer is written
//   taken          4                                   the epilogue warps, when it has been read
//   ring           tickets.cuh
// Hand-off: stmatrix and ld.shared are both of the generic proxy, an mbarrier orders them, no proxy fence.
#include "activation_gradient.cuh"
#include "epilogue.cuh"

constexpr int THREADS = 512, STAGES = 3, GATHER_THREADS = 96;
constexpr int FEATURES = 256;        // of a tile, and of one partial sum of dS
constexpr int ROWS = TILE_ROWS / 2;  // of a block
constexpr bool TIGHT = ROWS > 136;   // no room for a second slot of pre: it lies where the hand-off has been read
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = TIGHT ? 176 : 168;
constexpr int EPILOGUE_REGISTERS = 512 - PRODUCER_REGISTERS - 2 * CONSUMER_REGISTERS;
constexpr u32 WEIGHT_BYTES = FEATURES * 128, STAGE_BYTES = WEIGHT_BYTES + ROWS * 128;
constexpr u32 TILE_BYTES = ROWS * 128;           // a tile of the hand-off: [rows][64 features], swizzled; four of them
constexpr u32 SLOTS = 2, SLOT_BYTES = 128 * 32;  // pre on its way to the epilogue: 32 bytes a thread and slot
constexpr u32 HAND_OFF_BYTES = 4 * TILE_BYTES, PRE_BYTES = (TIGHT ? 1 : SLOTS) * SLOT_BYTES;
// All that a block can have, where it is tight: shared memory is declared as aligned, so that nothing is lost to that.
constexpr u32 SHARED_BYTES = STAGES * STAGE_BYTES + HAND_OFF_BYTES + PRE_BYTES + (TIGHT ? 1024 : FRAME_BYTES);

struct Shape {
  typedef ELEMENT Element;
  static constexpr int STAGES = ::STAGES;
  static constexpr u32 STAGE_BYTES = ::STAGE_BYTES, B_OFFSET = WEIGHT_BYTES;
  static constexpr int BLOCKS = 2, WIDTH = ROWS, NARROWEST = 16;
  static DEVICE constexpr int wider(int n) { return n < 64 ? n + 16 : n + 8; }  // up.cuh
  static constexpr bool A_MN_MAJOR = !TRANSPOSED, B_MN_MAJOR = false, GATHERED = true;
};

struct Params {
  const int4* table;       // tickets.cuh
  int* counter;            // zero at launch
  const u8* source;        // dO [T, H]
  const int* row_token;    // [S]
  const float* row_score;  // [S]
  const u8* pre;           // [S, 2I] ([S, I] if not gated)
  u8* dh;                  // like pre
  u8* scaled;              // A' [S, I], or null
  float* partials;         // dS [S, columns], or null
  int hidden, inter, columns;
  u32 source_pitch_16;  // row length of dO in units of 16 bytes: 32-bit products reach 64 GiB
};

// One gathering thread: chunk `chunk` (8 of the 64 k) of the rows first + 12 i, i = 0..11 (i = 11 as far as the width
// goes: whole warps). Rows step by 12 = 4 mod 8, so odd i have bit 6 of the swizzled address flipped: see wgrad.cu.
// Rows past the share repeat its first row: their columns of the product are computed and never stored, so they need no
// zeros.
//
// The copies leave back to back in groups of three, 36 rows: as many groups as hold the share's width.
DEVICE void gather_rows(const Params& p, Pipeline pipe, TileReader tiles, u32 rank, int thread) {
  constexpr int STEPS = 12, STRIDE = 12, GROUP = 3;
  const int chunk = thread & 7, first = thread >> 3;
  const u32 inside = Shape::B_OFFSET + swizzled(first, chunk);
  const int whole_blocks = p.hidden / 64, k_blocks = (p.hidden + 63) / 64;
  Tile tile;
  while (tiles.next(tile)) {
    const Share share = share_of(tile, rank, FEATURES);
    const u8* row[STEPS];  // all made before the first wait, and advanced in place: see up.cuh
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int r = first + i * STRIDE;
      const u32 token = share.rows > 0 ? __ldg(p.row_token + share.row + (r < share.rows ? r : 0)) : 0;
      row[i] = p.source + (u64)(token * p.source_pitch_16 + chunk) * 16;
    }
    for (int block = 0; block < k_blocks; block++) {
      pipe.wait_empty();
      const u32 even = pipe.address<Shape>() + inside, odd = even ^ 64;
      if (block < whole_blocks) {
#pragma unroll
        for (int i = 0; i + GROUP < STEPS; i += GROUP)
          if (share.width > i * STRIDE)
            copy_rows((i & 1 ? odd : even) + i * 1536, (i & 1 ? even : odd) + (i + 1) * 1536,
                      (i & 1 ? odd : even) + (i + 2) * 1536, row[i], row[i + 1], row[i + 2]);
        if (share.width > 9 * STRIDE) {
          copy_rows(odd + 13824, even + 15360, row[9], row[10]);
          if (first + 11 * STRIDE < share.width) copy_16(odd + 16896, row[11]);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) row[i] += 128;
      } else {  // where hidden ends: zeros, as TMA writes zeros of W
        const bool exists = block * 64 + chunk * 8 < p.hidden;
#pragma unroll
        for (int i = 0; i < STEPS; i++)
          if (first + i * STRIDE < share.width)
            copy_16_or_zero((i & 1 ? odd : even) + i * 1536, exists ? row[i] : p.source, exists ? 16 : 0);
      }
      barrier_arrive_after_copies(pipe.full_barrier());
      pipe.advance<Shape>();
    }
  }
}

// The epilogue of one share. A step is 16 rows: thread (warp, lane) has row 4 warp + lane / 8 and, in each of the four
// 64-feature tiles, the 8 features of chunk lane % 8, so that eight lanes move 128 bytes of one row. An item is one
// tile of a step: 16 bytes of dA, 32 of pre, 32 of dH, 16 of A'.
//
// pre comes through a ring of cp.async private to the thread, two items ahead: loads into registers would all wait on
// one scoreboard and not overlap. A slot is refilled after its values have been consumed. Where shared memory has room
// for one slot only, the odd items' is the places of the thread's first two items of dA, which it reads before.
struct Epilogue {
  const Params& p;
  const u32 hand_off, slots, warp, lane;

  static constexpr int PER_ROW = GATED ? 2 : 1;  // features of pre to one of A

  DEVICE void run(const Share& share, u32 handed, u32 parity) const {
    constexpr int TILES = 4, STEP_ROWS = 16;
    const int local = warp * 4 + (lane >> 3), feature = share.feature + (lane & 7) * 8, inter = p.inter;
    const u32 pre_pitch = PER_ROW * inter * 2;                      // bytes of a row
    const u32 second = GATED ? (INTERLEAVED ? 16 : inter * 2) : 0;  // from the first to the second 16 bytes of pre
    constexpr int PRE_TILE = GATED && INTERLEAVED ? 256 : 128;      // bytes of 64 features
    const u64 origin = (u64)(share.row + local) * pre_pitch + (u64)feature * (GATED && INTERLEAVED ? 4 : 2);
    const u8* pre = p.pre + origin;
    u8* dh = p.dh + origin;
    u8* scaled = p.scaled + ((u64)(share.row + local) * inter + feature) * 2;
    const u32 own = slots + threadIdx.x % 128 * 16, cell = hand_off + swizzled(local, lane & 7);
    // Where the first and the second 16 bytes of pre go, of an even and of an odd item.
    auto slot = [&](int tile, int half) {
      if (TIGHT && tile % 2) return cell + half * TILE_BYTES;
      return own + tile % SLOTS * SLOT_BYTES + half * (SLOT_BYTES / 2);
    };

    auto exists = [&](int tile, int step) {
      return step * STEP_ROWS + local < share.rows && feature + tile * 64 < inter;
    };
    auto fetch = [&](int tile, int step) {
      if (exists(tile, step)) {
        const u8* from = pre + (u64)(u32)(step * STEP_ROWS) * pre_pitch + tile * PRE_TILE;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot(tile, 0)), "l"(from) : "memory");
        if (GATED)
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot(tile, 1)), "l"(from + second) : "memory");
      }
      copy_commit();  // empty groups too: copy_wait counts groups
    };
    auto score_of = [&](int step) {
      const int row = step * STEP_ROWS + local;
      return row < share.rows ? __ldg(p.row_score + share.row + row) : 0.0f;
    };

    float next_score = score_of(0);
    fetch(0, 0);
    if (!TIGHT) fetch(1, 0);
    barrier_wait(handed, parity);
    uint4 early[2];  // TIGHT: dA of the first two items
    if (TIGHT) {
      early[0] = load_shared(cell), early[1] = load_shared(cell + TILE_BYTES);
      fetch(1, 0);
    }
    const int steps = (share.rows + STEP_ROWS - 1) / STEP_ROWS;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const float score = next_score;
      float dot = 0.0f;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        if (tile == TILES - 1) next_score = score_of(step + 1);
        copy_wait<SLOTS - 1>();
        if (exists(tile, step)) {
          const u32 row = step * STEP_ROWS + local;
          uint4 da4;
          if (TIGHT && tile < 2 && step == 0)
            da4 = early[tile];
          else
            da4 = load_shared(hand_off + tile * TILE_BYTES + swizzled(row, lane & 7));
          const uint4 x4 = load_shared(slot(tile, 0)), y4 = GATED ? load_shared(slot(tile, 1)) : x4;
          const u32 da[4] = {da4.x, da4.y, da4.z, da4.w};
          const u32 x[8] = {x4.x, x4.y, x4.z, x4.w, y4.x, y4.y, y4.z, y4.w};
          u32 out[8], a[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {  // two features
            const bool mixed = GATED && INTERLEAVED;
            const float g0 = ELEMENT::low(mixed ? x[2 * i] : x[i]);
            const float g1 = mixed ? ELEMENT::low(x[2 * i + 1]) : ELEMENT::high(x[i]);
            const float u0 = mixed ? ELEMENT::high(x[2 * i]) : ELEMENT::low(x[4 + i]);
            const float u1 = mixed ? ELEMENT::high(x[2 * i + 1]) : ELEMENT::high(x[4 + i]);
            const Slopes s0 = slopes(g0, u0), s1 = slopes(g1, u1);
            float d0 = ELEMENT::low(da[i]), d1 = ELEMENT::high(da[i]);
            dot = fmaf(d0, s0.value, dot);
            dot = fmaf(d1, s1.value, dot);
            d0 *= score, d1 *= score;
            a[i] = ELEMENT::pack(score * s0.value, score * s1.value);
            if (mixed) {
              out[2 * i] = ELEMENT::pack(d0 * s0.gate, d0 * s0.up);
              out[2 * i + 1] = ELEMENT::pack(d1 * s1.gate, d1 * s1.up);
            } else {
              out[i] = ELEMENT::pack(d0 * s0.gate, d1 * s1.gate);
              out[4 + i] = ELEMENT::pack(d0 * s0.up, d1 * s1.up);
            }
          }
          u8* to = dh + (u64)(u32)(step * STEP_ROWS) * pre_pitch + tile * PRE_TILE;
          store_streamed(to, make_uint4(out[0], out[1], out[2], out[3]));
          if (GATED) store_streamed(to + second, make_uint4(out[4], out[5], out[6], out[7]));
          if (p.scaled)
            store_streamed(scaled + (u64)(u32)(step * STEP_ROWS) * (u32)(inter * 2) + tile * 128,
                           make_uint4(a[0], a[1], a[2], a[3]));
        }
        fetch((tile + SLOTS) % TILES, step + (tile + SLOTS) / TILES);
      }
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      dot += __shfl_xor_sync(~0u, dot, 4);
      const int row = step * STEP_ROWS + local;
      if (p.partials && (lane & 7) == 0 && row < share.rows)
        p.partials[(u64)(share.row + row) * p.columns + share.column] = dot;
    }
  }
};

// No warp is free to wait for the ticket's atomic and for the two dependent loads of the table: they are begun at
// successive k-blocks, each used at the next.
struct SteppedScheduler : TileScheduler {
  int row_tiles, near, column;
  int4 entry;

  DEVICE SteppedScheduler(const Params& p, u32 ring_) {
    TileScheduler::begin(ring_, p.table, p.columns, p.counter);
    row_tiles = tickets / columns;
  }
  DEVICE void begin() {
    advance<2>();
    if (more) advance<2>();
  }
  DEVICE void step(int block, int blocks) {  // publishes the tile after next
    if (!more) return;
    if (block == 0) draw();
    if (block == min(2, blocks - 1)) {
      near = min(ticket / columns, row_tiles - 1);
      entry = __ldg(table + 1 + near);
    }
    if (block == min(3, blocks - 1)) {
      const int start = near - (entry.w & 0xffff), band = entry.w >> 16, place = ticket - start * columns;
      column = place / band;
      entry = __ldg(table + 1 + min(start + place - column * band, row_tiles - 1));
    }
    if (block == min(4, blocks - 1)) {
      tile = ticket < tickets ? Tile{entry.x, entry.y, entry.z, column} : Tile{0, 0, -1, 0};
      publish<2>();
    }
  }
};

// One thread of each block: half of the weights for both blocks, and in block 0 the tickets.
DEVICE void load(const Params& p, const TensorMap* weights, Pipeline pipe, TileReader tiles, u32 rank, u32 ring) {
  const int k_blocks = (p.hidden + 63) / 64;
  SteppedScheduler scheduler(p, ring);
  const bool schedules = rank == 0;
  if (schedules) scheduler.begin();
  Tile tile;
  while (tiles.next(tile)) {
    const int feature = tile.column * FEATURES + (int)rank * 128;
    for (int block = 0; block < k_blocks; block++) {
      if (schedules) scheduler.step(block, k_blocks);
      pipe.wait_empty();
      const u32 target = pipe.address<Shape>() + rank * 2 * BLOCK_BYTES, full = pipe.full_barrier();
      barrier_arrive_expect(full, 4 * BLOCK_BYTES);
#pragma unroll
      for (int i = 0; i < 2; i++)
        if constexpr (TRANSPOSED)
          tma_multicast_3d(target + i * BLOCK_BYTES, weights, full, block * 64, feature + i * 64, tile.expert);
        else
          tma_multicast_3d(target + i * BLOCK_BYTES, weights, full, feature + i * 64, block * 64, tile.expert);
      pipe.advance<Shape>();
    }
  }
}

DEVICE void consume(const Params& p, Pipeline pipe, TileReader tiles, u32 rank, u32 warpgroup, u32 hand_off, u32 handed,
                    u32 taken) {
  const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
  const int k_blocks = (p.hidden + 63) / 64;
  const u32 own_tiles = hand_off + warpgroup * 2 * TILE_BYTES;
  u32 parity = 1;  // the buffer is free at first
  Tile tile;
  while (tiles.next(tile)) {
    const Share share = share_of(tile, rank, FEATURES);
    Accumulators<Shape> sums;
    multiply_class<Shape>(share.width, sums, pipe, warpgroup * 2 * BLOCK_BYTES, k_blocks);
    barrier_wait(taken, parity);
    parity ^= 1;
#pragma unroll
    for (int m = 0; m < Shape::BLOCKS; m++)
#pragma unroll
      for (int row = 0; row < ROWS; row += 16)
        if (row < share.rows) {
          const u32 to = own_tiles + m * TILE_BYTES;
          store_token_columns<ELEMENT, ROWS>(to, row, warp, lane, &sums[m][row / 2], 0.0f, 0.0f);
        }
    __syncwarp();
    if (lane == 0) barrier_arrive(handed);
  }
}

DEVICE void finish(const Params& p, TileReader tiles, u32 rank, u32 hand_off, u32 slots, u32 handed, u32 taken) {
  const Epilogue epilogue{p, hand_off, slots, (threadIdx.x >> 5) & 3, threadIdx.x & 31};
  u32 parity = 0;
  Tile tile;
  while (tiles.next(tile)) {
    epilogue.run(share_of(tile, rank, FEATURES), handed, parity);
    parity ^= 1;
    __syncwarp();
    if (epilogue.lane == 0) barrier_arrive(taken);
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
    dh(const __grid_constant__ TensorMap weights, const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const Frame<Shape, HAND_OFF_BYTES + PRE_BYTES, GATHER_THREADS + 1, 8, 4> frame(shared);
  const u32 hand_off = frame.buffers(), slots = hand_off + HAND_OFF_BYTES;
  const u32 handed = frame.barrier(0), taken = frame.barrier(1);
  if (frame.warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0)
      load(p, &weights, frame.pipe, frame.tiles, frame.rank, frame.ring());
    else if (threadIdx.x >= 32)
      gather_rows(p, frame.pipe, frame.tiles, frame.rank, threadIdx.x - 32);
  } else if (frame.warpgroup == 3) {
    give_registers<EPILOGUE_REGISTERS>();
    finish(p, frame.tiles, frame.rank, hand_off, slots, handed, taken);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(p, frame.pipe, frame.tiles, frame.rank, frame.warpgroup - 1, hand_off, handed, taken);
  }
  __syncwarp();
  frame.end();
}
