//! Grouped GEMMs over the experts on the CPU. Operands are fp32, bf16 or fp16; sums are fp32.

pub(crate) mod activation;
pub(crate) mod grouped;
pub(crate) mod nn;
pub(crate) mod nt;
mod pack;
mod tile;
pub(crate) mod tn;

pub use activation::Activation;
pub use grouped::{Epilogue, Gather, Grouped};
pub use nn::grouped_nn;
pub use nt::grouped_nt;
pub use tn::{GroupedTn, grouped_tn, larger_than_cache};
