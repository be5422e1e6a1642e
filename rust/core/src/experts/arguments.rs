//! What both passes of a layer of experts read: sizes, formula, input, plan and weights.

use crate::gemm::activation::Activation;
use crate::gemm::grouped::{Gather, Grouped};
use crate::permute::arguments::TokenMap;
use crate::vector::dtype::DType;
use crate::vector::isa::Isa;
use std::ptr::null;

/// What both passes read. Matrices are row-major and of type `dtype` (not fp64). Shapes are those of plain weights, in
/// brackets those of `transposed` ones; `width` is `2 * inter` for gated activations, else `inter`.
///
/// Further tensors of the experts become fields after these: the scales of packed weights, the factors of low-rank
/// adapters.
#[derive(Clone, Copy)]
pub struct ExpertsInputs {
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
    /// Slots per token.
    pub top_k: usize,
    /// Between the projections.
    pub activation: Activation,
    /// Whether weights have their input features first.
    pub transposed: bool,
    /// Whether gate and up features alternate.
    pub interleaved: bool,
    /// `[tokens, hidden]`.
    pub x: *const u8,
    /// `[slots]` fp32, by slot; null: ones.
    pub scores: *const f32,
    /// Row to slot.
    pub order: *const i32,
    /// Slot to row.
    pub inverse: *const i32,
    /// `experts + 1` row offsets; rows behind the last are sentinels' and contribute nothing.
    pub offsets: *const i32,
    /// `[experts, width, hidden]` (`[experts, hidden, width]`).
    pub w_gate_up: *const u8,
    /// `[experts, hidden, inter]` (`[experts, inter, hidden]`).
    pub w_down: *const u8,
    /// `[experts, width]` or null; the backward pass, which gets the pre-activation, does not read it.
    pub b_gate_up: *const u8,
    /// `[experts, hidden]` or null.
    pub b_down: *const u8,
}

impl ExpertsInputs {
    /// Features of the pre-activation.
    pub fn width(&self) -> usize {
        self.inter * self.activation.columns()
    }

    /// Rows that belong to an expert.
    ///
    /// # Safety
    /// The offsets are as documented.
    pub unsafe fn used(&self) -> usize {
        // SAFETY: the caller's: there are `experts + 1` offsets.
        unsafe { *self.offsets.add(self.experts) as usize }
    }

    /// Rows of tokens, read through the plan.
    pub(super) fn gather(&self) -> Gather {
        Gather { order: self.order, top_k: self.top_k }
    }

    /// The product of rows `a`, `[rows, k]`, with the weights `b` of each row's expert, without bias.
    pub(super) fn product(&self, (a, gather, k): Operand, b: *const u8, n: usize, out: *mut u8) -> Grouped {
        let &Self { isa, threads, dtype, experts, offsets, .. } = self;
        Grouped { isa, threads, dtype, experts, offsets, k, n, a, gather, b, bias: null(), out }
    }

    /// From rows back to tokens; `used` as [`ExpertsInputs::used`] gives it.
    pub(super) fn token_map(&self, used: usize) -> TokenMap {
        let &Self { isa, threads, dtype, tokens, top_k, hidden, inverse, .. } = self;
        TokenMap { isa, threads, dtype, tokens, top_k, hidden, inverse, used }
    }
}

/// A matrix, the rows of it that are read, its columns.
pub(super) type Operand = (*const u8, Gather, usize);
