//! The host half of moekern: planning, permutation and grouped GEMMs of a Mixture-of-Experts layer.
//!
//! Knows neither Python nor CUDA. Callers pass raw pointers with sizes; every `unsafe` function states
//! which memory it reads and writes.

pub mod gemm;
pub mod memory;
pub mod permute;
pub mod plan;
pub mod threads;
pub mod vector;
