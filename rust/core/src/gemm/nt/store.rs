//! Rounds finished fp32 results to the output's type and stores them row by row.

use crate::vector::format::Format;
use crate::vector::simd::{Kernel, Narrow, Simd};
use std::marker::PhantomData;

/// Stores results of the lanes kernel, `results[feature][width]`, as `out[row][feature]`.
///
/// Eight features are read at a time: up to seven rows of `results` behind the last feature are read too.
pub struct StoreTransposed<F> {
    pub results: *const f32,
    /// Lanes of a feature, a multiple of eight.
    pub width: usize,
    /// Rows to store, at most `width`.
    pub rows: usize,
    pub features: usize,
    pub out: *mut u8,
    /// Bytes from one row of `out` to the next.
    pub out_stride: usize,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for StoreTransposed<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `results` has seven rows behind the last feature and `width` lanes for each, so blocks of eight by
        // eight can be read; `store_some` writes no more than the features that are left.
        unsafe {
            let mut row = 0;
            while row < self.rows {
                let rows = if self.rows - row < 8 { self.rows - row } else { 8 };
                let mut feature = 0;
                while feature < self.features {
                    let mut block = [<S::Narrow as Simd>::zero(); 8];
                    for (i, v) in block.iter_mut().enumerate() {
                        *v = <S::Narrow as Simd>::load(self.results.add((feature + i) * self.width + row));
                    }
                    S::Narrow::transpose(&mut block);
                    for (i, &v) in block.iter().enumerate().take(rows) {
                        let out = self.out.add((row + i) * self.out_stride + feature * F::BYTES);
                        store_some::<S::Narrow, F>(out, v, self.features - feature);
                    }
                    feature += 8;
                }
                row += 8;
            }
        }
    }
}

/// Stores `rows` rows of `features` values as rows of `out`, reading up to seven values behind each row.
pub struct StoreRows<F> {
    pub results: *const f32,
    /// Values from one row of `results` to the next.
    pub stride: usize,
    pub rows: usize,
    pub features: usize,
    pub out: *mut u8,
    /// Bytes from one row of `out` to the next.
    pub out_stride: usize,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for StoreRows<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: each row of `results` has seven values behind its last; `store_some` writes no more than the
        // features that are left.
        unsafe {
            for row in 0..self.rows {
                let from = self.results.add(row * self.stride);
                let out = self.out.add(row * self.out_stride);
                let mut feature = 0;
                while feature < self.features {
                    let v = <S::Narrow as Simd>::load(from.add(feature));
                    store_some::<S::Narrow, F>(out.add(feature * F::BYTES), v, self.features - feature);
                    feature += 8;
                }
            }
        }
    }
}

/// Stores the first `count` of eight values, or all.
#[inline(always)]
unsafe fn store_some<S: Narrow, F: Format>(out: *mut u8, v: S::V, count: usize) {
    // SAFETY: the caller has room for `count` elements, and eight of them fit the 32 bytes of `rounded` in every
    // format.
    unsafe {
        if count >= 8 {
            F::store_rounded::<S>(out, v);
        } else {
            let mut rounded = [0u8; 32];
            F::store_rounded::<S>(rounded.as_mut_ptr(), v);
            out.copy_from_nonoverlapping(rounded.as_ptr(), count * F::BYTES);
        }
    }
}
