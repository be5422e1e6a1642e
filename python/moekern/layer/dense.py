"""Reads the projections, biases and activation of a dense MLP module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekern.backends.activations import ACTIVATIONS
from moekern.layer import dense_check
from moekern.layer.dense_check import Linear
from moekern.verbs import checks, direct

# The names of (gate, up, down) in models, or of (up, down) without a gate.
_GATED_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PLAIN_NAMES = (("up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
_ACTIVATION_ATTRIBUTES = ("act_fn", "act", "activation_fn", "activation", "activation_func")

# Known by identity, not by name: another class of the same name may compute anything.
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}
_TORCH_CLASSES: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
_TRANSFORMERS_CLASSES = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
# The names in configurations, as transformers reads them.
_STRINGS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_GATED_FORM = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


@dataclass(frozen=True)
class Dense:
    """A dense MLP's parameters, laid out as one expert: ``gate_up`` ``[2I, H]`` or ``[I, H]``, ``down`` ``[H, I]``."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str


def read_dense(module: nn.Module, activation: str | None) -> Dense:
    """Find the projections of a dense MLP; see :meth:`moekern.MoE.from_dense` for what is recognised.

    The names are a guess, which is checked against the outputs of the module's forward, see dense_check.py. Tensors
    without values (the meta device) are not checked.

    Raises:
        TypeError: ``module`` is not an nn.Module.
        ValueError: Its projections or its activation are not recognised, their weights cannot be read, their shapes do
            not fit together, or its forward computes something else.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"dense_mlp: got {type(module).__name__}, expected a torch.nn.Module")
    if activation is not None:
        checks.one_of("activation", activation, tuple(ACTIVATIONS))
    projections, pointwise = _find(module)
    gated = len(projections) == 3
    linears = [_read(name, projection) for name, projection in projections.items()]
    _check_alike(linears)
    *ups, down = linears
    if any(up.weight.shape != (down.weight.shape[1], down.weight.shape[0]) for up in ups):
        raise ValueError(
            f"dense_mlp: its projections have shapes {[tuple(p.weight.shape) for p in linears]}, which do not fit"
        )
    has_values = dense_check.has_values(down.weight)
    name = activation or _activation_name(pointwise, gated, module, linears if has_values else None)
    if ACTIVATIONS[name].gated != gated:
        raise ValueError(
            f"activation: got {name!r}, which has {'a' if not gated else 'no'} gate, but "
            f"{type(module).__name__} has {len(projections)} projections"
        )
    if has_values:
        dense_check.compare(module, linears, name)
    gate_up_bias = None
    if any(up.bias is not None for up in ups):
        gate_up_bias = torch.cat([torch.zeros_like(p.weight[:, 0]) if p.bias is None else p.bias for p in ups])
    return Dense(torch.cat([p.weight for p in ups]), down.weight, gate_up_bias, down.bias, name)


def _find(module: nn.Module) -> tuple[dict[str, nn.Module], Any]:
    """The projections by name in order (gate and up first, down last) and the object that holds the activation."""
    if isinstance(module, nn.Sequential):
        linear = {name: m for name, m in module.named_children() if _is_projection(m)}
        between = [m for m in module if not _is_projection(m)]
        if len(linear) == 2 and len(between) == 1 and module[1] is between[0]:
            return linear, between[0]
        parts = ", ".join(type(m).__name__ for m in module)
        raise ValueError(f"dense_mlp: got nn.Sequential of {parts}, expected linear, activation, linear")
    for names in (*_GATED_NAMES, *_PLAIN_NAMES):
        found = {name: getattr(module, name, None) for name in names}
        if all(isinstance(m, nn.Module) for m in found.values()):
            pointwise = next((getattr(module, a) for a in _ACTIVATION_ATTRIBUTES if hasattr(module, a)), None)
            return found, pointwise  # type: ignore[return-value]
    known = ", ".join("/".join(names) for names in (*_GATED_NAMES, *_PLAIN_NAMES))
    raise ValueError(f"dense_mlp: {type(module).__name__} has none of the projections {known} and is no nn.Sequential")


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _read(name: str, projection: nn.Module) -> Linear:
    """One projection's weight ``[out, in]`` and bias ``[out]``, without gradient.

    Raises:
        ValueError: The attribute ``weight`` is not the matrix that the module multiplies by.
    """
    kind = type(projection).__name__

    def refuse(what: str, helps: str) -> ValueError:
        return ValueError(f"dense_mlp: {name} ({kind}) {what}, expected a plain weight [out, in]: {helps}")

    if hasattr(projection, "base_layer") and _has_adapters(projection):
        raise refuse(
            "has LoRA adapters or the like that are not merged", "merge them first, as by model.merge_and_unload()"
        )
    if nn.utils.parametrize.is_parametrized(projection):
        raise refuse(
            "is parametrised", "torch.nn.utils.parametrize.remove_parametrizations(module, name) leaves the result"
        )
    if _is_offloaded(projection):
        raise refuse(
            "has its weights offloaded by accelerate",
            "load the model onto one device, or call accelerate.hooks.remove_hook_from_submodules",
        )
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor):
        raise refuse("has no tensor 'weight'", "it must be a linear layer; dequantise one that is quantised")
    if hasattr(weight, "to_local"):
        raise refuse("has a DTensor for a weight", "gather it first, as by weight.full_tensor()")
    if hasattr(weight, "ds_id") or weight.ndim != 2:
        raise refuse(
            f"has a weight of shape {tuple(weight.shape)}",
            "gather sharded weights (FSDP: summon_full_params; DeepSpeed: GatheredParameters), dequantise packed ones",
        )
    plain = type(weight) in direct.PLAIN or not dense_check.has_values(weight)
    if weight.dtype not in checks.FLOATING or not plain or hasattr(projection, "weight_scale_inv"):
        raise refuse(f"keeps a {type(weight).__name__} of {weight.dtype}, a quantised one", "dequantise it first")
    if bias is not None and (not isinstance(bias, Tensor) or bias.dtype not in checks.FLOATING):
        raise refuse("has a bias that is not a floating tensor", "dequantise it first")
    is_transposed = kind == "Conv1D"  # transformers'
    weight = weight.detach().T if is_transposed else weight.detach()
    if bias is not None and bias.shape != weight.shape[:1]:
        raise refuse(f"has a bias of shape {tuple(bias.shape)}", f"its bias would have shape [{weight.shape[0]}]")
    return Linear(name, weight, None if bias is None else bias.detach(), is_transposed)


def _has_adapters(projection: Any) -> bool:
    """Whether a layer around another one (peft's `base_layer`) may add something to it."""
    return not (getattr(projection, "merged", False) or getattr(projection, "disable_adapters", False))


def _is_offloaded(projection: Any) -> bool:
    """Whether accelerate loads the weights at every call: until then they are on the meta device."""
    hook = getattr(projection, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))


def _check_alike(linears: list[Linear]) -> None:
    """The dtype and the device of all weights, for the layer."""
    for what in ("dtype", "device"):
        seen = [getattr(t, what) for p in linears for t in (p.weight, p.bias) if t is not None]
        if len(set(seen)) > 1:
            found = ", ".join(dict.fromkeys(str(v).removeprefix("torch.") for v in seen))
            raise ValueError(f"dense_mlp: its weights have the {what}s {found}, expected one {what}")


def known_activation(pointwise: Any, gated: bool) -> str | None:
    """Our name of a pointwise function, or of its gated form, given as module, function or string; None if unknown.

    Modules and functions of torch and of transformers are known by identity, not by a name that others may use. Those
    with hooks or with a forward of the instance are unknown, since these may change the result.
    """
    name = None
    if isinstance(pointwise, str):
        name = _STRINGS.get(pointwise.lower())
    elif isinstance(pointwise, nn.Module):
        kind = type(pointwise)
        if pointwise._forward_hooks or pointwise._forward_pre_hooks or "forward" in pointwise.__dict__:
            return None
        if kind is nn.GELU:
            name = "gelu_tanh" if pointwise.approximate == "tanh" else "gelu"
        elif kind.__module__ == "transformers.activations":
            name = _TRANSFORMERS_CLASSES.get(kind.__name__)
        else:
            name = _TORCH_CLASSES.get(kind)
    elif callable(pointwise):
        name = next((ours for function, ours in _FUNCTIONS.items() if function is pointwise), None)
    return _GATED_FORM.get(name) if gated and name is not None else name


def _activation_name(pointwise: Any, gated: bool, module: nn.Module, linears: list[Linear] | None) -> str:
    """The activation that the module names; Llama's own MLP keeps w1, w3, w2 and calls F.silu without naming it."""
    if pointwise is None and gated and linears is not None:
        return "swiglu"
    name = known_activation(pointwise, gated)
    if name is None:
        key = pointwise if isinstance(pointwise, str) else getattr(pointwise, "__name__", type(pointwise).__name__)
        what = "is not named by an attribute" if pointwise is None else f"{key!r} is not recognised"
        fitting = None if linears is None else dense_check.fitting(module, linears)
        helps = f"activation={fitting!r} computes the same" if fitting else f"pass one of {', '.join(ACTIVATIONS)}"
        raise ValueError(f"activation: {type(module).__name__}'s activation {what}; {helps}")
    return name
