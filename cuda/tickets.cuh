// Work by ticket: the tile table and its order, the ring through which one thread of a cluster hands tiles to every
// role.
//
// A table (plan.cu, kernel `tiles`) has one entry for every row tile: an expert's rows are split evenly over ceil(rows
// / 256) tiles, or 272, or 288: there is a table for each. A GEMM has `columns` feature tiles for each row tile.
// Tickets are numbered so that bands of up to eight row tiles of one expert share the feature tile's weights in the L2:
// expert, band, feature tile, row tile (innermost).
//
//   table[0]     {row tiles, 0, 0, 0}
//   table[1 + i] {expert, first row, rows, place in its band | band size << 16}
//
// A band that starts at row tile s and holds b of them owns the tickets s * columns … (s + b) * columns - 1, so
// ticket / columns is some row tile of the right band, whose entry tells where in the band the ticket lies: no search.
//
// Hand-over: RING slots of an mbarrier (one arrival, 16 bytes) and a 16-byte entry in each block. The scheduler (one
// thread of block 0) publishes at most two tiles ahead of the role it follows; a slot comes round again after 16 tiles,
// and the pipeline of stages keeps all roles of a cluster within fewer tiles of each other, so nobody returns slots.
#pragma once
#include "hopper.cuh"

struct Tile {
  int expert, row, rows, column;  // rows < 0: no more tiles. column counts feature tiles
};

constexpr int RING = 16;
constexpr int RING_BYTES = RING * 8 + RING * 16;

DEVICE void ring_init(u32 ring) {
  for (int slot = 0; slot < RING; slot++) barrier_init(ring + slot * 8, 1);
}

struct TileReader {
  u32 ring, taken;

  DEVICE bool next(Tile& tile) {
    const u32 slot = taken % RING;
    barrier_wait(ring + slot * 8, (taken / RING) & 1);
    taken++;
    const uint4 entry = load_shared(ring + RING * 8 + slot * 16);
    tile.expert = entry.x, tile.row = entry.y, tile.rows = entry.z, tile.column = entry.w;
    return tile.rows >= 0;
  }
};

struct TileScheduler {
  u32 ring, published;
  const int4* table;
  int* counter;  // zero at launch
  int columns;
  int tickets;  // row tiles * columns
  bool more;
  int ticket;
  Tile tile;

  DEVICE void begin(u32 ring_, const int4* table_, int columns_, int* counter_) {
    ring = ring_, published = 0, table = table_, columns = columns_, counter = counter_;
    tickets = __ldg(&table[0].x) * columns;
    more = true;
  }

  DEVICE void draw() { ticket = atomicAdd(counter, 1); }

  DEVICE void look_up() {
    if (ticket >= tickets) {
      tile = Tile{0, 0, -1, 0};
      return;
    }
    const int near = ticket / columns;
    int4 entry = __ldg(table + 1 + near);
    const int start = near - (entry.w & 0xffff), band = entry.w >> 16;
    const int place = ticket - start * columns;
    const int column = place / band, row_tile = start + place - column * band;
    if (row_tile != near) entry = __ldg(table + 1 + row_tile);
    tile = Tile{entry.x, entry.y, entry.z, column};
  }

  // To every block of the cluster: the entry arrives with 16 transaction bytes.
  template <int Blocks> DEVICE void publish() {
    const u32 slot = published % RING;
    published++;
#pragma unroll
    for (int rank = 0; rank < Blocks; rank++) {
      const u32 barrier = in_block(ring + slot * 8, rank), target = in_block(ring + RING * 8 + slot * 16, rank);
      asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], 16;" ::"r"(barrier) : "memory");
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
          "r"(tile.expert), "r"(tile.row), "r"(tile.rows), "r"(tile.column), "r"(barrier)
          : "memory");
    }
    more = tile.rows >= 0;
  }

  template <int Blocks> DEVICE void advance() {
    draw();
    look_up();
    publish<Blocks>();
  }

  // For a thread with no other work, in clusters of two: publishes a tile when the copies of the one before it begin.
  // The producer arrives on `begun` (one arrival) at each tile; it cannot arrive twice unseen, because a tile is
  // published only after the arrival of the last one was seen.
  DEVICE void follow(u32 begun) {
    advance<2>();
    for (u32 parity = 0; more; parity ^= 1) {
      draw();
      look_up();
      barrier_wait(begun, parity);
      publish<2>();
    }
  }
};

// All that the thread of TileScheduler::follow does.
DEVICE void draw_tickets(const int4* table, int columns, int* counter, u32 ring, u32 begun) {
  TileScheduler scheduler;
  scheduler.begin(ring, table, columns, counter);
  scheduler.follow(begun);
}
