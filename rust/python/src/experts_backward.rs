//! The experts' backward pass.

use crate::experts::{Shared, activation, check_present, check_size, dtype, isa, pointer};
use moekern_core::experts::{ExpertsBackward, experts_backward as backward};
use pyo3::prelude::*;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(experts_backward, module)?)
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, tokens, hidden, inter, experts, top_k, activation, transposed, interleaved,
    dout, x, pre, scores, order, inverse, offsets, w_gate_up, w_down, b_gate_up, b_down,
    dx, dscores, dw_gate_up, dw_down, db_gate_up, db_down))]
#[allow(clippy::too_many_arguments)]
pub fn experts_backward(
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
    dout: usize,
    x: usize,
    pre: usize,
    scores: usize,
    order: usize,
    inverse: usize,
    offsets: usize,
    w_gate_up: usize,
    w_down: usize,
    b_gate_up: usize,
    b_down: usize,
    dx: usize,
    dscores: usize,
    dw_gate_up: usize,
    dw_down: usize,
    db_gate_up: usize,
    db_down: usize,
) -> PyResult<()> {
    // The saved pre-activations contain this bias already.
    let _ = b_gate_up;
    let dtype = self::dtype(dtype)?;
    let activation = self::activation(activation)?;
    let isa = isa()?;
    let width = inter.saturating_mul(activation.columns());
    check_size("x", dtype, &[tokens, hidden])?;
    check_size("pre", dtype, &[tokens, top_k, width])?;
    check_size("dout", dtype, &[tokens, top_k, hidden])?;
    check_size("w_gate_up", dtype, &[experts, width, hidden])?;
    check_present(&[("offsets", offsets)])?;
    if tokens > 0 && top_k > 0 {
        check_present(&[("order", order), ("inverse", inverse)])?;
        if hidden > 0 && inter > 0 {
            check_present(&[("dout", dout), ("x", x), ("pre", pre)])?;
        }
    }
    if experts > 0 && hidden > 0 && inter > 0 {
        check_present(&[("w_gate_up", w_gate_up), ("w_down", w_down)])?;
    }
    let args = Shared(ExpertsBackward {
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
        dout: pointer(dout),
        x: pointer(x),
        pre: pointer(pre),
        scores: pointer(scores).cast(),
        order: pointer(order).cast(),
        inverse: pointer(inverse).cast(),
        offsets: pointer(offsets).cast(),
        w_gate_up: pointer(w_gate_up),
        w_down: pointer(w_down),
        b_down: pointer(b_down),
        dx: pointer(dx).cast_mut(),
        dscores: pointer(dscores).cast_mut().cast(),
        dw_gate_up: pointer(dw_gate_up).cast_mut(),
        dw_down: pointer(dw_down).cast_mut(),
        db_gate_up: pointer(db_gate_up).cast_mut(),
        db_down: pointer(db_down).cast_mut(),
    });
    // SAFETY: Python vouches for the tensors behind the addresses.
    py.detach(|| unsafe { backward(args.get()) });
    Ok(())
}
