// The frame of every kernel whose clusters of two blocks work through tiles by ticket: what comes before the roles of
// the warpgroups and behind them, and a block's share of a tile.
//
//   extern __shared__ u8 shared[];
//   const Frame<...> frame(shared);      the barriers are set up, and seen by both blocks
//   if (frame.warpgroup == 0) {          a role for each warpgroup, with the registers that its threads keep
//     give_registers<PRODUCER_REGISTERS>();
//     ...
//   }
//   __syncwarp();
//   frame.end();
//
// Shared memory: the stages, `BufferBytes` of the kernel's own, the barriers full[stage] and empty[stage], one for each
// of `Arrivals` (barrier(0), barrier(1) …), the ring of tiles.
#pragma once
#include "mainloop.cuh"
#include "tickets.cuh"

// What a launch reserves for the barriers and the ring, and for aligning the first stage.
constexpr u32 FRAME_BYTES = 1536;

template <class Shape, u32 BufferBytes, u32 FullArrivals, u32... Arrivals> struct Frame {
  static constexpr u32 BUFFERS = Shape::STAGES * Shape::STAGE_BYTES;
  static constexpr u32 FULL = BUFFERS + BufferBytes, EMPTY = FULL + Shape::STAGES * 8, OWN = EMPTY + Shape::STAGES * 8;
  static constexpr u32 RING = (OWN + sizeof...(Arrivals) * 8 + 15) / 16 * 16, END = RING + RING_BYTES;
  static_assert(END - FULL + 1023 <= FRAME_BYTES);

  const u32 base, rank, warpgroup;
  const Pipeline pipe;
  const TileReader tiles;

  DEVICE explicit Frame(const u8* shared)
      : base(align_1024(shared_address(shared))), rank(cluster_rank()), warpgroup(warpgroup_index()),
        pipe{base + FULL, base + EMPTY, base, 0, 0}, tiles{base + RING, 0} {
    if (threadIdx.x == 0) {
      pipeline_init<Shape>(pipe, FullArrivals);
      u32 own = base + OWN;
      ((barrier_init(own, Arrivals), own += 8), ...);
      ring_init(base + RING);
      fence_barrier_init();
    }
    cluster_sync();
  }

  DEVICE u32 buffers() const { return base + BUFFERS; }
  DEVICE u32 barrier(int i) const { return base + OWN + i * 8; }
  DEVICE u32 ring() const { return base + RING; }

  // All threads, the warps converged again: a block must not leave while its peer may still write to it.
  DEVICE void end() const { cluster_sync(); }
};

// A cluster's tile as one of its blocks sees it, where the blocks split the rows: half of them, in multiples of 8 (a
// width of wgmma). Both blocks multiply the same width; the second may own no row at all: nothing of it is stored.
struct Share {
  int expert, row, rows, width, feature, column;
};

// `features` of the tile's columns.
DEVICE Share share_of(const Tile& tile, u32 rank, int features) {
  const int width = ((tile.rows + 1) / 2 + 7) & ~7, before = (int)rank * width;
  const int row = tile.row + before, rows = min(max(tile.rows - before, 0), width);
  return {tile.expert, row, rows, width, tile.column * features, tile.column};
}
