// A CUDA driver that knows two kernels, those of cuda/host_plan.cu, and runs them on the CPU: function 1 brings ids to the
// host, late and piece by piece, function 2 completes a plan; see test_host_plan.py. Function 3 stands for any other kernel
// and does nothing: its tensor maps are refused where the driver refuses them; see test_cuda_maps.py.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct narrow {
  const int64_t* ids;
  uint8_t* out;
  uint32_t* marks;
  uint32_t slots;
  int experts, id_type, bytes;
  uint32_t epoch, unused;
};

struct spread {
  const int64_t* ids;
  const int16_t* ranks;
  const int* table;
  int *order, *inverse, *offsets;
  uint32_t slots;
  int experts, id_type, chunk;
};

enum { BLOCK_BYTES = 4096, BLOCK_SLOTS = 2048, MARK_WORDS = 16, INVALID = 1, NOT_READY = 600, ILLEGAL_ADDRESS = 700 };

int failing = 0;  // 1: the ids never come; 2: nor does the device survive
static int busy = 0;  // kernels at work: the next plan may begin before this thread has ended

static uint32_t bucket(int64_t id, int experts) { return id >= 0 && id < experts ? (uint32_t)id : (uint32_t)experts; }

static void* bring_ids(void* argument) {
  struct narrow p = *(struct narrow*)argument;
  free(argument);
  usleep(100);
  uint32_t size = BLOCK_BYTES / p.bytes;
  for (uint32_t block = 0; !failing && block * size < p.slots; block++) {
    for (uint32_t slot = block * size; slot < p.slots && slot < (block + 1) * size; slot++) {
      uint32_t narrowed = bucket(p.ids[slot], p.experts);
      memcpy(p.out + (size_t)slot * p.bytes, &narrowed, p.bytes);
    }
    __atomic_store_n(p.marks + block * MARK_WORDS, p.epoch, __ATOMIC_RELEASE);
    if (block % 8 == 0) usleep(10);
  }
  __atomic_fetch_sub(&busy, 1, __ATOMIC_RELEASE);
  return 0;
}

static int complete(const struct spread* p) {
  int buckets = p->experts + 1;
  memcpy(p->offsets, p->table, buckets * sizeof(int));
  for (uint32_t slot = 0; slot < p->slots; slot++) {
    const int* rows = p->table + ((size_t)slot + p->chunk / 2) / p->chunk * buckets;
    int row = rows[bucket(p->ids[slot], p->experts)] + p->ranks[slot];
    p->inverse[slot] = row;
    p->order[row] = (int)slot;
  }
  return p->chunk / 2 % BLOCK_SLOTS ? INVALID : 0;
}

// Two devices with a context each; the first is current on every thread at the start.
static int contexts[2];
static __thread int current;
int launched_on;

int cuLaunchKernel(uint64_t function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block, unsigned block_y,
                   unsigned block_z, unsigned shared, uint64_t stream, void** arguments, void** extra) {
  launched_on = current;
  if (function == 3) return 0;
  if (function == 2) {
    const struct spread* p = arguments[0];
    return grid == (p->slots + BLOCK_SLOTS - 1) / BLOCK_SLOTS ? complete(p) : INVALID;
  }
  struct narrow* p = malloc(sizeof *p);
  memcpy(p, arguments[0], sizeof *p);
  if (grid != ((uint64_t)p->slots * p->bytes + BLOCK_BYTES - 1) / BLOCK_BYTES || p->id_type != 3) return INVALID;
  __atomic_fetch_add(&busy, 1, __ATOMIC_RELEASE);
  pthread_t thread;
  return pthread_create(&thread, 0, bring_ids, p) || pthread_detach(thread) ? INVALID : 0;
}

void finish(void) {
  while (__atomic_load_n(&busy, __ATOMIC_ACQUIRE)) usleep(10);
}

int cuStreamQuery(uint64_t stream) {
  if (__atomic_load_n(&busy, __ATOMIC_ACQUIRE)) return NOT_READY;
  return failing == 2 ? ILLEGAL_ADDRESS : 0;
}

int cuCtxGetCurrent(void** context) {
  *context = contexts + current;
  return 0;
}

int cuCtxGetDevice(int* device) {
  *device = current;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  current = (int*)context - contexts;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = contexts + device;
  return 0;
}

int encoded = 0;  // tensor maps

// What cuda.h says of 16-bit elements with SWIZZLE_128B, and that bases lie below 2^57, which the driver says.
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, uint64_t base, const uint64_t* dims, const uint64_t* strides,
                           const unsigned* box, const unsigned* element_strides, int interleave, int swizzle, int promotion,
                           int fill) {
  if ((uint64_t)map % 64 || (type != 6 && type != 9) || rank < 1 || rank > 5 || interleave || swizzle != 3 ||
      promotion > 3 || fill)
    return INVALID;
  if (base % 16 || base >> 57) return INVALID;
  for (unsigned i = 0; i < rank; i++) {
    if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || element_strides[i] != 1) return INVALID;
    if (i && (strides[i - 1] % 16 || strides[i - 1] >> 40)) return INVALID;
  }
  if (box[0] * 2 > 128) return INVALID;
  encoded++;
  return 0;
}

int cuGetErrorName(int error, const char** name) {
  *name = "CUDA_ERROR_ILLEGAL_ADDRESS";
  return 0;
}
