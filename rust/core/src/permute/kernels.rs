//! Weighted sums and their gradients in fp32, on whatever vectors the CPU has.

use std::marker::PhantomData;
use std::ops::Range;

use super::arguments::{Combine, CombineBackward};
use crate::vector::format::Format;
use crate::vector::round::{load_up_to, store_up_to};
use crate::vector::simd::{Kernel, Narrow, Simd};

/// Vectors kept in registers at once: enough to hide the latency of a fused multiply-add.
const UNROLL: usize = 4;

/// [`Combine`] for some tokens.
///
/// # Safety
/// As for `Combine::run`, and the CPU supports `S`.
pub(super) unsafe fn combine<S: Simd, F: Format>(args: &Combine, tokens: Range<usize>) {
    // SAFETY: slots of a token and rows below `used` exist by the contract of `Combine`, and `terms` holds rows of
    // `hidden` elements.
    unsafe {
        let map = &args.map;
        let weights: *const f32 = args.weights.cast();
        let mut terms = Vec::with_capacity(map.top_k);
        for token in tokens {
            terms.clear();
            for slot in map.slots(token) {
                if let Some(row) = map.used_row(slot) {
                    let weight = if weights.is_null() { 1.0 } else { *weights.add(slot) };
                    terms.push((args.y.add(row * map.row_bytes()), weight));
                }
            }
            let out = args.out.add(token * map.row_bytes());
            S::enter(WeightedSum::<F> { terms: &terms, out, len: map.hidden, format: PhantomData });
        }
    }
}

/// [`CombineBackward`] for some tokens.
///
/// # Safety
/// As for `CombineBackward::run`, and the CPU supports `S`.
pub(super) unsafe fn combine_backward<S: Simd, F: Format>(args: &CombineBackward, tokens: Range<usize>) {
    // SAFETY: slots of a token and their rows exist by the contract of `CombineBackward`; a result is written if it
    // is wanted, and no two slots share a row.
    unsafe {
        let map = &args.map;
        let bytes = map.row_bytes();
        let (weights, dweights): (*const f32, *mut f32) = (args.weights.cast(), args.dweights.cast());
        for token in tokens {
            let dout = args.dout.add(token * bytes);
            for slot in map.slots(token) {
                let row = map.row(slot);
                let used = row < map.used;
                if !args.dy.is_null() {
                    let to = args.dy.add(row * bytes);
                    if used {
                        let weight = if weights.is_null() { 1.0 } else { *weights.add(slot) };
                        S::enter(Scale::<F> { from: dout, weight, to, len: map.hidden, format: PhantomData });
                    } else {
                        to.write_bytes(0, bytes);
                    }
                }
                if !dweights.is_null() {
                    *dweights.add(slot) = if used {
                        let y = args.y.add(row * bytes);
                        S::enter(RowDot::<F> { a: dout, b: y, len: map.hidden, format: PhantomData })
                    } else {
                        0.0
                    };
                }
            }
        }
    }
}

/// `out = sum of weight * row`, rounded once.
struct WeightedSum<'a, F> {
    terms: &'a [(*const u8, f32)],
    out: *mut u8,
    len: usize,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for WeightedSum<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: all rows have `len` elements: whole vectors end there, and the rest is loaded and stored by its
        // elements.
        unsafe {
            let step = UNROLL * S::LANES;
            let mut i = 0;
            while i + step <= self.len {
                let mut sums = [S::zero(); UNROLL];
                for &(row, weight) in self.terms {
                    let (row, weight) = (row.add(i * F::BYTES), S::splat(weight));
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = S::fma(weight, F::load_widened::<S>(row.add(j * S::LANES * F::BYTES)), *sum);
                    }
                }
                for (j, sum) in sums.into_iter().enumerate() {
                    F::store_rounded::<S>(self.out.add((i + j * S::LANES) * F::BYTES), sum);
                }
                i += step;
            }
            while i < self.len {
                let mut sum = S::zero();
                for &(row, weight) in self.terms {
                    sum = S::fma(S::splat(weight), load_up_to::<S, F>(row.add(i * F::BYTES), self.len - i), sum);
                }
                store_up_to::<S, F>(self.out.add(i * F::BYTES), sum, self.len - i);
                i += S::LANES;
            }
        }
    }
}

/// `to = weight * from`, rounded.
struct Scale<F> {
    from: *const u8,
    weight: f32,
    to: *mut u8,
    len: usize,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Scale<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: both rows have `len` elements, and no more than are left are loaded and stored.
        unsafe {
            let weight = S::splat(self.weight);
            let mut i = 0;
            while i < self.len {
                let value = S::mul(weight, load_up_to::<S, F>(self.from.add(i * F::BYTES), self.len - i));
                store_up_to::<S, F>(self.to.add(i * F::BYTES), value, self.len - i);
                i += S::LANES;
            }
        }
    }
}

/// The scalar product of two rows.
struct RowDot<F> {
    a: *const u8,
    b: *const u8,
    len: usize,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for RowDot<F> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: both rows have `len` elements: whole vectors end there, and the rest is loaded by its elements.
        unsafe {
            let step = UNROLL * S::LANES;
            let mut sums = [S::zero(); UNROLL];
            let mut i = 0;
            while i + step <= self.len {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let at = (i + j * S::LANES) * F::BYTES;
                    *sum = S::fma(F::load_widened::<S>(self.a.add(at)), F::load_widened::<S>(self.b.add(at)), *sum);
                }
                i += step;
            }
            while i < self.len {
                let a = load_up_to::<S, F>(self.a.add(i * F::BYTES), self.len - i);
                let b = load_up_to::<S, F>(self.b.add(i * F::BYTES), self.len - i);
                sums[0] = S::fma(a, b, sums[0]);
                i += S::LANES;
            }
            let sum = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            let mut lanes = [<S::Narrow as Simd>::zero(); 8];
            lanes[0] = S::fold(sum);
            let mut totals = [0f32; 8];
            <S::Narrow as Simd>::store(totals.as_mut_ptr(), S::Narrow::sum_each(lanes));
            totals[0]
        }
    }
}
