//! The experts' passes.

use moekern_core::experts::{
    ExpertsBackward, ExpertsForward, ExpertsInputs, experts_backward as backward, experts_forward as forward,
};
use pyo3::prelude::*;

use crate::arguments::{
    ActivationName, Address, Form, Gradients, PlanTensors, Sizes, Weights, check_present, check_size, dtype, isa,
};

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(experts_forward, module)?)?;
    module.add_function(wrap_pyfunction!(experts_backward, module)?)
}

/// Checks what both passes read, apart from which tensors are there, and makes it one argument.
#[allow(clippy::too_many_arguments, reason = "the arguments of the two functions below")]
fn inputs(
    dtype: u8,
    threads: usize,
    tokens: usize,
    sizes: &Sizes,
    x: Address,
    scores: Address,
    plan: &PlanTensors,
    weights: &Weights,
    form: &Form,
) -> PyResult<ExpertsInputs> {
    let dtype = self::dtype(dtype)?;
    let &Sizes { experts, hidden, inter, features } = sizes;
    let &Form { activation: ActivationName(activation), transposed, interleaved, top_k } = form;
    check_size("x", dtype, &[tokens, hidden])?;
    check_size("pre", dtype, &[tokens, top_k, features])?;
    check_size("w_gate_up", dtype, &[experts, features, hidden])?;
    Ok(ExpertsInputs {
        isa: isa()?,
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
        x: x.read(),
        scores: scores.read(),
        order: plan.order.read(),
        inverse: plan.inverse.read(),
        offsets: plan.offsets.read(),
        w_gate_up: weights.w_gate_up.read(),
        w_down: weights.w_down.read(),
        b_gate_up: weights.b_gate_up.read(),
        b_down: weights.b_down.read(),
    })
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, tokens, sizes, x, scores, plan, weights, form, pre, out))]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn experts_forward(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    tokens: usize,
    sizes: Sizes,
    x: Address,
    scores: Address,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    pre: Address,
    out: Address,
) -> PyResult<()> {
    let inputs = inputs(dtype, threads, tokens, &sizes, x, scores, &plan, &weights, &form)?;
    if tokens == 0 || sizes.hidden == 0 {
        return Ok(());
    }
    check_present(&[("offsets", plan.offsets), ("x", x), ("out", out)])?;
    if form.top_k > 0 {
        check_present(&[("order", plan.order), ("inverse", plan.inverse)])?;
    }
    let args = ExpertsForward { inputs, pre: pre.write(), out: out.write() };
    // SAFETY: Python vouches for the tensors behind the addresses.
    py.detach(|| unsafe { forward(&args) });
    Ok(())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (dtype, threads, tokens, sizes, dout, x, pre, scores, plan, weights, form, gradients))]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn experts_backward(
    py: Python<'_>,
    dtype: u8,
    threads: usize,
    tokens: usize,
    sizes: Sizes,
    dout: Address,
    x: Address,
    pre: Address,
    scores: Address,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    gradients: Gradients,
) -> PyResult<()> {
    let inputs = inputs(dtype, threads, tokens, &sizes, x, scores, &plan, &weights, &form)?;
    let Sizes { experts, hidden, inter, .. } = sizes;
    check_size("dout", inputs.dtype, &[tokens, form.top_k, hidden])?;
    check_present(&[("offsets", plan.offsets)])?;
    if tokens > 0 && form.top_k > 0 {
        check_present(&[("order", plan.order), ("inverse", plan.inverse)])?;
        if hidden > 0 && inter > 0 {
            check_present(&[("dout", dout), ("x", x), ("pre", pre)])?;
        }
    }
    if experts > 0 && hidden > 0 && inter > 0 {
        check_present(&[("w_gate_up", weights.w_gate_up), ("w_down", weights.w_down)])?;
    }
    let args = ExpertsBackward {
        inputs,
        dout: dout.read(),
        pre: pre.read(),
        dx: gradients.x.write(),
        dscores: gradients.scores.write(),
        dw_gate_up: gradients.w_gate_up.write(),
        dw_down: gradients.w_down.write(),
        db_gate_up: gradients.b_gate_up.write(),
        db_down: gradients.b_down.write(),
    };
    // SAFETY: Python vouches for the tensors behind the addresses.
    py.detach(|| unsafe { backward(&args) });
    Ok(())
}
