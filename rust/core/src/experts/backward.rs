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
use super::arguments::{ExpertsInputs, Operand};
use super::column_sums::ColumnSums;
use super::score_grad::ScoreGradient;
use crate::gemm::grouped::{Epilogue, Gather};
use crate::gemm::nn::pass::{COLUMN_BLOCK, Finish, FinishedSums, NnJob, StoreSums};
use crate::gemm::nt::pass::grouped_nt;
use crate::gemm::tn::{GroupedTn, TnJob, larger_than_cache};
use crate::memory::scratch::{Buffer, with_workspace};
use crate::permute::arguments::Combine;
use crate::threads::jobs::{Job, ThreadState, run_jobs};
use crate::vector::format::Format;
use crate::vector::isa::with_kernels;
use crate::vector::round::widen_row;
use crate::vector::simd::{Kernel, Simd};
use std::marker::PhantomData;
use std::ptr::null_mut;

/// Rows of a ticket where activations are differentiated on their own.
const ROWS: usize = 32;

/// Arguments of [`experts_backward`]; a null result is not wanted.
#[derive(Clone, Copy)]
pub struct ExpertsBackward {
    /// What the forward pass read.
    pub inputs: ExpertsInputs,
    /// `[tokens, hidden]`, the gradient of the output.
    pub dout: *const u8,
    /// `[slots, width]`, as the forward pass left it.
    pub pre: *const u8,
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
            with_kernels!(args.inputs.isa, args.inputs.dtype, S, F => Pass::<S, F>::new(args, buffer).run());
        });
    }
}

/// What the steps share. Results that no later step needs are null.
struct Pass<'a, S, F> {
    args: &'a ExpertsBackward,
    inputs: &'a ExpertsInputs,
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
        // SAFETY: offsets end with that of `inputs.experts`, and the parts are within the bytes asked for.
        unsafe {
            let inputs = &args.inputs;
            let slots = inputs.tokens * inputs.top_k;
            let width = inputs.width();
            let used = inputs.used();
            let wants_hidden = !args.dx.is_null() || !args.dw_gate_up.is_null() || !args.db_gate_up.is_null();
            let wants_grad = wants_hidden || !args.dscores.is_null();
            let sizes = [
                if wants_grad && inputs.transposed { used * inputs.inter * F::BYTES } else { 0 },
                if wants_hidden { used * width * F::BYTES } else { 0 },
                if args.dw_down.is_null() { 0 } else { used * inputs.inter * F::BYTES },
                if args.dx.is_null() { 0 } else { used * inputs.hidden * F::BYTES },
                if args.dscores.is_null() { 0 } else { inputs.inter.div_ceil(COLUMN_BLOCK) * slots * 4 },
            ];
            // A line between the parts, so that vectors at the end of one do not share it with the next.
            let mut next = buffer.bytes(sizes.iter().map(|size| size.next_multiple_of(64) + 64).sum());
            let [grad, hidden, scaled, rows, shares] = sizes.map(|size| {
                let start = next;
                next = next.add(size.next_multiple_of(64) + 64);
                if size == 0 { null_mut() } else { start }
            });
            let gather = inputs.gather();
            let shares = shares.cast();
            Self { args, inputs, slots, width, used, gather, grad, hidden, scaled, rows, shares, types: PhantomData }
        }
    }

    unsafe fn run(&self) {
        // SAFETY: the pointers are the caller's and those of `new`, each with the shape stated there; a step reads
        // what the steps before it have written.
        unsafe {
            let (args, inputs) = (self.args, self.inputs);
            let into_activation = HiddenGradient::<F> {
                activation: inputs.activation,
                interleaved: inputs.interleaved,
                inter: inputs.inter,
                slots: self.slots,
                pre: args.pre,
                order: inputs.order,
                scores: inputs.scores,
                hidden: self.hidden,
                scaled: self.scaled,
                shares: self.shares,
                format: PhantomData,
            };
            let dout = (args.dout, self.gather, inputs.hidden);
            let down = inputs.product(dout, inputs.w_down, inputs.inter, self.grad);
            if self.hidden.is_null() && self.shares.is_null() {
                // Only the weights' own gradient, which needs the activations but not their gradient.
                if !self.scaled.is_null() {
                    run_jobs(inputs.threads, &[&self.differentiate_rows(into_activation)]);
                }
            } else if inputs.transposed {
                grouped_nt(&down, &Epilogue::NONE);
                run_jobs(inputs.threads, &[&self.differentiate_rows(into_activation)]);
            } else {
                run_jobs(inputs.threads, &[&NnJob::<S, F, _>::new(&down, into_activation)]);
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
            let (args, inputs) = (self.args, self.inputs);
            let mut jobs: Vec<Box<dyn Job + '_>> = Vec::new();
            let hidden = (self.hidden.cast_const(), Gather::NONE, self.width);
            if !args.dx.is_null() {
                let up = inputs.product(hidden, inputs.w_gate_up, inputs.hidden, self.rows);
                if inputs.transposed {
                    grouped_nt(&up, &Epilogue::NONE);
                } else {
                    let finish =
                        StoreSums::<F> { out: self.rows, bias: null_mut(), n: inputs.hidden, format: PhantomData };
                    jobs.push(Box::new(NnJob::<S, F, _>::new(&up, finish)));
                }
            }
            let elements = inputs.experts
                * inputs.hidden
                * (if args.dw_down.is_null() { 0 } else { inputs.inter }
                    + if args.dw_gate_up.is_null() { 0 } else { self.width });
            let stream = larger_than_cache(elements * F::BYTES);
            let dout = (args.dout, self.gather, inputs.hidden);
            let x = (inputs.x, self.gather, inputs.hidden);
            if !args.dw_down.is_null() {
                let scaled = (self.scaled.cast_const(), Gather::NONE, inputs.inter);
                let (a, b) = if inputs.transposed { (scaled, dout) } else { (dout, scaled) };
                jobs.push(Box::new(self.weight_gradient(a, b, args.dw_down, stream)));
            }
            if !args.dw_gate_up.is_null() {
                let (a, b) = if inputs.transposed { (x, hidden) } else { (hidden, x) };
                jobs.push(Box::new(self.weight_gradient(a, b, args.dw_gate_up, stream)));
            }
            if !args.db_gate_up.is_null() {
                jobs.push(Box::new(self.column_sums(hidden, std::ptr::null(), args.db_gate_up)));
            }
            if !args.db_down.is_null() {
                jobs.push(Box::new(self.column_sums(dout, inputs.scores, args.db_down)));
            }
            if !args.dscores.is_null() {
                jobs.push(Box::new(self.score_gradient()));
            }
            run_jobs(inputs.threads, &jobs.iter().map(|job| &**job).collect::<Vec<_>>());
        }
    }

    unsafe fn weight_gradient(&self, a: Operand, b: Operand, out: *mut u8, stream: bool) -> TnJob<S, F> {
        // SAFETY: the caller's: operands with the rows that the plan has, and room for the result.
        unsafe {
            let &ExpertsInputs { isa, threads, dtype, experts, offsets, .. } = self.inputs;
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
        let &ExpertsInputs { experts, offsets, order, .. } = self.inputs;
        ColumnSums { experts, offsets, a, gather, n, order, scores, out, types: PhantomData }
    }

    fn score_gradient(&self) -> ScoreGradient<S, F> {
        let &ExpertsInputs { experts, offsets, order, hidden, b_down, .. } = self.inputs;
        let &ExpertsBackward { dout, dscores, .. } = self.args;
        ScoreGradient {
            experts,
            offsets,
            slots: self.slots,
            order,
            shares: self.shares,
            blocks: self.inputs.inter.div_ceil(COLUMN_BLOCK),
            dout,
            gather: self.gather,
            hidden,
            b_down,
            dscores,
            types: PhantomData,
        }
    }

    fn token_sums(&self) -> Combine {
        let map = self.inputs.token_map(self.used);
        Combine { map, y: self.rows, weights: std::ptr::null(), out: self.args.dx }
    }

    fn differentiate_rows(&self, finish: HiddenGradient<F>) -> DifferentiateRows<S, F> {
        DifferentiateRows { grad: self.grad, used: self.used, finish, types: PhantomData }
    }
}

/// The gradient through the activation as a pass of its own.
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
