//! "nn" for few rows: whole weight rows, read once and in order, added into results that stay in the cache.
//!
//! A column strip small enough for registers would walk down all weight rows, a page apart each, at half the
//! memory's rate or less. Here a group of consecutive weight rows is read from left to right while the next
//! group is prefetched; what that costs is a load and a store of the results for each group.

use crate::vector::format::{Format, Kind};
use crate::vector::simd::{Kernel, Simd, prefetch};
use std::marker::PhantomData;

/// Weight rows of a group: words of the summed index.
const GROUP: usize = 8;

/// Rows of activations that one call takes.
pub const fn axpy_rows<S: Simd>() -> usize {
    if S::LANES == 16 { 8 } else { 4 }
}

/// Columns that the kernel moves at once; it takes whole steps only.
pub const fn axpy_columns<S: Simd, F: Format>() -> usize {
    if S::LANES == 8 { 2 * S::LANES } else { S::LANES * F::PER_WORD }
}

/// The kernel sums over multiples of this many elements: a group, or half of one where words are pairs.
pub const AXPY_ELEMENTS: usize = GROUP;

/// `sums[row][..columns] += left^T * weights`, or `=` if `fresh`.
///
/// Where words are pairs the columns of each step are kept in the order of `Simd::interleave`; [`InOrder`] puts
/// them right when the sum is complete.
pub struct Axpy<F> {
    /// Elements of the summed index that this call takes, a multiple of [`AXPY_ELEMENTS`].
    pub k: usize,
    /// `[words][rows]`.
    pub left: *const f32,
    /// First weight of the first row.
    pub weights: *const u8,
    /// Bytes from one weight row to the next.
    pub weight_stride: usize,
    /// fp32 results.
    pub sums: *mut f32,
    /// Values from one row of the results to the next.
    pub sums_stride: usize,
    /// A multiple of [`axpy_columns`].
    pub columns: usize,
    /// Whether this is the first call for these results.
    pub fresh: bool,
    /// Whether to prefetch; only the first of several calls on the same weights should.
    pub prefetch: bool,
    pub format: PhantomData<F>,
}

impl<F: Format> Axpy<F> {
    /// Runs the kernel for `rows` rows, at most [`axpy_rows`].
    ///
    /// # Safety
    /// The CPU supports `S`, and the operands are as described.
    pub unsafe fn run<S: Simd>(self, rows: usize) {
        // SAFETY: the caller's: the operands are as described, for so many rows.
        unsafe {
            macro_rules! pick {
            ($($n:literal)*) => {
                match rows {
                    $($n => S::enter(AxpyRows::<F, $n>(self)),)*
                    _ => unreachable!("{rows} rows"),
                }
            };
        }
            if const { S::LANES == 16 } { pick!(1 2 3 4 5 6 7 8) } else { pick!(1 2 3 4) }
        }
    }
}

struct AxpyRows<F, const ROWS: usize>(Axpy<F>);

impl<F: Format, const ROWS: usize> Kernel for AxpyRows<F, ROWS> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `left` and `weights` have as many words and rows as `k` elements need, whole groups and at most
        // half a one.
        unsafe {
            let c = &self.0;
            let words = F::words(c.k);
            let (mut left, mut weights) = (c.left, c.weights);
            let mut fresh = c.fresh;
            let mut word = 0;
            if const { S::LANES == 8 } {
                while word + GROUP / 2 <= words {
                    wide_group::<S, F, ROWS, { GROUP / 2 }>(c, left, weights, fresh);
                    left = left.add(GROUP / 2 * ROWS);
                    weights = weights.wrapping_add(GROUP / 2 * c.weight_stride);
                    fresh = false;
                    word += GROUP / 2;
                }
                return;
            }
            while word + GROUP <= words {
                group::<S, F, ROWS, GROUP>(c, left, weights, fresh);
                left = left.add(GROUP * ROWS);
                weights = weights.wrapping_add(GROUP * F::PER_WORD * c.weight_stride);
                fresh = false;
                word += GROUP;
            }
            if matches!(F::KIND, Kind::Bf16Pairs) && word < words {
                group::<S, F, ROWS, { GROUP / 2 }>(c, left, weights, fresh);
            }
        }
    }
}

#[inline(always)]
unsafe fn group<S: Simd, F: Format, const ROWS: usize, const WORDS: usize>(
    c: &Axpy<F>,
    left: *const f32,
    weights: *const u8,
    fresh: bool,
) {
    // SAFETY: the caller's: `WORDS` words of `ROWS` rows at `left`, weight rows of `columns` columns for each of
    // their elements, and as many sums in each row. Prefetches may have any address.
    unsafe {
        let paired = matches!(F::KIND, Kind::Bf16Pairs);
        let step = axpy_columns::<S, F>();
        let next = weights.wrapping_add(WORDS * F::PER_WORD * c.weight_stride);
        let mut column = 0;
        while column < c.columns {
            let at = column * F::BYTES;
            // Half-line steps prefetch every other time.
            if c.prefetch && at.is_multiple_of(64) {
                for i in 0..WORDS * F::PER_WORD {
                    prefetch(next.wrapping_add(i * c.weight_stride + at));
                }
            }
            let (mut w0, mut w1) = ([S::zero(); WORDS], [S::zero(); WORDS]);
            for i in 0..WORDS {
                let row = weights.add(i * F::PER_WORD * c.weight_stride + at);
                if paired {
                    (w0[i], w1[i]) = S::interleave(S::load(row.cast()), S::load(row.add(c.weight_stride).cast()));
                } else {
                    w0[i] = F::load_widened::<S>(row);
                }
            }
            for r in 0..ROWS {
                let to = c.sums.add(r * c.sums_stride + column);
                let mut a = if fresh { S::zero() } else { S::load(to) };
                if paired {
                    let mut b = if fresh { S::zero() } else { S::load(to.add(S::LANES)) };
                    for i in 0..WORDS {
                        let l = S::splat_bits(left.add(i * ROWS + r).cast::<u32>().read());
                        a = S::dot_pairs(a, l, w0[i]);
                        b = S::dot_pairs(b, l, w1[i]);
                    }
                    S::store(to.add(S::LANES), b);
                } else {
                    for (i, &w) in w0.iter().enumerate() {
                        a = S::fma(S::splat(*left.add(i * ROWS + r)), w, a);
                    }
                }
                S::store(to, a);
            }
            column += step;
        }
    }
}

/// The same for sixteen registers: half as many weight rows, twice as many columns. A splat then serves two vectors of
/// sums, and splats are most of what is loaded.
#[inline(always)]
unsafe fn wide_group<S: Simd, F: Format, const ROWS: usize, const WORDS: usize>(
    c: &Axpy<F>,
    left: *const f32,
    weights: *const u8,
    fresh: bool,
) {
    // SAFETY: the caller's: `WORDS` values of `ROWS` rows at `left`, as many weight rows of `columns` columns, and
    // as many sums in each row. Prefetches may have any address.
    unsafe {
        let next = weights.wrapping_add(2 * WORDS * c.weight_stride);
        let mut column = 0;
        while column < c.columns {
            let at = column * F::BYTES;
            if c.prefetch && at.is_multiple_of(64) {
                for i in 0..WORDS {
                    prefetch(next.wrapping_add(i * c.weight_stride + at));
                }
            }
            let mut w = [[S::zero(); 2]; WORDS];
            for (i, w) in w.iter_mut().enumerate() {
                let row = weights.add(i * c.weight_stride + at);
                *w = [F::load_widened::<S>(row), F::load_widened::<S>(row.add(S::LANES * F::BYTES))];
            }
            for r in 0..ROWS {
                let to = c.sums.add(r * c.sums_stride + column);
                let (mut a, mut b) =
                    if fresh { (S::zero(), S::zero()) } else { (S::load(to), S::load(to.add(S::LANES))) };
                for (i, w) in w.iter().enumerate() {
                    let l = S::splat(*left.add(i * ROWS + r));
                    a = S::fma(l, w[0], a);
                    b = S::fma(l, w[1], b);
                }
                S::store(to, a);
                S::store(to.add(S::LANES), b);
            }
            column += 2 * S::LANES;
        }
    }
}

/// Puts the results of paired words into the order of their columns.
pub struct InOrder {
    /// The results.
    pub sums: *mut f32,
    /// Values from one row to the next.
    pub stride: usize,
    /// Rows.
    pub rows: usize,
    /// Columns, a multiple of `2 * LANES`.
    pub columns: usize,
}

impl Kernel for InOrder {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: each row has `columns` values, whole pairs of vectors.
        unsafe {
            for r in 0..self.rows {
                let row = self.sums.add(r * self.stride);
                let mut column = 0;
                while column < self.columns {
                    let to = row.add(column);
                    let (a, b) = S::deinterleave(S::load(to), S::load(to.add(S::LANES)));
                    S::store(to, a);
                    S::store(to.add(S::LANES), b);
                    column += 2 * S::LANES;
                }
            }
        }
    }
}

/// Adds finished sums to others.
pub struct AddValues {
    /// What is added.
    pub from: *const f32,
    /// To what.
    pub to: *mut f32,
    /// How many, a multiple of 16.
    pub len: usize,
}

impl Kernel for AddValues {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: both have `len` values, whole vectors.
        unsafe {
            let mut i = 0;
            while i < self.len {
                let to = self.to.add(i);
                S::store(to, S::add(S::load(to), S::load(self.from.add(i))));
                i += S::LANES;
            }
        }
    }
}
