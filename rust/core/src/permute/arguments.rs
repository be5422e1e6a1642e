//! The arguments of the permutation's passes: shapes, the plan's part in them, and addresses.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::threads::pool::parallel;
use crate::vector::dtype::DType;
use crate::vector::isa::Isa;

/// Bytes of rows that a thread takes at a time.
const BYTES_AT_ONCE: usize = 64 << 10;

/// The shapes of a permutation, and the plan's part in it.
#[derive(Clone, Copy)]
pub struct TokenMap {
    /// Instruction set of the kernels, one that this CPU has.
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
    pub map: TokenMap,
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
    pub map: TokenMap,
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
    pub map: TokenMap,
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

// SAFETY: threads read shared memory and write that of their own tokens.
unsafe impl Sync for TokenMap {}
// SAFETY: as above.
unsafe impl Sync for Permute {}
// SAFETY: as above.
unsafe impl Sync for Combine {}
// SAFETY: as above.
unsafe impl Sync for CombineBackward {}

impl TokenMap {
    pub(super) fn row_bytes(&self) -> usize {
        self.hidden * self.dtype.size()
    }

    pub(super) fn slots(&self, token: usize) -> Range<usize> {
        token * self.top_k..(token + 1) * self.top_k
    }

    /// The row of a slot.
    ///
    /// # Safety
    /// The slot exists.
    #[inline(always)]
    pub(super) unsafe fn row(&self, slot: usize) -> usize {
        // SAFETY: the caller's: the slot exists.
        unsafe { *self.inverse.add(slot) as usize }
    }

    /// The row of a slot, unless it is a sentinel.
    ///
    /// # Safety
    /// The slot exists.
    #[inline(always)]
    pub(super) unsafe fn used_row(&self, slot: usize) -> Option<usize> {
        // SAFETY: the caller's: the slot exists.
        let row = unsafe { self.row(slot) };
        (row < self.used).then_some(row)
    }

    /// Tokens that a thread takes at a time.
    fn at_once(&self) -> usize {
        let token_bytes = self.row_bytes() * (self.top_k + 1);
        (BYTES_AT_ONCE / token_bytes.max(1)).clamp(1, self.tokens.max(1))
    }

    /// Calls `f` on ranges that hold every token once, from several threads if there is work for them.
    pub(super) fn for_tokens(&self, f: impl Fn(Range<usize>) + Sync) {
        let next = AtomicUsize::new(0);
        let threads = self.threads.min(self.tokens.div_ceil(self.at_once())).max(1);
        parallel(threads, &|_| self.draw_tokens(&next, &f));
    }

    /// Calls `f` on ranges of tokens until none is left.
    pub(super) fn draw_tokens(&self, next: &AtomicUsize, f: &impl Fn(Range<usize>)) {
        let at_once = self.at_once();
        loop {
            let start = next.fetch_add(at_once, Relaxed);
            if start >= self.tokens {
                return;
            }
            f(start..self.tokens.min(start + at_once));
        }
    }
}
