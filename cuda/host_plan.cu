// Both ends of a plan that the host makes of ids on the device: the ids cross the bus once, in the narrowest type, and
// what comes back is a 16-bit rank a slot and a table of rows, whose sum is the slot's row
// (rust/core/src/plan/ranks.rs). Host memory is read and written in place (pinned memory has an address on the device),
// so that each way is one launch and no copy of the driver's. Whatever is read is asked for at once, before any of it
// is used: a trip over the bus takes a microsecond.
#include "base.cuh"

constexpr int THREADS = 256;

// The buckets of N slots from `first` on; an id that names no expert becomes E, which names none in the narrow type
// either. What lies past the end repeats the last slot.
template <typename Id, int N>
DEVICE void load_buckets(u32 (&bucket)[N], const void* ids, u32 first, u32 slots, int experts) {
  constexpr int OF_VECTOR = 16 / sizeof(Id);
  const Id* from = (const Id*)ids + first;
  alignas(16) Id id[N];
  bool loaded = false;
  if constexpr (N % OF_VECTOR == 0) {
    loaded = first + N <= slots && (u64)from % 16 == 0;
    if (loaded) {
#pragma unroll
      for (int i = 0; i < N / OF_VECTOR; i++) *(int4*)&id[i * OF_VECTOR] = __ldg((const int4*)from + i);
    }
  }
  if (!loaded) {
#pragma unroll
    for (int i = 0; i < N; i++) id[i] = __ldg((const Id*)ids + min(first + i, slots - 1));
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const long long wide = id[i];
    bucket[i] = wide >= 0 && wide < experts ? (u32)wide : (u32)experts;
  }
}

template <int N>
DEVICE void load_buckets(u32 (&bucket)[N], const void* ids, int id_type, u32 first, u32 slots, int experts) {
  switch (id_type) {  // 0 u8, 1 u16, 2 i32, 3 i64
    case 0: return load_buckets<u8>(bucket, ids, first, slots, experts);
    case 1: return load_buckets<u16>(bucket, ids, first, slots, experts);
    case 2: return load_buckets<int>(bucket, ids, first, slots, experts);
    default: return load_buckets<long long>(bucket, ids, first, slots, experts);
  }
}

struct NarrowParams {
  const void* ids;
  uint4* out;  // on the host, a multiple of 16 bytes
  u32* marks;  // on the host, one a block
  u32 slots;
  int experts, id_type;
  int bytes;  // of an id in `out`: 1, 2 or 4
  u32 epoch;  // what a mark becomes when its block's ids are there
  u32 unused;
};
static_assert(sizeof(NarrowParams) == 48, "filled by rust/python/src/cuda_plan.rs");

constexpr int MARK_WORDS = 16;  // from one mark to the next: a cache line of the host's

// A thread fills 16 bytes: the bus wants whole lines.
template <int BYTES>
DEVICE void narrow(const NarrowParams& p) {
  constexpr int IDS = 16 / BYTES;
  const u32 unit = blockIdx.x * THREADS + threadIdx.x;
  if ((u64)unit * IDS >= p.slots) return;
  u32 bucket[IDS], word[4] = {};
  load_buckets(bucket, p.ids, p.id_type, unit * IDS, p.slots, p.experts);
#pragma unroll
  for (int i = 0; i < IDS; i++) word[i * BYTES / 4] |= bucket[i] << (8 * (i * BYTES % 4));
  p.out[unit] = make_uint4(word[0], word[1], word[2], word[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS) narrow_ids(const __grid_constant__ NarrowParams p) {
  if (p.bytes == 1)
    narrow<1>(p);
  else if (p.bytes == 2)
    narrow<2>(p);
  else
    narrow<4>(p);
  // The host reads on as soon as it sees the mark: everything the block has written must be there by then.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    *(volatile u32*)(p.marks + blockIdx.x * MARK_WORDS) = p.epoch;
  }
}

struct SpreadParams {
  const void* ids;
  const uint4* ranks;  // on the host: signed, 16 bits [S] and up to seven more
  const int* table;    // on the host: [chunks + 1, E + 1], the first line being the offsets
  int* order;
  int* inverse;
  int* offsets;
  u32 slots;
  int experts, id_type;
  int chunk;  // slots, half of it a multiple of a block's
};
static_assert(sizeof(SpreadParams) == 64, "filled by rust/python/src/cuda_plan.rs");

constexpr int RANKS = 8;  // of a thread: 16 bytes
constexpr int MOST_IN_SHARED = 4096;

extern "C" __global__ void __launch_bounds__(THREADS) spread_plan(const __grid_constant__ SpreadParams p) {
  __shared__ int line[MOST_IN_SHARED];
  const int buckets = p.experts + 1;
  const u32 unit = blockIdx.x * THREADS + threadIdx.x, first = unit * RANKS;
  // Of the boundary of chunks that is nearest.
  const int* rows = p.table + (u64)((blockIdx.x * (THREADS * RANKS) + p.chunk / 2) / p.chunk) * buckets;
  uint4 packed = {};
  if (first < p.slots) packed = p.ranks[unit];
  const int entry = threadIdx.x < buckets ? rows[threadIdx.x] : 0;
  u32 bucket[RANKS] = {};
  if (first < p.slots) load_buckets(bucket, p.ids, p.id_type, first, p.slots, p.experts);
  if (buckets <= MOST_IN_SHARED) {  // each entry crosses the bus once a block
    line[threadIdx.x] = entry;
    for (int b = threadIdx.x + THREADS; b < buckets; b += THREADS) line[b] = rows[b];
    rows = line;
  }
  __syncthreads();
  if (blockIdx.x == 0)
    for (int b = threadIdx.x; b < buckets; b += THREADS) p.offsets[b] = rows[b];

  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
  int row[RANKS] = {};
#pragma unroll
  for (int i = 0; i < RANKS; i++) {
    const u32 slot = first + i;
    if (slot < p.slots) {
      row[i] = rows[bucket[i]] + (short)(words[i / 2] >> (16 * (i % 2)));
      p.order[row[i]] = (int)slot;
    }
  }
  if (first + RANKS <= p.slots) {
    int4* out = (int4*)(p.inverse + first);
    out[0] = make_int4(row[0], row[1], row[2], row[3]);
    out[1] = make_int4(row[4], row[5], row[6], row[7]);
  } else {
#pragma unroll
    for (int i = 0; i < RANKS; i++)
      if (first + i < p.slots) p.inverse[first + i] = row[i];
  }
}
