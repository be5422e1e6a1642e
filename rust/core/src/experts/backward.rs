//! The gradients of a layer of experts.
//!
//! With `dO` the gradient of the output, `s` the scores, rows sorted by expert:
//!
//! 1. `g = dO[token] * W_down`; while a block of `g` is in the cache: `dH = J^T (s g)`, `A' = s A` and the block's
//!    share of `dscores = <g, A>` ([`super::activation_grad`])
//! 2. `dX~ = dH * W_gate_up`, `dW_down = dO[token]^T A'`, `dW_gate_up = dH^T X[token]`, the biases, `dscores`
//! 3. `dX[token] = sum of its rows of dX~`
//!
//! A gradient that is not wanted skips the work that nothing else needs. Results do not depend on the number of
//! threads.

use super::activation_grad::HiddenGradient;
use super::column_sums::ColumnSums;
use super::score_grad::ScoreGradient;
use crate::gemm::activation::Activation;
use crate::gemm::grouped::Epilogue;
use crate::gemm::grouped::{Gather, Grouped};
use crate::gemm::nn::pass::{COLUMN_BLOCK, Finish, FinishedSums, NnJob, StoreSums};
use crate::gemm::nt::pass::grouped_nt;
use crate::gemm::tn::{GroupedTn, TnJob, larger_than_cache};
use crate::memory::scratch::{Buffer, with_workspace};
use crate::permute::arguments::{Combine, TokenMap};
use crate::threads::jobs::{Job, ThreadState, run_jobs};
use crate::vector::dtype::DType;
use crate::vector::format::Format;
use crate::vector::isa::{Isa, with_kernels};
use crate::vector::round::widen_row;
use crate::vector::simd::{Kernel, Simd};
use std::marker::PhantomData;
use std::ptr::null_mut;

/// Rows of a ticket where activations are differentiated on their own.
const ROWS: usize = 32;

/// Arguments of [`experts_backward`]. Matrices are row-major and of type `dtype` (not fp64); a null result is not
/// wanted. Shapes are those of plain weights, in brackets those of `transposed` ones; `width` is `2 * inter` for
/// gated activations, else `inter`.
#[derive(Clone, Copy)]
pub struct ExpertsBackward {
    /// Instruction set of the kernels, one that this CPU has.
    pub isa: Isa,
    /// Threads to use, at least one.
    pub threads: usize,
    /// Element type.
    pub dtype: DType,
    /// Number of tokens.
    pub tokens: usize,
    /// Features of a token.
    pub hidden: usize,
    /// Features between the projections.
    pub inter: usize,
    /// Number of experts.
    pub experts: usize,
    /// Slots of a token.
    pub top_k: usize,
    /// What lies between the projections.
    pub activation: Activation,
    /// Whether weights have their input features first.
    pub transposed: bool,
    /// Whether gate and up features alternate.
    pub interleaved: bool,
    /// `[tokens, hidden]`.
    pub dout: *const u8,
    /// `[tokens, hidden]`.
    pub x: *const u8,
    /// `[slots, width]`, as the forward pass left it.
    pub pre: *const u8,
    /// `[slots]` fp32, by slot; null: ones.
    pub scores: *const f32,
    /// Row to slot.
    pub order: *const i32,
    /// Slot to row.
    pub inverse: *const i32,
    /// `experts + 1` row offsets.
    pub offsets: *const i32,
    /// `[experts, width, hidden]` (`[experts, hidden, width]`).
    pub w_gate_up: *const u8,
    /// `[experts, hidden, inter]` (`[experts, inter, hidden]`).
    pub w_down: *const u8,
    /// `[experts, hidden]` or null.
    pub b_down: *const u8,
    /// `[tokens, hidden]`.
    pub dx: *mut u8,
    /// `[slots]` fp32, by slot.
    pub dscores: *mut f32,
    /// As `w_gate_up`.
    pub dw_gate_up: *mut u8,
    /// As `w_down`.
    pub dw_down: *mut u8,
    /// `[experts, width]`.
    pub db_gate_up: *mut u8,
    /// `[experts, hidden]`.
    pub db_down: *mut u8,
}

// SAFETY: the pointers are shared by the threads of a call, which write disjoint parts of the results.
unsafe impl Send for ExpertsBackward {}
// SAFETY: as above.
unsafe impl Sync for ExpertsBackward {}

/// Computes the gradients that `args` asks for.
///
/// # Safety
/// The pointers of `args` are as documented there, and the plan's arrays are a plan.
pub unsafe fn experts_backward(args: &ExpertsBackward) {
    // SAFETY: the caller's, handed on with memory for what the steps share.
    unsafe {
        with_workspace(|[buffer, _]| {
            with_kernels!(args.isa, args.dtype, S, F => Pass::<S, F>::new(args, buffer).run());
        });
    }
}

/// What the steps share. Results that no later step needs are null.
struct Pass<'a, S, F> {
    args: &'a ExpertsBackward,
    slots: usize,
    width: usize,
    /// Rows that belong to an expert.
    used: usize,
    /// Row to token.
    gather: Gather,
    /// `g`, only for transposed weights, `[used, inter]`.
    grad: *mut u8,
    /// `dH`, `[used, width]`.
    hidden: *mut u8,
    /// `A'`, `[used, inter]`.
    scaled: *mut u8,
    /// `dX~`, `[used, hidden]`.
    rows: *mut u8,
    /// `[column blocks, slots]`.
    shares: *mut f32,
    types: PhantomData<fn() -> (S, F)>,
}

impl<'a, S: Simd, F: Format> Pass<'a, S, F> {
    unsafe fn new(args: &'a ExpertsBackward, buffer: &mut Buffer) -> Self {
        // SAFETY: offsets end with that of `args.experts`, and the parts are within the bytes asked for.
        unsafe {
            let slots = args.tokens * args.top_k;
            let width = args.inter * args.activation.columns();
            let used = *args.offsets.add(args.experts) as usize;
            let wants_hidden = !args.dx.is_null() || !args.dw_gate_up.is_null() || !args.db_gate_up.is_null();
            let wants_grad = wants_hidden || !args.dscores.is_null();
            let sizes = [
                if wants_grad && args.transposed { used * args.inter * F::BYTES } else { 0 },
                if wants_hidden { used * width * F::BYTES } else { 0 },
                if args.dw_down.is_null() { 0 } else { used * args.inter * F::BYTES },
                if args.dx.is_null() { 0 } else { used * args.hidden * F::BYTES },
                if args.dscores.is_null() { 0 } else { args.inter.div_ceil(COLUMN_BLOCK) * slots * 4 },
            ];
            // A line between the parts, so that vectors at the end of one do not share it with the next.
            let mut next = buffer.bytes(sizes.iter().map(|size| size.next_multiple_of(64) + 64).sum());
            let [grad, hidden, scaled, rows, shares] = sizes.map(|size| {
                let start = next;
                next = next.add(size.next_multiple_of(64) + 64);
                if size == 0 { null_mut() } else { start }
            });
            let gather = Gather { order: args.order, top_k: args.top_k };
            let shares = shares.cast();
            Self { args, slots, width, used, gather, grad, hidden, scaled, rows, shares, types: PhantomData }
        }
    }

    unsafe fn run(&self) {
        // SAFETY: the pointers are the caller's and those of `new`, each with the shape stated there; a step reads
        // what the steps before it have written.
        unsafe {
            let args = self.args;
            let into_activation = HiddenGradient::<F> {
                activation: args.activation,
                interleaved: args.interleaved,
                inter: args.inter,
                slots: self.slots,
                pre: args.pre,
                order: args.order,
                scores: args.scores,
                hidden: self.hidden,
                scaled: self.scaled,
                shares: self.shares,
                format: PhantomData,
            };
            let down = self.product(args.dout, self.gather, args.w_down, args.hidden, args.inter, self.grad);
            if self.hidden.is_null() && self.shares.is_null() {
                // Only the weights' own gradient, which needs the activations but not their gradient.
                if !self.scaled.is_null() {
                    run_jobs(args.threads, &[&self.differentiate_rows(into_activation)]);
                }
            } else if args.transposed {
                grouped_nt(&down, &Epilogue::NONE);
                run_jobs(args.threads, &[&self.differentiate_rows(into_activation)]);
            } else {
                run_jobs(args.threads, &[&NnJob::<S, F, _>::new(&down, into_activation)]);
            }
            self.after_activation();
            if !args.dx.is_null() {
                self.token_sums().run();
            }
        }
    }

    /// Everything that needs nothing but `dH` and `A'`, in one go.
    unsafe fn after_activation(&self) {
        // SAFETY: as in `run`, which has computed `dH` and `A'`.
        unsafe {
            let args = self.args;
            let mut jobs: Vec<Box<dyn Job + '_>> = Vec::new();
            if !args.dx.is_null() {
                let up = self.product(self.hidden, Gather::NONE, args.w_gate_up, self.width, args.hidden, self.rows);
                if args.transposed {
                    grouped_nt(&up, &Epilogue::NONE);
                } else {
                    let finish =
                        StoreSums::<F> { out: self.rows, bias: null_mut(), n: args.hidden, format: PhantomData };
                    jobs.push(Box::new(NnJob::<S, F, _>::new(&up, finish)));
                }
            }
            let elements = args.experts
                * args.hidden
                * (if args.dw_down.is_null() { 0 } else { args.inter }
                    + if args.dw_gate_up.is_null() { 0 } else { self.width });
            let stream = larger_than_cache(elements * F::BYTES);
            let dout = (args.dout, self.gather, args.hidden);
            let x = (args.x, self.gather, args.hidden);
            if !args.dw_down.is_null() {
                let scaled = (self.scaled.cast_const(), Gather::NONE, args.inter);
                let (a, b) = if args.transposed { (scaled, dout) } else { (dout, scaled) };
                jobs.push(Box::new(self.weight_gradient(a, b, args.dw_down, stream)));
            }
            if !args.dw_gate_up.is_null() {
                let hidden = (self.hidden.cast_const(), Gather::NONE, self.width);
                let (a, b) = if args.transposed { (x, hidden) } else { (hidden, x) };
                jobs.push(Box::new(self.weight_gradient(a, b, args.dw_gate_up, stream)));
            }
            if !args.db_gate_up.is_null() {
                let hidden = (self.hidden.cast_const(), Gather::NONE, self.width);
                jobs.push(Box::new(self.column_sums(hidden, std::ptr::null(), args.db_gate_up)));
            }
            if !args.db_down.is_null() {
                jobs.push(Box::new(self.column_sums(dout, args.scores, args.db_down)));
            }
            if !args.dscores.is_null() {
                jobs.push(Box::new(self.score_gradient()));
            }
            run_jobs(args.threads, &jobs.iter().map(|job| &**job).collect::<Vec<_>>());
        }
    }

    /// A product of rows with an expert's weights.
    fn product(&self, a: *const u8, gather: Gather, b: *const u8, k: usize, n: usize, out: *mut u8) -> Grouped {
        let &ExpertsBackward { isa, threads, dtype, experts, offsets, .. } = self.args;
        Grouped { isa, threads, dtype, experts, offsets, k, n, a, gather, b, bias: std::ptr::null(), out }
    }

    unsafe fn weight_gradient(&self, a: Operand, b: Operand, out: *mut u8, stream: bool) -> TnJob<S, F> {
        // SAFETY: the caller's: operands with the rows that the plan has, and room for the result.
        unsafe {
            let &ExpertsBackward { isa, threads, dtype, experts, offsets, .. } = self.args;
            let ((a, gather_a, p), (b, gather_b, n)) = (a, b);
            TnJob::new(&GroupedTn {
                isa,
                threads,
                dtype,
                experts,
                offsets,
                p,
                n,
                a,
                gather_a,
                b,
                gather_b,
                out,
                stream,
            })
        }
    }

    fn column_sums(&self, (a, gather, n): Operand, scores: *const f32, out: *mut u8) -> ColumnSums<S, F> {
        let &ExpertsBackward { experts, offsets, order, .. } = self.args;
        ColumnSums { experts, offsets, a, gather, n, order, scores, out, types: PhantomData }
    }

    fn score_gradient(&self) -> ScoreGradient<S, F> {
        let &ExpertsBackward { experts, offsets, order, dout, hidden, b_down, dscores, .. } = self.args;
        ScoreGradient {
            experts,
            offsets,
            slots: self.slots,
            order,
            shares: self.shares,
            blocks: self.args.inter.div_ceil(COLUMN_BLOCK),
            dout,
            gather: self.gather,
            hidden,
            b_down,
            dscores,
            types: PhantomData,
        }
    }

    fn token_sums(&self) -> Combine {
        let &ExpertsBackward { isa, threads, dtype, tokens, top_k, inverse, hidden, dx: out, .. } = self.args;
        let map = TokenMap { isa, threads, dtype, tokens, top_k, hidden, inverse, used: self.used };
        Combine { map, y: self.rows, weights: std::ptr::null(), out }
    }

    fn differentiate_rows(&self, finish: HiddenGradient<F>) -> DifferentiateRows<S, F> {
        DifferentiateRows { grad: self.grad, used: self.used, finish, types: PhantomData }
    }
}

/// A matrix, the rows of it that are read, its columns.
type Operand = (*const u8, Gather, usize);

/// The way back through the activation as a pass of its own.
struct DifferentiateRows<S, F> {
    /// `g`, `[used, inter]`; null: zeros.
    grad: *const u8,
    used: usize,
    finish: HiddenGradient<F>,
    types: PhantomData<fn() -> S>,
}

// SAFETY: tickets read shared memory and write disjoint parts.
unsafe impl<S, F> Sync for DifferentiateRows<S, F> {}

impl<S: Simd, F: Format> Job for DifferentiateRows<S, F> {
    fn tickets(&self) -> usize {
        self.used.div_ceil(ROWS)
    }

    fn run(&self, ticket: usize, thread: &mut ThreadState) {
        let columns = self.finish.inter;
        let stride = columns.next_multiple_of(16);
        let row = ticket * ROWS;
        let rows = ROWS.min(self.used - row);
        let values = thread.scratch.results.words(ROWS * stride);
        // SAFETY: whoever made this vouches for the pointers.
        unsafe {
            for r in 0..rows {
                let to = values.add(r * stride);
                if self.grad.is_null() {
                    to.write_bytes(0, stride);
                } else {
                    let from = self.grad.add((row + r) * columns * F::BYTES);
                    S::enter(WidenRow::<F> { from, to, len: columns, format: PhantomData });
                }
            }
            self.finish.finish::<S>(&FinishedSums { expert: 0, row, rows, column: 0, columns, values, stride });
        }
    }
}

/// A row widened to fp32.
struct WidenRow<F> {
    from: *const u8,
    to: *mut f32,
    len: usize,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for WidenRow<F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: both rows have `len` elements, `to` up to a whole vector.
        unsafe {
            widen_row::<S, F>(self.from, self.to, self.len);
        }
    }
}
