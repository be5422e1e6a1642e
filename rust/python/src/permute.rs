//! Permutation and combine, forward and backward.

use moekern_core::permute::{Combine, CombineBackward, Permute, TokenMap};
use moekern_core::vector::DType;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arguments::{Address, PlanTensors, TokenSizes, check_present, isa};

/// Moving fewer bytes takes less than about 20 us, too short to let other Python threads run meanwhile.
const BYTES_WORTH_RELEASING: usize = 128 << 10;

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(permute, module)?)?;
    module.add_function(wrap_pyfunction!(combine, module)?)?;
    module.add_function(wrap_pyfunction!(combine_backward, module)?)
}

/// Checks sizes, and that the plan and the `required` tensors are there. None if there is nothing to do.
fn token_map(
    dtype: u8,
    threads: usize,
    sizes: TokenSizes,
    plan: PlanTensors,
    required: &[(&str, Address)],
) -> PyResult<Option<TokenMap>> {
    let error = |message| Err(PyValueError::new_err(message));
    let Some(dtype) = DType::from_code(dtype) else {
        return error(format!("dtype: got code {dtype}, expected 0 to 3"));
    };
    let TokenSizes { tokens, hidden, top_k, experts } = sizes;
    let slots = tokens.checked_mul(top_k).filter(|&slots| slots <= i32::MAX as usize);
    let bytes = slots.and_then(|slots| slots.max(tokens).checked_mul(hidden)?.checked_mul(dtype.size()));
    if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
        return error(format!("shape: {tokens} tokens of {top_k} rows of {hidden} elements exceed the address range"));
    }
    if tokens == 0 {
        return Ok(None);
    }
    if slots != Some(0) && hidden > 0 {
        check_present(&[("offsets", plan.offsets), ("inverse", plan.inverse)])?;
        check_present(required)?;
    }
    let offsets: *const i32 = plan.offsets.read();
    // SAFETY: Python vouches for the tensors behind the addresses.
    let used = if offsets.is_null() { 0 } else { unsafe { *offsets.add(experts) as usize } };
    let inverse = plan.inverse.read();
    Ok(Some(TokenMap { isa: isa()?, threads: threads.max(1), dtype, tokens, top_k, hidden, inverse, used }))
}

/// Runs the work, without the interpreter if it takes long.
fn run<T: Sync>(py: Python<'_>, map: &TokenMap, args: T, work: unsafe fn(&T)) {
    let bytes = map.tokens * (map.top_k + 1) * map.hidden * map.dtype.size();
    // SAFETY: Python vouches for the tensors behind the addresses.
    let work = || unsafe { work(&args) };
    if bytes < BYTES_WORTH_RELEASING { work() } else { py.detach(work) }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, sizes, x, plan, out))]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn permute(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    sizes: TokenSizes,
    x: Address,
    plan: PlanTensors,
    out: Address,
) -> PyResult<()> {
    if let Some(map) = token_map(dtype, threads, sizes, plan, &[("x", x), ("out", out)])? {
        run(py, &map, Permute { map, x: x.read(), out: out.write() }, Permute::run);
    }
    Ok(())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, sizes, y, weights, plan, out))]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn combine(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    sizes: TokenSizes,
    y: Address,
    weights: Address,
    plan: PlanTensors,
    out: Address,
) -> PyResult<()> {
    if let Some(map) = token_map(dtype, threads, sizes, plan, &[("y", y), ("out", out)])? {
        let args = Combine { map, y: y.read(), weights: weights.read(), out: out.write() };
        run(py, &map, args, Combine::run);
    }
    Ok(())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, sizes, dout, y, weights, plan, dy, dweights))]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn combine_backward(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    sizes: TokenSizes,
    dout: Address,
    y: Address,
    weights: Address,
    plan: PlanTensors,
    dy: Address,
    dweights: Address,
) -> PyResult<()> {
    let required = [("dout", dout), ("y", if dweights.is_null() { dout } else { y })];
    if let Some(map) = token_map(dtype, threads, sizes, plan, &required)? {
        let args = CombineBackward {
            map,
            dout: dout.read(),
            y: y.read(),
            weights: weights.read(),
            dy: dy.write(),
            dweights: dweights.write(),
        };
        run(py, &map, args, CombineBackward::run);
    }
    Ok(())
}
