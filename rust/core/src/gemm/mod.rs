//! Grouped GEMMs over the experts on the CPU. Operands are fp32, bf16 or fp16; sums are fp32.

mod activate_rows;
pub(crate) mod activation;
mod activation_grad;
mod column_sums;
mod experts_backward;
mod experts_forward;
pub(crate) mod grouped;
pub(crate) mod nn;
pub(crate) mod nt;
mod pack;
mod score_grad;
mod tile;
pub(crate) mod tn;

pub use activation::Activation;
pub use experts_backward::{ExpertsBackward, experts_backward};
pub use experts_forward::{ExpertsForward, experts_forward};
pub use grouped::{Epilogue, Gather, Grouped};
pub use nn::grouped_nn;
pub use nt::grouped_nt;
pub use tn::{GroupedTn, grouped_tn, larger_than_cache};
