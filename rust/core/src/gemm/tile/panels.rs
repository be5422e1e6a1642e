//! Packing of operands whose summed index runs over rows: bands of the left one, panels of the right one.
//!
//! A word is what `Format` says: one value, or the bf16 values of two consecutive rows.

use crate::vector::format::{Format, Kind};
use crate::vector::simd::{Kernel, Simd};
use std::marker::PhantomData;

/// Words that a band may be written beyond its end; the next one starts no earlier.
pub const BAND_SLACK: usize = 16;

/// Columns of some rows cut into bands: `to[band][word][height]`, [`BAND_SLACK`] words between the bands.
///
/// The left operand of [`super::tiles`]: a step of it is broadcast, so `height` need not suit the vectors.
pub struct PackBands<'a, F> {
    /// The rows, in the order of the sum.
    pub rows: &'a [*const u8],
    /// First column.
    pub column: usize,
    /// How many; the last band may be narrower than the others.
    pub columns: usize,
    /// Columns that a row has.
    pub width: usize,
    /// Columns of a band, at most `LANES`.
    pub height: usize,
    /// `band_words` for each band.
    pub to: *mut f32,
    pub format: PhantomData<F>,
}

/// Words from one band to the next.
pub fn band_words<F: Format>(depth: usize, height: usize) -> usize {
    F::words(depth) * height + BAND_SLACK
}

impl<F: Format> Kernel for PackBands<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: columns `column..column + columns` are within the rows. A whole vector is read only if `reach`
        // columns are left in the row, and what it writes beyond its band's words is the next word's place or the
        // slack; otherwise `height` words are read and written one by one.
        unsafe {
            let pitch = band_words::<F>(self.rows.len(), self.height);
            // A vector of words reads this many elements of a row.
            let reach = S::LANES * F::PER_WORD;
            for word in 0..F::words(self.rows.len()) {
                let (first, second) = rows_of_word::<F>(self.rows, word);
                let (mut done, mut band) = (0, self.to);
                while done < self.columns {
                    let height = self.height.min(self.columns - done);
                    let (c, to) = (self.column + done, band.add(word * height));
                    if c + reach <= self.width && !second.is_null() {
                        // A whole vector: the surplus lands where the next word goes, or in the slack.
                        let at = c * F::BYTES;
                        S::store(to, one_vector::<S, F>(first.add(at), second.add(at)));
                    } else {
                        for i in 0..height {
                            *to.add(i) = word_of_rows::<F>(first, second, c + i);
                        }
                    }
                    done += height;
                    band = band.add(pitch);
                }
            }
        }
    }
}

/// Columns of some rows cut into panels of two vectors: `to[panel][word][2 * LANES]`, the last one filled up
/// with zeros. The right operand of [`super::tiles`].
pub struct PackPanels<'a, F> {
    /// The rows, in the order of the sum.
    pub rows: &'a [*const u8],
    /// First column.
    pub column: usize,
    /// How many.
    pub columns: usize,
    /// Whether columns keep their order. Otherwise those of a whole panel are as `Simd::interleave` leaves them where
    /// words are pairs, and `InOrder` puts the results right.
    pub in_order: bool,
    /// `F::words(rows) * 2 * LANES` for each panel.
    pub to: *mut f32,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for PackPanels<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: columns `column..column + columns` are within the rows, whole panels are read in two vectors, and
        // a ragged one word by word; `to` has room for the panels.
        unsafe {
            let width = 2 * S::LANES;
            let words = F::words(self.rows.len());
            let whole = self.columns / width;
            for word in 0..words {
                let (first, second) = rows_of_word::<F>(self.rows, word);
                let mut to = self.to.add(word * width);
                for panel in 0..whole {
                    let at = (self.column + panel * width) * F::BYTES;
                    let second = if second.is_null() { second } else { second.add(at) };
                    let (a, b) = two_vectors::<S, F>(first.add(at), second, self.in_order);
                    S::store(to, a);
                    S::store(to.add(S::LANES), b);
                    to = to.add(words * width);
                }
                if whole * width < self.columns {
                    for i in 0..width {
                        let c = whole * width + i;
                        *to.add(i) =
                            if c < self.columns { word_of_rows::<F>(first, second, self.column + c) } else { 0.0 };
                    }
                }
            }
        }
    }
}

/// The same for bf16 as fp32, where a panel's first vector holds its even columns and its second one the odd ones. The
/// last panel, if it is not whole, keeps its order.
pub struct PackSplit<'a, F> {
    /// The rows, in the order of the sum.
    pub rows: &'a [*const u8],
    /// How many columns, from the first.
    pub columns: usize,
    /// `rows * 2 * LANES` for each panel.
    pub to: *mut f32,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for PackSplit<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the rows have `columns` columns, whole panels are read in one vector of pairs, and a ragged one
        // value by value; `to` has room for the panels.
        unsafe {
            let width = 2 * S::LANES;
            let whole = self.columns / width;
            for (word, row) in self.rows.iter().enumerate() {
                let mut to = self.to.add(word * width);
                for panel in 0..whole {
                    let pairs = S::load(row.add(panel * width * F::BYTES).cast());
                    S::store(to, S::widen_even(pairs));
                    S::store(to.add(S::LANES), S::widen_odd(pairs));
                    to = to.add(self.rows.len() * width);
                }
                if whole * width < self.columns {
                    for i in 0..width {
                        let c = whole * width + i;
                        *to.add(i) = if c < self.columns { F::load_one(row.add(c * F::BYTES)) } else { 0.0 };
                    }
                }
            }
        }
    }
}

/// The rows whose elements word `word` holds. The second is the first again where a word holds one element,
/// and null past the last row.
#[inline(always)]
fn rows_of_word<F: Format>(rows: &[*const u8], word: usize) -> (*const u8, *const u8) {
    if F::PER_WORD == 1 {
        return (rows[word], rows[word]);
    }
    (rows[2 * word], rows.get(2 * word + 1).copied().unwrap_or(std::ptr::null()))
}

/// The words of `2 * LANES` columns, pairs in order only if asked for. A null second row reads as zeros.
#[inline(always)]
pub(super) unsafe fn two_vectors<S: Simd, F: Format>(
    first: *const u8,
    second: *const u8,
    in_order: bool,
) -> (S::V, S::V) {
    // SAFETY: the caller's: `2 * LANES` elements at `first`, and at `second` unless it is null.
    unsafe {
        if !matches!(F::KIND, Kind::Bf16Pairs) {
            return (F::load_widened::<S>(first), F::load_widened::<S>(first.add(S::LANES * F::BYTES)));
        }
        let below = if second.is_null() { S::zero() } else { S::load(second.cast()) };
        let (a, b) = S::interleave(S::load(first.cast()), below);
        if in_order { S::deinterleave(a, b) } else { (a, b) }
    }
}

/// The words of `LANES` columns. Where words are pairs, `2 * LANES` elements are read.
#[inline(always)]
unsafe fn one_vector<S: Simd, F: Format>(first: *const u8, second: *const u8) -> S::V {
    // SAFETY: the caller's: the elements of a vector of words at both addresses.
    unsafe {
        match F::KIND {
            Kind::Bf16Pairs => two_vectors::<S, F>(first, second, true).0,
            _ => F::load_widened::<S>(first),
        }
    }
}

/// One word from column `c`.
#[inline(always)]
unsafe fn word_of_rows<F: Format>(first: *const u8, second: *const u8, c: usize) -> f32 {
    // SAFETY: the caller's: both rows have a column `c`, the second unless it is null.
    unsafe {
        if !matches!(F::KIND, Kind::Bf16Pairs) {
            return F::load_one(first.add(c * F::BYTES));
        }
        let element = |row: *const u8| u32::from(row.cast::<u16>().add(c).read());
        f32::from_bits(element(first) | if second.is_null() { 0 } else { element(second) << 16 })
    }
}
