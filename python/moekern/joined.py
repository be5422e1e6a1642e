"""A shared expert fused with the routed ones: its weights lie behind theirs, as experts that every token chooses.

A gated MLP n times as wide as an expert is the sum of n experts. State dicts keep the names and shapes of a layer with
the shared expert beside, so that checkpoints serve both: the parameters are split when a state dict is made, and joined
when one is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekern.activations import ACTIVATIONS

if TYPE_CHECKING:
    from moekern.layer import MoE

_MATRICES = ("gate_up_proj", "down_proj")


def chosen_by_all(
    ids: Tensor, weights: Tensor, experts: range, gate: Tensor | None, extra_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """A choice of routed experts, with those that every token chooses appended.

    Args:
        ids, weights: ``[T + extra_rows, K]``; the extra rows are those that rounding adds behind the tokens.
        experts: The experts appended.
        gate: ``[T, 1]``, their weight before the sigmoid; None for weight one.
        extra_rows: Their places become sentinels.

    Returns:
        Ids and weights ``[T + extra_rows, K + len(experts)]``.
    """
    shape = (ids.shape[0] - extra_rows, len(experts))
    always = torch.arange(experts.start, experts.stop, dtype=ids.dtype, device=ids.device).expand(shape)
    if gate is None:
        factor = weights.new_ones(shape)
    else:
        factor = torch.sigmoid(gate.to(weights.dtype)).expand(shape)
    if extra_rows:
        always = torch.nn.functional.pad(always, (0, 0, 0, extra_rows), value=-1)
        factor = torch.nn.functional.pad(factor, (0, 0, 0, extra_rows))
    return torch.cat((ids, always), dim=1), torch.cat((weights, factor), dim=1)


def split(matrix: str, joined: Tensor, num_experts: int, gated: bool) -> dict[str, Tensor]:
    """A joined parameter as entries of a state dict: a view of the routed experts, and copies of the shared one's.

    Copies, because most of them are no views, and safetensors refuses tensors that share memory.
    """
    parts = {f"experts.{matrix}": joined[:num_experts]}
    shared = joined[num_experts:]
    if matrix == "down_proj":
        blocks = {"down_proj": shared.transpose(0, 1)}  # [H, n, I]
    else:
        names = ("gate_proj", "up_proj") if gated else ("up_proj",)
        blocks = dict(zip(names, shared.chunk(len(names), dim=1), strict=True))  # [n, I, H] each
    for name, block in blocks.items():
        whole = block.clone(memory_format=torch.contiguous_format)
        parts[f"shared_expert.{name}.weight"] = whole.flatten(1) if matrix == "down_proj" else whole.flatten(0, 1)
    return parts


def join(matrix: str, parts: dict[str, Tensor], count: int) -> Tensor:
    """The inverse of :func:`split` for `count` experts behind the routed ones."""
    routed, *shared = parts.values()
    if matrix == "down_proj":
        behind = shared[0].unflatten(1, (count, -1)).transpose(0, 1)
    else:
        behind = torch.cat([part.unflatten(0, (count, -1)) for part in shared], dim=1)
    return torch.cat((routed, behind))


def write_apart(layer: MoE, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook on a state dict: the names of a layer that is not fused. Parameters spread over ranks stay joined."""
    keys = [f"{prefix}experts.{matrix}" for matrix in _MATRICES]
    if not all(key in state and not _is_spread(state[key]) for key in keys):
        return
    last = f"{prefix}shared_expert_gate.weight"
    gate = {last: state.pop(last)} if last in state else {}
    for matrix, key in zip(_MATRICES, keys, strict=True):
        for name, part in split(matrix, state[key], layer.num_experts, _is_gated(layer)).items():
            state[prefix + name] = part
    state.update(gate)


def read_apart(
    layer: MoE,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Hook before loading: joins what :func:`write_apart` took apart, and leaves what is joined already."""
    own = {matrix: layer.experts._parameters.get(matrix) for matrix in _MATRICES}
    names = [f"{prefix}shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")]
    joined_rows = layer.num_experts + layer.num_fused_experts
    if not any(name in state for name in names) and any(
        _rows(state.get(f"{prefix}experts.{matrix}")) == joined_rows for matrix in _MATRICES
    ):
        return
    for matrix, parameter in own.items():
        if parameter is None:  # under a parametrization: such a layer's state dict is not split either
            continue
        if _is_spread(parameter):
            errors.append(
                f"{prefix}experts.{matrix}: got a state dict with the shared expert apart, expected one of "
                "a layer like this, whose fused weights are DTensors: load before sharding"
            )
            state.update({f"{prefix}experts.{name}": value for name, value in own.items()})  # no further complaint
            for name in names:
                state.pop(name, None)
            return
        _read_matrix(layer, matrix, parameter, state, prefix, local_metadata, strict, missing, errors)


def _read_matrix(
    layer: MoE,
    matrix: str,
    parameter: Tensor,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    errors: list[str],
) -> None:
    """Put the joined matrix into the state dict, or say in torch's words what is missing or does not fit.

    A part that is missing keeps its values. The parameter itself in its place makes torch leave it as it is.
    """
    key = f"{prefix}experts.{matrix}"
    parts = split(matrix, parameter.detach(), layer.num_experts, _is_gated(layer))
    given = {name: state.pop(prefix + name) for name in parts if prefix + name in state}
    if strict and given:
        missing.extend(prefix + name for name in parts if name not in given)
    elif strict:
        missing.extend(prefix + name for name in parts if prefix + name != key)  # torch reports that one
    if not given:
        return
    state[key] = parameter
    wrong = []
    for name, value in given.items():
        if not torch.overrides.is_tensor_like(value):
            wrong.append(
                f'While copying the parameter named "{prefix}{name}", expected torch.Tensor, got {type(value)}'
            )
        elif value.shape != parts[name].shape:
            wrong.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {value.shape} from checkpoint, "
                f"the shape in current model is {parts[name].shape}."
            )
        else:
            parts[name] = value.detach()
    errors.extend(wrong)
    if wrong:
        return
    assigned = local_metadata.get("assign_to_params_buffers", False)
    if len({(part.device, part.dtype) for part in parts.values()}) > 1:
        if assigned:
            found = ", ".join(f"{prefix}{name} {part.dtype} on {part.device}" for name, part in parts.items())
            errors.append(f"{key}: got {found}, expected one dtype and device: assign=True joins them to one parameter")
            return
        parts = {name: part.to(parameter.device) for name, part in parts.items()}
    state[key] = join(matrix, parts, layer.num_fused_experts)


def _rows(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim == 3 else None


def _is_spread(value: Any) -> bool:
    return hasattr(value, "to_local")


def _is_gated(layer: MoE) -> bool:
    return ACTIVATIONS[layer.activation].gated
