//! Grouped GEMMs over the experts on the CPU. Operands are fp32, bf16 or fp16; sums are fp32.

mod activate_rows;
mod activation;
mod activation_grad;
mod axpy;
mod column_sums;
mod dot;
mod experts_backward;
mod experts_forward;
mod forward;
mod forward_block;
mod forward_kernels;
mod forward_pack;
mod grouped;
mod lanes;
mod nn;
mod pack;
mod panels;
mod score_grad;
mod store;
mod tickets;
mod tile;
mod tn;

pub use activation::Activation;
pub use experts_backward::{ExpertsBackward, experts_backward};
pub use experts_forward::{ExpertsForward, experts_forward};
pub use forward::grouped_nt;
pub use grouped::{Epilogue, Gather, Grouped};
pub use nn::grouped_nn;
pub use tn::{GroupedTn, grouped_tn, larger_than_cache};
