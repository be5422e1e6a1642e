//! Permutation and combine, forward and backward.

use moekern_core::permute::{Combine, CombineBackward, Permute, TokenMap};
use moekern_core::vector::{DType, Isa};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Moving fewer bytes takes less than about 20 us, too short to let other Python threads run meanwhile.
const BYTES_WORTH_RELEASING: usize = 128 << 10;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(permute, module)?)?;
    module.add_function(wrap_pyfunction!(combine, module)?)?;
    module.add_function(wrap_pyfunction!(combine_backward, module)?)
}

/// The shapes and the plan, as Python passes them.
struct Shapes {
    dtype: u8,
    threads: usize,
    tokens: usize,
    hidden: usize,
    top_k: usize,
    experts: usize,
    inverse: usize,
    offsets: usize,
}

impl Shapes {
    /// Checks sizes and that the plan and the `required` tensors are there. None if there is nothing to do.
    fn map(self, required: &[(&str, usize)]) -> PyResult<Option<TokenMap>> {
        let error = |message| Err(PyValueError::new_err(message));
        let Some(dtype) = DType::from_code(self.dtype) else {
            return error(format!("dtype: got code {}, expected 0 to 3", self.dtype));
        };
        let slots = self.tokens.checked_mul(self.top_k).filter(|&slots| slots <= i32::MAX as usize);
        let bytes = slots.and_then(|slots| slots.max(self.tokens).checked_mul(self.hidden)?.checked_mul(dtype.size()));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            let (tokens, top_k, hidden) = (self.tokens, self.top_k, self.hidden);
            return error(format!(
                "shape: {tokens} tokens of {top_k} rows of {hidden} elements exceed the address range"
            ));
        }
        if self.tokens == 0 {
            return Ok(None);
        }
        let plan = [("offsets", self.offsets), ("inverse", self.inverse)];
        let absent = plan.iter().chain(required).find(|(_, address)| *address == 0);
        if let Some((name, _)) = absent.filter(|_| slots != Some(0) && self.hidden > 0) {
            return error(format!("{name}: null pointer"));
        }
        let offsets: *const i32 = address(self.offsets);
        Ok(Some(TokenMap {
            isa: Isa::current().map_err(|error| PyValueError::new_err(error.to_string()))?,
            threads: self.threads.max(1),
            dtype,
            tokens: self.tokens,
            top_k: self.top_k,
            hidden: self.hidden,
            inverse: address(self.inverse),
            // SAFETY: Python vouches for the tensors behind the addresses.
            used: if offsets.is_null() { 0 } else { unsafe { *offsets.add(self.experts) as usize } },
        }))
    }
}

fn address<T>(address: usize) -> *const T {
    address as *const T
}

/// Runs the work, without the interpreter if it takes long. Python vouches for the tensors behind the addresses.
fn run<T: Sync>(py: Python<'_>, map: &TokenMap, args: T, work: unsafe fn(&T)) {
    let bytes = map.tokens * (map.top_k + 1) * map.hidden * map.dtype.size();
    if bytes < BYTES_WORTH_RELEASING {
        // SAFETY: Python vouches for the tensors behind the addresses.
        unsafe { work(&args) }
    } else {
        let args = &args;
        // SAFETY: Python vouches for the tensors behind the addresses.
        py.detach(|| unsafe { work(args) });
    }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, tokens, hidden, top_k, experts, x, inverse, offsets, out))]
#[allow(clippy::too_many_arguments)]
fn permute(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    tokens: usize,
    hidden: usize,
    top_k: usize,
    experts: usize,
    x: usize,
    inverse: usize,
    offsets: usize,
    out: usize,
) -> PyResult<()> {
    let shapes = Shapes { dtype, threads, tokens, hidden, top_k, experts, inverse, offsets };
    if let Some(map) = shapes.map(&[("x", x), ("out", out)])? {
        run(py, &map, Permute { map, x: address(x), out: out as *mut u8 }, Permute::run);
    }
    Ok(())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, tokens, hidden, top_k, experts, y, weights, inverse, offsets, out))]
#[allow(clippy::too_many_arguments)]
fn combine(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    tokens: usize,
    hidden: usize,
    top_k: usize,
    experts: usize,
    y: usize,
    weights: usize,
    inverse: usize,
    offsets: usize,
    out: usize,
) -> PyResult<()> {
    let shapes = Shapes { dtype, threads, tokens, hidden, top_k, experts, inverse, offsets };
    if let Some(map) = shapes.map(&[("y", y), ("out", out)])? {
        let args = Combine { map, y: address(y), weights: address(weights), out: out as *mut u8 };
        run(py, &map, args, Combine::run);
    }
    Ok(())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, tokens, hidden, top_k, experts, dout, y, weights, inverse, offsets, dy, dweights))]
#[allow(clippy::too_many_arguments)]
fn combine_backward(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    tokens: usize,
    hidden: usize,
    top_k: usize,
    experts: usize,
    dout: usize,
    y: usize,
    weights: usize,
    inverse: usize,
    offsets: usize,
    dy: usize,
    dweights: usize,
) -> PyResult<()> {
    let shapes = Shapes { dtype, threads, tokens, hidden, top_k, experts, inverse, offsets };
    let required = [("dout", dout), ("y", if dweights == 0 { dout } else { y })];
    if let Some(map) = shapes.map(&required)? {
        let args = CombineBackward {
            map,
            dout: address(dout),
            y: address(y),
            weights: address(weights),
            dy: dy as *mut u8,
            dweights: dweights as *mut u8,
        };
        run(py, &map, args, CombineBackward::run);
    }
    Ok(())
}
