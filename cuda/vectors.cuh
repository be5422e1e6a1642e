// Rows of any length as vectors of 16, 8, 4 or 2 bytes, and their elements in float32. For kernels that only move
// memory: nothing here needs more than sm_80.
//
// A row begins at a multiple of VECTOR bytes if the tensor does and if a row has a multiple of it: the launcher takes
// the largest VECTOR for which both hold.
#pragma once
#include "base.cuh"

// float32, beside the 16-bit elements: one in each word.
struct F32 {};

template <int BYTES> struct Vector;

template <> struct Vector<16> {
  u32 word[4];
  static DEVICE Vector load(const void* from) {
    const uint4 v = __ldcs((const uint4*)from);
    return {{v.x, v.y, v.z, v.w}};
  }
  DEVICE void store(void* to) const { __stcs((uint4*)to, make_uint4(word[0], word[1], word[2], word[3])); }
};

template <> struct Vector<8> {
  u32 word[2];
  static DEVICE Vector load(const void* from) {
    const uint2 v = __ldcs((const uint2*)from);
    return {{v.x, v.y}};
  }
  DEVICE void store(void* to) const { __stcs((uint2*)to, make_uint2(word[0], word[1])); }
};

template <> struct Vector<4> {
  u32 word[1];
  static DEVICE Vector load(const void* from) { return {{__ldcs((const u32*)from)}}; }
  DEVICE void store(void* to) const { __stcs((u32*)to, word[0]); }
};

template <> struct Vector<2> {
  u32 word[1];  // its lower half
  static DEVICE Vector load(const void* from) { return {{__ldcs((const u16*)from)}}; }
  DEVICE void store(void* to) const { __stcs((u16*)to, (u16)word[0]); }
};

// A vector's elements: the i-th in float32, and a vector of such with one rounding each.
template <class Element, int BYTES> struct Elements {
  static constexpr int SIZE = 2, COUNT = BYTES / SIZE;  // bytes of an element, elements of a vector
  static DEVICE float at(const Vector<BYTES>& v, int i) {
    return i % 2 ? Element::high(v.word[i / 2]) : Element::low(v.word[i / 2]);
  }
  static DEVICE Vector<BYTES> narrow(const float (&in)[COUNT]) {
    Vector<BYTES> v;
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) v.word[i / 2] = Element::pack(in[i], i + 1 < COUNT ? in[i + 1] : 0.0f);
    return v;
  }
};

template <int BYTES> struct Elements<F32, BYTES> {
  static constexpr int SIZE = 4, COUNT = BYTES / SIZE;
  static DEVICE float at(const Vector<BYTES>& v, int i) { return __uint_as_float(v.word[i]); }
  static DEVICE Vector<BYTES> narrow(const float (&in)[COUNT]) {
    Vector<BYTES> v;
#pragma unroll
    for (int i = 0; i < COUNT; i++) v.word[i] = __float_as_uint(in[i]);
    return v;
  }
};
