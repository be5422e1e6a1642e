//! `moekern._core`: a thin Python shell over `moekern-core`.

mod codes;
mod cuda;
mod cuda_plan;
mod experts;
mod experts_backward;
mod memory;
mod permute;
mod plan;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    codes::register(module)?;
    cuda::register(module)?;
    cuda_plan::register(module)?;
    experts::register(module)?;
    experts_backward::register(module)?;
    memory::register(module)?;
    plan::register(module)?;
    permute::register(module)
}
