//! The forward kernel for more than a few rows: rows of activations are the lanes, weights are read where they
//! lie, one word at a time, and broadcast. So weights need no packing, and one vector of rows shares each read.

use crate::vector::format::{Format, Kind};
use crate::vector::simd::{Kernel, Simd, prefetch};
use std::marker::PhantomData;

/// How far ahead weights are prefetched within a row, in bytes.
const AHEAD: usize = 2048;

/// Elements of k that are summed in registers before they join the total in memory: rounding errors then grow with
/// these and with the number of blocks, not with all of k, as in any blocked matrix product.
const DEPTH: usize = 512;

/// `out[feature][VECTORS * LANES] = bias[feature] + sum over k of weights[feature][k] * panel[k][...]` for
/// `tiles * FEATURES` features.
///
/// More than eight weight rows at once with one vector, or twelve with two, would fall into the same few sets
/// of the first-level cache, as rows lie a power of two apart.
pub struct Lanes<F, const VECTORS: usize, const FEATURES: usize> {
    /// From `PackTransposed` with `width = VECTORS * LANES`.
    pub panel: *const f32,
    /// Elements of a weight row.
    pub k: usize,
    /// The first weight row.
    pub weights: *const u8,
    /// Bytes from one weight row to the next.
    pub stride: usize,
    /// Groups of `FEATURES` rows.
    pub tiles: usize,
    /// The weight rows read after these, by whichever kernel: prefetched towards the end.
    pub next: *const u8,
    /// fp32, one a feature, or null.
    pub bias: *const f32,
    /// `tiles * FEATURES` times `VECTORS * LANES` values.
    pub out: *mut f32,
    pub format: PhantomData<F>,
}

impl<F: Format, const VECTORS: usize, const FEATURES: usize> Kernel for Lanes<F, VECTORS, FEATURES> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `panel` holds `VECTORS` vectors for each word of `k`, and each weight row `k` elements: whole
        // words end before them, and an odd last one is read alone. `out` has `VECTORS` vectors for each feature,
        // `bias` a value. Prefetches may have any address.
        unsafe {
            let Self { panel, k, stride, tiles, next, .. } = self;
            let words = k * F::BYTES / 4;
            let chunks = words / 16;
            let row_bytes = chunks * 64;
            let ahead = if row_bytes < AHEAD { row_bytes } else { AHEAD };
            let width = VECTORS * S::LANES;
            let mut weights = self.weights;
            let mut out = self.out;
            let mut bias = self.bias;
            for tile in 0..tiles {
                let mut sums = [[S::zero(); VECTORS]; FEATURES];
                // One vector of eight lanes by eight features is too few sums to hide the latency of adding to them.
                let split = const { VECTORS == 1 && S::LANES == 8 && !matches!(F::KIND, Kind::Bf16) };
                let mut odd = [[S::zero(); VECTORS]; FEATURES];
                if !bias.is_null() {
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum = [S::splat(*bias.add(n)); VECTORS];
                    }
                    bias = bias.add(FEATURES);
                }
                let following = weights.wrapping_add(FEATURES * stride);
                let next_tile = if tile + 1 < tiles { following } else { next };
                // From `turn` bytes on, the prefetch has run off the rows and continues in those of the next tile.
                let turn = row_bytes - ahead;
                let mut x = panel;
                let mut w = weights;
                let mut at = 0;
                let mut stop = DEPTH * F::BYTES;
                while at < row_bytes {
                    if at == stop {
                        if split {
                            sums = added::<S, VECTORS, FEATURES>(&sums, &odd);
                            odd = [[S::zero(); VECTORS]; FEATURES];
                        }
                        add_to::<S, VECTORS, FEATURES>(out, &sums, stop > DEPTH * F::BYTES);
                        sums = [[S::zero(); VECTORS]; FEATURES];
                        stop += DEPTH * F::BYTES;
                    }
                    let fetch = if at < turn { w.wrapping_add(ahead) } else { next_tile.wrapping_add(at - turn) };
                    for n in 0..FEATURES {
                        prefetch(fetch.wrapping_add(n * stride));
                    }
                    for _ in 0..8 {
                        x = word::<S, F, VECTORS, FEATURES>(&mut sums, x, w, stride);
                        x = word::<S, F, VECTORS, FEATURES>(
                            if split { &mut odd } else { &mut sums },
                            x,
                            w.add(4),
                            stride,
                        );
                        w = w.add(8);
                    }
                    at += 64;
                }
                if split {
                    sums = added::<S, VECTORS, FEATURES>(&sums, &odd);
                }
                for _ in chunks * 16..words {
                    x = word::<S, F, VECTORS, FEATURES>(&mut sums, x, w, stride);
                    w = w.add(4);
                }
                if F::BYTES == 2 && k % 2 == 1 {
                    for (n, sum) in sums.iter_mut().enumerate() {
                        let last = w.add(n * stride).cast::<u16>().read_unaligned();
                        let one = if matches!(F::KIND, Kind::Bf16Pairs) {
                            S::splat_bits(u32::from(last))
                        } else {
                            S::splat_bits(u32::from(last) << 16)
                        };
                        for (p, s) in sum.iter_mut().enumerate() {
                            let xv = S::load(x.add(p * S::LANES));
                            *s = if matches!(F::KIND, Kind::Bf16Pairs) {
                                S::dot_pairs(*s, xv, one)
                            } else {
                                S::fma(xv, one, *s)
                            };
                        }
                    }
                }
                add_to::<S, VECTORS, FEATURES>(out, &sums, stop > DEPTH * F::BYTES);
                out = out.add(FEATURES * width);
                weights = following;
            }
        }
    }
}

/// The sums of two sets of sums.
#[inline(always)]
unsafe fn added<S: Simd, const VECTORS: usize, const FEATURES: usize>(
    a: &[[S::V; VECTORS]; FEATURES],
    b: &[[S::V; VECTORS]; FEATURES],
) -> [[S::V; VECTORS]; FEATURES] {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let mut sums = *a;
        for (sum, other) in sums.iter_mut().zip(b) {
            for (s, &o) in sum.iter_mut().zip(other) {
                *s = S::add(*s, o);
            }
        }
        sums
    }
}

/// Stores a tile's sums, or adds them to those stored before.
#[inline(always)]
unsafe fn add_to<S: Simd, const VECTORS: usize, const FEATURES: usize>(
    out: *mut f32,
    sums: &[[S::V; VECTORS]; FEATURES],
    stored: bool,
) {
    // SAFETY: the caller's: `out` has room for the sums, which were stored there before if `stored`.
    unsafe {
        for (n, sum) in sums.iter().enumerate() {
            for (p, &s) in sum.iter().enumerate() {
                let to = out.add((n * VECTORS + p) * S::LANES);
                S::store(to, if stored { S::add(S::load(to), s) } else { s });
            }
        }
    }
}

/// One word of each weight row. Returns where the next word's activations are.
#[inline(always)]
unsafe fn word<S: Simd, F: Format, const VECTORS: usize, const FEATURES: usize>(
    sums: &mut [[S::V; VECTORS]; FEATURES],
    x: *const f32,
    w: *const u8,
    stride: usize,
) -> *const f32 {
    // SAFETY: the caller's: one word of each weight row at `w`, and its vectors of activations at `x`, two of them
    // where bf16 is widened.
    unsafe {
        let width = VECTORS * S::LANES;
        let mut first = [S::zero(); VECTORS];
        for (p, v) in first.iter_mut().enumerate() {
            *v = S::load(x.add(p * S::LANES));
        }
        if matches!(F::KIND, Kind::Bf16) {
            let mut second = [S::zero(); VECTORS];
            for (p, v) in second.iter_mut().enumerate() {
                *v = S::load(x.add(width + p * S::LANES));
            }
            for (n, sum) in sums.iter_mut().enumerate() {
                let both = S::splat_bits(w.add(n * stride).cast::<u32>().read_unaligned());
                let (even, odd) = (S::widen_even(both), S::widen_odd(both));
                for (s, &xv) in sum.iter_mut().zip(&first) {
                    *s = S::fma(xv, even, *s);
                }
                for (s, &xv) in sum.iter_mut().zip(&second) {
                    *s = S::fma(xv, odd, *s);
                }
            }
            return x.add(2 * width);
        }
        for (n, sum) in sums.iter_mut().enumerate() {
            let one = S::splat_bits(w.add(n * stride).cast::<u32>().read_unaligned());
            for (s, &xv) in sum.iter_mut().zip(&first) {
                *s = if matches!(F::KIND, Kind::Bf16Pairs) { S::dot_pairs(*s, xv, one) } else { S::fma(xv, one, *s) };
            }
        }
        x.add(width)
    }
}

/// Copies weight rows as fp32, for formats whose conversion is too dear to repeat for every panel. The copy
/// stays in the second-level cache; rows should lie off a power of two apart.
pub struct WidenWeights<F> {
    /// The first row.
    pub from: *const u8,
    /// Bytes from one row to the next.
    pub from_stride: usize,
    /// How many rows.
    pub rows: usize,
    /// Elements of a row.
    pub k: usize,
    pub to: *mut f32,
    /// Values from one copy to the next.
    pub to_stride: usize,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for WidenWeights<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: rows have `k` elements on both sides, and vectors end before them.
        unsafe {
            for row in 0..self.rows {
                let from = self.from.add(row * self.from_stride);
                let to = self.to.add(row * self.to_stride);
                let mut at = 0;
                while at + 32 <= self.k {
                    prefetch(from.wrapping_add(at * F::BYTES + AHEAD));
                    let mut i = 0;
                    while i < 32 {
                        S::store(to.add(at + i), F::load_widened::<S>(from.add((at + i) * F::BYTES)));
                        i += S::LANES;
                    }
                    at += 32;
                }
                while at + 8 <= self.k {
                    let v = F::load_widened::<S::Narrow>(from.add(at * F::BYTES));
                    <S::Narrow as Simd>::store(to.add(at), v);
                    at += 8;
                }
                while at < self.k {
                    *to.add(at) = F::load_one(from.add(at * F::BYTES));
                    at += 1;
                }
            }
        }
    }
}
