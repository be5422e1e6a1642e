//! The grouped products.

use moekern_core::gemm::{Epilogue, Gather, Grouped, GroupedTn, grouped_nn, grouped_nt, grouped_tn, larger_than_cache};
use moekern_core::memory::advise_huge_pages;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arguments::{Address, check_present, check_size, dtype, isa};

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(grouped_mm, module)?)
}

const NT: u8 = 0;
const NN: u8 = 1;
const TN: u8 = 2;
/// The kinds of products, and their codes.
pub const KINDS: [(&str, u8); 3] = [("nt", NT), ("nn", NN), ("tn", TN)];

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, kind, experts, rows, k, n, a, b, offsets, out))]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn grouped_mm(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    kind: u8,
    experts: usize,
    rows: usize,
    k: usize,
    n: usize,
    a: Address,
    b: Address,
    offsets: Address,
    out: Address,
) -> PyResult<()> {
    let dtype = self::dtype(dtype)?;
    let isa = isa()?;
    check_size("a", dtype, &[rows, k])?;
    check_size("b", dtype, &[experts, k, n])?;
    check_size("out", dtype, &[if kind == TN { experts } else { 1 }, if kind == TN { k } else { rows }, n])?;
    check_present(&[("offsets", offsets)])?;
    let threads = threads.max(1);
    let (a, b, out, offsets) = (a.read(), b.read(), out.write(), offsets.read());
    match kind {
        TN => {
            let bytes = experts * k * n * dtype.size();
            let (gather_a, gather_b) = (Gather::NONE, Gather::NONE);
            let stream = larger_than_cache(bytes);
            let args =
                GroupedTn { isa, threads, dtype, experts, offsets, p: k, n, a, gather_a, b, gather_b, out, stream };
            py.detach(|| {
                let args = &args;
                advise_huge_pages(args.out, bytes);
                // SAFETY: Python vouches for the tensors behind the addresses.
                unsafe { grouped_tn(args) };
            });
        }
        NT | NN => {
            let (gather, bias) = (Gather::NONE, std::ptr::null());
            let args = Grouped { isa, threads, dtype, experts, offsets, k, n, a, gather, b, bias, out };
            py.detach(|| {
                let args = &args;
                advise_huge_pages(args.out, rows * n * dtype.size());
                // SAFETY: Python vouches for the tensors behind the addresses.
                unsafe {
                    if kind == NT {
                        grouped_nt(args, &Epilogue::NONE)
                    } else {
                        grouped_nn(args)
                    }
                    clear_unused(args, rows);
                }
            });
        }
        _ => return Err(PyValueError::new_err(format!("kind: {kind}; accepted: 0 (nt), 1 (nn), 2 (tn)"))),
    }
    Ok(())
}

/// Zeroes the rows that belong to no expert.
///
/// # Safety
/// `args.out` has `rows` rows and `args.offsets` is as documented.
unsafe fn clear_unused(args: &Grouped, rows: usize) {
    let row_bytes = args.n * args.dtype.size();
    // SAFETY: the caller's: `used` is at most `rows`.
    unsafe {
        let used = *args.offsets.add(args.experts) as usize;
        if used < rows {
            args.out.add(used * row_bytes).write_bytes(0, (rows - used) * row_bytes);
        }
    }
}
