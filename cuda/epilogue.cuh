// From sums to rows in memory: bias, rounding, stmatrix into a swizzled tile, and the store by the threads.
//
// wgmma's accumulator layout, as far as the epilogues need it: in an m64 tile, warp w of the warpgroup holds rows
// 16 w … 16 w + 15; a thread has rows lane / 4 and lane / 4 + 8 of them, and of every 8 columns the two at 2 (lane %
// 4): sums[4 j], [4 j + 1] in the first row, [4 j + 2], [4 j + 3] in the second, for columns 8 j ….
#pragma once
#include "frame.cuh"

// With BIAS its two rows get their bias; without, no zero is added: 128 additions a tile and thread are 1 % of a short
// one.
#ifdef BIAS
constexpr bool ADDS_BIAS = BIAS;
#else
constexpr bool ADDS_BIAS = false;
#endif
DEVICE float biased(float sum, float bias) { return ADDS_BIAS ? sum + bias : sum; }

// Writes 16 columns (j, j + 1 of the above) as 16 token rows of 16 features into a [tokens][64 features] tile,
// swizzled.
template <class Element>
DEVICE void store_token_rows(u32 tile, int column, u32 warp, u32 lane, const float* s, float low, float high) {
  const u32 token = column + (lane & 7) + ((lane >> 4) << 3), chunk = warp * 2 + ((lane >> 3) & 1);
  store_matrices_transposed(tile + swizzled(token, chunk), Element::pack(biased(s[0], low), biased(s[1], low)),
                            Element::pack(biased(s[2], high), biased(s[3], high)),
                            Element::pack(biased(s[4], low), biased(s[5], low)),
                            Element::pack(biased(s[6], high), biased(s[7], high)));
}

// The same in a tile of `Width` rows that may end after eight of the sixteen.
template <class Element, int Width>
DEVICE void store_token_columns(u32 tile, int column, u32 warp, u32 lane, const float* s, float low, float high) {
  if (column + 16 <= Width) {
    store_token_rows<Element>(tile, column, warp, lane, s, low, high);
  } else {
    const u32 token = column + (lane & 7), chunk = warp * 2 + ((lane >> 3) & 1);
    store_two_matrices_transposed(tile + swizzled(token, chunk), Element::pack(biased(s[0], low), biased(s[1], low)),
                                  Element::pack(biased(s[2], high), biased(s[3], high)));
  }
}

// The bias of one feature row of an expert's `rows`; zero where there is none.
DEVICE float bias_of(const u16* bias, int expert, int rows, int row, bool exists) {
  return ADDS_BIAS && exists ? ELEMENT::low(__ldg(bias + (u64)expert * rows + row)) : 0.0f;
}

// What a consumer warpgroup has put into its buffer [Lines][64 features], rows `first` … of its share, goes to 64
// columns of a matrix [S, columns], of which `columns_left` exist: eight lanes a row.
template <int Lines>
DEVICE void store_by_threads(u32 buffer, u8* matrix, u32 columns, u32 column, int columns_left, const Share& own,
                             int first) {
  const u32 thread = threadIdx.x & 127, chunk = thread & 7, line = thread >> 3, pitch = columns * 2;
  if ((int)chunk * 8 >= columns_left) return;
  u8* target = matrix + (u64)(u32)(own.row + first + (int)line) * pitch + (column + chunk * 8) * 2;
#pragma unroll
  for (int row = 0; row < Lines; row += 16)
    if (first + row + (int)line < own.rows)
      store_global(target + (u64)((u32)row * pitch), load_shared(buffer + swizzled(row + line, chunk)));
}
