"""The verbs of the CUDA backend: each call goes to the Hopper kernels or to plain torch.

The verbs and their arguments are those of :mod:`moekern.backends.reference`. No verb synchronises on the Hopper path,
and the stream is torch's current one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekern.backends.call import Form, PlanTensors, Weights, sizes_of
from moekern.backends.cuda import torch_path
from moekern.backends.cuda.configuration import Configuration, choose
from moekern.backends.cuda.launch.device import on_device
from moekern.backends.cuda.torch_path import warn_once

if TYPE_CHECKING:
    from moekern.backends.cuda.passes import training

# A limit of the elements of x and of the output's gradient: 32 bits address their rows in units of 16 bytes.
GATHERED_ELEMENTS = 1 << 35

_HALF = (torch.bfloat16, torch.float16)
_choose = lru_cache(maxsize=1024)(choose)  # every number of tokens is a key


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _aligned(*tensors: Tensor) -> bool:
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % torch_path.ALIGNMENT == 0


def _copied(tensor: Tensor) -> Tensor:
    """Activations that kernels can read: a view of foreign memory may begin anywhere, and is then copied."""
    return tensor if tensor.data_ptr() % torch_path.ALIGNMENT == 0 else tensor.clone()


def _gathers(x: Tensor) -> bool:
    fits = x.numel() < GATHERED_ELEMENTS
    if not fits:
        warn_once(f"the Hopper kernels need fewer than 2^35 elements of x, not {x.numel()}")
    return fits


def _configuration(tensor: Tensor, slots: int, experts: int, hidden: int, inter: int, aligned: bool) -> Configuration:
    found = _choose(tensor.dtype, _capability(tensor.get_device()), slots, experts, hidden, inter, aligned)
    if found.path == "torch":
        warn_once(found.reason)
    return found


def _of_program(x: Tensor, weights: Weights, form: Form) -> Configuration | None:
    """The configuration of a program for calls like this one; None if torch serves them."""
    experts, hidden, inter, _ = sizes_of(weights, form)
    slots = x.shape[0] * form.top_k
    found = _choose(x.dtype, _capability(x.get_device()), slots, experts, hidden, inter, True)
    return None if found.path == "torch" or slots == 0 else found


def get_ready(device: int) -> None:
    """Import the modules that the first call on a device needs, mainly CuPy, which takes a tenth of a second."""
    if _capability(device) == (9, 0):
        from moekern.backends.cuda.build import loader
        from moekern.backends.cuda.passes import inference, training  # noqa: F401

        loader.get_ready()


def plan(topk_ids: Tensor, num_experts: int) -> PlanTensors:
    """Sort the slots by expert: two launches, no synchronisation, bitwise the host planner's result."""
    configuration = _choose(torch.bfloat16, _capability(topk_ids.get_device()), 0, num_experts, 8, 8, True)
    if topk_ids.numel() == 0 or configuration.path == "torch":
        return torch_path.plan(topk_ids, num_experts)
    from moekern.backends.cuda.passes import forward

    return forward.plan(topk_ids.contiguous(), num_experts)


@cache
def _host_planner() -> Callable[[Tensor, int], PlanTensors]:
    from moekern.backends.cuda.passes import host_plan

    return host_plan.plan


def plan_on_host(topk_ids: Tensor, num_experts: int) -> PlanTensors:
    """The same plan, sorted by Rust on the host: waits for the device once."""
    if topk_ids.numel() and _capability(topk_ids.get_device()) == (9, 0):
        return _host_planner()(topk_ids.contiguous(), num_experts)
    from moekern.backends import cpu

    return PlanTensors(*(_send(t, topk_ids.device) for t in cpu.plan(topk_ids.cpu(), num_experts)))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """An asynchronous copy of a host tensor to a device: later work on the stream finds it complete."""
    return tensor.pin_memory().to(device, non_blocking=True)


def experts_forward(
    x: Tensor, scores: Tensor | None, plan: PlanTensors, weights: Weights, form: Form, save: bool
) -> tuple[Tensor, Tensor]:
    """Run every token through its experts: up projection with gather and activation, down projection, combine."""
    slots, (experts, hidden, inter, _) = plan.order.shape[0], sizes_of(weights, form)
    x = _copied(x)
    aligned = _aligned(weights.w_gate_up, weights.w_down)
    configuration = _configuration(x, slots, experts, hidden, inter, aligned)
    gathers = _gathers(x)
    if configuration.path == "torch" or not (slots and hidden and inter and gathers):
        return torch_path.experts_forward(x, scores, plan, weights, form, save)
    from moekern.backends.cuda.passes import forward

    return forward.experts_forward(x, scores, plan, weights, form, save, configuration)


def prepare_inference(
    x: Tensor,
    routed_by: Tensor,
    topk_weights: Tensor | None,
    weights: Weights,
    form: Form,
    formula: tuple[str, bool, float] | None = None,
    makes_logits: bool = False,
) -> Callable[..., Tensor | None] | None:
    """A function of the tensors that plans and runs the forward pass at once; None if torch serves the call.

    `routed_by` are the chosen experts; or the router's logits, with the formula, ``norm_topk_prob`` and factor of
    :func:`moekern.route`; or with these and `makes_logits` the router's weight, see :func:`makes_logits`.
    """
    configuration = _of_program(x, weights, form)
    if configuration is None:
        return None
    from moekern.backends.cuda.kernels import router
    from moekern.backends.cuda.passes import inference

    if formula is not None and form.top_k > router.MOST_TOP_K:
        return None
    how = None if formula is None else router.formula(*formula)
    return inference.make(x, routed_by, topk_weights, weights, form, how, configuration, makes_logits)


def prepare_training(
    x: Tensor, router_weight: Tensor, weights: Weights, form: Form, formula: tuple[str, bool, float]
) -> training.Layer | None:
    """Forward and backward of a whole layer with its router; None if torch serves the call or a part of it."""
    configuration = _of_program(x, weights, form)
    if configuration is None or x.numel() >= GATHERED_ELEMENTS:
        return None
    from moekern.backends.cuda.kernels import router
    from moekern.backends.cuda.passes import training

    if form.top_k > router.MOST_TOP_K:
        return None
    return training.Layer(x, router_weight, weights, form, router.formula(*formula), configuration, experts_backward)


def makes_logits(x: Tensor, weight: Tensor) -> bool:
    """Whether moekern's own kernel serves the router's product ``x @ weight.T`` of half-precision tensors."""
    fits = x.ndim == 2 and weight.ndim == 2 and x.shape[1] == weight.shape[1] and x.device == weight.device
    if not fits or x.dtype not in _HALF or x.dtype != weight.dtype or _capability(x.get_device()) != (9, 0):
        return False
    from moekern.backends.cuda.kernels import router

    return router.makes_logits(x.shape[0], weight.shape[0], x.shape[1])


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32, of plain half-precision tensors; torch raises if shapes do not fit."""
    if makes_logits(x, weight) and weight.is_contiguous() and _aligned(weight):
        from moekern.backends.cuda.kernels import router

        x = _copied(x.contiguous())
        out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
        with on_device(x.get_device()):
            router.logits(x, weight, None, out)
        return out
    return torch.mm(x, weight.mT, out_dtype=torch.float32)


def experts_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    scores: Tensor | None,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scores, w_gate_up, w_down, b_gate_up, b_down; empty where ``needs`` is false."""
    slots, (experts, hidden, inter, _) = plan.order.shape[0], sizes_of(weights, form)
    dout, x = _copied(dout), _copied(x)
    if weights.b_down is not None:
        weights = weights._replace(b_down=_copied(weights.b_down))  # dS reads it in vectors
    aligned = _aligned(pre, weights.w_gate_up, weights.w_down)
    configuration = _configuration(x, slots, experts, hidden, inter, aligned)
    gathers = _gathers(x)
    if configuration.path == "torch" or not (slots and hidden and inter and gathers):
        return torch_path.experts_backward(dout, x, pre, scores, plan, weights, form, needs)
    from moekern.backends.cuda.passes import backward

    with torch.cuda.device(x.device):
        return backward.experts_backward(dout, x, pre, scores, plan, weights, form, needs, configuration)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, kind: str) -> Tensor:
    """Multiply each expert's rows by its matrix; see :func:`moekern.backends.reference.grouped_mm`."""
    features = b.shape[1 if kind in ("nt", "tn") else 2]
    experts = offsets.shape[0] - 1
    a = _copied(a)
    configuration = _configuration(a, a.shape[0], experts, a.shape[1], features, _aligned(b))
    if configuration.path == "torch":
        return torch_path.grouped_mm(a, b, offsets, kind)
    from moekern.backends.cuda.kernels import gradients, grouped
    from moekern.backends.cuda.kernels.tables import Tables

    if kind == "tn":
        out = a.new_empty((experts, a.shape[1], features))
        if a.shape[0] == 0:
            return out.zero_()
        if out.numel():
            with torch.cuda.device(a.device):
                tables = Tables(offsets, a.shape[0])
                gradients.wgrad(a, b, None, offsets, tables, out, False, stages=configuration.wgrad_stages)
        return out
    out = a.new_zeros((a.shape[0], features))  # rows past the last expert's stay zero
    if out.numel() and a.shape[1]:
        with torch.cuda.device(a.device):
            tables = Tables(offsets, a.shape[0])
            grouped.grouped_product(a, b, None, out, tables, kind == "nn", configuration)
    return out


def _mover(rows: Tensor) -> ModuleType:
    """Whether kernels or torch move these rows; torch after a warning that says why."""
    if rows.dtype == torch.float64:
        warn_once("the kernels of permute and combine move float32, bfloat16 and float16, not float64")
        return torch_path
    capability = _capability(rows.get_device())
    if capability != (9, 0):
        warn_once(f"kernels exist for compute capability 9.0 (Hopper), this GPU has {capability[0]}.{capability[1]}")
        return torch_path
    from moekern.backends.cuda.passes import permute

    return permute


def permute(x: Tensor, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """Copy each token to its rows; see :func:`moekern.backends.reference.permute`."""
    return _mover(x).permute(x, plan, top_k)


def combine(y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """Sum each token's rows, weighted; see :func:`moekern.backends.reference.combine`."""
    return _mover(y).combine(y, weights, plan, top_k)


def combine_backward(
    dout: Tensor, y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights; see :func:`moekern.backends.reference.combine_backward`."""
    return _mover(y).combine_backward(dout, y, weights, plan, top_k, needs)
