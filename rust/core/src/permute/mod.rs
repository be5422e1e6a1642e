//! Tokens to rows sorted by expert, and back: gather, weighted sum, and the gradients of both.
//!
//! All of it goes token by token: a token's row is read or written once and stays in the first-level cache while
//! its `top_k` rows pass by, and no two tokens write the same memory. Sums are fp32 (fp64 for fp64) with the
//! token's slots in ascending order, so results do not depend on the number of threads.

pub(crate) mod arguments;
mod double;
mod kernels;
mod passes;

pub use arguments::{Combine, CombineBackward, Permute, TokenMap};
