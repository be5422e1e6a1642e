// What every GPU has: types, the 16-bit elements, vectors of 16 bytes, sums over a warp. Kernels of memory and integers
// need no more; those that multiply add the verbs of hopper.cuh.
//
// A shared-memory address is a u32 in the shared window. No header is included anywhere in this directory: NVRTC
// compiles these files on machines without a CUDA toolkit.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

constexpr u32 ALL_LANES = 0xffffffffu;

// ------------------------------------------------------------------------------------------------------- element types

// Two 16-bit elements in a register: `low` is the one at the lower address.
struct Bf16 {
  static DEVICE u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static DEVICE float low(u32 packed) { return __uint_as_float(packed << 16); }
  static DEVICE float high(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }
};

struct F16 {
  static DEVICE u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static DEVICE float low(u32 packed) {
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(packed));
    return value;
  }
  static DEVICE float high(u32 packed) {
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(packed));
    return value;
  }
};

// ------------------------------------------------------------------------------------------- shared and global vectors

DEVICE uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
DEVICE void store_shared(u32 address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// Global vectors used once: streamed past what the L2 should keep.
DEVICE uint4 load_streamed(const void* address) {
  uint4 v;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
DEVICE void store_streamed(void* address, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
DEVICE void store_global(void* address, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// -------------------------------------------------------------------------------------------------------------- a warp

DEVICE float sum_of_warp(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}
