"""The public functions: they check their arguments, apply autocast, and hand over to the differentiable verbs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.call import Form, PlanTensors, Weights
from moekern.functional.plan import Plan, plan, tensors_of
from moekern.verbs import autograd, checks, direct, ops
from moekern.verbs.backend import resolve


def experts(
    x: Tensor,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "swiglu",
    transposed: bool = False,
    interleaved: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """Run every token through its top-k experts and sum their outputs with the router's weights.

    ``out[t] = sum_k topk_weights[t, k] * expert[topk_ids[t, k]](x[t])``. Differentiable, any number of times, in x,
    the router weights, the weights and the biases.

    Args:
        x: ``[T, H]``, float32, bfloat16, float16 or float64. T may be 0.
        topk_ids: ``[T, K]`` int64, int32, uint8 or uint16. Ids outside ``0 .. E-1``, negative ones too, are sentinels:
            they cost nothing, contribute zero and get zero gradient. None if ``plan`` is given.
        topk_weights: ``[T, K]`` floating, used in float32 (float64 for float64 ``x``); None for ones.
        w_gate_up: ``[E, 2I, H]``, gate rows then up rows; ``[E, I, H]`` for an activation without gate. Same dtype
            as x, except under autocast, which casts x, weights and biases.
        w_down: ``[E, H, I]``.
        b_gate_up: ``[E, 2I]`` (``[E, I]`` without gate) or None.
        b_down: ``[E, H]`` or None.
        activation: swiglu, geglu, geglu_tanh, reglu, swiglu_oai (gpt-oss: clamped at 7, slope 1.702), all gated;
            silu, gelu, gelu_tanh, relu, relu2, without gate.
        transposed: The weights are ``[E, H, 2I]`` and ``[E, I, H]``, as gpt-oss keeps them.
        interleaved: Gate and up features alternate along the 2I dimension, as gpt-oss keeps them.
        plan: The result of :func:`moekern.plan` for these ids, to reuse it across layers or calls.

    Returns:
        ``[T, H]`` in the dtype of x (or of autocast).

    Raises:
        TypeError: An argument is not a dense tensor of an accepted dtype, or the dtypes differ.
        ValueError: Shapes or devices do not fit together, or a name is unknown.
    """
    weights = Weights(w_gate_up, w_down, b_gate_up, b_down)
    signature = direct.signature(x, topk_ids, topk_weights, weights, activation, transposed, interleaved, plan)
    call = _accepted.get(signature)
    if call is not None:
        return call(x, topk_ids, topk_weights, weights, plan)  # type: ignore[no-any-return]
    check_experts(x, weights, activation, transposed, interleaved)
    num_experts = w_gate_up.shape[0]
    if plan is None:
        checks.topk_ids("topk_ids", topk_ids)
        assert topk_ids is not None
        checks.same_device("topk_ids", topk_ids, "x", x)
        checks.has_shape("topk_ids", topk_ids, (x.shape[0], "top_k"), "one row of ids a token")
        top_k = topk_ids.shape[1]
        if top_k < 1:
            raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, expected at least one expert a token")
    else:
        _check_plan(plan, x, num_experts)
        top_k = plan.top_k
    if topk_weights is not None:
        checks.is_tensor("topk_weights", topk_weights)
        checks.has_dtype("topk_weights", topk_weights, checks.FLOATING)
        checks.same_device("topk_weights", topk_weights, "x", x)
        checks.has_shape("topk_weights", topk_weights, (x.shape[0], top_k), "tokens, top_k")
    backend = resolve(x.device.type)
    form = Form(activation, transposed, interleaved, top_k)
    score_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if signature is not None and backend != "reference" and (topk_weights is None or topk_weights.dtype == score_dtype):
        call = _Call(num_experts, form, backend)
        _accepted.remember(signature, call)
        return call(x, topk_ids, topk_weights, weights, plan)
    if plan is None:
        assert topk_ids is not None
        plan = _plan(topk_ids, num_experts)
    weights, form = _as_stored(weights, form)
    x, weights = _autocast(x, weights)
    if topk_weights is not None:
        topk_weights = topk_weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    return autograd.experts(x, topk_weights, tensors_of(plan), weights, form, backend)


def grouped_mlp(
    x_sorted: Tensor,
    offsets: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "swiglu",
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Run rows that are already sorted by expert through their expert's MLP: the experts without dispatch and combine.

    Args:
        x_sorted: ``[R, H]``; rows of expert e are ``offsets[e]:offsets[e + 1]``. Rows past ``offsets[E]`` are ignored:
            their output and gradient are zero.
        offsets: ``[E + 1]`` int32 or int64, starting with 0, not decreasing, at most R; on the device of x_sorted.
            Its values are not checked, so that nothing waits for the device.
        w_gate_up, w_down, b_gate_up, b_down, activation, transposed, interleaved: As in :func:`experts`.

    Returns:
        ``[R, H]``.

    Raises:
        TypeError, ValueError: As in :func:`experts`.
    """
    weights = Weights(w_gate_up, w_down, b_gate_up, b_down)
    check_experts(x_sorted, weights, activation, transposed, interleaved, x_name="x_sorted")
    offsets = _check_offsets(offsets, x_sorted, "x_sorted", w_gate_up.shape[0])
    weights, form = _as_stored(weights, Form(activation, transposed, interleaved, 1))
    x_sorted, weights = _autocast(x_sorted, weights)
    rows = torch.arange(x_sorted.shape[0], dtype=torch.int32, device=x_sorted.device)
    inverse = rows.clone() if torch.compiler.is_compiling() else rows  # it refuses one tensor in two places
    plan = PlanTensors(rows, inverse, offsets)
    return autograd.experts(x_sorted, None, plan, weights, form, resolve(x_sorted.device.type))


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Multiply groups of rows by a matrix each, or groups of rows by each other.

    Args:
        a: ``[R, K]``; rows of group e are ``offsets[e]:offsets[e + 1]``.
        b: ``[E, K, N]``, contiguous or the transpose of a contiguous ``[E, N, K]`` (neither is copied): the result is
            ``a_e @ b[e]``. Or ``[R, N]``: the result is ``a_e.T @ b_e``, as the gradient of a weight needs it.
        offsets: ``[E + 1]`` int32 or int64, starting with 0; on the device of a. Its values are not checked.

    Returns:
        ``[R, N]`` with zeros in the rows past ``offsets[E]``, or ``[E, K, N]``.

    Raises:
        TypeError: An argument is not a dense tensor of an accepted dtype.
        ValueError: Shapes or devices do not fit together.
    """
    for name, value in (("a", a), ("b", b)):
        checks.is_tensor(name, value)
        checks.has_dtype(name, value, checks.FLOATING)
    checks.has_shape("a", a, ("R", "K"))
    checks.same_device("b", b, "a", a)
    dtype = _autocast_dtype(a)
    if dtype is not None:
        a, b = a.to(dtype), b.to(dtype)
    if b.dtype != a.dtype:
        raise TypeError(f"b: got dtype {b.dtype}, expected {a.dtype}, the dtype of a")
    backend = resolve(a.device.type)
    if b.ndim == 2:
        checks.has_shape("b", b, (a.shape[0], "N"), "as many rows as a")
        return autograd.grouped_mm(a.contiguous(), b.contiguous(), _check_offsets(offsets, a, "a", None), "tn", backend)
    checks.has_shape("b", b, ("E", a.shape[1], "N"), "the middle dimension is the columns of a")
    offsets = _check_offsets(offsets, a, "a", b.shape[0])
    if not b.is_contiguous() and b.mT.is_contiguous():
        return autograd.grouped_mm(a.contiguous(), b.mT, offsets, "nt", backend)
    return autograd.grouped_mm(a.contiguous(), b.contiguous(), offsets, "nn", backend)


_plan = plan  # the parameter of `experts` hides the function
_accepted = direct.Accepted()


class _Call:
    """An accepted signature of :func:`experts`: runs any call of that signature, without checks and dispatcher."""

    def __init__(self, num_experts: int, form: Form, backend: str):
        self._num_experts, self._form, self._backend = num_experts, form, backend
        self._module = ops.backend_module(backend)
        # Planner and verb as one program, made at the first inference: not every backend has that, nor every size.
        self._prepare = getattr(self._module, "prepare_inference", None)
        self._inference: Callable[..., Tensor | None] | None = None

    def __call__(
        self,
        x: Tensor,
        topk_ids: Tensor | None,
        topk_weights: Tensor | None,
        weights: Weights,
        plan: Plan | None,
    ) -> Tensor:
        w_gate_up, w_down, b_gate_up, b_down = weights
        differentiable = torch.is_grad_enabled() and (
            x.requires_grad or w_gate_up.requires_grad or w_down.requires_grad
            or (topk_weights is not None and topk_weights.requires_grad)
            or (b_gate_up is not None and b_gate_up.requires_grad)
            or (b_down is not None and b_down.requires_grad)
        )  # fmt: skip
        if plan is None:
            assert topk_ids is not None
            if not differentiable:
                prepare = self._prepare  # read once: another thread may be through with it in between
                if prepare is not None:
                    self._inference = prepare(x, topk_ids, topk_weights, weights, self._form)
                    self._prepare = None
                if self._inference is not None:
                    out = self._inference(x, topk_ids, topk_weights, weights)
                    if out is not None:
                        return out
            plan = _plan(topk_ids, self._num_experts)
        if differentiable:
            return autograd.experts_eagerly(x, topk_weights, tensors_of(plan), weights, self._form, self._backend)
        out, _ = self._module.experts_forward(x, topk_weights, tensors_of(plan), weights, self._form, False)
        return out  # type: ignore[no-any-return]


def check_experts(
    x: Tensor, weights: Weights, activation: str, transposed: bool, interleaved: bool, x_name: str = "x"
) -> None:
    """Everything about x and the weights that can be known before any work."""
    w_gate_up, w_down, b_gate_up, b_down = weights
    checks.one_of("activation", activation, tuple(ACTIVATIONS))
    checks.is_bool("transposed", transposed)
    checks.is_bool("interleaved", interleaved)
    gated = ACTIVATIONS[activation].gated
    if interleaved and not gated:
        raise ValueError(f"interleaved: got True, expected False with activation {activation!r}, which has no gate")
    biases = [(n, b) for n, b in (("b_gate_up", b_gate_up), ("b_down", b_down)) if b is not None]
    for name, value in ((x_name, x), ("w_gate_up", w_gate_up), ("w_down", w_down), *biases):
        checks.is_tensor(name, value)
        checks.has_dtype(name, value, checks.FLOATING)
        checks.same_device(name, value, x_name, x)
    checks.has_shape(x_name, x, ("tokens", "hidden"))
    hidden = x.shape[1]
    features = "2 * intermediate" if gated else "intermediate"
    up_shape = ("experts", hidden, features) if transposed else ("experts", features, hidden)
    checks.has_shape("w_gate_up", w_gate_up, up_shape, f"hidden as in {x_name}")
    num_experts, width = w_gate_up.shape[0], w_gate_up.shape[2 if transposed else 1]
    if gated and width % 2 != 0:
        raise ValueError(f"w_gate_up: got {width} features, expected an even number: gate and up halves")
    inner = width // 2 if gated else width
    down_shape = (num_experts, inner, hidden) if transposed else (num_experts, hidden, inner)
    checks.has_shape("w_down", w_down, down_shape, f"to match {x_name} and w_gate_up")
    for name, size in (("hidden", hidden), ("experts", num_experts), ("intermediate", inner)):
        if size < 1:
            raise ValueError(f"{x_name if name == 'hidden' else 'w_gate_up'}: got {name} size 0, expected at least 1")
    if b_gate_up is not None:
        checks.has_shape("b_gate_up", b_gate_up, (num_experts, width), "to match w_gate_up")
    if b_down is not None:
        checks.has_shape("b_down", b_down, (num_experts, hidden), "to match w_down")
    if not _autocast_dtype(x):
        for name, value in (("w_gate_up", w_gate_up), ("w_down", w_down), *biases):
            if value.dtype != x.dtype:
                raise TypeError(f"{name}: got dtype {value.dtype}, expected {x.dtype}, the dtype of {x_name}")


def _check_plan(plan: Plan, x: Tensor, num_experts: int) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a moekern.Plan")
    for name in ("order", "inverse", "offsets"):
        checks.is_tensor(f"plan.{name}", getattr(plan, name))
        checks.has_dtype(f"plan.{name}", getattr(plan, name), (torch.int32,))
    if plan.num_experts != num_experts:
        raise ValueError(f"plan: got a plan for {plan.num_experts} experts, expected {num_experts}, as w_gate_up has")
    if plan.order.shape[0] != x.shape[0] * plan.top_k:
        raise ValueError(
            f"plan: got a plan for {plan.order.shape[0] // plan.top_k} tokens, expected {x.shape[0]}, as x has"
        )
    expected = {"order": plan.order.shape[0], "inverse": plan.order.shape[0], "offsets": num_experts + 1}
    for name, size in expected.items():
        checks.has_shape(f"plan.{name}", getattr(plan, name), (size,))
        checks.same_device(f"plan.{name}" if name != "order" else "plan", getattr(plan, name), "x", x)


def _check_offsets(offsets: Tensor, rows: Tensor, rows_name: str, num_experts: int | None) -> Tensor:
    checks.is_tensor("offsets", offsets)
    checks.has_dtype("offsets", offsets, checks.OFFSETS)
    checks.has_shape(
        "offsets", offsets, ("E + 1" if num_experts is None else num_experts + 1,), "one more than experts"
    )
    if offsets.shape[0] < 2:
        raise ValueError(f"offsets: got shape {tuple(offsets.shape)}, expected at least [2]: one expert")
    checks.same_device("offsets", offsets, rows_name, rows)
    if rows.shape[0] >= 2**31:
        raise ValueError(f"{rows_name}: got {rows.shape[0]} rows, expected fewer than 2**31")
    return offsets.to(torch.int32).contiguous()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on this device; float64 is left alone, as torch does."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _autocast(x: Tensor, weights: Weights) -> tuple[Tensor, Weights]:
    """All tensors contiguous, and in autocast's dtype where it is on."""
    dtype = _autocast_dtype(x) or x.dtype
    cast = [
        t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in (x, *weights)
    ]
    return cast[0], Weights(*cast[1:])  # type: ignore[return-value, arg-type]


def _as_stored(weights: Weights, form: Form) -> tuple[Weights, Form]:
    """The weights in the layout that their memory has: transposed views of the other layout need no copy.

    Any other view is copied by :func:`_autocast` at every call, and a warning says so once.
    """
    matrices = {"w_gate_up": weights.w_gate_up, "w_down": weights.w_down}
    strided = {name: w for name, w in matrices.items() if not w.is_contiguous()}
    if not strided:
        return weights, form
    if all(w.mT.is_contiguous() for w in matrices.values()):
        return (
            weights._replace(w_gate_up=weights.w_gate_up.mT, w_down=weights.w_down.mT),
            form._replace(transposed=not form.transposed),
        )
    if not torch.compiler.is_compiling():
        for name in strided:
            _warn_of_copy(name)
    return weights, form


@cache
def _warn_of_copy(name: str) -> None:
    warnings.warn(
        f"moekern: {name}: got a strided view, which is copied at every call; expected contiguous weights, or both "
        "weights as transposed views (.mT) of contiguous ones",
        stacklevel=4,
    )
