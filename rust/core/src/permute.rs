//! Tokens to rows sorted by expert, and back: gather, weighted sum, and the gradients of both.
//!
//! All of it goes token by token: a token's row is read or written once and stays in the first-level cache while
//! its `top_k` rows pass by, and no two tokens write the same memory. Sums are fp32 (fp64 for fp64) with the
//! token's slots in ascending order, so results do not depend on the number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::memory::pages::advise_huge_pages;
use crate::threads::pool::parallel;
use crate::vector::dtype::DType;
use crate::vector::isa::Isa;
use crate::vector::isa::with_kernels;

mod double;
mod kernels;

/// Bytes of rows that a thread takes at a time.
const TICKET_BYTES: usize = 64 << 10;

/// The shapes of a permutation, and the plan's part in it.
#[derive(Clone, Copy)]
pub struct Layout {
    /// Instruction set.
    pub isa: Isa,
    /// Threads at most.
    pub threads: usize,
    /// Type of all rows.
    pub dtype: DType,
    /// Tokens.
    pub tokens: usize,
    /// Slots of a token.
    pub top_k: usize,
    /// Elements of a row.
    pub hidden: usize,
    /// `[tokens * top_k]`, slot to row.
    pub inverse: *const i32,
    /// Rows from this one on, `offsets[experts]`, are sentinels'.
    pub used: usize,
}

/// `out[inverse[t * top_k + k]] = x[t]`, and zeros in the rows of sentinels.
pub struct Permute {
    /// Shapes.
    pub layout: Layout,
    /// `[tokens, hidden]`.
    pub x: *const u8,
    /// `[tokens * top_k, hidden]`, all of it written.
    pub out: *mut u8,
}

/// `out[t] = sum over k of weights[t, k] * y[inverse[t * top_k + k]]`, without the sentinels.
///
/// With `weights` null this is also the gradient of [`Permute`].
pub struct Combine {
    /// Shapes.
    pub layout: Layout,
    /// `[tokens * top_k, hidden]`; the rows of sentinels are not read.
    pub y: *const u8,
    /// `[tokens, top_k]`, fp32 (fp64 with fp64 rows), or null for ones.
    pub weights: *const u8,
    /// `[tokens, hidden]`, all of it written.
    pub out: *mut u8,
}

/// The gradients of [`Combine`]: `dy[row] = weights[slot] * dout[t]` and `dweights[slot] = <dout[t], y[row]>`, zeros
/// for sentinels.
pub struct CombineBackward {
    /// Shapes.
    pub layout: Layout,
    /// `[tokens, hidden]`.
    pub dout: *const u8,
    /// `[tokens * top_k, hidden]`; not read if `dweights` is null.
    pub y: *const u8,
    /// As for [`Combine`].
    pub weights: *const u8,
    /// `[tokens * top_k, hidden]`, all of it written; null if not wanted.
    pub dy: *mut u8,
    /// `[tokens, top_k]` in the type of the weights, all of it written; null if not wanted.
    pub dweights: *mut u8,
}

// Safety: threads read shared memory and write that of their own tokens.
unsafe impl Sync for Layout {}
unsafe impl Sync for Permute {}
unsafe impl Sync for Combine {}
unsafe impl Sync for CombineBackward {}

impl Permute {
    /// Does it.
    ///
    /// # Safety
    /// The pointers are as documented, and `inverse` is a permutation.
    pub unsafe fn run(&self) {
        let layout = &self.layout;
        let bytes = layout.row_bytes();
        advise_huge_pages(self.out, layout.tokens * layout.top_k * bytes);
        layout.for_tokens(|tokens| {
            for token in tokens {
                for slot in layout.slots(token) {
                    // Safety: the rows exist by contract, and this row is this slot's.
                    unsafe {
                        let row = layout.row(slot);
                        let to = self.out.add(row * bytes);
                        if row < layout.used {
                            to.copy_from_nonoverlapping(self.x.add(token * bytes), bytes);
                        } else {
                            to.write_bytes(0, bytes);
                        }
                    }
                }
            }
        });
    }
}

impl Combine {
    /// Does it.
    ///
    /// # Safety
    /// The pointers are as documented, and `inverse` is a permutation.
    pub unsafe fn run(&self) {
        advise_huge_pages(self.out, self.layout.tokens * self.layout.row_bytes());
        // Safety: handed on, and each token is drawn once.
        self.layout.for_tokens(|tokens| unsafe { self.tokens(tokens) });
    }

    /// Does the tokens that are left to draw from `next`, which starts at 0: one thread's part of a larger job.
    ///
    /// # Safety
    /// As for `run`.
    pub(crate) unsafe fn work(&self, next: &AtomicUsize) {
        // Safety: handed on, and each token is drawn once.
        self.layout.draw_tokens(next, &|tokens| unsafe { self.tokens(tokens) });
    }

    unsafe fn tokens(&self, tokens: Range<usize>) {
        unsafe {
            match self.layout.dtype {
                DType::F64 => double::combine(self, tokens),
                dtype => with_kernels!(self.layout.isa, dtype, S, F => kernels::combine::<S, F>(self, tokens)),
            }
        }
    }
}

impl CombineBackward {
    /// Does it.
    ///
    /// # Safety
    /// The pointers are as documented, and `inverse` is a permutation.
    pub unsafe fn run(&self) {
        if !self.dy.is_null() {
            advise_huge_pages(self.dy, self.layout.tokens * self.layout.top_k * self.layout.row_bytes());
        }
        // Safety: handed on, and each token is drawn once.
        self.layout.for_tokens(|tokens| unsafe {
            match self.layout.dtype {
                DType::F64 => double::combine_backward(self, tokens),
                dtype => with_kernels!(self.layout.isa, dtype, S, F => kernels::combine_backward::<S, F>(self, tokens)),
            }
        });
    }
}

impl Layout {
    fn row_bytes(&self) -> usize {
        self.hidden * self.dtype.size()
    }

    fn slots(&self, token: usize) -> Range<usize> {
        token * self.top_k..(token + 1) * self.top_k
    }

    /// The row of a slot.
    ///
    /// # Safety
    /// The slot exists.
    #[inline(always)]
    unsafe fn row(&self, slot: usize) -> usize {
        unsafe { *self.inverse.add(slot) as usize }
    }

    /// The row of a slot, unless it is a sentinel.
    ///
    /// # Safety
    /// The slot exists.
    #[inline(always)]
    unsafe fn used_row(&self, slot: usize) -> Option<usize> {
        let row = unsafe { self.row(slot) };
        (row < self.used).then_some(row)
    }

    /// Tokens of a ticket.
    fn ticket(&self) -> usize {
        let token_bytes = self.row_bytes() * (self.top_k + 1);
        (TICKET_BYTES / token_bytes.max(1)).clamp(1, self.tokens.max(1))
    }

    /// Calls `f` on ranges that hold every token once, from several threads if there is work for them.
    fn for_tokens(&self, f: impl Fn(Range<usize>) + Sync) {
        let next = AtomicUsize::new(0);
        let threads = self.threads.min(self.tokens.div_ceil(self.ticket())).max(1);
        parallel(threads, &|_| self.draw_tokens(&next, &f));
    }

    /// Calls `f` on ranges of tokens until none is left.
    fn draw_tokens(&self, next: &AtomicUsize, f: &impl Fn(Range<usize>)) {
        let ticket = self.ticket();
        loop {
            let start = next.fetch_add(ticket, Relaxed);
            if start >= self.tokens {
                return;
            }
            f(start..self.tokens.min(start + ticket));
        }
    }
}
