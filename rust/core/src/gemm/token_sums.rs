//! The gradient of the input: for each token the sum of its rows' gradients.

#![allow(unsafe_op_in_unsafe_fn)]

use super::format::Format;
use super::jobs::{Job, Worker};
use super::round::{load_up_to, store_up_to};
use super::simd::{Kernel, Simd};
use std::marker::PhantomData;

/// Tokens of a ticket.
const TOKENS: usize = 16;

/// `out[t] = sum over k of rows[inverse[t * top_k + k]]`, in fp32 and in this order, without sentinels.
pub struct TokenSums<S, F> {
    pub tokens: usize,
    pub top_k: usize,
    /// Slot to row.
    pub inverse: *const i32,
    /// Rows from this one on are sentinels' and are not read.
    pub used: usize,
    /// `[used, n]`.
    pub rows: *const u8,
    pub n: usize,
    /// `[tokens, n]`, all of it written.
    pub out: *mut u8,
    pub types: PhantomData<fn() -> (S, F)>,
}

// The pointers are shared by the threads of a call, which write disjoint parts of `out`.
unsafe impl<S, F> Sync for TokenSums<S, F> {}

impl<S: Simd, F: Format> Job for TokenSums<S, F> {
    fn tickets(&self) -> usize {
        self.tokens.div_ceil(TOKENS)
    }

    fn run(&self, ticket: usize, worker: &mut Worker) {
        let rows = &mut worker.scratch.rows;
        for token in ticket * TOKENS..self.tokens.min((ticket + 1) * TOKENS) {
            // Whoever made this vouches for the pointers.
            unsafe {
                rows.clear();
                for slot in token * self.top_k..(token + 1) * self.top_k {
                    let row = *self.inverse.add(slot) as usize;
                    if row < self.used {
                        rows.push(self.rows.add(row * self.n * F::BYTES));
                    }
                }
                let out = self.out.add(token * self.n * F::BYTES);
                S::enter(SumOfRows::<F> { rows, out, n: self.n, format: PhantomData });
            }
        }
    }
}

/// The sum of some rows, rounded.
struct SumOfRows<'a, F> {
    rows: &'a [*const u8],
    out: *mut u8,
    n: usize,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for SumOfRows<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut i = 0;
        while i < self.n {
            let mut sum = S::zero();
            for row in self.rows {
                sum = S::add(sum, load_up_to::<S, F>(row.add(i * F::BYTES), self.n - i));
            }
            store_up_to::<S, F>(self.out.add(i * F::BYTES), sum, self.n - i);
            i += S::LANES;
        }
    }
}
