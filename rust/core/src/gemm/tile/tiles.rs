//! The tile kernel of the gradients: some rows times panels of two vectors, both packed.
//!
//! A step broadcasts one word of each row and multiplies it with the panel's two vectors: twelve rows fill 24
//! of AVX-512's 32 registers, six rows 12 of AVX2's 16. The weights of "nn" would otherwise be read from memory
//! just before they are copied into panels, so the kernel prefetches the block that comes next while it works
//! on this one, a line every few steps: the same prefetches issued in a burst are a quarter slower.

use super::panels::two_vectors;
use crate::vector::format::{F32, Format, Kind};
use crate::vector::simd::{Kernel, Simd, prefetch};
use std::marker::PhantomData;

/// Rows of the largest tile.
pub const fn tile_rows<S: Simd>() -> usize {
    if S::LANES == 16 { 12 } else { 6 }
}

/// What becomes of a finished tile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// fp32.
    Set,
    /// fp32, added to what is there.
    Add,
    /// fp32 past the caches; aligned to vectors.
    Stream,
    /// bf16.
    Bf16,
    /// bf16 past the caches; aligned to vectors.
    StreamBf16,
    /// bf16, the tile's two vectors being even and odd columns.
    SplitBf16,
    /// The same past the caches; aligned to vectors.
    StreamSplitBf16,
    /// fp16.
    F16,
}

/// A walk over the cache lines of a matrix block, row by row, made in small steps.
pub struct Prefetch {
    line: *const u8,
    lines: usize,
    left: usize,
    skip: usize,
    rows: usize,
    interval: usize,
    burst: usize,
}

impl Prefetch {
    /// Nothing to prefetch.
    pub fn none() -> Self {
        Self { line: std::ptr::null(), lines: 0, left: 0, skip: 0, rows: 0, interval: 0, burst: 0 }
    }

    /// The block of `rows` rows of `bytes` bytes at `start`, spread over `steps` steps of the tile kernel.
    pub fn new(start: *const u8, stride: usize, rows: usize, bytes: usize, steps: usize) -> Self {
        let lines = bytes.div_ceil(64);
        let total = lines * rows;
        if total == 0 || steps == 0 {
            return Self::none();
        }
        Self {
            line: start,
            lines,
            left: lines,
            skip: stride.wrapping_sub(lines * 64),
            rows,
            interval: (steps / total).max(1),
            burst: total.div_ceil(steps),
        }
    }

    #[inline(always)]
    fn advance(&mut self) {
        for _ in 0..self.burst {
            prefetch(self.line);
            self.line = self.line.wrapping_add(64);
            self.left -= 1;
            if self.left == 0 {
                self.left = self.lines;
                self.line = self.line.wrapping_add(self.skip);
                self.rows -= 1;
                if self.rows == 0 {
                    (self.interval, self.burst) = (0, 0);
                    return;
                }
            }
        }
    }
}

/// A right operand as it lies in memory, to be packed on the way: whole panels of whole words.
///
/// A step has twelve or more multiplications for one row of a panel, beside which loading, interleaving and storing
/// it are free; packed on its own it takes a quarter of the time of sixteen rows.
#[derive(Clone, Copy)]
pub struct Source {
    /// The first panel's first row; null: the panels are packed.
    pub start: *const u8,
    /// From one row to the next.
    pub row_bytes: usize,
}

impl Source {
    /// The panels are packed.
    pub const NONE: Self = Self { start: std::ptr::null(), row_bytes: 0 };
}

/// One strip of rows against consecutive panels.
pub struct Tiles {
    /// Words of the summed index.
    pub words: usize,
    /// `[words][rows]`.
    pub left: *const f32,
    /// `[words][2 * LANES]` for each panel; written first if there is a [`Source`].
    pub right: *mut f32,
    /// How many panels.
    pub panels: usize,
    /// Words from one panel to the next.
    pub panel_stride: usize,
    /// First element of the result.
    pub out: *mut u8,
    /// Bytes from one row of the result to the next.
    pub out_stride: usize,
    /// Bytes from one panel's columns to the next one's.
    pub out_step: usize,
    /// What to do with the results.
    pub store: Store,
}

impl Tiles {
    /// Runs the kernel on `rows` rows, at most [`tile_rows`].
    ///
    /// # Safety
    /// The CPU supports `S`, and the operands are as described.
    pub unsafe fn run<S: Simd, F: Format>(self, rows: usize, source: Source, ahead: &mut Prefetch) {
        // SAFETY: the caller's: the operands are as described, for so many rows.
        unsafe {
            if !source.start.is_null() {
                self.pick::<S, F, true>(rows, source, ahead);
            } else if const { matches!(F::KIND, Kind::Bf16Pairs) } {
                self.pick::<S, F, false>(rows, source, ahead);
            } else {
                // All formats but pairs share the kernels on packed words.
                self.pick::<S, F32, false>(rows, source, ahead);
            }
        }
    }

    unsafe fn pick<S: Simd, F: Format, const PACK: bool>(self, rows: usize, source: Source, ahead: &mut Prefetch) {
        // SAFETY: the caller's: the operands are as described, for so many rows.
        unsafe {
            macro_rules! pick {
            ($($n:literal)*) => {
                match rows {
                    $($n => S::enter(Rows::<F, $n, PACK> { tiles: self, source, ahead, format: PhantomData }),)*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
            if const { S::LANES == 16 } { pick!(1 2 3 4 5 6 7 8 9 10 11 12) } else { pick!(1 2 3 4 5 6) }
        }
    }
}

struct Rows<'a, F, const ROWS: usize, const PACK: bool> {
    tiles: Tiles,
    source: Source,
    ahead: &'a mut Prefetch,
    format: PhantomData<F>,
}

impl<F: Format, const ROWS: usize, const PACK: bool> Kernel for Rows<'_, F, ROWS, PACK> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `left` has `words` words of `ROWS` rows; the panel has as many of two vectors, to be written first
        // if `PACK`, from as many rows of the source, each as wide. `out` has two vectors for each row and panel.
        // Prefetches may have any address.
        unsafe {
            let t = self.tiles;
            let paired = matches!(F::KIND, Kind::Bf16Pairs);
            let mut countdown = self.ahead.interval;
            for panel in 0..t.panels {
                let mut sums = [[S::zero(); 2]; ROWS];
                let (mut left, mut right) = (t.left, t.right.add(panel * t.panel_stride));
                let mut source = self.source.start.wrapping_add(panel * 2 * S::LANES * F::BYTES);
                for _ in 0..t.words {
                    countdown = countdown.wrapping_sub(1);
                    if countdown == 0 {
                        self.ahead.advance();
                        countdown = self.ahead.interval;
                    }
                    let (r0, r1) = if PACK {
                        let second = source.wrapping_add((F::PER_WORD - 1) * self.source.row_bytes);
                        let (r0, r1) = two_vectors::<S, F>(source, second, false);
                        S::store(right, r0);
                        S::store(right.add(S::LANES), r1);
                        source = source.wrapping_add(F::PER_WORD * self.source.row_bytes);
                        (r0, r1)
                    } else {
                        (S::load(right), S::load(right.add(S::LANES)))
                    };
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let l = S::splat_bits(left.add(i).cast::<u32>().read());
                        if paired {
                            sum[0] = S::dot_pairs(sum[0], l, r0);
                            sum[1] = S::dot_pairs(sum[1], l, r1);
                        } else {
                            sum[0] = S::fma(l, r0, sum[0]);
                            sum[1] = S::fma(l, r1, sum[1]);
                        }
                    }
                    left = left.add(ROWS);
                    right = right.add(2 * S::LANES);
                }
                store::<S, ROWS>(t.store, t.out.add(panel * t.out_step), t.out_stride, &sums);
            }
        }
    }
}

/// One loop for each way, so that every loop is unrolled and the sums stay in registers.
#[inline(always)]
unsafe fn store<S: Simd, const ROWS: usize>(how: Store, to: *mut u8, stride: usize, sums: &[[S::V; 2]; ROWS]) {
    // SAFETY: the caller's: two vectors of results in each of `ROWS` rows, `stride` bytes apart, aligned to vectors
    // where they go past the caches; columns were split only where `S::SPLITS`.
    unsafe {
        macro_rules! each_row {
            ($element:ty, |$to:ident, $a:ident, $b:ident| $body:expr) => {
                for (i, &[$a, $b]) in sums.iter().enumerate() {
                    let $to = to.add(i * stride).cast::<$element>();
                    $body;
                }
            };
        }
        match how {
            Store::Set => each_row!(f32, |to, a, b| {
                S::store(to, a);
                S::store(to.add(S::LANES), b)
            }),
            Store::Add => each_row!(f32, |to, a, b| {
                S::store(to, S::add(S::load(to), a));
                S::store(to.add(S::LANES), S::add(S::load(to.add(S::LANES)), b))
            }),
            Store::Stream => each_row!(f32, |to, a, b| {
                S::stream(to, a);
                S::stream(to.add(S::LANES), b)
            }),
            Store::Bf16 => each_row!(u16, |to, a, b| S::store_bf16_pair(to, a, b)),
            Store::StreamBf16 => each_row!(u16, |to, a, b| S::stream_bf16_pair(to, a, b)),
            // Without the condition what is never called would be compiled.
            Store::SplitBf16 if S::SPLITS => each_row!(u16, |to, a, b| S::store_bf16_split(to, a, b)),
            Store::StreamSplitBf16 if S::SPLITS => each_row!(u16, |to, a, b| S::stream_bf16_split(to, a, b)),
            Store::SplitBf16 | Store::StreamSplitBf16 => unreachable!("columns were not split"),
            Store::F16 => each_row!(u16, |to, a, b| {
                S::store_f16(to, a);
                S::store_f16(to.add(S::LANES), b)
            }),
        }
    }
}
