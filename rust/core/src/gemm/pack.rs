//! Copies of operands in the order in which the kernels read them.

use crate::vector::format::{Format, Kind};
use crate::vector::simd::{Kernel, Narrow, Simd};
use std::marker::PhantomData;

/// `to[word of k][width]` from rows given by address: the rows become lanes. Lanes without a row are zero.
pub struct PackTransposed<'a, F> {
    /// At most `width` rows of `k` elements.
    pub rows: &'a [*const u8],
    /// Any width; a multiple of eight is fast.
    pub width: usize,
    /// Elements of a row.
    pub k: usize,
    /// `F::words(k) * width` words.
    pub to: *mut f32,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for PackTransposed<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: words are loaded as long as eight of a row are left, then one by one; `to` has a lane of each word
        // for every row and every empty lane, and stores of eight lanes end at `width`.
        unsafe {
            let Self { rows, width, k, to, .. } = self;
            let word_bytes = F::BYTES * F::PER_WORD;
            let whole = k / F::PER_WORD / 8 * 8;
            let mut word = 0;
            while word < whole {
                let mut lane = 0;
                while lane < width {
                    let mut block = [<S::Narrow as Simd>::zero(); 8];
                    for (i, row) in block.iter_mut().enumerate() {
                        if lane + i < rows.len() {
                            *row = F::load_words::<S::Narrow>(rows[lane + i].add(word * word_bytes));
                        }
                    }
                    S::Narrow::transpose(&mut block);
                    let out = to.add(word * width + lane);
                    if lane + 8 <= width {
                        for (i, &column) in block.iter().enumerate() {
                            S::Narrow::store(out.add(i * width), column);
                        }
                    } else {
                        let mut column = [0f32; 8];
                        for (i, &v) in block.iter().enumerate() {
                            S::Narrow::store(column.as_mut_ptr(), v);
                            for (j, &x) in column.iter().enumerate().take(width - lane) {
                                *out.add(i * width + j) = x;
                            }
                        }
                    }
                    lane += 8;
                }
                word += 8;
            }
            while word < F::words(k) {
                for lane in 0..width {
                    *to.add(word * width + lane) = if lane < rows.len() {
                        F::load_word(rows[lane].add(word * word_bytes), k - word * F::PER_WORD)
                    } else {
                        0.0
                    };
                }
                word += 1;
            }
        }
    }
}

/// `to[step][row][LANES]` from rows given by address: k stays in the lanes, as the dot kernels read it. A step
/// is a vector of words, or where bf16 is widened two: the even elements of all rows, then the odd ones. The
/// last step is filled with zeros.
pub struct PackSteps<'a, F> {
    /// Rows of `k` elements.
    pub rows: &'a [*const u8],
    /// Elements of a row.
    pub k: usize,
    /// `steps * rows * LANES` words, twice that where bf16 is widened.
    pub to: *mut f32,
    pub format: PhantomData<F>,
}

/// Elements of k in one step of the dot kernels.
pub const fn step_elements<S: Simd, F: Format>() -> usize {
    match F::KIND {
        Kind::F32 | Kind::F16 => S::LANES,
        Kind::Bf16 | Kind::Bf16Pairs => 2 * S::LANES,
    }
}

/// Words of `PackSteps` for one row.
pub const fn step_words<S: Simd, F: Format>(k: usize) -> usize {
    let per_step = if matches!(F::KIND, Kind::Bf16) { 2 * S::LANES } else { S::LANES };
    k.div_ceil(step_elements::<S, F>()) * per_step
}

impl<F: Format> Kernel for PackSteps<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: a step is read from a row only if all of it is there, else from `partial`, whose 64 bytes hold the
        // largest step; `to` has room for every step of every row.
        unsafe {
            let Self { rows, k, mut to, .. } = self;
            let step_bytes = step_elements::<S, F>() * F::BYTES;
            let row_bytes = k * F::BYTES;
            let mut at = 0;
            while at < row_bytes {
                for (i, &row) in rows.iter().enumerate() {
                    let mut partial = [0u8; 64];
                    let mut from = row.add(at);
                    if at + step_bytes > row_bytes {
                        from.copy_to_nonoverlapping(partial.as_mut_ptr(), row_bytes - at);
                        from = partial.as_mut_ptr();
                    }
                    match F::KIND {
                        Kind::F32 | Kind::Bf16Pairs => S::store(to.add(i * S::LANES), S::load(from.cast())),
                        Kind::F16 => S::store(to.add(i * S::LANES), S::load_f16(from.cast())),
                        Kind::Bf16 => {
                            let words = S::load(from.cast());
                            S::store(to.add(i * S::LANES), S::widen_even(words));
                            S::store(to.add((rows.len() + i) * S::LANES), S::widen_odd(words));
                        }
                    }
                }
                to = to.add(rows.len() * S::LANES * if matches!(F::KIND, Kind::Bf16) { 2 } else { 1 });
                at += step_bytes;
            }
        }
    }
}
