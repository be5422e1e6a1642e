"""The differentiable verbs: what is saved, what is recomputed, and how they differentiate twice and forward.

Saved for the backward pass of the experts: x, the pre-activation, the router weights and the plan. The activation is
recomputed, the down projection's output is never needed again.

Forward-mode differentiation and second derivatives of the experts are those of :func:`_expression`: torch's own
operators around grouped products, which are bilinear. ``vmap`` runs slice by slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekern.backends import reference
from moekern.backends.call import Form, PlanTensors, Weights
from moekern.backends.observers import forward_mode
from moekern.verbs import direct, ops

Ctx = Any  # torch types the context of a Function loosely


class Sliced(torch.autograd.Function):
    """A Function that ``vmap`` applies slice by slice."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:  # type: ignore[override]
        """The rule of torch.vmap."""
        return ops.slice_by_slice(cls.apply, info, in_dims, *args)


# A Function takes tensors one by one: x, scores, *weights, *plan. Of the first six gradients are asked.
_FLOATING = 2 + len(Weights._fields)


def _unflatten(tensors: Sequence[Any]) -> tuple[Tensor, Tensor | None, PlanTensors, Weights]:
    """The arguments x, scores, plan, weights."""
    x, scores, *weights = tensors[:_FLOATING]
    return x, scores, PlanTensors(*tensors[_FLOATING:]), Weights(*weights)


def _forward(
    x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, save: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The operator. It is given lists: the Dynamo of torch 2.11 has no proxies for named tuples."""
    return ops.experts_forward(  # type: ignore[no-any-return]
        x, scores, [*plan], [*weights], *form, save, backend
    )


class _Experts(Sliced):
    """Arguments: x, scores, *weights, *plan, form, backend."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        *tensors, form, backend = args
        return _forward(*_unflatten(tensors), form, True, backend)

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.form, ctx.backend_name = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dout)


class _EagerExperts(torch.autograd.Function):
    """The same for eager calls, in the form without ``setup_context``: that one costs 35 us more a call.

    Arguments: x, scores, *weights for the graph to know, and the others, with the same weights as they travel.
    """

    @staticmethod
    def forward(ctx: Ctx, *args: Any) -> Tensor:  # type: ignore[override]
        *floating, (plan, weights, ctx.form, ctx.backend_name) = args
        x, scores = floating[:2]
        out, pre = ops.backend_module(ctx.backend_name).experts_forward(x, scores, plan, weights, ctx.form, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*floating, *plan, pre)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _gradients(ctx, dout)


def _gradients(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    """What either Function's backward returns: None for every input where no gradient is wanted."""
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, pre = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_FLOATING])
    dout = dout.contiguous()
    direct.refuse_batched_graph("experts")
    grads: Sequence[Tensor | None]
    if forward_mode():
        grads = _gradients_of_expression(tensors, needs, dout, ctx.form, ctx.backend_name)
    elif direct.transformed() or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        grads = _ExpertsGrad.apply(dout, *tensors, pre, needs, ctx.form, ctx.backend_name)
    elif direct.undisturbed() and direct.plain(dout, *tensors, pre) and not direct.batched_gradients():
        x, scores, plan, weights = _unflatten(tensors)
        backend = ops.backend_module(ctx.backend_name)
        grads = backend.experts_backward(dout, x, pre, scores, plan, weights, ctx.form, needs)
    else:
        grads = _ExpertsGrad.forward(dout, *tensors, pre, needs, ctx.form, ctx.backend_name)
    wanted = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (*wanted, *(None,) * (len(ctx.needs_input_grad) - _FLOATING))


def _expression(
    x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, backend: str
) -> Tensor:
    """The experts' output by torch's own operators around grouped products: every transform has its rule for these."""

    def multiply(a: Tensor, b: Tensor, offsets: Tensor, kind: str) -> Tensor:
        return grouped_mm(a.contiguous(), b.contiguous(), offsets, kind, backend)

    return reference.experts(x, scores, plan, weights, form, multiply)


def _gradients_of_expression(
    tensors: Sequence[Tensor | None], needs: list[bool], dout: Tensor, form: Form, backend: str
) -> list[Tensor | None]:
    """The gradients of :func:`_expression`, itself an expression; None where not wanted."""
    wanted = [i for i, need in enumerate(needs) if need]

    def output(*chosen: Tensor) -> Tensor:
        args = list(tensors)
        for i, value in zip(wanted, chosen, strict=True):
            args[i] = value
        return _expression(*_unflatten(args), form, backend)

    found = torch.func.vjp(output, *(tensors[i] for i in wanted))[1](dout)
    grads: list[Tensor | None] = [None] * _FLOATING
    for i, gradient in zip(wanted, found, strict=True):
        grads[i] = gradient
    return grads


class _ExpertsGrad(Sliced):
    """The gradient as a function of its own, so that it can be differentiated again.

    Arguments: dout, x, scores, *weights, *plan, pre, needs, form, backend.
    """

    @staticmethod
    def forward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        *tensors, pre, needs, form, backend = args
        x, scores, plan, weights = _unflatten(tensors)
        return ops.experts_backward(  # type: ignore[no-any-return]
            dout, x, pre, scores, [*plan], [*weights], *form, needs, backend
        )

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _pre, ctx.needs, ctx.form, ctx.backend_name = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Ctx, *ggrads: Tensor | None) -> tuple[Any, ...]:
        """Differentiate :func:`_expression` twice: the gradient it gives, along ``ggrads``."""
        dout, *tensors = ctx.saved_tensors
        arguments = (dout, *tensors[:_FLOATING])
        present = [i for i, t in enumerate(arguments) if t is not None]
        wanted = [need and g is not None for need, g in zip(ctx.needs, ggrads, strict=True)]
        tail = (None,) * (len(ctx.needs_input_grad) - len(arguments))
        if not any(wanted):
            return (None,) * len(arguments) + tail

        def fill(values: tuple[Tensor, ...]) -> list[Tensor | None]:
            filled: list[Tensor | None] = [None] * len(arguments)
            for i, value in zip(present, values, strict=True):
                filled[i] = value
            return filled

        def gradient(*values: Tensor) -> tuple[Tensor | None, ...]:
            upstream, *leaves = fill(values)
            assert upstream is not None
            every = [*leaves, *tensors[_FLOATING:]]
            grads = _gradients_of_expression(every, wanted, upstream, ctx.form, ctx.backend_name)
            return tuple(g for g in grads if g is not None)

        pullback = torch.func.vjp(gradient, *(arguments[i] for i in present))[1]
        second = pullback(tuple(g for g, want in zip(ggrads, wanted, strict=True) if want))
        return (*fill(second), *tail)


class _GroupedMM(Sliced):
    """``kind`` names the layout of b; each gradient is a grouped product of another kind."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, offsets: Tensor, kind: str, backend: str) -> Tensor:
        return ops.grouped_mm(a, b, offsets, kind, backend)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.kind, ctx.backend_name = inputs[3:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 5
        direct.refuse_batched_graph("grouped_mm")
        a, b, offsets = ctx.saved_tensors
        dout = dout.contiguous()
        da = db = None
        kind = ctx.kind
        if ctx.needs_input_grad[0]:
            da = grouped_mm(b, dout, offsets, "nt", ctx.backend_name) if kind == "tn" else grouped_mm(
                dout, b, offsets, "nn" if kind == "nt" else "nt", ctx.backend_name
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            if kind == "tn":
                db = grouped_mm(a, dout, offsets, "nn", ctx.backend_name)
            else:
                left, right = (dout, a) if kind == "nt" else (a, dout)
                db = grouped_mm(left, right, offsets, "tn", ctx.backend_name)
        return da, db, None, None, None


class _DualGroupedMM(_GroupedMM):
    """The same with a rule for tangents, which torch.compile does not take."""

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
        _GroupedMM.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx: Ctx, da: Tensor | None, db: Tensor | None, *_: None) -> Tensor | None:  # type: ignore[override]
        a, b, offsets = ctx.saved_tensors
        return total(
            None if da is None else grouped_mm(da.contiguous(), b, offsets, ctx.kind, ctx.backend_name),
            None if db is None else grouped_mm(a, db.contiguous(), offsets, ctx.kind, ctx.backend_name),
        )


def total(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def experts(x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, backend: str) -> Tensor:
    """The experts' output, differentiable in everything floating; saves nothing when no gradient can be asked for."""
    if forward_mode():
        return _expression(x, scores, plan, weights, form, backend)
    floating = (x, scores, *weights)
    if direct.transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floating)):
        return _Experts.apply(*floating, *plan, form, backend)[0]  # type: ignore[no-any-return]
    return _forward(x, scores, plan, weights, form, False, backend)[0]


def experts_eagerly(
    x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, backend: str
) -> Tensor:
    """The experts' output for tensors that nothing observes (direct.py), some of which want a gradient."""
    return _EagerExperts.apply(x, scores, *weights, (plan, weights, form, backend))  # type: ignore[no-any-return]


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, kind: str, backend: str) -> Tensor:
    """Differentiable grouped product; see :func:`moekern.grouped_mm`."""
    if forward_mode():
        return _DualGroupedMM.apply(a, b, offsets, kind, backend)  # type: ignore[no-any-return]
    if direct.transformed() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return _GroupedMM.apply(a, b, offsets, kind, backend)  # type: ignore[no-any-return]
    return ops.grouped_mm(a, b, offsets, kind, backend)  # type: ignore[no-any-return]
