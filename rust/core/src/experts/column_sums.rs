//! Gradients of biases: for each expert the sum of its rows, weighted or not.

use crate::gemm::grouped::Gather;
use crate::threads::jobs::{Job, ThreadState};
use crate::vector::format::Format;
use crate::vector::round::{load_up_to, store_up_to};
use crate::vector::simd::{Kernel, Simd};
use std::marker::PhantomData;

/// Columns of a ticket: whole lines of every row, and enough vectors to hide the latency of additions.
const COLUMNS: usize = 128;

/// `out[expert][c] = sum over its rows of scores[slot] * a[source(row)][c]`.
pub struct ColumnSums<S, F> {
    pub experts: usize,
    /// `experts + 1` row offsets.
    pub offsets: *const i32,
    /// The matrix.
    pub a: *const u8,
    /// Which of its rows are read.
    pub gather: Gather,
    /// Columns.
    pub n: usize,
    /// Row to slot; used where `scores` is not null.
    pub order: *const i32,
    /// A factor for each slot; null: one.
    pub scores: *const f32,
    /// `[experts, n]`, all of it written.
    pub out: *mut u8,
    pub types: PhantomData<fn() -> (S, F)>,
}

// SAFETY: the pointers are shared by the threads of a call, which write disjoint parts of `out`.
unsafe impl<S, F> Sync for ColumnSums<S, F> {}

impl<S: Simd, F: Format> Job for ColumnSums<S, F> {
    fn tickets(&self) -> usize {
        self.experts * self.n.div_ceil(COLUMNS)
    }

    fn run(&self, ticket: usize, _: &mut ThreadState) {
        let blocks = self.n.div_ceil(COLUMNS);
        // SAFETY: whoever made this vouches for the pointers.
        unsafe { S::enter(Sum { of: self, expert: ticket / blocks, column: ticket % blocks * COLUMNS }) }
    }
}

struct Sum<'a, S, F> {
    of: &'a ColumnSums<S, F>,
    expert: usize,
    column: usize,
}

impl<F: Format, T> Kernel for Sum<'_, T, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the expert and the columns are those of a ticket, so rows, scores and `out` are there by the
        // contract of `ColumnSums`; a last vector that is not whole is loaded and stored by its elements, and `sums`
        // holds whole vectors.
        unsafe {
            let Self { of, expert, column } = self;
            let columns = COLUMNS.min(of.n - column);
            let mut sums = [0f32; COLUMNS];
            for row in *of.offsets.add(expert) as usize..*of.offsets.add(expert + 1) as usize {
                let from = of.a.add((of.gather.source(row) * of.n + column) * F::BYTES);
                let score = if of.scores.is_null() { 1.0 } else { *of.scores.add(*of.order.add(row) as usize) };
                let mut i = 0;
                while i < columns {
                    let to = sums.as_mut_ptr().add(i);
                    let value = load_up_to::<S, F>(from.add(i * F::BYTES), columns - i);
                    S::store(to, S::fma(S::splat(score), value, S::load(to)));
                    i += S::LANES;
                }
            }
            let out = of.out.add((expert * of.n + column) * F::BYTES);
            let mut i = 0;
            while i < columns {
                store_up_to::<S, F>(out.add(i * F::BYTES), S::load(sums.as_ptr().add(i)), columns - i);
                i += S::LANES;
            }
        }
    }
}
