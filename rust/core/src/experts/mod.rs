//! The passes of a layer of experts, forward and backward, made of grouped GEMMs.

mod activate_rows;
mod activation_grad;
mod arguments;
mod backward;
mod column_sums;
mod forward;
mod score_grad;

pub use arguments::ExpertsInputs;
pub use backward::{ExpertsBackward, experts_backward};
pub use forward::{ExpertsForward, experts_forward};
