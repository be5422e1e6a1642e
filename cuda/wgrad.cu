// Weight gradients: dW[e] = sum over the rows r of expert e of P_r^T Q_r, a grouped GEMM whose k runs over an expert's
// rows.
//
//              P (features on wgmma M)            Q (features on wgmma N)   result             contiguous in the result
//   gate/up    x of the row's token,   [S, H]     dH  [S, 2I]               dW [E, 2I, H]      P
//   down       dO of the row's token,  [S, H]     A'  [S, I]                dW [E, H, I]       Q
//   "tn"       a, rows as they are,    [S, K]     b   [S, N]                out [E, K, N]      Q
//
// The gathered operand is always P, the narrow one: 128 features a block against 256 of Q, so half as many bytes pass
// through cp.async as through TMA.
//
// Macros: ELEMENT; GATHER (P by token index, or as it is); P_INNERMOST (which feature is contiguous in the result);
// RING_STAGES and STORE_FEATURES: 3 and 256, a tile leaves in one store, or 4 and 128 for few rows per expert: in two;
// LAUNCH_REGISTERS (168 a thread, or 160: that leaves every SM room for four warps of 32 registers, the combine that
// runs beside this kernel).
//
// A cluster of two blocks computes 256 x 256 features of one expert. Each block owns 128 features of P; the 256 of Q
// are common: each block loads half of them and multicasts. Both operands are MN-major in shared memory (a line is 64
// features of one row), which wgmma reads through its transpose bits: nothing is transposed in memory.
//
// Roles (384 threads)
//   warp 0        one thread: TMA of Q (of P too without GATHER) and, in block 0, the tickets
//   warps 1-3     gather: 96 threads copy rows of P with cp.async and do nothing else
//   warps 4-11    two consumer warpgroups of 64 P features each: wgmma m64n256k16, epilogue, store
//
// Barriers         arrivals                                              who releases it
//   full[stage]    1 with TMA's bytes (+ 96 with GATHER)                 TMA; each gathering thread's copies
//   empty[stage]   4                                                     the consumer warpgroups of both blocks
//   ring           tickets.cuh
//   named 1, 2     128                                                   a consumer warpgroup around its store buffer
//
// Ragged k without padding: rows past the expert's end must count as exact zeros in both operands (a neighbour's Inf
// times zero is NaN). TMA clips through the ragged load map (hopper.cuh), cp.async through its source size. Of the last
// k-block only the steps of 16 rows that hold any are multiplied: at 256 rows per expert half of the experts have a
// fifth k-block that is nearly empty. An expert without rows runs one step of zeros and so stores zeros: no special
// case.
#include "frame.cuh"

constexpr int K_BLOCK = 64;  // rows
constexpr int THREADS = 384, GATHER_THREADS = 96;
constexpr u32 STAGE_BYTES = 6 * BLOCK_BYTES;          // 128 features of P, 256 of Q
constexpr u32 STORE_BYTES = 64 * STORE_FEATURES * 2;  // of a consumer warpgroup: 64 P x STORE_FEATURES of Q
constexpr u32 SHARED_BYTES = RING_STAGES * STAGE_BYTES + 2 * STORE_BYTES + FRAME_BYTES;

struct Shape {
  typedef ELEMENT Element;
  static constexpr int STAGES = RING_STAGES;
  static constexpr u32 B_OFFSET = 2 * BLOCK_BYTES, STAGE_BYTES = ::STAGE_BYTES;
  static constexpr int BLOCKS = 1, WIDTH = 256;
  static constexpr bool A_MN_MAJOR = true, B_MN_MAJOR = true, GATHERED = GATHER;
};

// Registers of the producer and consumer warpgroups: producer + 2 * consumer = 3 * registers at launch.
#if LAUNCH_REGISTERS == 160
#define LAUNCH __maxnreg__(160)
constexpr int PRODUCER_REGISTERS = 80, CONSUMER_REGISTERS = 200;
#else
#define LAUNCH __launch_bounds__(THREADS, 1)
constexpr int PRODUCER_REGISTERS = 72, CONSUMER_REGISTERS = 216;
#endif

struct Params {
  const int* offsets;       // [E + 1]
  const int* expert_order;  // [E], most rows first
  int* counter;             // zero at launch
  const u8* source;         // GATHER: [tokens, p_features]
  const int* row_token;     // GATHER: [S]
  int experts, p_features, q_features;
  u32 source_pitch;  // bytes from token to token
};

// Ticket -> tile: experts by rows, most first (the short ones fill the gaps at the end); of an expert Q tiles outer, P
// tiles inner, so that neighbours share Q in the L2. A tile's column is q tile << 16 | p tile.
//
// No warp is free to wait for the atomic and for the two dependent loads: they are begun at successive k-blocks, each
// used at the next; the last one is used at the first k-block of the tile that follows, because a tile may have only a
// few.
struct ExpertScheduler : TileScheduler {
  const int* offsets;
  const int* expert_order;
  int p_tiles, tiles_each, experts;
  bool ready;  // a tile is looked up and not yet published

  DEVICE ExpertScheduler(const Params& p, u32 ring_) {
    ring = ring_, published = 0, counter = p.counter, more = true, ready = false;
    offsets = p.offsets, expert_order = p.expert_order, experts = p.experts;
    p_tiles = (p.p_features + 255) / 256;
    tiles_each = p_tiles * ((p.q_features + 255) / 256);
  }
  DEVICE void look_up_expert() {
    const int place = ticket / tiles_each, within = ticket - place * tiles_each, q = within / p_tiles;
    const bool exists = place < experts;
    tile = Tile{exists ? __ldg(expert_order + place) : 0, 0, exists ? 0 : -1, q << 16 | (within - q * p_tiles)};
  }
  DEVICE void look_up_rows() {
    if (tile.rows < 0) return;
    tile.row = __ldg(offsets + tile.expert);
    tile.rows = __ldg(offsets + tile.expert + 1) - tile.row;
  }
  DEVICE void begin() {
    for (int i = 0; i < 2 && more; i++) {
      draw();
      look_up_expert();
      look_up_rows();
      publish<2>();
    }
  }
  DEVICE void step(int block, int blocks) {  // publishes the next tile, and looks up the one after it
    if (block == 0 && ready) publish<2>(), ready = false;
    if (!more) return;
    if (block == 0) draw();
    if (block == min(1, blocks - 1)) look_up_expert();
    if (block == min(2, blocks - 1)) look_up_rows(), ready = true;
  }
};

DEVICE int p_begin(const Tile& tile, u32 rank) { return (tile.column & 0xffff) * 256 + (int)rank * 128; }
DEVICE int q_begin(const Tile& tile) { return (tile.column >> 16) * 256; }
DEVICE int k_blocks(const Tile& tile) { return max(1, (tile.rows + K_BLOCK - 1) / K_BLOCK); }

#if GATHER
// One gathering thread copies chunk `chunk` (8 features) of the rows first + 12 i of both 64-feature boxes, i = 0..5:
// 96 threads are 12 rows of 8 chunks, and i = 5 exists for first < 4 only (60 + first < 64), which is warp 1: no
// divergence.
//
// Addresses: the swizzle puts chunk c of row r at chunk c ^ (r & 7). 12 is 4 modulo 8, so odd i have bit 2 of the
// chunk, bit 6 of the address, flipped: with even = stage + swizzled(first, chunk) and odd = even ^ 64, row i of box b
// lies at (i odd ? odd : even) + 1536 i + BLOCK_BYTES b, and all offsets are immediates.
//
// The row's token changes with every row: token numbers are loaded two k-blocks ahead, over the end of a tile too, by a
// second reader of the ring (the scheduler has published that tile by then).
#define COPY "cp.async.cg.shared.global.L2::256B "

class RowGather {
  static constexpr int STEPS = 6, STRIDE = 12;
  const Params& params;
  const u32 rank;
  Pipeline pipe;
  const int chunk, first;
  const bool sixth;
  TileReader current, ahead;
  const int* numbers;  // token numbers to load next, of `numbers_left` rows
  int numbers_left;
  bool numbers_more, more;
  const u8* column;         // this thread's chunk of token 0
  int left;                 // rows of the tile from this k-block on
  bool in_box_0, in_box_1;  // p_features may end inside a box

  DEVICE void follow_numbers(const Tile& tile) {
    numbers = params.row_token + tile.row + first;
    numbers_left = tile.rows;
  }
  DEVICE void follow(const Tile& tile) {
    const int feature = p_begin(tile, rank) + chunk * 8;
    in_box_0 = feature < params.p_features;
    in_box_1 = feature + 64 < params.p_features;
    column = params.source + (u64)(in_box_0 ? feature : 0) * 2;
    left = tile.rows;
  }
  DEVICE void load_numbers(int (&token)[STEPS]) {
    if (numbers_left >= K_BLOCK) {
#pragma unroll
      for (int i = 0; i < 5; i++) token[i] = __ldg(numbers + i * STRIDE);
      if (sixth) token[5] = __ldg(numbers + 5 * STRIDE);
    } else {
#pragma unroll
      for (int i = 0; i < STEPS; i++) token[i] = first + i * STRIDE < numbers_left ? __ldg(numbers + i * STRIDE) : 0;
    }
  }
  DEVICE void next_numbers(int (&token)[STEPS]) {
    if (!numbers_more) return;
    numbers += K_BLOCK, numbers_left -= K_BLOCK;
    if (numbers_left <= 0) {
      Tile tile;
      numbers_more = ahead.next(tile);
      if (!numbers_more) return;
      follow_numbers(tile);
    }
    load_numbers(token);
  }

  // One k-block. Addresses stand in registers of their own before the wait, and the copies leave back to back: a copy
  // computed after the wait would queue behind the one before it until that has read its registers.
  DEVICE void copy(int (&token)[STEPS]) {
    const u8* row[STEPS];
    const u32 even = pipe.address<Shape>() + swizzled(first, chunk), odd = even ^ 64;
    if (left >= K_BLOCK && in_box_1) {
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        row[i] = column + (u64)(u32)token[i] * params.source_pitch;
        asm volatile("" : "+l"(row[i]));
      }
      next_numbers(token);
      pipe.wait_empty();
      // clang-format off
      asm volatile(COPY "[%0], [%2], 16;\n" COPY "[%0+8192], [%2+128], 16;\n"
                   COPY "[%1+1536], [%3], 16;\n" COPY "[%1+9728], [%3+128], 16;\n"
                   COPY "[%0+3072], [%4], 16;\n" COPY "[%0+11264], [%4+128], 16;\n"
                   COPY "[%1+4608], [%5], 16;\n" COPY "[%1+12800], [%5+128], 16;\n"
                   COPY "[%0+6144], [%6], 16;\n" COPY "[%0+14336], [%6+128], 16;" ::"r"(even), "r"(odd),
                   "l"(row[0]), "l"(row[1]), "l"(row[2]), "l"(row[3]), "l"(row[4])
                   : "memory");
      // clang-format on
      if (sixth)
        asm volatile(COPY "[%0+7680], [%1], 16;\n" COPY "[%0+15872], [%1+128], 16;" ::"r"(odd), "l"(row[5]) : "memory");
    } else {  // an expert's last k-block, or the last features: what is multiplied and does not exist becomes zeros
      const int multiplied = max((left + 15) & ~15, 16);
      u32 bytes_0[STEPS], bytes_1[STEPS];
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        const bool exists = first + i * STRIDE < left;
        row[i] = column + (u64)(exists ? (u32)token[i] : 0u) * params.source_pitch;
        bytes_0[i] = exists && in_box_0 ? 16 : 0;
        bytes_1[i] = exists && in_box_1 ? 16 : 0;
        asm volatile("" : "+l"(row[i]), "+r"(bytes_0[i]), "+r"(bytes_1[i]));
      }
      next_numbers(token);
      pipe.wait_empty();
#pragma unroll
      for (int i = 0; i < STEPS; i++)
        if ((i < 5 || sixth) && first + i * STRIDE < multiplied) {
          const u32 target = (i & 1 ? odd : even) + i * 1536;
          copy_16_or_zero(target, row[i], bytes_0[i]);
          copy_16_or_zero(target + BLOCK_BYTES, row[i] + 128, bytes_1[i]);
        }
    }
    barrier_arrive_after_copies(pipe.full_barrier());
    pipe.advance<Shape>();
    left -= K_BLOCK;
    if (left <= 0) {
      Tile tile;
      more = current.next(tile);
      if (more) follow(tile);
    }
  }

 public:
  DEVICE RowGather(const Params& params, Pipeline pipe, TileReader tiles, u32 rank, int thread)
      : params(params), rank(rank), pipe(pipe), chunk(thread & 7), first(thread >> 3), sixth(first < 4), current(tiles),
        ahead(tiles) {}

  DEVICE void run() {
    int even[STEPS], odd[STEPS];  // in turn: moving one to the other would wait for its loads
    Tile tile;
    more = numbers_more = current.next(tile);
    if (!more) return;
    ahead.taken++;
    follow_numbers(tile);
    follow(tile);
    load_numbers(even);
    next_numbers(odd);
    while (more) {
      copy(even);
      if (!more) break;
      copy(odd);
    }
  }
};
#endif

// One thread of each block: Q, half of it for both blocks; P too if its rows are not gathered.
DEVICE void load(const Params& p, const TensorMap* p_map, const TensorMap* q_map, Pipeline pipe, TileReader tiles,
                 u32 rank, u32 ring) {
  ExpertScheduler scheduler(p, ring);
  const bool schedules = rank == 0;
  if (schedules) scheduler.begin();
  Tile tile;
  while (tiles.next(tile)) {
    const int blocks = k_blocks(tile), p_feature = p_begin(tile, rank), q_feature = q_begin(tile) + (int)rank * 128;
    const int end = tile.row + tile.rows;
    for (int block = 0; block < blocks; block++) {
      if (schedules) scheduler.step(block, blocks);
      pipe.wait_empty();
      const u32 stage = pipe.address<Shape>(), full = pipe.full_barrier();
      const u32 target = stage + Shape::B_OFFSET + rank * 2 * BLOCK_BYTES;
      const int row = RAGGED_LOAD - tile.rows + block * K_BLOCK;
      if constexpr (GATHER) {
        barrier_arrive_expect(full, 4 * BLOCK_BYTES);
      } else {
        barrier_arrive_expect(full, 6 * BLOCK_BYTES);
        tma_load_4d(stage, p_map, full, p_feature, row, RAGGED_LOAD, end);
        tma_load_4d(stage + BLOCK_BYTES, p_map, full, p_feature + 64, row, RAGGED_LOAD, end);
      }
      tma_multicast_4d(target, q_map, full, q_feature, row, RAGGED_LOAD, end);
      tma_multicast_4d(target + BLOCK_BYTES, q_map, full, q_feature + 64, row, RAGGED_LOAD, end);
      pipe.advance<Shape>();
    }
  }
}

// The results of a consumer warpgroup on their way out: rounded, put into its buffer, fetched from there by the copy
// engine.
class Results {
  const TensorMap* map;
  const u32 buffer, rank, warpgroup, warp, lane;
  const bool storing;

  // A part ends up in the buffer once the part before it has been read.
  DEVICE void begin() const {
    if (storing) tma_store_wait_read<0>();
    sync_consumers(warpgroup);
  }
  // Sixteen Q features, from j of the part on. A thread has two P features of them: a, b are P features 0-7 and 8-15 of
  // the warp's sixteen at the first eight of Q; c, d at the other eight.
  DEVICE void put(int j, u32 a, u32 b, u32 c, u32 d) const {
    if constexpr (P_INNERMOST) {  // buffer [STORE_FEATURES q][64 p]
      const u32 q = j + (lane & 7) + (lane >> 4) * 8, chunk = warp * 2 + ((lane >> 3) & 1);
      store_matrices_transposed(buffer + swizzled(q, chunk), a, b, c, d);
    } else {  // STORE_FEATURES / 64 buffers [64 p][64 q]
      const u32 p = warp * 16 + (lane & 7) + ((lane >> 3) & 1) * 8, chunk = j / 8 + (lane >> 4);
      store_matrices(buffer + (chunk >> 3) * BLOCK_BYTES + swizzled(p, chunk & 7), a, b, c, d);
    }
  }
  DEVICE void end(const Tile& tile, int part) const {
    fence_async_shared();
    sync_consumers(warpgroup);
    if (!storing) return;
    const int p = p_begin(tile, rank) + (int)warpgroup * 64, q = q_begin(tile) + part * STORE_FEATURES;
    if constexpr (P_INNERMOST) {
      tma_store_3d(map, buffer, p, q, tile.expert);
    } else {
#pragma unroll
      for (int i = 0; i < STORE_FEATURES / 64; i++)
        tma_store_3d(map, buffer + i * BLOCK_BYTES, q + i * 64, p, tile.expert);
    }
    tma_store_commit();
  }

 public:
  DEVICE Results(const TensorMap* map, u32 stores, u32 rank, u32 warpgroup)
      : map(map), buffer(stores + warpgroup * STORE_BYTES), rank(rank), warpgroup(warpgroup),
        warp((threadIdx.x >> 5) & 3), lane(threadIdx.x & 31), storing((threadIdx.x & 127) == 0) {}

  // `pair(i)` is the thread's pair number i of this part, rounded.
  template <class Pair> DEVICE void store(const Tile& tile, int part, Pair pair) const {
    begin();
#pragma unroll
    for (int i = 0; i < STORE_FEATURES / 4; i += 4) put(4 * i, pair(i), pair(i + 1), pair(i + 2), pair(i + 3));
    end(tile, part);
  }
  DEVICE void finish() const {
    if (storing) tma_store_wait<0>();
  }
};

// Pair number i of a thread's sums.
DEVICE u32 rounded(const float* sums, int i) { return ELEMENT::pack(sums[2 * i], sums[2 * i + 1]); }

DEVICE void consume(const TensorMap* map, Pipeline pipe, TileReader tiles, u32 rank, u32 warpgroup, u32 stores) {
  const Results results(map, stores, rank, warpgroup);
  Tile tile;
#if STORE_FEATURES == 256
  // The store runs on while the next tile is multiplied; it is waited for only when its buffer is written again.
  while (tiles.next(tile)) {
    Accumulators<Shape> sums;
    multiply_ragged<Shape, 256>(sums, pipe, warpgroup * BLOCK_BYTES, tile.rows);
    results.store(tile, 0, [&](int i) { return rounded(sums[0], i); });
  }
#else
  // The second part would wait for the first to leave the buffer. It stays in registers instead, rounded, and goes
  // between two k-blocks of the next tile: behind the first one in one warpgroup and the second in the other, so that
  // one of them multiplies.
  u32 second[STORE_FEATURES / 4];
  Tile before;
  bool holds = false;
  const auto store_second = [&] {
    if (holds) results.store(before, 1, [&](int i) { return second[i]; });
    holds = false;
  };
  while (tiles.next(tile)) {
    Accumulators<Shape> sums;
    multiply_ragged<Shape, 256>(sums, pipe, warpgroup * BLOCK_BYTES, tile.rows, [&](int block) {
      if (block == (int)warpgroup) store_second();
    });
    store_second();  // a tile of one k-block
    results.store(tile, 0, [&](int i) { return rounded(sums[0], i); });
#pragma unroll
    for (int i = 0; i < STORE_FEATURES / 4; i++) second[i] = rounded(sums[0] + 64, i);
    before = tile, holds = true;
  }
  store_second();
#endif
  results.finish();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) LAUNCH
    wgrad(const __grid_constant__ TensorMap p_map, const __grid_constant__ TensorMap q_map,
          const __grid_constant__ TensorMap result, const __grid_constant__ Params params) {
  extern __shared__ u8 shared[];
  const Frame<Shape, 2 * STORE_BYTES, GATHER ? GATHER_THREADS + 1 : 1> frame(shared);
  if (frame.warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) load(params, &p_map, &q_map, frame.pipe, frame.tiles, frame.rank, frame.ring());
#if GATHER
    if (threadIdx.x >= 32) RowGather(params, frame.pipe, frame.tiles, frame.rank, threadIdx.x - 32).run();
#endif
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(&result, frame.pipe, frame.tiles, frame.rank, frame.warpgroup - 1, frame.buffers());
  }
  __syncwarp();
  frame.end();
}
