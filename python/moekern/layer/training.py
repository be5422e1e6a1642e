"""The short way of a layer's eager training: router, plan and experts as one node of the autograd graph.

Taken where :mod:`moekern.layer.inference` would be, with a gradient; the layer's own way gives the same result. Each of
its dozen operators has a node of its own, which for few tokens costs several times the work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern.backends.call import Form, Weights
from moekern.functional.experts import check_experts
from moekern.layer.attributes import LayerAttributes
from moekern.layer.inference import fits, parameters_of
from moekern.layer.parameters import Experts, Router, is_ordinary, wide_linear
from moekern.routing import router
from moekern.verbs import autograd, direct, ops
from moekern.verbs.backend import resolve

_accepted = direct.Accepted()


class Latest:
    """What the router decided, to be made into tensors when somebody asks."""

    def __init__(self, logits: Tensor, kept: Tensor, program: Any, shape: tuple[int, ...]):
        """Hold the outputs of :class:`_Layer`; `shape` are the leading sizes of the layer's input."""
        self.logits, self.shape = logits, shape
        self.mask: Tensor | None = None
        self._kept, self._layout = kept, program.kept

    def counts_and_ids(self) -> tuple[Tensor, Tensor]:
        """Tokens of each expert, int32 ``[E]``, and the choice, int64 ``[T, K]``."""
        offsets = self._layout.plan(self._kept)[2]
        return offsets[1:] - offsets[:-1], self._layout.chosen(self._kept)[0].long()


def train(layer: LayerAttributes, x: Tensor) -> tuple[Tensor, Latest] | None:
    """The layer's output for ``[..., H]`` and what was decided, or None if the call must take the long way."""
    options = layer.options
    if options.training_key is None or layer._modules.get("shared_expert") is not None:
        return None
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if not (is_ordinary(layer._modules["experts"], Experts) and is_ordinary(layer._modules["gate"], Router)):
        return None
    gate, router_weight, router_bias, weights = parameters_of(layer)
    signature = direct.signature(x, router_weight, None, weights, options.activation, False, False, None)
    if signature is None:
        return None
    if gate._buffers.get("e_score_correction_bias") is not None:
        return None
    key = signature, options.training_key
    program = _accepted.get(key)
    if program is None:
        program = _prepare(layer, x) or False
        _accepted.remember(key, program)
    if program is False or router_weight.is_neg() or not program.accepts(x, router_weight, weights):
        return None
    if router_bias is not None and not fits(router_bias, router_weight):
        return None
    if not any(t is not None and t.requires_grad for t in (x, router_weight, router_bias, *weights)):
        return None
    method = (options.routing, options.norm_topk_prob, options.routed_scaling_factor)
    out, logits, kept = _Layer.apply(x, router_weight, router_bias, *weights, program, method)
    return out, Latest(logits, kept, program, x.shape[:-1])


def _prepare(layer: LayerAttributes, x: Tensor) -> Any:
    """The program for calls like this one; None if there is none, or if the call is one that is refused."""
    gate, weights, options = layer.gate, layer.experts.projections, layer.options
    weight = gate.weight
    if x.ndim < 1 or x.shape[-1] != options.hidden_size or x.dtype != weight.dtype or x.device != weight.device:
        return None
    tokens = x.detach().view(-1, options.hidden_size)
    try:
        check_experts(tokens, weights, options.activation, False, False)
        module = ops.backend_module(resolve(x.device.type))
    except (TypeError, ValueError):
        return None
    if not hasattr(module, "prepare_training") or weight.shape != (weights.w_gate_up.shape[0], x.shape[-1]):
        return None
    formula = (router.METHODS[options.routing], options.norm_topk_prob, options.routed_scaling_factor)
    form = Form(options.activation, False, False, options.top_k)
    return module.prepare_training(tokens, weight, weights, form, formula)


class _Layer(torch.autograd.Function):
    """Arguments: x, the router's weight and bias, *weights of the experts, program, method.

    `method` are arguments of the router's `weights_of`.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        *inputs, ctx.program, ctx.method = args
        x, router_weight, router_bias, *weights = inputs
        out, logits, kept, pre = ctx.program.forward(x, router_weight, router_bias, Weights(*weights))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(*inputs, logits, kept, pre)
        return out, logits, kept

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlogits: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if dout is None and dlogits is None:
            return (None,) * len(ctx.needs_input_grad)
        *inputs, logits, kept, pre = ctx.saved_tensors
        x, router_weight, router_bias, *weights = inputs
        if torch.is_grad_enabled() or not (direct.undisturbed() and direct.plain(dout, dlogits, *inputs)):
            grads = _gradients_again(ctx, dout, dlogits, inputs, kept)
        else:
            needs = ctx.needs_input_grad[: len(inputs)]
            grads = ctx.program.backward(
                dout, dlogits, x, router_weight, router_bias, Weights(*weights), logits, kept, pre, needs
            )
        return (*grads, None, None)


def _gradients_again(
    ctx: Any, dout: Tensor | None, dlogits: Tensor | None, inputs: list[Any], kept: Tensor
) -> list[Tensor | None]:
    """The same by operators, which differentiate again and are seen by whoever observes the backward pass."""
    again = torch.is_grad_enabled()
    if not again:
        inputs = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
    layout = ctx.program.kept
    with torch.enable_grad():
        x, router_weight, router_bias, *weights = inputs
        tokens = x.reshape(-1, x.shape[-1])
        logits = wide_linear(tokens, router_weight)
        if router_bias is not None:
            logits = logits + router_bias.float()
        scores = router.weights_of(logits, layout.chosen(kept)[0].long(), *ctx.method)
        backend = x.device.type  # that of the program, whatever is asked for by now
        out = autograd.experts(tokens, scores, layout.plan(kept), Weights(*weights), ctx.program.form, backend)
        pairs = [(out, None if dout is None else dout.reshape(out.shape)), (logits, dlogits)]
        outputs, upstream = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[: len(inputs)]) if need]
        found = torch.autograd.grad(
            outputs, [inputs[i] for i in wanted], upstream, create_graph=again, allow_unused=True
        )
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        grads[i] = gradient
    return grads
