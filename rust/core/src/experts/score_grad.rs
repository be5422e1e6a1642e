//! The gradient of the routing scores, from the shares that the blocks of the first GEMM left.

use crate::gemm::grouped::Gather;
use crate::threads::jobs::{Job, ThreadState};
use crate::vector::format::Format;
use crate::vector::round::load_up_to;
use crate::vector::simd::{Kernel, Narrow, Simd};
use std::marker::PhantomData;

/// Rows of a ticket.
const ROWS: usize = 1024;

/// `dscores[slot] = sum over blocks of shares[block][row] + <dout[token], b_down[expert]>`; zero for sentinels.
pub struct ScoreGradient<S, F> {
    pub experts: usize,
    /// `experts + 1` row offsets.
    pub offsets: *const i32,
    /// Rows, sentinels included.
    pub slots: usize,
    /// Row to slot.
    pub order: *const i32,
    /// `[blocks, slots]`.
    pub shares: *const f32,
    pub blocks: usize,
    /// `[tokens, hidden]`.
    pub dout: *const u8,
    /// Row to token.
    pub gather: Gather,
    pub hidden: usize,
    /// `[experts, hidden]` or null.
    pub b_down: *const u8,
    /// `[slots]`, by slot.
    pub dscores: *mut f32,
    pub types: PhantomData<fn() -> (S, F)>,
}

// SAFETY: the pointers are shared by the threads of a call, which write disjoint parts of `dscores`.
unsafe impl<S, F> Sync for ScoreGradient<S, F> {}

impl<S: Simd, F: Format> Job for ScoreGradient<S, F> {
    fn tickets(&self) -> usize {
        self.slots.div_ceil(ROWS)
    }

    fn run(&self, ticket: usize, _: &mut ThreadState) {
        // SAFETY: whoever made this vouches for the pointers.
        unsafe {
            let mut expert = 0;
            for row in ticket * ROWS..self.slots.min((ticket + 1) * ROWS) {
                while expert < self.experts && *self.offsets.add(expert + 1) as usize <= row {
                    expert += 1;
                }
                let mut sum = 0.0;
                if expert < self.experts {
                    for block in 0..self.blocks {
                        sum += *self.shares.add(block * self.slots + row);
                    }
                    if !self.b_down.is_null() {
                        let row_bytes = self.hidden * F::BYTES;
                        sum += S::enter(RowDot::<F> {
                            a: self.dout.add(self.gather.source(row) * row_bytes),
                            b: self.b_down.add(expert * row_bytes),
                            len: self.hidden,
                            format: PhantomData,
                        });
                    }
                }
                *self.dscores.add(*self.order.add(row) as usize) = sum;
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
        // SAFETY: both rows have `len` elements, and `load_up_to` reads no more than are left.
        unsafe {
            let mut lanes = [<S::Narrow as Simd>::zero(); 8];
            let mut sum = S::zero();
            let mut i = 0;
            while i < self.len {
                let a = load_up_to::<S, F>(self.a.add(i * F::BYTES), self.len - i);
                let b = load_up_to::<S, F>(self.b.add(i * F::BYTES), self.len - i);
                sum = S::fma(a, b, sum);
                i += S::LANES;
            }
            lanes[0] = S::fold(sum);
            let mut sums = [0f32; 8];
            <S::Narrow as Simd>::store(sums.as_mut_ptr(), S::Narrow::sum_each(lanes));
            sums[0]
        }
    }
}
