// Hopper's asynchronous machinery as one-line functions named by what they do: mbarriers, bulk tensor copies, wgmma,
// cp.async gathers, stmatrix, register hand-over. Every kernel that multiplies is written in these verbs.
//
// Conventions: `barrier` is the address of an 8-byte mbarrier; `bytes` counts what a transaction barrier still expects.
// Functions that must be executed by all threads of a warp or a warpgroup say so; everything else is meant for one
// elected thread.
#pragma once
#include "base.cuh"

// CUtensorMap, opaque; passed by value as a __grid_constant__ kernel parameter.
struct alignas(128) TensorMap {
  u64 opaque[16];
};

// ----------------------------------------------------------------------------------------------- places and identities

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 128-byte swizzled tiles repeat every 1024 bytes: stage bases must be aligned to that, and the launch promises
// 16 only.
DEVICE u32 align_1024(u32 address) { return (address + 1023) & ~1023u; }

DEVICE u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address of the same shared-memory location in another block of the cluster.
DEVICE u32 in_block(u32 address, u32 rank) {
  u32 mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Warpgroup index, known to the compiler to be uniform: setmaxnreg and role branches need that.
DEVICE u32 warpgroup_index() { return __shfl_sync(ALL_LANES, threadIdx.x / 128, 0); }

// ----------------------------------------------------------------------------------------------------------- mbarriers

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialisation visible to the copy engine and to the other blocks of the cluster (cluster_sync follows).
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives on the barrier of a block of the cluster. The plain form on purpose: `.release.cluster` compiles to a
// GPU-wide memory barrier before every arrive, worth 25 % of a GEMM; nothing written generically is published here.
DEVICE void barrier_arrive_in_block(u32 barrier, u32 rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_block(barrier, rank)) : "memory");
}

// Arrives once this thread's earlier cp.async have landed; counts as one of the barrier's expected arrivals.
DEVICE void barrier_arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// All threads of all blocks of the cluster (warps converged).
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Named barrier over one warpgroup. Literal ids: a run-time id makes the compiler reserve all sixteen.
template <int Id> DEVICE void warpgroup_sync() { asm volatile("bar.sync %0, 128;" ::"n"(Id) : "memory"); }

// --------------------------------------------------------------------------------------------------------- fences, PDL

// Orders this thread's generic shared-memory accesses (stmatrix, cp.async) before later ones of the copy engine and
// wgmma.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -------------------------------------------------------------------------------------------------- register hand-over

// All four warps of a warpgroup; the kernel needs __launch_bounds__(threads, 1).
template <int Count> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count)); }
template <int Count> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count)); }

// -------------------------------------------------------------------------------------------- bulk tensor copies (TMA)

#define TMA_LOAD(DIMENSIONS) "cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.mbarrier::complete_tx::bytes "
#define TMA_MULTICAST(DIMENSIONS) \
  "cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
#define TMA_STORE(DIMENSIONS) "cp.async.bulk.tensor." DIMENSIONS ".global.shared::cta.bulk_group "

// Multicast forms write the box to the same address in both blocks of a cluster of two and complete the barrier of
// each.

DEVICE void tma_load_2d(u32 target, const TensorMap* map, u32 barrier, int c0, int c1) {
  asm volatile(TMA_LOAD("2d") "[%0], [%1, {%3, %4}], [%2];" ::"r"(target), "l"(map), "r"(barrier), "r"(c0), "r"(c1)
               : "memory");
}

DEVICE void tma_load_3d(u32 target, const TensorMap* map, u32 barrier, int c0, int c1, int c2) {
  asm volatile(TMA_LOAD("3d") "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target), "l"(map), "r"(barrier), "r"(c0), "r"(c1),
               "r"(c2)
               : "memory");
}

DEVICE void tma_load_4d(u32 target, const TensorMap* map, u32 barrier, int c0, int c1, int c2, int c3) {
  asm volatile(TMA_LOAD("4d") "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target), "l"(map), "r"(barrier), "r"(c0),
               "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

DEVICE void tma_multicast_2d(u32 target, const TensorMap* map, u32 barrier, int c0, int c1) {
  asm volatile(TMA_MULTICAST("2d") "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target), "l"(map), "r"(barrier), "r"(c0),
               "r"(c1), "h"((u16)3)
               : "memory");
}

DEVICE void tma_multicast_3d(u32 target, const TensorMap* map, u32 barrier, int c0, int c1, int c2) {
  asm volatile(TMA_MULTICAST("3d") "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(target), "l"(map), "r"(barrier), "r"(c0),
               "r"(c1), "r"(c2), "h"((u16)3)
               : "memory");
}

DEVICE void tma_multicast_4d(u32 target, const TensorMap* map, u32 barrier, int c0, int c1, int c2, int c3) {
  asm volatile(TMA_MULTICAST("4d") "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(target), "l"(map), "r"(barrier),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"((u16)3)
               : "memory");
}

DEVICE void tma_store_3d(const TensorMap* map, u32 source, int c0, int c1, int c2) {
  asm volatile(TMA_STORE("3d") "[%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

DEVICE void tma_store_4d(const TensorMap* map, u32 source, int c0, int c1, int c2, int c3) {
  asm volatile(TMA_STORE("4d") "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(source), "r"(c0), "r"(c1), "r"(c2),
               "r"(c3)
               : "memory");
}

#undef TMA_LOAD
#undef TMA_MULTICAST
#undef TMA_STORE

DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most `Pending` of this thread's store groups still read shared memory …
template <int Pending> DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// … or are not yet complete. The storing thread waits for all of them before its block exits.
template <int Pending> DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// Ragged boxes: a tensor of rows is described with one or two extra dimensions, shifted by S rows, so that the hardware
// clips a box at the last row although the next expert's rows follow in memory (cuda/README.md). Row r of `rows` rows
// that begin at `first`:
//   store map, S = RAGGED_STORE: {features, S, 2^31-1}, base - S rows
//                                coordinates (f, S - rows + r, first + rows)
//   load map, S = RAGGED_LOAD:   {features, S, 2^31-1, 2^31-1}, strides s, 2^35 - s, s
//                                coordinates (f, S - rows + r, S, first + rows)
// The driver takes bases from 0 to 2^57 only, and virtual memory begins low: a store's shift is as short as its rows
// allow, those of a tile. A load's rows are all of an expert's; its map has the tensor's own base, and the shift, a
// multiple of 2^64 bytes, is in the coordinates, where the copy engine counts modulo 2^64.
constexpr int RAGGED_STORE = 512, RAGGED_LOAD = 1 << 30;

// --------------------------------------------------------------------------------------------------------------- wgmma

// Operands are made of swizzled blocks: 64 lines of 64 16-bit elements.
constexpr u32 BLOCK_BYTES = 64 * 128;
// The next 64 rows of a K-major tile, the next 64 m of an MN-major one: a block further.
constexpr int BLOCK_STEP = BLOCK_BYTES / 16;

// Operand descriptors for 128-byte swizzled tiles of 64 16-bit elements a row.
// K-major: rows of 64 k; stride between groups of 8 rows 1024 B. 16 k further: address + 32 B, descriptor + 2.
DEVICE u64 descriptor_k_major(u32 address) {
  return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((address & 0x3FFFF) >> 4);
}
constexpr int K_MAJOR_STEP = 2;
// MN-major: rows of 64 m (or n), 64 k rows a block; the leading offset steps to the next 64 m. 16 k further:
// 16 rows of 128 B = 2048 B, descriptor + 128.
DEVICE u64 descriptor_mn_major(u32 address) {
  return (1ull << 62) | (64ull << 32) | ((u64)BLOCK_STEP << 16) | ((address & 0x3FFFF) >> 4);
}
constexpr int MN_MAJOR_STEP = 128;

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending> DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Wgmma<N, Element, TransposeA, TransposeB>::issue(accumulators, a, b, accumulate): m64nNk16, fp32 accumulators. The
// 64 specialisations are text without information, so the loader generates them (moekern/backends/cuda/build/wgmma.py).
template <int N, class Element, int TransposeA, int TransposeB> struct Wgmma;
#include "wgmma.cuh"

// ---------------------------------------------------------------------------------------------------- gather: cp.async

#define COPY_16 "cp.async.cg.shared.global.L2::256B "

// Two or three 16-byte copies back to back. One asm block, because a copy keeps its address registers busy until the
// memory pipe has read them: with a register pair for each row, made before the slot is waited for and advanced in
// place, all copies of a k-block issue in a row; written one by one the compiler recycles a few pairs and each copy
// waits (8-11 % of the up projection). Blocks of eight operands make it recycle them too. Look at the SASS after every
// change near a use of these: the LDGSTS of the common path must name distinct registers.
DEVICE void copy_rows(u32 a, u32 b, const u8* first, const u8* second) {
  asm volatile(COPY_16 "[%0], [%2], 16;\n" COPY_16 "[%1], [%3], 16;" ::"r"(a), "r"(b), "l"(first), "l"(second)
               : "memory");
}
DEVICE void copy_rows(u32 a, u32 b, u32 c, const u8* first, const u8* second, const u8* third) {
  asm volatile(COPY_16 "[%0], [%3], 16;\n" COPY_16 "[%1], [%4], 16;\n" COPY_16 "[%2], [%5], 16;" ::"r"(a), "r"(b),
               "r"(c), "l"(first), "l"(second), "l"(third)
               : "memory");
}

DEVICE void copy_16(u32 target, const u8* source) {
  asm volatile(COPY_16 "[%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// Copies `bytes` (0 or 16) and fills the rest with zeros; with 0 the source is not read.
DEVICE void copy_16_or_zero(u32 target, const u8* source, u32 bytes) {
  asm volatile(COPY_16 "[%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

#undef COPY_16

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"); }

// The 16-byte chunk of a row inside a 128-byte swizzled tile: what the copy engine writes with SWIZZLE_128B.
DEVICE u32 swizzled(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// ------------------------------------------------------------------------------------------- matrices to shared memory

// Four 8x8 matrices of 16-bit elements; lane l supplies the address of row l % 8 of matrix l / 8. All lanes.
DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
DEVICE void store_matrices_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
// Two of them: lanes 0 to 15 supply the addresses.
DEVICE void store_two_matrices_transposed(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}
