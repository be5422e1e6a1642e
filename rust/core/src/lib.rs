//! The host half of moekern: planning, permutation and grouped GEMMs of a Mixture-of-Experts layer.
//!
//! Knows neither Python nor CUDA. Callers pass raw pointers with sizes; every `unsafe` function states
//! which memory it reads and writes.
//!
//! A folder knows only those above it in this list. Other crates take names from a folder itself; files of this crate
//! take them from the file that defines them.

pub mod vector;

pub mod memory;
pub mod threads;

pub mod plan;

pub mod permute;

pub mod gemm;

pub mod experts;
