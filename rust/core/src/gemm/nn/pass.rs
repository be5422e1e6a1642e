//! A grouped "nn" cut into pieces. A piece is some rows of an expert and some columns. Its sums are formed in fp32 in the
//! second-level cache and handed to a [`Finish`], which is where bias, rounding or the gradient of the activation happen.
//!
//! | rows of the expert | form                                                                         |
//! |--------------------|------------------------------------------------------------------------------|
//! | few                | [`super::axpy`]: weight rows as they lie in memory                           |
//! | more               | [`Tiles`]: blocks of weights are packed a few columns at a time, the next one being prefetched |

use super::axpy::{AXPY_ELEMENTS, AddValues, Axpy, InOrder, axpy_columns, axpy_rows};
use crate::gemm::grouped::Grouped;
use crate::gemm::pack::PackTransposed;
use crate::gemm::tile::panels::PackPanels;
use crate::gemm::tile::tiles::{Prefetch, Source, Store, Tiles, tile_rows};
use crate::threads::jobs::{Job, ThreadState, even_parts, run_jobs};
use crate::vector::format::{Format, Kind};
use crate::vector::isa::with_kernels;
use crate::vector::round::RoundRows;
use crate::vector::simd::Simd;
use std::marker::PhantomData;

/// Pieces start at multiples of this many columns.
pub const COLUMN_BLOCK: usize = 256;

/// Rows of a piece: their sums, their share of a block of weights and two such blocks share the second-level cache.
const PIECE_ROWS: usize = 512;

/// Up to so many rows the blocks of weights are wide and shallow.
const WIDE_ROWS: usize = 64;

/// Bytes of packed weights: they and a strip of rows share the first-level cache.
const PACKED_BYTES: usize = 16 << 10;

/// A block of weights: what is prefetched while the one before is multiplied.
///
/// Weight rows lie a power of two apart, so the lines of a block fall into as few sets of the second-level cache as
/// a row of it has lines (times the pages that happen to lie differently): shallow blocks leave room there. Deep ones
/// load and store the sums less often, which counts more where there are many.
struct WeightBlock {
    /// Elements of the summed index.
    depth: usize,
    /// Columns, a multiple of [`COLUMN_BLOCK`].
    columns: usize,
}

impl WeightBlock {
    const fn new<F: Format>(rows: usize) -> Self {
        if rows <= WIDE_ROWS {
            Self { depth: 128, columns: 1024 / F::BYTES }
        } else {
            Self { depth: 256, columns: COLUMN_BLOCK }
        }
    }
}

/// Elements of the summed index for which all rows are done before the next ones, if few rows need several calls:
/// their weights stay in the first-level cache or near it.
const AXPY_DEPTH: usize = 64;

/// Elements of one running fp32 sum: rounding errors grow with the length of the sum, not of the pieces. Half
/// precision is rounded in the end, coarser than any order of the sum.
const SUMMED: usize = 512;

/// Up to how many rows weights are read in place.
pub(super) const fn few_rows<S: Simd, F: Format>() -> usize {
    // Measured on Zen 4. Packing on the way costs few rows little, except where AVX-512 multiplies fp32: there it is a
    // fifth slower up to eight rows, and level from twelve on.
    if S::LANES == 16 && !matches!(F::KIND, Kind::Bf16Pairs) { 24 } else { 4 }
}

/// Finished sums of some rows and columns.
pub struct FinishedSums {
    /// The expert.
    pub expert: usize,
    /// First row, in the order of the plan.
    pub row: usize,
    /// How many rows.
    pub rows: usize,
    /// First column, a multiple of [`COLUMN_BLOCK`].
    pub column: usize,
    /// How many columns.
    pub columns: usize,
    /// The sums.
    pub values: *mut f32,
    /// Values from one row to the next; those between `columns` and the next multiple of 16 can be written.
    pub stride: usize,
}

/// Takes sums as they are finished, while they are in the cache.
pub trait Finish: Sync {
    /// Consumes the sums.
    ///
    /// # Safety
    /// The CPU supports `S`, and the sums are some of the GEMM that this was made for.
    unsafe fn finish<S: Simd>(&self, sums: &FinishedSums);
}

/// Adds the bias, rounds, stores.
pub struct StoreSums<F> {
    /// `[rows, n]`.
    pub out: *mut u8,
    /// `[experts, n]` or null.
    pub bias: *const u8,
    /// Columns of `out`.
    pub n: usize,
    pub format: PhantomData<F>,
}

// SAFETY: pieces write disjoint parts.
unsafe impl<F> Sync for StoreSums<F> {}

impl<F: Format> Finish for StoreSums<F> {
    unsafe fn finish<S: Simd>(&self, sums: &FinishedSums) {
        // SAFETY: the sums are some of this GEMM: their rows and columns exist in `out`, and their expert's bias
        // unless it is null.
        unsafe {
            let at = |row: usize| (row * self.n + sums.column) * F::BYTES;
            S::enter(RoundRows::<F> {
                from: sums.values,
                from_stride: sums.stride,
                bias: if self.bias.is_null() { self.bias } else { self.bias.add(at(sums.expert)) },
                to: self.out.add(at(sums.row)),
                to_stride: self.n * F::BYTES,
                rows: sums.rows,
                columns: sums.columns,
                format: PhantomData,
            });
        }
    }
}

/// The grouped GEMM of `args`, `b[expert]` being `[k, n]`.
///
/// # Safety
/// The pointers of `args` are as documented there.
pub unsafe fn grouped_nn(args: &Grouped) {
    // SAFETY: the caller's: the pointers are as documented in `args`, and stay so during the call.
    unsafe {
        with_kernels!(args.isa, args.dtype, S, F => {
            let finish = StoreSums::<F> { out: args.out, bias: args.bias, n: args.n, format: PhantomData };
            run_jobs(args.threads, &[&NnJob::<S, F, _>::new(args, finish)]);
        });
    }
}

/// What one ticket stands for.
struct Piece {
    expert: usize,
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
    /// Pieces of a group share their rows.
    group: usize,
}

/// A grouped "nn" as a job. `out` and `bias` of the arguments are not used.
pub struct NnJob<S, F, E> {
    args: Grouped,
    pieces: Vec<Piece>,
    finish: E,
    types: PhantomData<fn() -> (S, F)>,
}

impl<S: Simd, F: Format, E: Finish> NnJob<S, F, E> {
    /// Cuts the work.
    ///
    /// # Safety
    /// The pointers of `args` are as documented there, and stay so while tickets run.
    pub unsafe fn new(args: &Grouped, finish: E) -> Self {
        // SAFETY: the offsets have a row range for every expert.
        unsafe {
            let mut pieces = Vec::new();
            let busy = (0..args.experts).filter(|&e| !args.rows(e).is_empty()).count();
            for expert in 0..args.experts {
                let range = args.rows(expert);
                for (start, rows) in even_parts(range.len(), PIECE_ROWS) {
                    // Whole weight rows are best for few rows, unless threads would have nothing to do.
                    let width = if Self::in_place(args, rows) {
                        let cuts = (2 * args.threads).div_ceil(busy).min(args.n.div_ceil(2 * COLUMN_BLOCK)).max(1);
                        args.n.div_ceil(cuts).max(1).next_multiple_of(COLUMN_BLOCK)
                    } else {
                        let columns = WeightBlock::new::<F>(rows).columns;
                        // Unless threads would wait for the last ones.
                        if busy * args.n.div_ceil(columns) < 8 * args.threads { COLUMN_BLOCK } else { columns }
                    };
                    let group = pieces.len();
                    for column in (0..args.n).step_by(width) {
                        let columns = width.min(args.n - column);
                        pieces.push(Piece { expert, row: range.start + start, rows, column, columns, group });
                    }
                }
            }
            Self { args: *args, pieces, finish, types: PhantomData }
        }
    }

    /// Whether the weights of `rows` rows are read in place.
    fn in_place(args: &Grouped, rows: usize) -> bool {
        rows <= few_rows::<S, F>()
            && args.k.is_multiple_of(AXPY_ELEMENTS)
            && args.n.is_multiple_of(axpy_columns::<S, F>())
    }

    /// Packs a piece's rows, unless the thread has them already: strips `[words][height]` one after the other.
    unsafe fn pack_rows(&self, piece: &Piece, height: usize, thread: &mut ThreadState) -> *const f32 {
        // SAFETY: the piece's rows are its expert's, so the gather has their sources, of `k` elements; `to` has a
        // word of each for every word of `k`.
        unsafe {
            let words = F::words(self.args.k);
            let to = thread.scratch.panels.words(piece.rows * words);
            if thread.packed != piece.group {
                let list = &mut thread.scratch.rows;
                for (start, count) in even_parts(piece.rows, height) {
                    let first = piece.row + start;
                    self.args.gather.addresses(first..first + count, self.args.a, self.args.k * F::BYTES, list);
                    S::enter(PackTransposed::<F> {
                        rows: list,
                        width: count,
                        k: self.args.k,
                        to: to.add(start * words),
                        format: PhantomData,
                    });
                }
                thread.packed = piece.group;
            }
            to
        }
    }

    unsafe fn weights(&self, piece: &Piece) -> *const u8 {
        // SAFETY: the piece's expert has weights, and its column is one of theirs.
        unsafe {
            let row_bytes = self.args.n * F::BYTES;
            self.args.b.add(piece.expert * self.args.k * row_bytes + piece.column * F::BYTES)
        }
    }

    unsafe fn run_in_place(&self, piece: &Piece, thread: &mut ThreadState) {
        // SAFETY: strips of the rows were packed for all of `k`, weight rows `from..end` exist, and `sums` has room
        // for the running sums and for a second set of them.
        unsafe {
            let (k, words) = (self.args.k, F::words(self.args.k));
            let left = self.pack_rows(piece, axpy_rows::<S>(), thread);
            let strips = even_parts(piece.rows, axpy_rows::<S>());
            let stride = sums_stride(piece.columns);
            let values = piece.rows * stride;
            let sums = thread.scratch.results.words(2 * values);
            if k == 0 {
                sums.write_bytes(0, values);
            }
            let weight_stride = self.args.n * F::BYTES;
            let weights = self.weights(piece);
            let summed = if matches!(F::KIND, Kind::F32) { SUMMED } else { k };
            let depth = if piece.rows <= axpy_rows::<S>() { k } else { AXPY_DEPTH };
            for from in (0..k).step_by(depth.min(summed).max(1)) {
                let first = from / summed * summed;
                let to = if first == 0 { sums } else { sums.add(values) };
                let end = (from + depth).min(first + summed).min(k);
                for (start, count) in strips.clone() {
                    Axpy::<F> {
                        k: end - from,
                        left: left.add(start * words + from / F::PER_WORD * count),
                        weights: weights.add(from * weight_stride),
                        weight_stride,
                        sums: to.add(start * stride),
                        sums_stride: stride,
                        columns: piece.columns,
                        fresh: from == first,
                        prefetch: start == 0,
                        format: PhantomData,
                    }
                    .run::<S>(count);
                }
                if first > 0 && (end == k || end == first + summed) {
                    S::enter(AddValues { from: to, to: sums, len: values });
                }
            }
            if matches!(F::KIND, Kind::Bf16Pairs) {
                S::enter(InOrder { sums, stride, rows: piece.rows, columns: piece.columns });
            }
            self.finish.finish::<S>(&piece.finished(sums, stride));
        }
    }

    unsafe fn run_packed(&self, piece: &Piece, thread: &mut ThreadState) {
        // SAFETY: strips of the rows were packed for all of `k`, weight rows and columns of a block exist, and
        // `packed` and `sums` have room for whole panels of them.
        unsafe {
            let (k, words) = (self.args.k, F::words(self.args.k));
            let left = self.pack_rows(piece, tile_rows::<S>(), thread);
            let strips = even_parts(piece.rows, tile_rows::<S>());
            let block = WeightBlock::new::<F>(piece.rows).depth;
            let width = 2 * S::LANES;
            let panels = piece.columns.div_ceil(width);
            let stride = sums_stride(panels * width);
            let sums = thread.scratch.results.words(piece.rows * stride);
            if k == 0 {
                sums.write_bytes(0, piece.rows * stride);
            }
            // Panels that are packed, and then multiplied with all rows, together.
            let together = (PACKED_BYTES / (F::words(block) * width * 4)).max(1);
            let packed = thread.scratch.weights.words(F::words(block) * together * width);
            let weight_stride = self.args.n * F::BYTES;
            let weights = self.weights(piece);
            for from in (0..k).step_by(block) {
                let depth = block.min(k - from);
                let steps = strips.clone().count() * panels * F::words(depth);
                let mut ahead = if from + depth < k {
                    let next = weights.add((from + depth) * weight_stride);
                    Prefetch::new(next, weight_stride, block.min(k - from - depth), piece.columns * F::BYTES, steps)
                } else if let Some(next) = thread.upcoming().map(|i| &self.pieces[i]) {
                    // Weights read in place are prefetched as they are read: only their beginning is needed.
                    let rows = if Self::in_place(&self.args, next.rows) {
                        2 * AXPY_ELEMENTS
                    } else {
                        WeightBlock::new::<F>(next.rows).depth.min(k)
                    };
                    Prefetch::new(self.weights(next), weight_stride, rows, next.columns * F::BYTES, steps)
                } else {
                    Prefetch::none()
                };
                for first in (0..panels).step_by(together) {
                    let (column, panels) = (first * width, together.min(panels - first));
                    let columns = (panels * width).min(piece.columns - column);
                    // The first strip packs what it multiplies with, unless ends of rows or of the sum are ragged.
                    let mut unpacked = Source::NONE;
                    if columns == panels * width && depth.is_multiple_of(F::PER_WORD) {
                        unpacked = Source {
                            start: weights.add(from * weight_stride + column * F::BYTES),
                            row_bytes: weight_stride,
                        };
                    } else {
                        let list = &mut thread.scratch.rows;
                        list.clear();
                        list.extend((from..from + depth).map(|row| weights.add(row * weight_stride)));
                        S::enter(PackPanels::<F> {
                            rows: list,
                            column,
                            columns,
                            in_order: false,
                            to: packed,
                            format: PhantomData,
                        });
                    }
                    for (start, count) in strips.clone() {
                        let tiles = Tiles {
                            words: F::words(depth),
                            left: left.add(start * words + from / F::PER_WORD * count),
                            right: packed,
                            panels,
                            panel_stride: F::words(depth) * width,
                            out: sums.add(start * stride + column).cast(),
                            out_stride: stride * 4,
                            out_step: width * 4,
                            store: if from == 0 { Store::Set } else { Store::Add },
                        };
                        tiles.run::<S, F>(count, std::mem::replace(&mut unpacked, Source::NONE), &mut ahead);
                    }
                }
            }
            if matches!(F::KIND, Kind::Bf16Pairs) {
                S::enter(InOrder { sums, stride, rows: piece.rows, columns: piece.columns / width * width });
            }
            self.finish.finish::<S>(&piece.finished(sums, stride));
        }
    }
}

impl<S: Simd, F: Format, E: Finish> Job for NnJob<S, F, E> {
    fn tickets(&self) -> usize {
        self.pieces.len()
    }

    fn run(&self, ticket: usize, thread: &mut ThreadState) {
        let piece = &self.pieces[ticket];
        // SAFETY: the caller of `new` vouches for the pointers.
        unsafe {
            if Self::in_place(&self.args, piece.rows) {
                self.run_in_place(piece, thread);
            } else {
                self.run_packed(piece, thread);
            }
        }
    }
}

impl Piece {
    fn finished(&self, values: *mut f32, stride: usize) -> FinishedSums {
        let &Self { expert, row, rows, column, columns, .. } = self;
        FinishedSums { expert, row, rows, column, columns, values, stride }
    }
}

/// Values from one row of sums to the next: one cache line more than needed, so that rows do not share sets.
fn sums_stride(columns: usize) -> usize {
    columns.next_multiple_of(16) + 16
}
