//! Vector units and the values in them: what every kernel is written with.
//!
//! One build serves every CPU. Kernels are generic over a vector unit (`simd`) and over the format of their operands
//! (`format`), compiled for each instruction set, and chosen when they are called (`isa`).

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod dtype;
pub(crate) mod format;
pub(crate) mod isa;
pub(crate) mod math;
pub(crate) mod round;
pub(crate) mod scalar;
pub(crate) mod simd;

pub use dtype::{DType, IdType};
pub use isa::{ISA_VARIABLE, Isa, IsaError};
