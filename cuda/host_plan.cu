// Both ends of a plan that the host makes of ids on the device: the ids cross the bus once, in the narrowest type, and of
// the plan only the half that the other half follows from. Host memory is read and written in place (pinned memory has an
// address on the device), so that each way is one launch and no copy of the driver's.
#include "hopper.cuh"

struct NarrowParams {
  const void* ids;
  uint4* out;       // on the host, a multiple of 16 bytes
  int slots, experts;
  int id_type;      // 0 u8, 1 u16, 2 i32, 3 i64
  int bytes;        // of an id in `out`: 1, 2 or 4
};
static_assert(sizeof(NarrowParams) == 32, "filled by the launcher");

constexpr int THREADS = 256;

// An id that names no expert becomes E, which names none in the narrow type either.
template <typename Id>
DEVICE u32 bucket_of(const void* ids, int slot, int experts) {
  const long long id = __ldg((const Id*)ids + slot);
  return id >= 0 && id < experts ? (u32)id : (u32)experts;
}

DEVICE u32 bucket_of(const NarrowParams& p, int slot) {
  switch (p.id_type) {
    case 0: return bucket_of<u8>(p.ids, slot, p.experts);
    case 1: return bucket_of<u16>(p.ids, slot, p.experts);
    case 2: return bucket_of<int>(p.ids, slot, p.experts);
    default: return bucket_of<long long>(p.ids, slot, p.experts);
  }
}

// A thread fills 16 bytes: the bus wants whole lines.
template <int BYTES>
DEVICE void narrow(const NarrowParams& p) {
  constexpr int IDS = 16 / BYTES;
  const u32 unit = blockIdx.x * THREADS + threadIdx.x;
  if ((u64)unit * IDS >= (u64)p.slots) return;
  u32 word[4] = {};
#pragma unroll
  for (int i = 0; i < IDS; i++) {
    const int slot = min(unit * IDS + i, (u32)p.slots - 1);  // past the end nobody looks
    word[i * BYTES / 4] |= bucket_of(p, slot) << (8 * (i * BYTES % 4));
  }
  p.out[unit] = make_uint4(word[0], word[1], word[2], word[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS) narrow_ids(const __grid_constant__ NarrowParams p) {
  if (p.bytes == 1)
    narrow<1>(p);
  else if (p.bytes == 2)
    narrow<2>(p);
  else
    narrow<4>(p);
}

struct SpreadParams {
  const int4* host_inverse;  // [S] and up to three more
  const int* host_offsets;   // [E + 1]
  int* order;
  int* inverse;
  int* offsets;
  int slots, experts;
};
static_assert(sizeof(SpreadParams) == 48, "filled by the launcher");

// order[inverse[slot]] = slot: the host sends one of the two.
extern "C" __global__ void __launch_bounds__(THREADS) spread_plan(const __grid_constant__ SpreadParams p) {
  const int unit = blockIdx.x * THREADS + threadIdx.x;
  for (int e = unit; e <= p.experts; e += gridDim.x * THREADS) p.offsets[e] = p.host_offsets[e];
  const long long first = 4LL * unit;
  if (first >= p.slots) return;
  const int4 rows = p.host_inverse[unit];
  const int row[4] = {rows.x, rows.y, rows.z, rows.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (first + i < p.slots) {
      p.inverse[first + i] = row[i];
      p.order[row[i]] = (int)(first + i);
    }
  }
}
