"""A layer from a dense MLP: :meth:`moekern.MoE.from_dense`, over the tensor functions of upcycling.py."""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moekern.backends.activations import ACTIVATIONS
from moekern.layer.attributes import LayerAttributes
from moekern.layer.dense import Dense, read_dense
from moekern.layer.dense_check import has_values
from moekern.layer.fused_shared import join
from moekern.layer.options import obstacle_to_copies
from moekern.layer.upcycling import (
    Init,
    Shared,
    Split,
    dropped_neurons,
    generator_for,
    noised,
    parse_init,
    redrawn,
    rounds,
    router_rows,
    scaled,
    shard,
    shared_part,
    split,
)
from moekern.verbs import checks
from moekern.verbs.backend import backend

Layer = TypeVar("Layer", bound=LayerAttributes)


def build(
    cls: type[Layer],
    dense_mlp: nn.Module,
    num_experts: int,
    top_k: int,
    granularity: int,
    shared: Shared,
    init: str,
    expert_width: int | None,
    router_std: float,
    activation: str | None,
    options: dict[str, Any],
) -> Layer:
    """See :meth:`moekern.MoE.from_dense`."""
    checks.is_int("num_experts", num_experts, 1)
    checks.is_int("top_k", top_k, 1, num_experts, f"num_experts is {num_experts}")
    checks.is_number("router_std", router_std, low=0)
    initial = parse_init(init)
    if options.get("shared_intermediate_size") is not None:
        raise ValueError(
            f"shared_intermediate_size: got {options['shared_intermediate_size']!r}, expected shared=, a number of the "
            "dense MLP's neurons or 'whole': the layer must add up to the dense output"
        )
    obstacle = obstacle_to_copies(options)
    if obstacle is not None and shared != "whole":
        raise ValueError(f"{obstacle}: the copies must average to the dense output (shared='whole' starts from it)")
    dense = read_dense(dense_mlp, activation)
    parts = split(
        dense.down.shape[1], num_experts, top_k, granularity, shared, expert_width, sums_to_one=obstacle is None
    )
    _check_fit(dense, parts, options)
    layer = cls(
        dense.down.shape[0],
        parts.expert_width,
        num_experts,
        top_k,
        activation=dense.activation,
        bias=dense.gate_up_bias is not None or dense.down_bias is not None,
        shared_intermediate_size=parts.shared_width or None,
        **{"device": dense.down.device, "dtype": dense.down.dtype, **options},
    )
    factor = options.get("routed_scaling_factor", 1.0)
    _tell_of_rounding(layer, parts, factor)
    with torch.no_grad():
        _fill_experts(layer, dense, parts, initial, factor)
        _fill_shared(layer, dense, parts)
        rows = router_rows(num_experts, layer.hidden_size, granularity, router_std, dtype=layer.gate.weight.dtype)
        layer.gate.weight.copy_(rows)
    if not initial.is_exact and parts.scale and has_values(layer.experts.down_proj):
        change = _change(layer.eval(), dense)
        warnings.warn(
            f"moekern: init={init!r} does not keep the dense MLP's function: its outputs change by {change:.2g} "
            "relative on random rows",
            stacklevel=3,
        )
    layer.train(dense_mlp.training)
    return layer


def _check_fit(dense: Dense, parts: Split, options: dict[str, Any]) -> None:
    """Raise ValueError for a dense MLP that the parts of the layer cannot hold."""
    checks.is_number("routed_scaling_factor", options.get("routed_scaling_factor", 1.0), above=0)
    if parts.shared_width and dense.gate_up_bias is not None:
        raise ValueError("shared: got a dense MLP with biases on its first projections, but a shared expert has none")
    if parts.scale == 0 and dense.down_bias is not None:
        raise ValueError(
            "shared: got a dense MLP with a bias on its output, but a shared expert has none; expected router weights "
            "that sum to one, so that the routed experts can hold it"
        )
    groups = options.get("n_group", 1)
    if isinstance(groups, int) and groups > 1 and parts.num_experts // groups % parts.granularity:
        raise ValueError(
            f"n_group: got {groups}, whose groups of {parts.num_experts // groups} experts cut a replica of "
            f"{parts.granularity} shards; expected groups of a multiple of it"
        )


def _tell_of_rounding(layer: LayerAttributes, parts: Split, factor: float) -> None:
    dtype = layer.experts.down_proj.dtype
    if rounds(parts.scale / factor, dtype):
        warnings.warn(
            f"moekern: multiplying down_proj by {parts.scale / factor:g} rounds it, by up to "
            f"{torch.finfo(dtype).eps / 2:.1g} relative; routed_scaling_factor={parts.scale:g} leaves the weights "
            "alone",
            stacklevel=4,
        )


def _fill_experts(layer: LayerAttributes, dense: Dense, parts: Split, init: Init, factor: float) -> None:
    """Write the routed experts; `factor` already multiplies the router's weights."""
    experts, count = layer.experts, parts.num_experts
    dtype = torch.promote_types(dense.down.dtype, experts.down_proj.dtype)  # one rounding, at the end
    ups, up_biases = _halves(dense)
    seed = 0 if init.is_exact else int(torch.randint(2**62, (), device="cpu"))
    # Copies are computed once, for all replicas.
    targets = [slice(g, count, parts.granularity) for g in range(parts.granularity)]
    if not init.is_exact:
        targets = [slice(e, e + 1) for e in range(count)]
    for target in targets:
        e, n = target.start, parts.expert_width
        matrices = [(f"up{i}", shard(up, parts, e, 0).to(dtype), 0) for i, up in enumerate(ups)]
        matrices.append(("down", shard(dense.down, parts, e, 1).to(dtype), 1))
        *gate_up, down = _drawn(matrices, init, seed, e)
        for i, part in enumerate(gate_up):
            experts.gate_up_proj[target, i * n : (i + 1) * n].copy_(part)
        experts.down_proj[target].copy_(scaled(down, parts.scale / factor))
        if experts.gate_up_proj_bias is not None:
            for i, bias in enumerate(up_biases):
                experts.gate_up_proj_bias[target, i * n : (i + 1) * n].copy_(shard(bias, parts, e, 0))
    if experts.down_proj_bias is not None:
        if dense.down_bias is None:
            experts.down_proj_bias.zero_()
        else:
            experts.down_proj_bias.copy_(scaled(dense.down_bias.to(dtype), 1 / factor))


def _halves(dense: Dense) -> tuple[list[Tensor], list[Tensor]]:
    """Gate and up, or up alone, and their biases, zeros if there are none."""
    count = 2 if ACTIVATIONS[dense.activation].gated else 1
    bias = dense.gate_up.new_zeros(len(dense.gate_up)) if dense.gate_up_bias is None else dense.gate_up_bias
    return list(dense.gate_up.chunk(count)), list(bias.chunk(count))


def _drawn(matrices: list[tuple[str, Tensor, int]], init: Init, seed: int, expert: int) -> list[Tensor]:
    """One expert's matrices after the initialisation; each has its own random numbers."""
    if init.is_exact:
        return [matrix for _, matrix, _ in matrices]
    if init.kind == "noise":
        return [noised(matrix, init.amount, generator_for(seed, expert, name)) for name, matrix, _ in matrices]
    width = matrices[-1][1].shape[1]
    neurons = dropped_neurons(width, init.amount, generator_for(seed, expert))
    return [redrawn(matrix, neurons, dim, generator_for(seed, expert, name)) for name, matrix, dim in matrices]


def _fill_shared(layer: LayerAttributes, dense: Dense, parts: Split) -> None:
    """Write the shared expert, separate or fused with the routed ones, and a gate of zeros, which gives 1/2."""
    if not parts.shared_width:
        return
    factor = parts.shared_scale
    if layer.shared_expert_gate is not None:
        layer.shared_expert_gate.weight.zero_()
        factor *= 2
    ups = [shared_part(up, parts, 0) for up in _halves(dense)[0]]
    down = shared_part(dense.down, parts, 1)
    down = scaled(down.to(torch.promote_types(down.dtype, layer.experts.down_proj.dtype)), factor)
    if layer.shared_expert is not None:
        shared = layer.shared_expert
        targets = [shared.up_proj] if shared.gate_proj is None else [shared.gate_proj, shared.up_proj]
        for linear, value in zip((*targets, shared.down_proj), (*ups, down), strict=True):
            linear.weight.copy_(value)
        return
    count, routed = layer.num_fused_experts, layer.num_experts
    for name, matrix, values in (
        ("gate_up_proj", layer.experts.gate_up_proj, ups),
        ("down_proj", layer.experts.down_proj, [down]),
    ):
        pieces = dict(enumerate((values[0].new_empty((0, *matrix.shape[1:])), *values)))
        matrix[routed:].copy_(join(name, {str(i): piece for i, piece in pieces.items()}, count))


def _change(layer: LayerAttributes, dense: Dense) -> float:
    """The relative change of the output against the dense MLP's, on rows with pre-activations of order one."""
    weight = layer.experts.down_proj
    x = torch.randn(64, dense.down.shape[0], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = x.to(dense.gate_up)
    with torch.no_grad(), backend("reference"), torch.autocast(weight.device.type, enabled=False):
        pre = nn.functional.linear(x, dense.gate_up)
        rms = max(pre.float().square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)
        x = x / rms
        pre = nn.functional.linear(x, dense.gate_up, dense.gate_up_bias)
        function = ACTIVATIONS[dense.activation]
        a = function.forward(*(pre.chunk(2, -1) if function.gated else (pre, None)))
        theirs = nn.functional.linear(a, dense.down, dense.down_bias).double()
        ours = layer(x.to(weight)).to(theirs)
        size = theirs.norm().item()
        return (ours - theirs).norm().item() / size if size else math.inf
