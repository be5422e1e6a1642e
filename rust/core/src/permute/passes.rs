//! The passes: each hands ranges of tokens to threads, and those to the kernels.

use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use super::arguments::{Combine, CombineBackward, Permute};
use super::{double, kernels};
use crate::memory::pages::advise_huge_pages;
use crate::vector::dtype::DType;
use crate::vector::isa::with_kernels;

impl Permute {
    /// Does it.
    ///
    /// # Safety
    /// The pointers are as documented, and `inverse` is a permutation.
    pub unsafe fn run(&self) {
        let map = &self.map;
        let bytes = map.row_bytes();
        advise_huge_pages(self.out, map.tokens * map.top_k * bytes);
        map.for_tokens(|tokens| {
            for token in tokens {
                for slot in map.slots(token) {
                    // SAFETY: the rows exist by contract, and this row is this slot's.
                    unsafe {
                        let row = map.row(slot);
                        let to = self.out.add(row * bytes);
                        if row < map.used {
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
        advise_huge_pages(self.out, self.map.tokens * self.map.row_bytes());
        // SAFETY: handed on, and each token is drawn once.
        self.map.for_tokens(|tokens| unsafe { self.tokens(tokens) });
    }

    /// Does the tokens that are left to draw from `next`, which starts at 0: one thread's part of a larger job.
    ///
    /// # Safety
    /// As for `run`.
    pub(crate) unsafe fn work(&self, next: &AtomicUsize) {
        // SAFETY: handed on, and each token is drawn once.
        self.map.draw_tokens(next, &|tokens| unsafe { self.tokens(tokens) });
    }

    unsafe fn tokens(&self, tokens: Range<usize>) {
        // SAFETY: the caller's, on the vector unit that the instruction set has.
        unsafe {
            match self.map.dtype {
                DType::F64 => double::combine(self, tokens),
                dtype => with_kernels!(self.map.isa, dtype, S, F => kernels::combine::<S, F>(self, tokens)),
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
            advise_huge_pages(self.dy, self.map.tokens * self.map.top_k * self.map.row_bytes());
        }
        // SAFETY: handed on, and each token is drawn once.
        self.map.for_tokens(|tokens| unsafe {
            match self.map.dtype {
                DType::F64 => double::combine_backward(self, tokens),
                dtype => with_kernels!(self.map.isa, dtype, S, F => kernels::combine_backward::<S, F>(self, tokens)),
            }
        });
    }
}
