// The multiplying half of every GEMM here: a ring of stages in shared memory, filled by producers (copy engine or
// cp.async), drained by two consumer warpgroups that issue wgmma on them.
//
// A Shape says what a stage holds:
//   Element            Bf16 or F16
//   STAGES             ring length
//   STAGE_BYTES        bytes of a stage: operand A (features, wgmma's M), then operand B (tokens, wgmma's N)
//   B_OFFSET           bytes of operand A
//   BLOCKS             m64 tiles of a consumer warpgroup; each is BLOCK_BYTES of operand A
//   WIDTH              most tokens (N) of a tile, at most 256
//   NARROWEST          the first N class: a short tile runs the narrowest class that holds it
//   wider(n)           the class after n, the last one is WIDTH; each costs a tenth of a second to compile
//   A_MN_MAJOR, B_MN_MAJOR   operand rows run along k in memory (imm-trans 1) instead of along features / tokens
//   GATHERED           part of a stage is written by cp.async, so a proxy fence precedes the wgmma that reads it
//
// Barriers: full[s] completes when a stage is filled; empty[s] when all consumer warpgroups of both blocks of the
// cluster are done with it: each of them arrives once at either block (threads 0 and 1), 4 arrivals. Both blocks'
// copies are released together because half of one operand is multicast.
#pragma once
#include "hopper.cuh"

constexpr u32 EMPTY_ARRIVALS = 4;

struct Pipeline {
  u32 full, empty, base;  // addresses: barriers (8 bytes each) and stage 0
  u32 stage, parity;

  template <class Shape> DEVICE u32 address() const { return base + stage * Shape::STAGE_BYTES; }
  DEVICE u32 full_barrier() const { return full + stage * 8; }
  DEVICE void wait_full() const { barrier_wait(full + stage * 8, parity); }
  // Producers are a lap behind: the first wait on a fresh barrier must pass.
  DEVICE void wait_empty() const { barrier_wait(empty + stage * 8, parity ^ 1); }
  DEVICE void release() const {
    if ((threadIdx.x & 127) < 2) barrier_arrive_in_block(empty + stage * 8, threadIdx.x & 127);
  }
  template <class Shape> DEVICE void advance() {
    if (++stage == Shape::STAGES) stage = 0, parity ^= 1;
  }
};

// One thread of a block, before anybody else sees the barriers.
template <class Shape> DEVICE void pipeline_init(const Pipeline& pipe, u32 full_arrivals) {
  for (int stage = 0; stage < Shape::STAGES; stage++) {
    barrier_init(pipe.full + stage * 8, full_arrivals);
    barrier_init(pipe.empty + stage * 8, EMPTY_ARRIVALS);
  }
}

// The four warps of one consumer warpgroup, 0 or 1, wait for each other.
DEVICE void sync_consumers(u32 warpgroup) {
  if (warpgroup == 0)
    warpgroup_sync<1>();
  else
    warpgroup_sync<2>();
}

template <class Shape> using Accumulators = float[Shape::BLOCKS][Shape::WIDTH / 2];

// `Steps` times 16 k of the stage that comes next, for N token columns; `first`: the old sums do not count.
template <class Shape, int N, int Steps>
DEVICE void multiply_block(Accumulators<Shape>& sums, Pipeline& pipe, u32 a_offset, bool first) {
  typedef Wgmma<N, typename Shape::Element, Shape::A_MN_MAJOR, Shape::B_MN_MAJOR> Issued;
  constexpr int A_STEP = Shape::A_MN_MAJOR ? MN_MAJOR_STEP : K_MAJOR_STEP;
  constexpr int B_STEP = Shape::B_MN_MAJOR ? MN_MAJOR_STEP : K_MAJOR_STEP;
  pipe.wait_full();
  if (Shape::GATHERED) fence_async_shared();
  wgmma_fence();
  const u32 at = pipe.address<Shape>() + a_offset, bt = pipe.address<Shape>() + Shape::B_OFFSET;
  const u64 a = Shape::A_MN_MAJOR ? descriptor_mn_major(at) : descriptor_k_major(at);
  const u64 b = Shape::B_MN_MAJOR ? descriptor_mn_major(bt) : descriptor_k_major(bt);
#pragma unroll
  for (int k = 0; k < Steps; k++)
#pragma unroll
    for (int m = 0; m < Shape::BLOCKS; m++)
      Issued::issue(sums[m], a + m * BLOCK_STEP + k * A_STEP, b + k * B_STEP, !first || k != 0);
  wgmma_commit();
  wgmma_wait<0>();
  pipe.release();
  pipe.advance<Shape>();
}

// One tile with N token columns: all of a consumer warpgroup. The result overwrites the accumulators.
// The loop stays rolled: unrolled by the compiler it takes five times as long to compile and is no faster.
template <class Shape, int N>
DEVICE void multiply(Accumulators<Shape>& sums, Pipeline& pipe, u32 a_offset, int k_blocks) {
#pragma unroll 1
  for (int block = 0; block < k_blocks; block++) multiply_block<Shape, N, 4>(sums, pipe, a_offset, block == 0);
}

struct Nothing {
  DEVICE void operator()(int) const {}
};

// The same for `rows` of k, of which the last block has only as many steps of 16 as hold any; at least one block.
// Behind every whole block `then` is called with its number.
template <class Shape, int N, class Then = Nothing>
DEVICE void multiply_ragged(Accumulators<Shape>& sums, Pipeline& pipe, u32 a_offset, int rows, Then then = {}) {
  const int whole = rows / 64, steps = (rows % 64 + 15) / 16;
#pragma unroll 1
  for (int block = 0; block < whole; block++) {
    multiply_block<Shape, N, 4>(sums, pipe, a_offset, block == 0);
    then(block);
  }
  const bool first = whole == 0;
  if (steps == 4)
    multiply_block<Shape, N, 4>(sums, pipe, a_offset, first);
  else if (steps == 3)
    multiply_block<Shape, N, 3>(sums, pipe, a_offset, first);
  else if (steps == 2)
    multiply_block<Shape, N, 2>(sums, pipe, a_offset, first);
  else if (steps == 1 || first)
    multiply_block<Shape, N, 1>(sums, pipe, a_offset, first);
}

// The same for a run-time number of columns: the whole k loop is inside the class, so the choice costs one branch a
// tile.
template <class Shape, int N = Shape::NARROWEST>
DEVICE void multiply_class(int columns, Accumulators<Shape>& sums, Pipeline& pipe, u32 a_offset, int k_blocks) {
  if constexpr (N >= Shape::WIDTH) {
    multiply<Shape, Shape::WIDTH>(sums, pipe, a_offset, k_blocks);
  } else {
    if (columns <= N)
      multiply<Shape, N>(sums, pipe, a_offset, k_blocks);
    else
      multiply_class<Shape, Shape::wider(N)>(columns, sums, pipe, a_offset, k_blocks);
  }
}
