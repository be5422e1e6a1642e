//! The experts' forward pass and the grouped GEMMs.

use moekern_core::experts::{ExpertsForward, experts_forward as forward};
use moekern_core::gemm::{
    Activation, Epilogue, Gather, Grouped, GroupedTn, grouped_nn, grouped_nt, grouped_tn, larger_than_cache,
};
use moekern_core::memory::advise_huge_pages;
use moekern_core::vector::{DType, Isa};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cpu_isa, module)?)?;
    module.add_function(wrap_pyfunction!(experts_forward, module)?)?;
    module.add_function(wrap_pyfunction!(grouped_mm, module)?)
}

/// A tensor's address as Python passes it; 0 means absent.
pub fn pointer(address: usize) -> *const u8 {
    address as *const u8
}

/// The element type of the CPU kernels with this code.
pub fn dtype(code: u8) -> PyResult<DType> {
    match DType::from_code(code) {
        Some(dtype) if dtype != DType::F64 => Ok(dtype),
        _ => Err(PyValueError::new_err(format!("dtype: code {code}; accepted: 0 (fp32), 2 (bf16), 3 (fp16)"))),
    }
}

/// The activation with this code.
pub fn activation(code: u8) -> PyResult<Activation> {
    Activation::from_code(code)
        .ok_or_else(|| PyValueError::new_err(format!("activation: code {code}; accepted: 0 to 9")))
}

/// The instruction set in use, or what is wrong with the one the environment requests.
pub fn isa() -> PyResult<Isa> {
    Isa::current().map_err(|error| PyValueError::new_err(error.to_string()))
}

/// Fails unless the product of `sizes`, in elements of `dtype`, fits in an address range.
pub fn check_size(name: &str, dtype: DType, sizes: &[usize]) -> PyResult<()> {
    let bytes = sizes.iter().try_fold(dtype.size(), |product, &size| product.checked_mul(size));
    match bytes {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(PyValueError::new_err(format!("{name}: shape {sizes:?} exceeds the address range"))),
    }
}

/// Fails unless rows of a plan can be counted in int32 and all of them are named by present pointers.
pub fn check_present(pointers: &[(&str, usize)]) -> PyResult<()> {
    match pointers.iter().find(|(_, address)| *address == 0) {
        Some((name, _)) => Err(PyValueError::new_err(format!("{name}: null pointer"))),
        None => Ok(()),
    }
}

/// `cpu_isa() -> str`: the instruction set of the CPU kernels.
#[pyfunction]
pub fn cpu_isa() -> PyResult<&'static str> {
    Ok(isa()?.name())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, tokens, hidden, inter, experts, top_k, activation, transposed, interleaved,
    x, scores, order, inverse, offsets, w_gate_up, w_down, b_gate_up, b_down, pre, out))]
#[allow(clippy::too_many_arguments)]
pub fn experts_forward(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    tokens: usize,
    hidden: usize,
    inter: usize,
    experts: usize,
    top_k: usize,
    activation: u8,
    transposed: bool,
    interleaved: bool,
    x: usize,
    scores: usize,
    order: usize,
    inverse: usize,
    offsets: usize,
    w_gate_up: usize,
    w_down: usize,
    b_gate_up: usize,
    b_down: usize,
    pre: usize,
    out: usize,
) -> PyResult<()> {
    let dtype = self::dtype(dtype)?;
    let activation = self::activation(activation)?;
    let isa = isa()?;
    let width = inter.saturating_mul(activation.columns());
    check_size("x", dtype, &[tokens, hidden])?;
    check_size("pre", dtype, &[tokens, top_k, width])?;
    check_size("w_gate_up", dtype, &[experts, width, hidden])?;
    if tokens == 0 || hidden == 0 {
        return Ok(());
    }
    check_present(&[("offsets", offsets), ("x", x), ("out", out)])?;
    if top_k > 0 {
        check_present(&[("order", order), ("inverse", inverse)])?;
    }
    let args = Shared(ExpertsForward {
        isa,
        threads: threads.max(1),
        dtype,
        tokens,
        hidden,
        inter,
        experts,
        top_k,
        activation,
        transposed,
        interleaved,
        x: pointer(x),
        scores: pointer(scores).cast(),
        order: pointer(order).cast(),
        inverse: pointer(inverse).cast(),
        offsets: pointer(offsets).cast(),
        w_gate_up: pointer(w_gate_up),
        w_down: pointer(w_down),
        b_gate_up: pointer(b_gate_up),
        b_down: pointer(b_down),
        pre: pointer(pre).cast_mut(),
        out: pointer(out).cast_mut(),
    });
    // SAFETY: Python vouches for the tensors behind the addresses.
    py.detach(|| unsafe { forward(args.get()) });
    Ok(())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, kind, experts, rows, k, n, a, b, offsets, out))]
#[allow(clippy::too_many_arguments)]
pub fn grouped_mm(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    kind: u8,
    experts: usize,
    rows: usize,
    k: usize,
    n: usize,
    a: usize,
    b: usize,
    offsets: usize,
    out: usize,
) -> PyResult<()> {
    let dtype = self::dtype(dtype)?;
    let isa = isa()?;
    check_size("a", dtype, &[rows, k])?;
    check_size("b", dtype, &[experts, k, n])?;
    check_size("out", dtype, &[if kind == 2 { experts } else { 1 }, if kind == 2 { k } else { rows }, n])?;
    check_present(&[("offsets", offsets)])?;
    if kind > 2 {
        return Err(PyValueError::new_err(format!("kind: {kind}; accepted: 0 (nt), 1 (nn), 2 (tn)")));
    }
    let threads = threads.max(1);
    let (a, b, out) = (pointer(a), pointer(b), pointer(out).cast_mut());
    let offsets = pointer(offsets).cast();
    if kind == 2 {
        let bytes = experts * k * n * dtype.size();
        let (gather_a, gather_b) = (Gather::NONE, Gather::NONE);
        let stream = larger_than_cache(bytes);
        let args = GroupedTn { isa, threads, dtype, experts, offsets, p: k, n, a, gather_a, b, gather_b, out, stream };
        // SAFETY: Python vouches for the tensors behind the addresses.
        py.detach(|| unsafe {
            let args = &args;
            advise_huge_pages(args.out, bytes);
            grouped_tn(args);
        });
        return Ok(());
    }
    let gather = Gather::NONE;
    let bias = std::ptr::null();
    let args = Grouped { isa, threads, dtype, experts, offsets, k, n, a, gather, b, bias, out };
    // SAFETY: Python vouches for the tensors behind the addresses.
    py.detach(|| unsafe {
        let args = &args;
        advise_huge_pages(args.out, rows * n * dtype.size());
        if kind == 0 {
            grouped_nt(args, &Epilogue::NONE)
        } else {
            grouped_nn(args)
        }
        clear_unused(args, rows);
    });
    Ok(())
}

/// Zeroes the rows that belong to no expert.
///
/// # Safety
/// `args.out` has `rows` rows and `args.offsets` is as documented.
unsafe fn clear_unused(args: &Grouped, rows: usize) {
    let row_bytes = args.n * args.dtype.size();
    // SAFETY: the caller's: the offsets name `used` rows of `rows`.
    unsafe {
        let used = *args.offsets.add(args.experts) as usize;
        if used < rows {
            args.out.add(used * row_bytes).write_bytes(0, (rows - used) * row_bytes);
        }
    }
}

/// Lets arguments with pointers be used where the interpreter is released.
pub struct Shared<T>(pub T);

// SAFETY: plain addresses; what may be done with them is the called function's contract.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// The arguments.
    pub fn get(&self) -> &T {
        &self.0
    }
}
