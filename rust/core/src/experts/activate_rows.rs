//! The activation as a pass of its own, for products whose kernels do not apply it.

use crate::gemm::activation::{Activate, Activation};
use crate::threads::jobs::{Job, ThreadState};
use crate::vector::format::Format;
use crate::vector::round::{round_row, widen_row};
use crate::vector::simd::{Kernel, Simd};
use std::marker::PhantomData;

/// Rows of a ticket.
const ROWS: usize = 16;

/// `out[row, :] = activation(pre[row, :])`.
pub struct ActivateRows<S, F> {
    pub activation: Activation,
    /// Gate and up columns alternate.
    pub interleaved: bool,
    pub rows: usize,
    /// Columns of `out`; `pre` has twice as many if the activation is gated.
    pub columns: usize,
    pub pre: *const u8,
    pub out: *mut u8,
    pub types: PhantomData<fn() -> (S, F)>,
}

// SAFETY: the pointers are shared by the threads of a call, which write disjoint rows.
unsafe impl<S, F> Sync for ActivateRows<S, F> {}

impl<S: Simd, F: Format> Job for ActivateRows<S, F> {
    fn tickets(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    fn run(&self, ticket: usize, thread: &mut ThreadState) {
        // Whole vectors of every part stay within it.
        let part = self.columns.next_multiple_of(16);
        let gate = thread.scratch.results.words(5 * part);
        for row in ticket * ROWS..self.rows.min((ticket + 1) * ROWS) {
            // SAFETY: whoever made this vouches for the pointers.
            unsafe {
                let width = self.columns * self.activation.columns();
                S::enter(ActivateRow::<F> {
                    activation: self.activation,
                    interleaved: self.interleaved && self.activation.gated(),
                    columns: self.columns,
                    pre: self.pre.add(row * width * F::BYTES),
                    gate,
                    up: gate.add(part),
                    mixed: gate.add(2 * part),
                    out: self.out.add(row * self.columns * F::BYTES),
                    format: PhantomData,
                });
            }
        }
    }
}

/// One row.
struct ActivateRow<F> {
    activation: Activation,
    interleaved: bool,
    columns: usize,
    pre: *const u8,
    /// Space for `columns` values.
    gate: *mut f32,
    /// The same.
    up: *mut f32,
    /// Space for twice as many.
    mixed: *mut f32,
    out: *mut u8,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for ActivateRow<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `pre` and `out` are rows of the widths stated; `gate`, `up` and `mixed` have room up to the next
        // whole vector, which widening writes and the activation reads.
        unsafe {
            let Self { activation, columns, pre, gate, up, mixed, out, .. } = self;
            if self.interleaved {
                widen_row::<S, F>(pre, mixed, 2 * columns);
                for i in 0..columns {
                    *gate.add(i) = *mixed.add(2 * i);
                    *up.add(i) = *mixed.add(2 * i + 1);
                }
            } else {
                widen_row::<S, F>(pre, gate, columns);
                if activation.gated() {
                    widen_row::<S, F>(pre.add(columns * F::BYTES), up, columns);
                }
            }
            let width = columns;
            Activate { activation, rows: 1, width, gate, up, in_stride: 0, out: gate, out_stride: 0 }.run::<S>();
            round_row::<S, F>(gate, out, columns);
        }
    }
}
