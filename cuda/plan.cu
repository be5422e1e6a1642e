// The planner on the device: a stable counting sort of the slots by expert in two launches (one for few slots), and the
// tile table of a verb. Nothing depends on the order in which blocks run, so the result is the host planner's, bit for
// bit.
//
// Slots are cut into `chunks` contiguous chunks of `chunk_slots`, a block each.
//   plan_count    counts[chunk][bucket]: how many slots of the chunk go to each bucket
//   plan_scatter  every block sums the columns of `counts` (all chunks: the experts' totals; earlier chunks: its own
//                 start in each expert), then ranks its slots in order and writes them
// Buckets are the E experts and one more, E, for sentinels (ids outside 0 … E - 1).
#include "base.cuh"

struct PlanParams {
  const void* ids;
  int* counts;   // [chunks, E + 1]
  int* order;    // row -> slot
  int* inverse;  // slot -> row
  int* offsets;  // [E + 1]
  int slots, experts, chunks, chunk_slots;
  int id_type;  // 0 u8, 1 u16, 2 i32, 3 i64
};

constexpr int WARPS = 32, THREADS = 1024;
constexpr int PER_THREAD = 2;
constexpr int PASS = THREADS * PER_THREAD;  // slots ranked at once

DEVICE int bucket_of(const PlanParams& p, int slot) {
  long long id;
  if (p.id_type == 3)
    id = __ldg((const long long*)p.ids + slot);
  else if (p.id_type == 2)
    id = __ldg((const int*)p.ids + slot);
  else if (p.id_type == 1)
    id = __ldg((const u16*)p.ids + slot);
  else
    id = __ldg((const u8*)p.ids + slot);
  return id >= 0 && id < p.experts ? (int)id : p.experts;
}

extern "C" __global__ void __launch_bounds__(THREADS) plan_count(const __grid_constant__ PlanParams p) {
  extern __shared__ int histogram[];  // E + 1
  const int buckets = p.experts + 1;
  for (int b = threadIdx.x; b < buckets; b += THREADS) histogram[b] = 0;
  __syncthreads();
  const int first = blockIdx.x * p.chunk_slots, end = min(first + p.chunk_slots, p.slots);
  for (int slot = first + threadIdx.x; slot < end; slot += THREADS) atomicAdd(histogram + bucket_of(p, slot), 1);
  __syncthreads();
  for (int b = threadIdx.x; b < buckets; b += THREADS) p.counts[blockIdx.x * buckets + b] = histogram[b];
}

// Exclusive sum over the threads of a block; `partial` holds a word for each warp.
DEVICE int scan_block(int value, int* partial) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(ALL_LANES, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) partial[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int total = partial[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(ALL_LANES, total, step);
      if (lane >= step) total += other;
    }
    partial[lane] = total;
  }
  __syncthreads();
  const int before = warp ? partial[warp - 1] : 0;
  __syncthreads();
  return before + sum - value;
}

extern "C" __global__ void __launch_bounds__(THREADS) plan_scatter(const __grid_constant__ PlanParams p) {
  // start[bucket]: the row of this block's next slot of that bucket. warps[warp][bucket]: first a warp's count of the
  // present pass, then the sum over the warps before it. Both scratch: totals and partial sums of the column sums.
  extern __shared__ int shared[];
  const int buckets = p.experts + 1;
  int* start = shared;
  int* total = start + buckets;
  int* partial = total + buckets;
  int* warps = partial + WARPS;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int first = blockIdx.x * p.chunk_slots, end = min(first + p.chunk_slots, p.slots);

  for (int b = thread; b < buckets; b += THREADS) start[b] = 0, total[b] = 0;
  __syncthreads();
  if (p.chunks == 1) {
    for (int slot = thread; slot < p.slots; slot += THREADS) atomicAdd(total + bucket_of(p, slot), 1);
  } else {
    // Several threads a column where there are fewer buckets than threads.
    const int groups = max(THREADS / buckets, 1);
    for (int item = thread; item < groups * buckets; item += THREADS) {
      const int b = item % buckets, group = item / buckets;
      int all = 0, before = 0;
#pragma unroll 8
      for (int chunk = group; chunk < p.chunks; chunk += groups) {
        const int count = __ldg(p.counts + chunk * buckets + b);
        all += count;
        if (chunk < (int)blockIdx.x) before += count;
      }
      if (all) atomicAdd(total + b, all);
      if (before) atomicAdd(start + b, before);
    }
  }
  __syncthreads();
  // Exclusive sums of the totals: a thread owns consecutive buckets (two at most: E <= 1024).
  const int b0 = thread * 2, b1 = b0 + 1;
  const int t0 = b0 < buckets ? total[b0] : 0, t1 = b1 < buckets ? total[b1] : 0;
  const int before = scan_block(t0 + t1, partial);
  if (b0 < buckets) start[b0] += before;
  if (b1 < buckets) start[b1] += before + t0;
  if (blockIdx.x == 0) {
    if (b0 < buckets) p.offsets[b0] = before;
    if (b1 < buckets) p.offsets[b1] = before + t0;
  }

  for (int base = first; base < end; base += PASS) {
    for (int i = thread; i < WARPS * buckets; i += THREADS) warps[i] = 0;
    __syncthreads();
    // Warp w ranks the slots base + 64 w …, 32 at a time, in order.
    int bucket[PER_THREAD], rank[PER_THREAD];
    int* own = warps + warp * buckets;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const int slot = base + (warp * PER_THREAD + i) * 32 + lane;
      bucket[i] = slot < end ? bucket_of(p, slot) : -1;
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const u32 same = __match_any_sync(ALL_LANES, bucket[i]);
      if (bucket[i] >= 0) rank[i] = own[bucket[i]] + __popc(same & ((1u << lane) - 1));
      __syncwarp();
      if (bucket[i] >= 0 && lane == __ffs(same) - 1) own[bucket[i]] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    for (int b = thread; b < buckets; b += THREADS) {
      int sum = start[b];
#pragma unroll 8
      for (int w = 0; w < WARPS; w++) {
        const int count = warps[w * buckets + b];
        warps[w * buckets + b] = sum;
        sum += count;
      }
      start[b] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const int slot = base + (warp * PER_THREAD + i) * 32 + lane;
      if (slot < end) {
        const int row = own[bucket[i]] + rank[i];
        p.inverse[slot] = row;
        p.order[row] = slot;
      }
    }
    __syncthreads();
  }
}

// The tables of one verb: row tiles (tickets.cuh), experts by rows (most first, then by number), and the ticket
// counters set to zero. Block b < TABLES writes the table of tiles of up to 256 + 16 b rows, the next one, if there is
// one, the experts' order.
//
// 256 is what one wgmma can take. A block of up.cu and dh.cu has half of a tile's rows and so takes somewhat more:
// where an expert has 256 rows on average, as powers of two make it, half of the experts have some more and need no
// second tile.
constexpr int TABLES = 3, LOWEST_TILES = 256, TILES_STEP = 16;

struct TilesParams {
  const int* offsets;  // [E + 1]
  int4* table[3];      // [1 + row tiles], TABLES of them
  int* expert_order;   // [E], or null
  int* counters;
  int experts, counter_count;
};

constexpr int BAND = 8, GRANULE = 16;

// Rows of a tile: as few tiles as possible, all of one size in multiples of 16 (256 + 14 rows would cost two full
// tiles).
DEVICE int even_split(int rows, int most) {
  const int count = max((rows + most - 1) / most, 1);
  return max(min(((rows + count - 1) / count + GRANULE - 1) / GRANULE * GRANULE, most), GRANULE);
}

extern "C" __global__ void __launch_bounds__(THREADS) tiles(const __grid_constant__ TilesParams p) {
  __shared__ int rows_of[THREADS], first_tile[THREADS], partial[WARPS];
  const int e = threadIdx.x;
  const int first = e < p.experts ? __ldg(p.offsets + e) : 0;
  const int rows = e < p.experts ? __ldg(p.offsets + e + 1) - first : 0;
  rows_of[e] = rows;
  if (blockIdx.x == TABLES) {
    __syncthreads();
    if (e >= p.experts) return;
    int rank = 0;
#pragma unroll 8
    for (int other = 0; other < p.experts; other++)
      rank += rows_of[other] > rows || (rows_of[other] == rows && other < e);
    p.expert_order[rank] = e;
    return;
  }
  if (blockIdx.x == 0)
    for (int i = e; i < p.counter_count; i += THREADS) p.counters[i] = 0;

  const int most = LOWEST_TILES + TILES_STEP * (int)blockIdx.x;
  int4* const table = p.table[blockIdx.x];
  const int size = even_split(rows, most), count = (rows + size - 1) / size;
  const int before = scan_block(count, partial);
  first_tile[e] = before;
  if (e == THREADS - 1) table[0] = make_int4(before + count, 0, 0, 0);
  __syncthreads();

  // A warp writes the tiles of an expert, so that one expert taking all rows is not one thread's work.
  const int lane = e & 31;
  for (int expert = e >> 5; expert < p.experts; expert += WARPS) {
    const int r = rows_of[expert], start = __ldg(p.offsets + expert), s = even_split(r, most), n = (r + s - 1) / s;
    for (int i = lane; i < n; i += 32) {
      const int place = i % BAND, band = min(BAND, n - (i - place));
      table[1 + first_tile[expert] + i] = make_int4(expert, start + i * s, min(s, r - i * s), place | band << 16);
    }
  }
}
