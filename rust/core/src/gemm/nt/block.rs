//! One block of features for the rows of one unit: the kernels panel by panel, and what becomes of the sums.

use super::kernels::{PanelKernel, Product, widens};
use super::panel::Panel;
use super::store::{StoreRows, StoreTransposed};
use super::tickets::{BLOCK, Unit};
use crate::gemm::activation::{Activate, Activation};
use crate::gemm::grouped::{Epilogue, Grouped};
use crate::memory::scratch::{Buffer, Scratch};
use crate::vector::format::Format;
use crate::vector::simd::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of scratch between the gate and the up results are rounded up to this, so that whole vectors of one do
/// not reach into the other.
const PAD: usize = 16;

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
pub struct FeatureBlock<'a> {
    pub args: &'a Grouped,
    pub epilogue: &'a Epilogue,
    pub unit: &'a Unit,
    /// Columns of `out`.
    pub features: Range<usize>,
    /// The weights read after this block.
    pub next: *const u8,
}

/// What the kernels of one panel need to know.
struct Part<'a> {
    panel: &'a Panel,
    segments: &'a [Segment],
    /// Rows of results.
    height: usize,
    /// fp32, one for each row of results.
    bias: &'a [f32],
    /// Whether the weights are not needed after this panel.
    last: bool,
}

/// Values from one row of widened weights to the next: a cache line off a power of two.
fn copy_stride(k: usize) -> usize {
    k.next_multiple_of(16) + 16
}

impl FeatureBlock<'_> {
    fn segments(&self) -> ([Segment; 2], usize) {
        let (first, count) = (self.features.start, self.features.len());
        let one = Segment { first, count, result: 0 };
        if self.epilogue.columns() == 1 {
            ([one, one], 1)
        } else if self.epilogue.interleaved {
            let both = Segment { first: 2 * first, count: 2 * count, result: 0 };
            ([both, both], 1)
        } else {
            let up = Segment { first: self.args.n / 2 + first, count, result: count.next_multiple_of(PAD) };
            ([one, up], 2)
        }
    }

    /// Computes, finishes and stores the block.
    ///
    /// # Safety
    /// `panels` holds the unit's rows and the args's pointers are as documented.
    pub unsafe fn run<S: Simd, F: Format>(&self, panels: &[Panel], scratch: &mut Scratch) {
        let (segments, count) = self.segments();
        let segments = &segments[..count];
        let last = segments[count - 1];
        let height = (last.result + last.count).next_multiple_of(PAD);
        debug_assert!(height <= 2 * BLOCK + 2 * PAD);
        let mut bias = [0f32; 2 * BLOCK + 2 * PAD];
        // SAFETY: the caller's: panels and pointers are as documented; results go to the features and rows of this
        // block.
        unsafe {
            self.load_bias::<F>(segments, &mut bias);
            // The dot kernel widens what it reads.
            let widened = (widens::<S, F>(self.unit.rows.len())
                && panels.iter().any(|panel| panel.kernel != PanelKernel::Dot))
            .then(|| self.widen::<S, F>(segments, height, scratch));
            for (i, panel) in panels.iter().enumerate() {
                let part = Part { panel, segments, height, bias: &bias, last: i + 1 == panels.len() };
                match panel.kernel {
                    PanelKernel::Dot => self.dot::<S, F>(&part, scratch),
                    PanelKernel::Lanes { vectors } => self.lanes::<S, F>(&part, vectors, widened, scratch),
                }
            }
        }
    }

    /// The weights of all segments as fp32: the copy of a segment begins at row `result`.
    unsafe fn widen<S: Simd, F: Format>(&self, segments: &[Segment], height: usize, scratch: &mut Scratch) -> *mut f32 {
        let k = self.args.k;
        let stride = copy_stride(k);
        let copy = scratch.weights.words(height * stride);
        for segment in segments {
            // SAFETY: the copy has `height` rows, of which the segment's begin at `result`.
            unsafe {
                let to = copy.add(segment.result * stride);
                Product::widen::<S, F>(self.weights::<F>(segment), k * F::BYTES, segment.count, k, to, stride);
            }
        }
        copy
    }

    unsafe fn load_bias<F: Format>(&self, segments: &[Segment], to: &mut [f32]) {
        if self.args.bias.is_null() {
            return;
        }
        for segment in segments {
            for i in 0..segment.count {
                let at = (self.unit.expert * self.args.n + segment.first + i) * F::BYTES;
                // SAFETY: each expert has `n` values of the bias.
                to[segment.result + i] = unsafe { F::load_one(self.args.bias.add(at)) };
            }
        }
    }

    /// The weights of a segment.
    fn weights<F: Format>(&self, segment: &Segment) -> *const u8 {
        let row = self.unit.expert * self.args.n + segment.first;
        self.args.b.wrapping_add(row * self.args.k * F::BYTES)
    }

    fn bias_of(&self, segment: &Segment, bias: &[f32]) -> *const f32 {
        if self.args.bias.is_null() { std::ptr::null() } else { bias[segment.result..].as_ptr() }
    }

    /// The product with a segment's weights, without a place for the results.
    unsafe fn product<F: Format>(&self, part: &Part, index: usize) -> Product {
        let segment = &part.segments[index];
        Product {
            panel: part.panel.words,
            k: self.args.k,
            weights: self.weights::<F>(segment),
            stride: self.args.k * F::BYTES,
            count: segment.count,
            next: self.following::<F>(part.segments, index, part.last),
            bias: self.bias_of(segment, part.bias),
            out: std::ptr::null_mut(),
        }
    }

    unsafe fn dot<S: Simd, F: Format>(&self, part: &Part, scratch: &mut Scratch) {
        let &Part { panel: &Panel { row, rows, .. }, segments, height, .. } = part;
        let results = scratch.results.words((rows + 1) * height);
        // SAFETY: `results` has `rows` rows of `height` values, and one more for what is read behind the last; `pre`
        // and `out` have the unit's rows.
        unsafe {
            for (i, segment) in segments.iter().enumerate() {
                let out = results.add(segment.result);
                Product { out, ..self.product::<F>(part, i) }.dot::<S, F>(rows, height);
            }
            if !self.epilogue.pre.is_null() {
                for segment in segments {
                    S::enter(StoreRows::<F> {
                        results: results.add(segment.result),
                        stride: height,
                        rows,
                        features: segment.count,
                        out: self.pre::<F>(row, segment),
                        out_stride: self.args.n * F::BYTES,
                        format: PhantomData,
                    });
                }
            }
            if let Some(activation) = self.epilogue.activation {
                self.activate_rows::<S>(activation, rows, results, height, &mut scratch.extra);
            }
            S::enter(StoreRows::<F> {
                results,
                stride: height,
                rows,
                features: self.features.len(),
                out: self.out::<F>(row),
                out_stride: self.out_stride::<F>(),
                format: PhantomData,
            });
        }
    }

    /// Activation in place on rows of results that hold features side by side.
    unsafe fn activate_rows<S: Simd>(
        &self,
        activation: Activation,
        rows: usize,
        results: *mut f32,
        height: usize,
        extra: &mut Buffer,
    ) {
        let width = self.features.len();
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
        // SAFETY: the rows hold both halves, each padded to whole vectors; so does the copy that takes them apart.
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
        part: &Part,
        vectors: usize,
        widened: Option<*mut f32>,
        scratch: &mut Scratch,
    ) {
        let width = PanelKernel::lanes::<S>(vectors);
        let sums = scratch.results.words(width * (part.height + PAD));
        let copy_stride = copy_stride(self.args.k);
        // SAFETY: `sums` has room for the panel's lanes of `height` results, and for what is read behind the last;
        // copies and panels are as the kernels need them.
        unsafe {
            for (i, segment) in part.segments.iter().enumerate() {
                let out = sums.add(segment.result * width);
                let product = Product { out, ..self.product::<F>(part, i) };
                if let Some(copy) = widened {
                    let weights = copy.add(segment.result * copy_stride).cast_const().cast();
                    Product { weights, next: weights, stride: copy_stride * 4, ..product }.widened_lanes::<S>(vectors);
                } else {
                    product.lanes::<S, F>(vectors);
                }
            }
            self.finish::<S, F>(part, width, sums);
        }
    }

    /// `pre`, activation and `out` of a panel's sums.
    unsafe fn finish<S: Simd, F: Format>(&self, part: &Part, width: usize, sums: *mut f32) {
        let &Part { panel, segments, .. } = part;
        let features = self.features.len();
        // SAFETY: `sums` holds the panel's results of every segment; `pre` and `out` have its rows.
        unsafe {
            if !self.epilogue.pre.is_null() {
                for segment in segments {
                    S::enter(StoreTransposed::<F> {
                        results: sums.add(segment.result * width),
                        width,
                        rows: panel.rows,
                        features: segment.count,
                        out: self.pre::<F>(panel.row, segment),
                        out_stride: self.args.n * F::BYTES,
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
        self.args.n / self.epilogue.columns() * F::BYTES
    }

    /// `out` at a row of the unit and the block's first feature.
    unsafe fn out<F: Format>(&self, row: usize) -> *mut u8 {
        let at = (self.unit.rows.start + row) * self.out_stride::<F>() + self.features.start * F::BYTES;
        // SAFETY: the caller's: the unit has the row, so `out` does.
        unsafe { self.args.out.add(at) }
    }

    /// `pre` at a row of the unit and a segment's first column.
    unsafe fn pre<F: Format>(&self, row: usize, segment: &Segment) -> *mut u8 {
        let at = ((self.unit.rows.start + row) * self.args.n + segment.first) * F::BYTES;
        // SAFETY: the caller's: `pre` is wanted and has the row.
        unsafe { self.epilogue.pre.add(at) }
    }
}
