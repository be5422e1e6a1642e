//! The forward kernel for a few rows: k stays in the lanes of both operands, so nothing is broadcast or
//! transposed, and the sums over the lanes at the end cost nothing beside the weights that had to be read.

use crate::gemm::pack::step_elements;
use crate::vector::format::{Format, Kind};
use crate::vector::simd::{Kernel, Narrow, Simd, prefetch};
use std::marker::PhantomData;

/// How far ahead weights are prefetched within a row, in bytes.
const AHEAD: usize = 2048;

/// `out[row][feature] = bias[feature] + sum over k of weights[feature][k] * x[row][k]` for
/// `tiles * FEATURES` features.
pub struct Dot<F, const ROWS: usize, const FEATURES: usize> {
    /// `ROWS` rows from `PackSteps`.
    pub steps: *const f32,
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
    pub out: *mut f32,
    /// Values from one row of `out` to the next.
    pub out_stride: usize,
    pub format: PhantomData<F>,
}

impl<F: Format, const ROWS: usize, const FEATURES: usize> Kernel for Dot<F, ROWS, FEATURES> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: whole steps end at `total` bytes of a weight row, and the last one is copied to `partial`, whose
        // rows of 64 bytes hold any step; `steps` was packed for the same steps. Up to 24 sums fill `folded` and
        // `values`, whose lengths are multiples of eight. `out` and `bias` have an element for each feature.
        // Prefetches may have any address.
        unsafe {
            let Self { k, stride, tiles, next, .. } = self;
            let step_bytes = step_elements::<S, F>() * F::BYTES;
            let total = k * F::BYTES;
            let row_bytes = total / 64 * 64;
            let ahead = if row_bytes < AHEAD { row_bytes } else { AHEAD };
            let turn = row_bytes - ahead;
            let mut weights = self.weights;
            let mut out = self.out;
            let mut bias = self.bias;
            for tile in 0..tiles {
                let mut sums = [[S::zero(); FEATURES]; ROWS];
                let following = weights.wrapping_add(FEATURES * stride);
                let next_tile = if tile + 1 < tiles { following } else { next };
                let mut x = self.steps;
                let mut w = weights;
                let mut at = 0;
                // One step a turn: several at once would be scheduled together and need more registers than there are.
                while at + step_bytes <= total {
                    if at % 64 == 0 && at < row_bytes {
                        let fetch = if at < turn { w.wrapping_add(ahead) } else { next_tile.wrapping_add(at - turn) };
                        for n in 0..FEATURES {
                            prefetch(fetch.wrapping_add(n * stride));
                        }
                    }
                    x = step::<S, F, ROWS, FEATURES>(&mut sums, x, w, stride);
                    w = w.add(step_bytes);
                    at += step_bytes;
                }
                if at < total {
                    let mut partial = [[0u8; 64]; FEATURES];
                    for (n, bytes) in partial.iter_mut().enumerate() {
                        w.add(n * stride).copy_to_nonoverlapping(bytes.as_mut_ptr(), total - at);
                    }
                    step::<S, F, ROWS, FEATURES>(&mut sums, x, partial.as_ptr().cast(), 64);
                }
                // Two small loops: one large one would not be unrolled, and the sums would live in memory.
                let mut folded = [<S::Narrow as Simd>::zero(); 32];
                for r in 0..ROWS {
                    for n in 0..FEATURES {
                        folded[r * FEATURES + n] = S::fold(sums[r][n]);
                    }
                }
                let mut values = [0f32; 32];
                for group in 0..(ROWS * FEATURES).div_ceil(8) {
                    let eight = folded.as_ptr().add(group * 8).cast::<[<S::Narrow as Simd>::V; 8]>().read();
                    <S::Narrow as Simd>::store(values.as_mut_ptr().add(group * 8), S::Narrow::sum_each(eight));
                }
                for r in 0..ROWS {
                    for n in 0..FEATURES {
                        let start = if bias.is_null() { 0.0 } else { *bias.add(n) };
                        *out.add(r * self.out_stride + n) = start + values[r * FEATURES + n];
                    }
                }
                if !bias.is_null() {
                    bias = bias.add(FEATURES);
                }
                out = out.add(FEATURES);
                weights = following;
            }
        }
    }
}

/// One step of every row and feature. Returns where the next step's activations are.
#[inline(always)]
unsafe fn step<S: Simd, F: Format, const ROWS: usize, const FEATURES: usize>(
    sums: &mut [[S::V; FEATURES]; ROWS],
    x: *const f32,
    w: *const u8,
    stride: usize,
) -> *const f32 {
    // SAFETY: the caller's: a step of `ROWS` rows at `x`, and one of `FEATURES` rows at `w`, `stride` bytes apart.
    unsafe {
        if matches!(F::KIND, Kind::Bf16) {
            let mut half = [S::zero(); FEATURES];
            for (n, v) in half.iter_mut().enumerate() {
                *v = S::widen_even(S::load(w.add(n * stride).cast()));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let xv = S::load(x.add(r * S::LANES));
                for n in 0..FEATURES {
                    row[n] = S::fma(xv, half[n], row[n]);
                }
            }
            let w = unrelated(w);
            for (n, v) in half.iter_mut().enumerate() {
                *v = S::widen_odd(S::load(w.add(n * stride).cast()));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let xv = S::load(x.add((ROWS + r) * S::LANES));
                for n in 0..FEATURES {
                    row[n] = S::fma(xv, half[n], row[n]);
                }
            }
            return x.add(2 * ROWS * S::LANES);
        }
        let mut wide = [S::zero(); FEATURES];
        for (n, v) in wide.iter_mut().enumerate() {
            let at = w.add(n * stride);
            *v = if matches!(F::KIND, Kind::F16) { S::load_f16(at.cast()) } else { S::load(at.cast()) };
        }
        for (r, row) in sums.iter_mut().enumerate() {
            let xv = S::load(x.add(r * S::LANES));
            for n in 0..FEATURES {
                row[n] = if matches!(F::KIND, Kind::Bf16Pairs) {
                    S::dot_pairs(row[n], xv, wide[n])
                } else {
                    S::fma(xv, wide[n], row[n])
                };
            }
        }
        x.add(ROWS * S::LANES)
    }
}

/// The same address, unknown to the compiler as such: words are then loaded twice, from the first-level cache,
/// instead of occupying registers that the sums need.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read through the pointer inside the block")]
fn unrelated(p: *const u8) -> *const u8 {
    // SAFETY: no instruction: the assembler sees a comment.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        let mut p = p;
        std::arch::asm!("/* {0} */", inout(reg) p, options(pure, nomem, nostack, preserves_flags));
        p
    }
    #[cfg(not(target_arch = "x86_64"))]
    p
}
