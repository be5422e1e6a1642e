"""The differentiable verbs: what is saved, what is recomputed, and how they differentiate twice and forward.

Saved for the backward pass of the experts: x, the pre-activation, the router weights and the plan. The activation is
recomputed, the down projection's output is never needed again.

Forward-mode differentiation and second derivatives of the experts are those of :func:`_expression`: torch's own
operators around grouped products, which are bilinear. ``vmap`` runs slice by slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern.backends import reference
from moekern.backends.observers import forward_mode
from moekern.verbs import direct, ops

Ctx = Any  # torch types the context of a Function loosely


class Sliced(torch.autograd.Function):
    """A Function that ``vmap`` applies slice by slice."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:  # type: ignore[override]
        """The rule of torch.vmap."""
        return ops.slice_by_slice(cls.apply, info, in_dims, *args)


class _Experts(Sliced):
    """Arguments: x, scores, w_gate_up, w_down, b_gate_up, b_down, order, inverse, offsets, *settings, backend."""

    @staticmethod
    def forward(
        x: Tensor,
        scores: Tensor | None,
        w_gate_up: Tensor,
        w_down: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        order: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        top_k: int,
        activation: str,
        transposed: bool,
        interleaved: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return ops.experts_forward(  # type: ignore[no-any-return]
            x, scores, order, inverse, offsets, w_gate_up, w_down, b_gate_up, b_down,
            top_k, activation, transposed, interleaved, True, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:9], output[1])
        ctx.settings = inputs[9:]

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 14
        return (*_gradients(ctx, dout), *(None,) * 8)


class _EagerExperts(torch.autograd.Function):
    """The same for eager calls, in the form without ``setup_context``: that one costs 35 us more a call.

    Arguments: x, scores, w_gate_up, w_down, b_gate_up, b_down, order, inverse, offsets, settings, backend.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Ctx,
        x: Tensor,
        scores: Tensor | None,
        w_gate_up: Tensor,
        w_down: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        order: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        settings: tuple[int, str, bool, bool],
        backend: str,
    ) -> Tensor:
        out, pre = ops.backend_module(backend).experts_forward(
            x, scores, order, inverse, offsets, w_gate_up, w_down, b_gate_up, b_down, *settings, True
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scores, w_gate_up, w_down, b_gate_up, b_down, order, inverse, offsets, pre)
        ctx.settings = (*settings, backend)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Ctx, dout: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None:
            return (None,) * 11
        return (*_gradients(ctx, dout), None, None, None, None, None)


def _gradients(ctx: Ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    """The six gradients of the experts, None where not wanted."""
    *inputs, pre = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    dout = dout.contiguous()
    direct.refuse_batched_graph("experts")
    if forward_mode():
        return tuple(_gradients_of_expression(inputs, needs, dout, *ctx.settings))
    if direct.transformed() or (torch.is_grad_enabled() and not torch.compiler.is_compiling()):
        grads = _ExpertsGrad.apply(dout, *inputs, pre, needs, *ctx.settings)
    elif direct.undisturbed() and direct.plain(dout, *inputs, pre) and not direct.batched_gradients():
        (x, scores, *weights), (order, inverse, offsets) = inputs[:6], inputs[6:]
        *settings, backend = ctx.settings
        grads = ops.backend_module(backend).experts_backward(
            dout, x, pre, scores, order, inverse, offsets, *weights, *settings, needs
        )  # fmt: skip
    else:
        grads = _ExpertsGrad.forward(dout, *inputs, pre, needs, *ctx.settings)
    return tuple(g if wanted else None for g, wanted in zip(grads, needs, strict=True))


def _expression(x: Tensor, scores: Tensor | None, *others: Any) -> Tensor:
    """The experts' output by torch's own operators around grouped products: every transform has its rule for these.

    Arguments: x, scores, w_gate_up, w_down, b_gate_up, b_down, order, inverse, offsets, *settings, backend.
    """
    *weights, order, inverse, offsets, top_k, activation, transposed, interleaved, backend = others

    def multiply(a: Tensor, b: Tensor, offsets: Tensor, kind: str) -> Tensor:
        return grouped_mm(a.contiguous(), b.contiguous(), offsets, kind, backend)

    return reference.experts(
        x, scores, order, inverse, offsets, *weights, top_k, activation, transposed, interleaved, multiply
    )


def _gradients_of_expression(
    inputs: list[Tensor | None], needs: list[bool], dout: Tensor, *settings: Any
) -> list[Tensor | None]:
    """The six gradients of :func:`_expression`, itself an expression; None where not wanted."""
    wanted = [i for i in range(6) if needs[i]]

    def output(*chosen: Tensor) -> Tensor:
        args = list(inputs)
        for i, value in zip(wanted, chosen, strict=True):
            args[i] = value
        return _expression(*args, *settings)  # type: ignore[arg-type]

    found = torch.func.vjp(output, *(inputs[i] for i in wanted))[1](dout)
    grads: list[Tensor | None] = [None] * 6
    for i, gradient in zip(wanted, found, strict=True):
        grads[i] = gradient
    return grads


class _ExpertsGrad(Sliced):
    """The gradient as a function of its own, so that it can be differentiated again."""

    @staticmethod
    def forward(
        dout: Tensor,
        x: Tensor,
        scores: Tensor | None,
        w_gate_up: Tensor,
        w_down: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        order: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        pre: Tensor,
        needs: list[bool],
        *settings: Any,
    ) -> tuple[Tensor, ...]:
        top_k, activation, transposed, interleaved, backend = settings
        return ops.experts_backward(  # type: ignore[no-any-return]
            dout, x, pre, scores, order, inverse, offsets, w_gate_up, w_down, b_gate_up, b_down,
            top_k, activation, transposed, interleaved, needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10])
        ctx.needs = inputs[11]
        ctx.settings = inputs[12:]
        ctx.tail = len(inputs) - 7

    @staticmethod
    def backward(ctx: Ctx, *ggrads: Tensor | None) -> tuple[Any, ...]:
        """Differentiate :func:`_expression` twice: the gradient it gives, along ``ggrads``."""
        dout, *inputs = ctx.saved_tensors
        arguments = (dout, *inputs[:6])
        present = [i for i, t in enumerate(arguments) if t is not None]
        wanted = [ctx.needs[i] and ggrads[i] is not None for i in range(6)]
        if not any(wanted):
            return (None,) * (7 + ctx.tail)  # type: ignore[no-any-return]

        def fill(values: tuple[Tensor, ...]) -> list[Tensor | None]:
            filled: list[Tensor | None] = [None] * 7
            for i, value in zip(present, values, strict=True):
                filled[i] = value
            return filled

        def gradient(*values: Tensor) -> tuple[Tensor | None, ...]:
            upstream, *leaves = fill(values)
            assert upstream is not None
            grads = _gradients_of_expression([*leaves, *inputs[6:]], wanted, upstream, *ctx.settings)
            return tuple(g for g in grads if g is not None)

        pullback = torch.func.vjp(gradient, *(arguments[i] for i in present))[1]
        second = pullback(tuple(g for g, want in zip(ggrads, wanted, strict=True) if want))
        return (*fill(second), *(None,) * ctx.tail)


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


def experts(
    x: Tensor,
    scores: Tensor | None,
    plan: tuple[Tensor, Tensor, Tensor],
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    settings: tuple[int, str, bool, bool],
    backend: str,
) -> Tensor:
    """The experts' output, differentiable in everything floating; saves nothing when no gradient can be asked for."""
    floating = (x, scores, w_gate_up, w_down, b_gate_up, b_down)
    if forward_mode():
        return _expression(*floating, *plan, *settings, backend)  # type: ignore[arg-type]
    if direct.transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floating)):
        return _Experts.apply(*floating, *plan, *settings, backend)[0]  # type: ignore[no-any-return]
    out, _ = ops.experts_forward(x, scores, *plan, w_gate_up, w_down, b_gate_up, b_down, *settings, False, backend)
    return out  # type: ignore[no-any-return]


def experts_eagerly(*arguments: Any) -> Tensor:
    """The experts' output for tensors that nothing observes (direct.py), some of which want a gradient.

    Arguments: x, scores, w_gate_up, w_down, b_gate_up, b_down, order, inverse, offsets, settings, backend.
    """
    return _EagerExperts.apply(*arguments)  # type: ignore[no-any-return]


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, kind: str, backend: str) -> Tensor:
    """Differentiable grouped product; see :func:`moekern.grouped_mm`."""
    if forward_mode():
        return _DualGroupedMM.apply(a, b, offsets, kind, backend)  # type: ignore[no-any-return]
    if direct.transformed() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return _GroupedMM.apply(a, b, offsets, kind, backend)  # type: ignore[no-any-return]
    return ops.grouped_mm(a, b, offsets, kind, backend)  # type: ignore[no-any-return]
