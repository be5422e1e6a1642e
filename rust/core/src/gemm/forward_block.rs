//! One block of features for the rows of one unit: packing those rows, choosing the kernels, finishing the sums.

use super::activation::{Activate, Activation};
use super::format::Format;
use super::forward::Epilogue;
use super::forward_kernels::{Product, dot_rows, max_vectors, widens};
use super::grouped::Grouped;
use super::pack::{PackSteps, PackTransposed, step_words};
use super::scratch::{Buffer, Scratch};
use super::simd::Simd;
use super::store::{StoreRows, StoreTransposed};
use super::tickets::{BLOCK, Unit};
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of scratch between the gate and the up results are rounded up to this, so that whole vectors of one do
/// not reach into the other.
const PAD: usize = 16;

/// Rows packed together.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// The first, counted from the unit's first row.
    pub row: usize,
    /// How many.
    pub rows: usize,
    /// Vectors they fill; 0: a vector of eight lanes.
    pub vectors: usize,
    /// Lanes before this panel's: its results begin there.
    pub lane: usize,
    /// The packed words.
    pub words: *const f32,
}

impl Panel {
    /// Lanes of the panel.
    pub fn width<S: Simd>(&self) -> usize {
        if self.vectors == 0 { 8 } else { self.vectors * S::LANES }
    }
}

/// A unit's rows, packed for one of the two kernels.
pub struct Packed {
    /// Few rows: each panel is a group for the dot kernel. Otherwise for the lanes kernel.
    pub dot: bool,
    pub panels: Vec<Panel>,
}

impl Packed {
    /// Packs rows of `k` elements into `to`.
    ///
    /// # Safety
    /// The rows are readable and the CPU supports `S`.
    pub unsafe fn new<S: Simd, F: Format>(rows: &[*const u8], k: usize, to: &mut Buffer) -> Self {
        if rows.len() <= dot_rows::<F>() {
            unsafe { Self::steps::<S, F>(rows, k, to) }
        } else {
            unsafe { Self::transposed::<S, F>(rows, k, to) }
        }
    }

    unsafe fn steps<S: Simd, F: Format>(rows: &[*const u8], k: usize, to: &mut Buffer) -> Self {
        let at_once = if S::LANES == 16 { 8 } else { 4 };
        let row_words = step_words::<S, F>(k);
        let base = to.words(rows.len() * row_words);
        let groups = rows.len().div_ceil(at_once);
        let mut panels = Vec::with_capacity(groups);
        let mut row = 0;
        for group in 0..groups {
            let count = (rows.len() - row).div_ceil(groups - group);
            let words = unsafe { base.add(row * row_words) };
            unsafe { S::enter(PackSteps::<F> { rows: &rows[row..row + count], k, to: words, format: PhantomData }) };
            panels.push(Panel { row, rows: count, vectors: 0, lane: 0, words });
            row += count;
        }
        Self { dot: true, panels }
    }

    unsafe fn transposed<S: Simd, F: Format>(rows: &[*const u8], k: usize, to: &mut Buffer) -> Self {
        let words = F::words(k);
        // A remainder of up to eight rows would fill only half of a vector of sixteen.
        let rest = rows.len() % S::LANES;
        let half = if S::LANES == 16 && (1..=8).contains(&rest) { rest } else { 0 };
        let vectors = (rows.len() - half).div_ceil(S::LANES);
        let groups = vectors.div_ceil(max_vectors::<S, F>());
        let base = to.words((vectors * S::LANES + 8) * words);
        let mut panels: Vec<Panel> = Vec::with_capacity(groups + 1);
        let (mut row, mut lane, mut left) = (0, 0, vectors);
        for group in 0..groups {
            let share = left.div_ceil(groups - group);
            left -= share;
            let count = (share * S::LANES).min(rows.len() - half - row);
            panels.push(Panel { row, rows: count, vectors: share, lane, words: unsafe { base.add(lane * words) } });
            row += count;
            lane += share * S::LANES;
        }
        if half > 0 {
            panels.push(Panel { row, rows: half, vectors: 0, lane, words: unsafe { base.add(lane * words) } });
        }
        for panel in &panels {
            let rows = &rows[panel.row..panel.row + panel.rows];
            let (width, to) = (panel.width::<S>(), panel.words.cast_mut());
            unsafe { S::enter(PackTransposed::<F> { rows, width, k, to, format: PhantomData }) };
        }
        Self { dot: false, panels }
    }

    fn lanes<S: Simd>(&self) -> usize {
        self.panels.last().map_or(0, |panel| panel.lane + panel.width::<S>())
    }
}

/// Consecutive weight rows of a block, and where their results go.
#[derive(Clone, Copy)]
pub struct Segment {
    /// First weight row of the expert, and first column of `pre`.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Row of results that the first one gets.
    pub result: usize,
}

impl Segment {
    /// The first weight row read for an output feature.
    pub fn first_row(epilogue: &Epilogue, feature: usize) -> usize {
        if epilogue.interleaved { feature * epilogue.columns() } else { feature }
    }
}

/// Some features of the output for one unit.
pub struct Block<'a> {
    pub job: &'a Grouped,
    pub epilogue: &'a Epilogue,
    pub unit: &'a Unit,
    /// Columns of `out`.
    pub features: Range<usize>,
    /// The weights read after this block.
    pub next: *const u8,
}

impl Block<'_> {
    fn segments(&self) -> ([Segment; 2], usize) {
        let (first, count) = (self.features.start, self.features.len());
        let one = Segment { first, count, result: 0 };
        if self.epilogue.columns() == 1 {
            ([one, one], 1)
        } else if self.epilogue.interleaved {
            let both = Segment { first: 2 * first, count: 2 * count, result: 0 };
            ([both, both], 1)
        } else {
            let up = Segment { first: self.job.n / 2 + first, count, result: count.next_multiple_of(PAD) };
            ([one, up], 2)
        }
    }

    /// Computes, finishes and stores the block.
    ///
    /// # Safety
    /// `packed` holds the unit's rows and the job's pointers are as documented.
    pub unsafe fn run<S: Simd, F: Format>(&self, packed: &Packed, scratch: &mut Scratch) {
        let (segments, count) = self.segments();
        let segments = &segments[..count];
        let last = segments[count - 1];
        let height = (last.result + last.count).next_multiple_of(PAD);
        debug_assert!(height <= 2 * BLOCK + 2 * PAD);
        let mut bias = [0f32; 2 * BLOCK + 2 * PAD];
        unsafe {
            self.load_bias::<F>(segments, &mut bias);
            if packed.dot {
                self.dot::<S, F>(packed, segments, height, &bias, scratch);
            } else {
                self.lanes::<S, F>(packed, segments, height, &bias, scratch);
            }
        }
    }

    unsafe fn load_bias<F: Format>(&self, segments: &[Segment], to: &mut [f32]) {
        if self.job.bias.is_null() {
            return;
        }
        for segment in segments {
            for i in 0..segment.count {
                let at = (self.unit.expert * self.job.n + segment.first + i) * F::BYTES;
                to[segment.result + i] = unsafe { F::load_one(self.job.bias.add(at)) };
            }
        }
    }

    /// The weights of a segment.
    fn weights<F: Format>(&self, segment: &Segment) -> *const u8 {
        let row = self.unit.expert * self.job.n + segment.first;
        self.job.b.wrapping_add(row * self.job.k * F::BYTES)
    }

    fn bias_of(&self, segment: &Segment, bias: &[f32]) -> *const f32 {
        if self.job.bias.is_null() { std::ptr::null() } else { bias[segment.result..].as_ptr() }
    }

    unsafe fn dot<S: Simd, F: Format>(
        &self,
        packed: &Packed,
        segments: &[Segment],
        height: usize,
        bias: &[f32],
        scratch: &mut Scratch,
    ) {
        let rows = self.unit.rows.len();
        let results = scratch.results.words((rows + 1) * height);
        let row_bytes = self.job.k * F::BYTES;
        unsafe {
            for (i, panel) in packed.panels.iter().enumerate() {
                for (j, segment) in segments.iter().enumerate() {
                    let product = Product {
                        panel: panel.words,
                        k: self.job.k,
                        weights: self.weights::<F>(segment),
                        stride: row_bytes,
                        count: segment.count,
                        next: self.following::<F>(segments, j, i + 1 == packed.panels.len()),
                        bias: self.bias_of(segment, bias),
                        out: results.add(panel.row * height + segment.result),
                    };
                    product.dot::<S, F>(panel.rows, height);
                }
            }
            if !self.epilogue.pre.is_null() {
                for segment in segments {
                    S::enter(StoreRows::<F> {
                        results: results.add(segment.result),
                        stride: height,
                        rows,
                        features: segment.count,
                        out: self.pre::<F>(0, segment),
                        out_stride: self.job.n * F::BYTES,
                        format: PhantomData,
                    });
                }
            }
            if let Some(activation) = self.epilogue.activation {
                self.activate_rows::<S>(activation, results, height, &mut scratch.extra);
            }
            S::enter(StoreRows::<F> {
                results,
                stride: height,
                rows,
                features: self.features.len(),
                out: self.out::<F>(0),
                out_stride: self.out_stride::<F>(),
                format: PhantomData,
            });
        }
    }

    /// Activation in place on rows of results that hold features side by side.
    unsafe fn activate_rows<S: Simd>(
        &self,
        activation: Activation,
        results: *mut f32,
        height: usize,
        extra: &mut Buffer,
    ) {
        let (rows, width) = (self.unit.rows.len(), self.features.len());
        let mut task = Activate {
            activation,
            rows,
            width,
            gate: results,
            up: results.wrapping_add(width.next_multiple_of(PAD)),
            in_stride: height,
            out: results,
            out_stride: height,
        };
        unsafe {
            if activation.gated() && self.epilogue.interleaved {
                let half = width.next_multiple_of(PAD);
                let apart = extra.words(rows * 2 * half);
                for row in 0..rows {
                    for i in 0..width {
                        *apart.add(row * 2 * half + i) = *results.add(row * height + 2 * i);
                        *apart.add(row * 2 * half + half + i) = *results.add(row * height + 2 * i + 1);
                    }
                }
                task.gate = apart;
                task.up = apart.add(half);
                task.in_stride = 2 * half;
            }
            S::enter(task);
        }
    }

    unsafe fn lanes<S: Simd, F: Format>(
        &self,
        packed: &Packed,
        segments: &[Segment],
        height: usize,
        bias: &[f32],
        scratch: &mut Scratch,
    ) {
        let results = scratch.results.words((packed.lanes::<S>() + 1) * height);
        let k = self.job.k;
        let row_bytes = k * F::BYTES;
        let widened = widens::<S, F>(self.unit.rows.len());
        // Rows of the copy lie a cache line off a power of two.
        let copy_stride = k.next_multiple_of(16) + 16;
        unsafe {
            let copy = if widened { scratch.weights.words(height * copy_stride) } else { std::ptr::null_mut() };
            if widened {
                for segment in segments {
                    let to = copy.add(segment.result * copy_stride);
                    Product::widen::<S, F>(self.weights::<F>(segment), row_bytes, segment.count, k, to, copy_stride);
                }
            }
            for (i, panel) in packed.panels.iter().enumerate() {
                let width = panel.width::<S>();
                let sums = results.add(panel.lane * height);
                for (j, segment) in segments.iter().enumerate() {
                    let mut product = Product {
                        panel: panel.words,
                        k,
                        weights: self.weights::<F>(segment),
                        stride: row_bytes,
                        count: segment.count,
                        next: self.following::<F>(segments, j, i + 1 == packed.panels.len()),
                        bias: self.bias_of(segment, bias),
                        out: sums.add(segment.result * width),
                    };
                    if widened {
                        product.weights = copy.add(segment.result * copy_stride).cast();
                        product.stride = copy_stride * 4;
                        product.next = product.weights;
                        product.widened_lanes::<S>(panel.vectors);
                    } else {
                        product.lanes::<S, F>(panel.vectors);
                    }
                }
                self.finish::<S, F>(panel, segments, sums);
            }
        }
    }

    /// `pre`, activation and `out` of a panel's sums.
    unsafe fn finish<S: Simd, F: Format>(&self, panel: &Panel, segments: &[Segment], sums: *mut f32) {
        let width = panel.width::<S>();
        let features = self.features.len();
        unsafe {
            if !self.epilogue.pre.is_null() {
                for segment in segments {
                    S::enter(StoreTransposed::<F> {
                        results: sums.add(segment.result * width),
                        width,
                        rows: panel.rows,
                        features: segment.count,
                        out: self.pre::<F>(panel.row, segment),
                        out_stride: self.job.n * F::BYTES,
                        format: PhantomData,
                    });
                }
            }
            if let Some(activation) = self.epilogue.activation {
                let interleaved = activation.gated() && self.epilogue.interleaved;
                S::enter(Activate {
                    activation,
                    rows: if interleaved { features } else { 1 },
                    width: if interleaved { width } else { features * width },
                    gate: sums,
                    up: sums.wrapping_add(width * if interleaved { 1 } else { features.next_multiple_of(PAD) }),
                    in_stride: 2 * width,
                    out: sums,
                    out_stride: width,
                });
            }
            S::enter(StoreTransposed::<F> {
                results: sums,
                width,
                rows: panel.rows,
                features,
                out: self.out::<F>(panel.row),
                out_stride: self.out_stride::<F>(),
                format: PhantomData,
            });
        }
    }

    /// The weights read after segment `index`.
    fn following<F: Format>(&self, segments: &[Segment], index: usize, last_panel: bool) -> *const u8 {
        if index + 1 < segments.len() {
            self.weights::<F>(&segments[index + 1])
        } else if last_panel {
            self.next
        } else {
            self.weights::<F>(&segments[0])
        }
    }

    fn out_stride<F: Format>(&self) -> usize {
        self.job.n / self.epilogue.columns() * F::BYTES
    }

    /// `out` at a row of the unit and the block's first feature.
    unsafe fn out<F: Format>(&self, row: usize) -> *mut u8 {
        let at = (self.unit.rows.start + row) * self.out_stride::<F>() + self.features.start * F::BYTES;
        unsafe { self.job.out.add(at) }
    }

    /// `pre` at a row of the unit and a segment's first column.
    unsafe fn pre<F: Format>(&self, row: usize, segment: &Segment) -> *mut u8 {
        let at = ((self.unit.rows.start + row) * self.job.n + segment.first) * F::BYTES;
        unsafe { self.epilogue.pre.add(at) }
    }
}
