//! Rows of a dtype to and from rows of fp32 values, of any length.

use super::format::Format;
use super::simd::{Kernel, Simd};
use std::marker::PhantomData;

/// Rounds rows of fp32 values, a row of `bias` added where it is not null.
pub struct RoundRows<F> {
    /// Values.
    pub from: *const f32,
    /// Values from one row to the next.
    pub from_stride: usize,
    /// `columns` elements, or null.
    pub bias: *const u8,
    /// Where the elements go.
    pub to: *mut u8,
    /// Bytes from one row to the next.
    pub to_stride: usize,
    pub rows: usize,
    pub columns: usize,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for RoundRows<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: rows and columns are those described in the fields; what is loaded and stored ends with the last
        // column.
        unsafe {
            for row in 0..self.rows {
                let from = self.from.add(row * self.from_stride);
                let to = self.to.add(row * self.to_stride);
                if self.bias.is_null() {
                    round_row::<S, F>(from, to, self.columns);
                    continue;
                }
                let mut i = 0;
                while i < self.columns {
                    let left = self.columns - i;
                    let bias = load_up_to::<S, F>(self.bias.add(i * F::BYTES), left);
                    let value = S::add(load_values_up_to::<S>(from.add(i), left), bias);
                    store_up_to::<S, F>(to.add(i * F::BYTES), value, left);
                    i += S::LANES;
                }
            }
        }
    }
}

/// Rounds `len` values.
#[inline(always)]
pub unsafe fn round_row<S: Simd, F: Format>(from: *const f32, to: *mut u8, len: usize) {
    // SAFETY: `i + LANES <= len` holds for whole vectors, and the rest is loaded and stored by its elements.
    unsafe {
        let mut i = 0;
        while i + S::LANES <= len {
            F::store_rounded::<S>(to.add(i * F::BYTES), S::load(from.add(i)));
            i += S::LANES;
        }
        if i < len {
            store_up_to::<S, F>(to.add(i * F::BYTES), load_values_up_to::<S>(from.add(i), len - i), len - i);
        }
    }
}

/// Widens `len` elements; what is left of the last vector becomes zeros.
#[inline(always)]
pub unsafe fn widen_row<S: Simd, F: Format>(from: *const u8, to: *mut f32, len: usize) {
    // SAFETY: `load_up_to` reads what is left, and `to` has room for whole vectors.
    unsafe {
        let mut i = 0;
        while i < len {
            S::store(to.add(i), load_up_to::<S, F>(from.add(i * F::BYTES), len - i));
            i += S::LANES;
        }
    }
}

/// The next `LANES` of `left` elements, zeros beyond them.
#[inline(always)]
pub unsafe fn load_up_to<S: Simd, F: Format>(from: *const u8, left: usize) -> S::V {
    // SAFETY: a whole vector is read only if so many elements are left; fewer fit the 64 bytes of `part`, as `LANES`
    // elements do.
    unsafe {
        if left >= S::LANES {
            return F::load_widened::<S>(from);
        }
        let mut part = [0u8; 64];
        from.copy_to_nonoverlapping(part.as_mut_ptr(), left * F::BYTES);
        F::load_widened::<S>(part.as_ptr())
    }
}

/// The next `LANES` of `left` values, zeros beyond them.
#[inline(always)]
pub unsafe fn load_values_up_to<S: Simd>(from: *const f32, left: usize) -> S::V {
    // SAFETY: a whole vector is read only if so many values are left; fewer fit `part`, as `LANES` values do.
    unsafe {
        if left >= S::LANES {
            return S::load(from);
        }
        let mut part = [0f32; 16];
        from.copy_to_nonoverlapping(part.as_mut_ptr(), left);
        S::load(part.as_ptr())
    }
}

/// Rounds the first `left` lanes, or all.
#[inline(always)]
pub unsafe fn store_up_to<S: Simd, F: Format>(to: *mut u8, value: S::V, left: usize) {
    // SAFETY: a whole vector is written only if so many elements are left; `LANES` elements fit the 64 bytes of
    // `part`.
    unsafe {
        if left >= S::LANES {
            return F::store_rounded::<S>(to, value);
        }
        let mut part = [0u8; 64];
        F::store_rounded::<S>(part.as_mut_ptr(), value);
        part.as_ptr().copy_to_nonoverlapping(to, left * F::BYTES);
    }
}
