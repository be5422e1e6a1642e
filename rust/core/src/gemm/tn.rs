//! Grouped "tn" (varlen-K): `out[expert][p, n] = sum over its rows of a[row, p] * b[row, n]`, the form of a
//! gradient with respect to weights.
//!
//! A piece is an expert and some rows of its result, across all columns. Both operands are packed: `b` once by
//! each thread for each expert, `a` for each piece. Finished tiles go past the caches when the results are
//! larger than those, which saves reading what is about to be overwritten. An expert without rows gets zeros,
//! by sums over nothing.

use super::grouped::Gather;
use crate::gemm::tile::panels::{PackBands, PackPanels, PackSplit, band_words};
use crate::gemm::tile::tiles::{Prefetch, Source, Store, Tiles, tile_rows};
use crate::memory::pages::advise_huge_pages;
use crate::threads::jobs::{Job, ThreadState, run_jobs};
use crate::vector::dtype::DType;
use crate::vector::format::{Format, Kind};
use crate::vector::isa::{Isa, with_kernels};
use crate::vector::round::RoundRows;
use crate::vector::simd::{Simd, fence};
use std::marker::PhantomData;

/// About how many rows of the result a piece has.
const PIECE_ROWS: usize = 256;

/// Rows of the operands that are packed at a time. Experts with more form their sums in fp32 in memory.
const DEPTH: usize = 1024;

/// Words of one running sum: rounding errors grow with the length of the sum, not of the pieces.
const SUMMED: usize = 512;

/// Bytes of panels used for all bands before the next ones: half of the second-level cache of most CPUs.
const PANEL_BYTES: usize = 256 << 10;

/// The arguments of a grouped "tn". All matrices are row-major and of type `dtype` (not fp64).
#[derive(Clone, Copy)]
pub struct GroupedTn {
    /// Instruction set of the kernels, one that this CPU has.
    pub isa: Isa,
    /// Threads to use, at least one.
    pub threads: usize,
    /// Element type of `a`, `b` and `out`.
    pub dtype: DType,
    /// Number of experts.
    pub experts: usize,
    /// `experts + 1` ascending row offsets, the first 0.
    pub offsets: *const i32,
    /// Columns of `a`, rows of each result.
    pub p: usize,
    /// Columns of `b` and of each result.
    pub n: usize,
    /// Left operand, `p` columns.
    pub a: *const u8,
    /// Which of its rows are read.
    pub gather_a: Gather,
    /// Right operand, `n` columns.
    pub b: *const u8,
    /// Which of its rows are read.
    pub gather_b: Gather,
    /// `[experts, p, n]`, all of it written.
    pub out: *mut u8,
    /// Whether the results go past the caches; see [`larger_than_cache`].
    pub stream: bool,
}

// SAFETY: the pointers are shared by the threads of a call, which write disjoint parts of `out`.
unsafe impl Send for GroupedTn {}
// SAFETY: as above.
unsafe impl Sync for GroupedTn {}

/// Computes `args`.
///
/// # Safety
/// The pointers of `args` are as documented there.
pub unsafe fn grouped_tn(args: &GroupedTn) {
    // SAFETY: the caller's: the pointers are as documented in `args`, and stay so during the call.
    unsafe {
        with_kernels!(args.isa, args.dtype, S, F => {
            run_jobs(args.threads, &[&TnJob::<S, F>::new(args)]);
        });
    }
}

/// Whether so many bytes of results do not fit the last cache, so that writing past it is faster.
pub fn larger_than_cache(bytes: usize) -> bool {
    use std::sync::OnceLock;
    static LAST_CACHE: OnceLock<usize> = OnceLock::new();
    let last = *LAST_CACHE.get_or_init(|| {
        let text = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
        let kib = text.trim().strip_suffix('K').and_then(|n| n.parse::<usize>().ok());
        kib.map_or(32 << 20, |kib| kib << 10)
    });
    bytes > last
}

/// A grouped "tn" as a job.
pub struct TnJob<S, F> {
    args: GroupedTn,
    /// Rows of the result of a piece, whole tiles of them.
    rows: usize,
    types: PhantomData<fn() -> (S, F)>,
}

/// The piece of a result that a ticket makes.
struct Piece {
    expert: usize,
    /// Its first row of the operands.
    first: usize,
    /// How many rows of the operands.
    depth: usize,
    /// First row of the result.
    p: usize,
    /// How many rows of the result.
    height: usize,
}

impl<S: Simd, F: Format> TnJob<S, F> {
    /// Cuts the work.
    ///
    /// # Safety
    /// The pointers of `args` are as documented there, and stay so while tickets run.
    pub unsafe fn new(args: &GroupedTn) -> Self {
        advise_huge_pages(args.out, args.experts * args.p * args.n * F::BYTES);
        let pieces = args.p.div_ceil(PIECE_ROWS).max(1);
        let rows = args.p.div_ceil(pieces).next_multiple_of(tile_rows::<S>()).max(1);
        Self { args: *args, rows, types: PhantomData }
    }

    fn piece(&self, ticket: usize) -> Piece {
        let a = &self.args;
        let each = a.p.div_ceil(self.rows);
        let (expert, p) = (ticket / each, ticket % each * self.rows);
        // SAFETY: the caller of `new` vouches for the offsets, one more than there are experts.
        let offset = |e: usize| unsafe { a.offsets.add(e).read() as usize };
        let first = offset(expert);
        Piece { expert, first, depth: offset(expert + 1) - first, p, height: self.rows.min(a.p - p) }
    }

    /// Packs all columns of `b` in rows `first..first + depth`, as even and odd ones if `split`.
    unsafe fn pack_right(&self, first: usize, depth: usize, split: bool, thread: &mut ThreadState) -> *mut f32 {
        // SAFETY: the rows are some expert's, so the gather has their sources, of `n` columns; `to` has room for all
        // panels of them.
        unsafe {
            let a = &self.args;
            let to = thread.scratch.panels.words(F::words(depth) * a.n.next_multiple_of(2 * S::LANES));
            // No two experts with rows start at the same one.
            if depth > 0 && thread.packed != first {
                let list = &mut thread.scratch.rows;
                a.gather_b.addresses(first..first + depth, a.b, a.n * F::BYTES, list);
                if split {
                    S::enter(PackSplit::<F> { rows: list, columns: a.n, to, format: PhantomData });
                } else {
                    let rows = list;
                    S::enter(PackPanels::<F> {
                        rows,
                        column: 0,
                        columns: a.n,
                        in_order: true,
                        to,
                        format: PhantomData,
                    });
                }
                thread.packed = first;
            }
            to
        }
    }

    /// Packs the columns of `a` that a piece needs, in rows `first..first + depth`.
    unsafe fn pack_left(&self, piece: &Piece, first: usize, depth: usize, thread: &mut ThreadState) -> *const f32 {
        // SAFETY: the rows are some expert's, so the gather has their sources, of `p` columns; `to` has room for all
        // bands of them.
        unsafe {
            let a = &self.args;
            let bands = piece.height.div_ceil(tile_rows::<S>());
            let to = thread.scratch.weights.words(bands * band_words::<F>(depth, tile_rows::<S>()));
            let list = &mut thread.scratch.rows;
            a.gather_a.addresses(first..first + depth, a.a, a.p * F::BYTES, list);
            S::enter(PackBands::<F> {
                rows: list,
                column: piece.p,
                columns: piece.height,
                width: a.p,
                height: tile_rows::<S>(),
                to,
                format: PhantomData,
            });
            to
        }
    }

    /// Multiplies rows `first..first + depth`. Tiles go to `out`, whose rows are `out_stride` bytes apart and
    /// whose panels `out_step`; the last `n % width` columns, if `whole` says so, go to fp32 rows in `rest`.
    unsafe fn multiply(&self, piece: &Piece, first: usize, depth: usize, to: &Target, thread: &mut ThreadState) {
        // SAFETY: `right` and `left` were packed for `depth` rows of the operands, in whole panels and bands, and
        // `to` has room for the tiles of the piece. Past the caches goes only what is aligned: see `store`.
        unsafe {
            let split = matches!(to.store, Store::SplitBf16 | Store::StreamSplitBf16);
            let right = self.pack_right(first, depth, split, thread);
            let left = self.pack_left(piece, first, depth, thread);
            let (words, width) = (F::words(depth), 2 * S::LANES);
            let at_once = (PANEL_BYTES / (words * width * 4).max(1)).max(1);
            let mut panel = 0;
            while panel < to.panels {
                let panels = at_once.min(to.panels - panel);
                for (band, row) in (0..piece.height).step_by(tile_rows::<S>()).enumerate() {
                    let rows = tile_rows::<S>().min(piece.height - row);
                    let left = left.add(band * band_words::<F>(depth, tile_rows::<S>()));
                    let mut from = 0;
                    // Once even for no words: the sums over nothing are zeros that must be stored.
                    while from == 0 || from < words {
                        let end = to.summed.saturating_add(from).min(words);
                        let tiles = Tiles {
                            words: end - from,
                            left: left.add(from * rows),
                            right: right.add((panel * words + from) * width),
                            panels,
                            panel_stride: words * width,
                            out: to.out.add(row * to.stride + panel * to.step),
                            out_stride: to.stride,
                            out_step: to.step,
                            store: match to.store {
                                _ if from > 0 => Store::Add,
                                // What is added to must stay in the cache.
                                Store::Stream if end < words => Store::Set,
                                store => store,
                            },
                        };
                        tiles.run::<S, F>(rows, Source::NONE, &mut Prefetch::none());
                        from = end.max(1);
                    }
                }
                panel += panels;
            }
            if let Some(rest) = to.rest {
                for (band, row) in (0..piece.height).step_by(tile_rows::<S>()).enumerate() {
                    let tiles = Tiles {
                        words,
                        left: left.add(band * band_words::<F>(depth, tile_rows::<S>())),
                        right: right.add(to.panels * words * width),
                        panels: 1,
                        panel_stride: 0,
                        out: rest.add(row * width).cast(),
                        out_stride: width * 4,
                        out_step: 0,
                        store: Store::Set,
                    };
                    tiles.run::<S, F>(tile_rows::<S>().min(piece.height - row), Source::NONE, &mut Prefetch::none());
                }
            }
        }
    }

    /// Rounds fp32 sums into `rows` rows of the result at `to`.
    unsafe fn round(&self, from: *const f32, from_stride: usize, to: *mut u8, rows: usize, columns: usize) {
        // SAFETY: the caller's: `rows` rows of `columns` values, and as many elements of the result.
        unsafe {
            S::enter(RoundRows::<F> {
                from,
                from_stride,
                bias: std::ptr::null(),
                to,
                to_stride: self.args.n * F::BYTES,
                rows,
                columns,
                format: PhantomData,
            });
        }
    }

    /// How finished tiles are stored.
    fn store(&self) -> Store {
        let vector = 4 * S::LANES;
        let aligned =
            (self.args.out as usize).is_multiple_of(vector) && (self.args.n * F::BYTES).is_multiple_of(vector);
        let stream = self.args.stream && aligned;
        match F::KIND {
            Kind::F32 if stream => Store::Stream,
            Kind::F32 => Store::Set,
            Kind::F16 => Store::F16,
            Kind::Bf16 if S::SPLITS && stream => Store::StreamSplitBf16,
            Kind::Bf16 if S::SPLITS => Store::SplitBf16,
            _ if stream => Store::StreamBf16,
            _ => Store::Bf16,
        }
    }
}

/// Where tiles go.
struct Target {
    out: *mut u8,
    stride: usize,
    step: usize,
    panels: usize,
    store: Store,
    /// Words summed in registers before they are added to what is stored.
    summed: usize,
    rest: Option<*mut f32>,
}

impl<S: Simd, F: Format> Job for TnJob<S, F> {
    fn tickets(&self) -> usize {
        if self.args.n == 0 { 0 } else { self.args.experts * self.args.p.div_ceil(self.rows) }
    }

    fn run(&self, ticket: usize, thread: &mut ThreadState) {
        let piece = self.piece(ticket);
        let (n, width) = (self.args.n, 2 * S::LANES);
        // SAFETY: the caller of `new` vouches for the pointers.
        unsafe {
            let out = self.args.out.add((piece.expert * self.args.p + piece.p) * n * F::BYTES);
            if piece.depth <= DEPTH {
                let rest = thread.scratch.results.words(piece.height * width);
                let target = Target {
                    out,
                    stride: n * F::BYTES,
                    step: width * F::BYTES,
                    panels: n / width,
                    store: self.store(),
                    // Half precision is rounded in the store, and coarser than any order of the sum.
                    summed: if matches!(F::KIND, Kind::F32) { SUMMED } else { usize::MAX },
                    rest: (!n.is_multiple_of(width)).then_some(rest),
                };
                self.multiply(&piece, piece.first, piece.depth, &target, thread);
                if target.rest.is_some() {
                    let done = n / width * width;
                    self.round(rest, width, out.add(done * F::BYTES), piece.height, n - done);
                }
            } else {
                let stride = n.next_multiple_of(width) + 16;
                let sums = thread.scratch.results.words(piece.height * stride);
                let mut done = 0;
                while done < piece.depth {
                    let depth = DEPTH.min(piece.depth - done);
                    let target = Target {
                        out: sums.cast(),
                        stride: stride * 4,
                        step: width * 4,
                        panels: n.div_ceil(width),
                        store: if done == 0 { Store::Set } else { Store::Add },
                        summed: SUMMED,
                        rest: None,
                    };
                    self.multiply(&piece, piece.first + done, depth, &target, thread);
                    done += depth;
                }
                self.round(sums, stride, out, piece.height, n);
            }
        }
        fence();
    }
}
