//! Grouped "nt": `out[row, :] = a[source(row), :] * b[expert]^T` with `b[expert]` of shape `[n, k]`.
//!
//! The form of a forward pass with weights as Hugging Face stores them: weight rows are read where they are in memory.

mod block;
mod dot;
mod kernels;
mod lanes;
mod panel;
pub(crate) mod pass;
mod store;
pub(crate) mod tickets;

pub use pass::grouped_nt;
