//! Grouped "nn": `out[row, :] = a[source(row), :] * b[expert]` with `b[expert]` of shape `[k, n]`.
//!
//! The form of a gradient with respect to activations, and of a forward pass with transposed weights.

mod axpy;
pub(crate) mod pass;

pub use pass::grouped_nn;
