//! The numbers that stand for types and activations in calls, as Rust knows them.

use moekern_core::gemm::Activation;
use moekern_core::vector::{DType, IdType};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::fmt::Debug;

use crate::grouped::KINDS;

type Codes = HashMap<String, u8>;

fn named<T: Copy + Debug>(all: &[T], code: impl Fn(T) -> u8) -> Codes {
    all.iter().map(|&one| (format!("{one:?}"), code(one))).collect()
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
fn codes() -> HashMap<&'static str, Codes> {
    HashMap::from([
        ("dtype", named(&DType::ALL, |one| one as u8)),
        ("id_type", named(&IdType::ALL, |one| one as u8)),
        ("activation", Activation::ALL.map(|one| (one.name().to_owned(), one as u8)).into()),
        ("kind", KINDS.map(|(name, code)| (name.to_owned(), code)).into()),
    ])
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(codes, module)?)
}
