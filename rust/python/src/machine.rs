//! What the machine has: memory for large results, the speed of memory, the instruction set.

use moekern_core::memory;
use moekern_core::threads::memory_rate as measure;
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::c_int;

use crate::arguments::isa;

/// See `python/moekern/_core.pyi`.
#[pyclass(frozen, module = "moekern._core")]
pub struct Pages {
    pages: memory::Pages,
    bytes: usize,
}

#[pymethods]
impl Pages {
    #[new]
    fn new(bytes: usize) -> PyResult<Self> {
        let pages = memory::Pages::new(bytes)
            .map_err(|error| PyMemoryError::new_err(format!("{bytes} bytes for a result: {error}")))?;
        Ok(Self { pages, bytes })
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let length = ffi::Py_ssize_t::try_from(this.bytes).map_err(|e| PyMemoryError::new_err(e.to_string()))?;
        // SAFETY: the view holds a reference to this object, hence the memory.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), this.pages.start().cast(), length, 0, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
fn memory_rate(py: Python<'_>, start: usize, bytes: usize, threads: usize, write: bool) -> PyResult<f64> {
    if start == 0 || !start.is_multiple_of(64) || bytes < 1 << 20 {
        return Err(PyValueError::new_err(format!(
            "start: address {start}, {bytes} bytes; accepted: aligned to 64, at least 1 MiB"
        )));
    }
    let isa = isa()?;
    // SAFETY: Python vouches for the memory.
    Ok(py.detach(|| unsafe { measure(isa, start as *mut u8, bytes, threads, write) }))
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
fn cpu_isa() -> PyResult<&'static str> {
    Ok(isa()?.name())
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Pages>()?;
    module.add_function(wrap_pyfunction!(cpu_isa, module)?)?;
    module.add_function(wrap_pyfunction!(memory_rate, module)?)
}
