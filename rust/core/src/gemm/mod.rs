//! Grouped GEMMs over the experts on the CPU.
//!
//! One build serves every CPU: kernels are generic over a vector unit (`simd`), compiled for each instruction
//! set, and chosen when they are called (`isa`). Operands are fp32, bf16 or fp16 (`format`); sums are fp32.

mod activate_rows;
mod activation;
mod activation_grad;
mod axpy;
mod column_sums;
mod dot;
mod experts_backward;
mod experts_forward;
pub(crate) mod format;
mod forward;
mod forward_block;
mod forward_kernels;
mod forward_pack;
mod grouped;
pub(crate) mod isa;
mod jobs;
mod lanes;
mod math;
mod nn;
mod pack;
mod panels;
pub(crate) mod round;
mod score_grad;
pub(crate) mod scratch;
pub(crate) mod simd;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd_avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod simd_avx512;
pub(crate) mod simd_scalar;
mod store;
mod tickets;
mod tile;
mod tn;

pub use activation::Activation;
pub use experts_backward::{ExpertsBackward, experts_backward};
pub use experts_forward::{ExpertsForward, experts_forward};
pub use forward::{Epilogue, grouped_nt};
pub use grouped::{Gather, Grouped};
pub use isa::{ISA_VARIABLE, Isa, IsaError};
pub use nn::grouped_nn;
pub use scratch::advise_huge_pages;
pub use tn::{GroupedTn, grouped_tn, larger_than_cache};
