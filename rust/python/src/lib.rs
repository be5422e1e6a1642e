//! `moekern._core`: a thin Python shell over `moekern-core`.

mod arguments;
mod codes;
mod cuda;
mod cuda_plan;
mod experts;
mod grouped;
mod machine;
mod permute;
mod plan;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    arguments::register(module)?;
    codes::register(module)?;
    cuda::register(module)?;
    cuda_plan::register(module)?;
    experts::register(module)?;
    grouped::register(module)?;
    machine::register(module)?;
    plan::register(module)?;
    permute::register(module)
}
