"""A shared expert fused with the routed ones: its weights follow theirs, as experts that every token chooses.

A gated MLP n times as wide as an expert is the sum of n experts. State dicts keep the names and shapes of a layer with
a separate shared expert, so that checkpoints serve both: the parameters are split when a state dict is made, and joined
when one is loaded.

transformers and accelerate fill a model without values (meta device) by the names of its state dict, and call no hooks
of torch. So making the state dict of a layer without values takes the layer apart: it becomes one that is not fused,
with a module under every name. Once it has values it is joined again, before anything sees its parameters: by
``train()`` and ``eval()``, with which ``from_pretrained`` ends, by any function that lists or moves parameters, and by
``load_state_dict``. A layer that cannot be joined, because its parts are wrapped by then, stays apart and computes the
same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekern.backends.activations import ACTIVATIONS
from moekern.layer.attributes import LayerAttributes
from moekern.layer.parameters import Experts, SharedExpert, is_ordinary
from moekern.verbs import direct

_MATRICES = ("gate_up_proj", "down_proj")


def chosen_by_all(
    ids: Tensor, weights: Tensor, experts: range, gate: Tensor | None, extra_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """A choice of routed experts, followed by the experts that every token chooses.

    Args:
        ids, weights: ``[T + extra_rows, K]``; the extra rows are those that rounding adds after the tokens.
        experts: The experts to append.
        gate: ``[T, 1]``, their weight before the sigmoid; None for weight one.
        extra_rows: Number of the extra rows, whose places become sentinels.

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

    Copies, because most of them cannot be views, and safetensors refuses tensors that share memory.
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
    """The inverse of :func:`split`, for `count` experts after the routed ones."""
    routed, *shared = parts.values()
    if matrix == "down_proj":
        behind = shared[0].unflatten(1, (count, -1)).transpose(0, 1)
    else:
        behind = torch.cat([part.unflatten(0, (count, -1)) for part in shared], dim=1)
    return torch.cat((routed, behind))


def take_apart(layer: LayerAttributes) -> None:
    """Turn a fused layer into the same layer with a separate shared expert."""
    experts, count = layer.experts, layer.num_fused_experts
    weight = experts.gate_up_proj
    size = count * layer.intermediate_size
    shared = SharedExpert(layer.hidden_size, size, layer.activation, device="meta", dtype=weight.dtype)
    for matrix in _MATRICES:
        whole = experts._parameters[matrix]
        assert whole is not None
        for name, part in split(matrix, whole.detach(), layer.num_experts, _is_gated(layer)).items():
            owner, _, last = name.removeprefix("shared_expert.").removeprefix("experts.").rpartition(".")
            _put(shared.get_submodule(owner) if owner else experts, last, part, [whole])
    experts.fused = layer.num_fused_experts = 0
    layer.num_apart_experts = count
    gate = layer.shared_expert_gate
    if gate is not None:
        del layer.shared_expert_gate
    layer.shared_expert = shared.train(layer.training)
    layer.shared_expert_gate = gate  # after the shared expert, as in a layer that is not fused


def put_together(layer: LayerAttributes, without_values: bool = True, partly_loaded: bool = True) -> None:
    """The inverse of :func:`take_apart`, where nothing wraps the parts and all are of one kind.

    Args:
        layer: One that may be apart.
        without_values: Also on the meta device, where values may still arrive under the names of the parts.
        partly_loaded: Also if transformers has loaded some of the parts and has still to draw the others.
    """
    experts, shared, count = layer.experts, layer.shared_expert, layer.num_apart_experts
    if not count or shared is None or not is_ordinary(experts, Experts) or not is_ordinary(shared, SharedExpert):
        return
    linears = {name: child for name, child in shared.named_children() if is_ordinary(child, nn.Linear)}
    expected = {"gate_proj", "up_proj", "down_proj"} if _is_gated(layer) else {"up_proj", "down_proj"}
    if linears.keys() != expected:
        return
    parts: dict[str, dict[str, Any]] = {
        matrix: {
            "experts": experts._parameters.get(matrix),
            **{
                name: linear._parameters.get("weight")
                for name, linear in linears.items()
                if (name == "down_proj") == is_down
            },
        }
        for matrix, is_down in zip(_MATRICES, (False, True), strict=True)
    }
    every = [part for group in parts.values() for part in group.values()]
    if not all(type(part) in direct.PLAIN for part in every):
        return
    if len({(part.device, part.dtype) for part in every}) > 1:
        return
    if every[0].is_meta and not without_values:
        return
    if not partly_loaded and len({_is_loaded(part) for part in every}) > 1:
        return
    if any(len({part.requires_grad for part in group.values()}) > 1 for group in parts.values()):
        return
    del layer.shared_expert  # from the layer's modules
    layer.shared_expert = None
    experts.fused = layer.num_fused_experts = count
    layer.num_apart_experts = 0
    for matrix, group in parts.items():
        values = {name: part.detach() for name, part in group.items()}
        _put(experts, matrix, join(matrix, values, count), list(group.values()))


def _put(module: nn.Module, name: str, value: Tensor, sources: list[Tensor]) -> None:
    """Make a value a parameter; if it was made from parameters, it is trained and marked as they are."""
    parameter = nn.Parameter(value, requires_grad=sources[0].requires_grad)
    if all(map(_is_loaded, sources)):  # transformers draws the others again
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    setattr(module, name, parameter)


def _is_loaded(parameter: Tensor) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


class _Joined(Mapping[str, Tensor]):
    """The experts' matrices, joined on demand from a mapping with the contents of a state dict."""

    def __init__(self, entries: Mapping[str, Tensor], prefix: str, layer: LayerAttributes) -> None:
        self.entries, self.prefix, self.count = entries, prefix, layer.num_fused_experts
        self.names = {
            matrix: list(split(matrix, parameter.detach().to("meta"), layer.num_experts, _is_gated(layer)))
            for matrix in _MATRICES
            if (parameter := layer.experts._parameters.get(matrix)) is not None
        }

    def __getitem__(self, matrix: str) -> Tensor:
        return join(matrix, {name: self.entries[self.prefix + name] for name in self.names[matrix]}, self.count)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def join_offloaded(layer: LayerAttributes) -> None:
    """Let accelerate's hook on a fused layer's experts load joined matrices: it keeps the entries of the state dict."""
    hook = layer.experts.__dict__.get("_hf_hook")
    if hook is None:
        return
    for one in getattr(hook, "hooks", (hook,)):
        offloaded = getattr(one, "weights_map", None)
        entries, prefix = getattr(offloaded, "dataset", None), getattr(offloaded, "prefix", "")
        before = prefix.removesuffix("experts.")
        if isinstance(entries, Mapping) and before != prefix and f"{before}shared_expert.up_proj.weight" in entries:
            one.weights_map = _Joined(entries, before, layer)


def write_apart(layer: LayerAttributes, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook on a state dict: write the names of a layer that is not fused. Parameters spread over ranks stay joined."""
    if layer.num_apart_experts:
        return
    keys = [f"{prefix}experts.{matrix}" for matrix in _MATRICES]
    if not all(key in state and not _is_spread(state[key]) for key in keys):
        return
    last = f"{prefix}shared_expert_gate.weight"
    gate = {last: state.pop(last)} if last in state else {}
    for matrix, key in zip(_MATRICES, keys, strict=True):
        for name, part in split(matrix, state[key], layer.num_experts, _is_gated(layer)).items():
            state[prefix + name] = part
    state.update(gate)
    if is_ordinary(layer.experts, Experts) and all(
        parameter is not None and type(parameter) in direct.PLAIN and parameter.is_meta
        for parameter in map(layer.experts._parameters.get, _MATRICES)
    ):
        take_apart(layer)


def read_apart(
    layer: LayerAttributes,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Hook before loading: join the entries that :func:`write_apart` split; leave joined ones as they are."""
    put_together(layer)
    if layer.num_apart_experts:
        return
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
    layer: LayerAttributes,
    matrix: str,
    parameter: Tensor,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    errors: list[str],
) -> None:
    """Put the joined matrix into the state dict, or report missing and unfitting parts in torch's words.

    A missing part keeps its values: the parameter itself takes its place, and torch leaves it as it is.
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


def _is_gated(layer: LayerAttributes) -> bool:
    return ACTIVATIONS[layer.activation].gated
