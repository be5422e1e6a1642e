"""Reading the projections, biases and activation out of a dense MLP module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekern import checks
from moekern.activations import ACTIVATIONS

# Names under which model code keeps (gate, up, down), or (up, down) without a gate.
_GATED_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PLAIN_NAMES = (("up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
_ACTIVATION_ATTRIBUTES = ("act_fn", "act", "activation_fn", "activation", "activation_func")

# Class or function names of the pointwise function, in torch and in transformers.
_POINTWISE = {
    "silu": "silu",
    "swish": "silu",
    "siluactivation": "silu",
    "gelu": "gelu",
    "geluactivation": "gelu",
    "gelutanh": "gelu_tanh",
    "pytorchgelutanh": "gelu_tanh",
    "newgeluactivation": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relusquaredactivation": "relu2",
    "relu2": "relu2",
}
_GATED_FORM = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


@dataclass(frozen=True)
class Dense:
    """A dense MLP's parameters as one expert keeps them: ``gate_up`` ``[2I, H]`` or ``[I, H]``, ``down`` ``[H, I]``."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str


def read_dense(module: nn.Module, activation: str | None) -> Dense:
    """Find the projections of a dense MLP; see :meth:`moekern.MoE.from_dense` for what is recognised.

    Raises:
        TypeError: ``module`` is not an nn.Module.
        ValueError: Its projections or its activation are not recognised, or their shapes do not fit together.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"dense_mlp: got {type(module).__name__}, expected a torch.nn.Module")
    if activation is not None:
        checks.one_of("activation", activation, tuple(ACTIVATIONS))
    projections, pointwise = _find(module)
    gated = len(projections) == 3
    weights = [_weight(p) for p in projections]
    biases = [getattr(p, "bias", None) for p in projections]
    name = activation or _activation_name(pointwise, gated, module)
    if ACTIVATIONS[name].gated != gated:
        raise ValueError(
            f"activation: got {name!r}, which has {'a' if not gated else 'no'} gate, but "
            f"{type(module).__name__} has {len(projections)} projections"
        )
    *ups, down = weights
    if any(up.shape != (down.shape[1], down.shape[0]) for up in ups):
        raise ValueError(
            f"dense_mlp: its projections have shapes {[tuple(w.shape) for w in weights]}, which do not fit"
        )
    *up_biases, down_bias = biases
    gate_up_bias = None
    if any(b is not None for b in up_biases):
        filled = [torch.zeros_like(w[:, 0]) if b is None else b for b, w in zip(up_biases, ups, strict=True)]
        gate_up_bias = torch.cat(filled).detach()
    if down_bias is not None:
        down_bias = down_bias.detach()
    return Dense(torch.cat(ups).detach(), down.detach(), gate_up_bias, down_bias, name)


def _find(module: nn.Module) -> tuple[list[nn.Module], Any]:
    """The projections in order (gate and up first, down last) and the object that holds the activation."""
    if isinstance(module, nn.Sequential):
        linear = [m for m in module if _is_projection(m)]
        between = [m for m in module if not _is_projection(m)]
        if len(linear) == 2 and len(between) == 1 and module[1] is between[0]:
            return linear, between[0]
        parts = ", ".join(type(m).__name__ for m in module)
        raise ValueError(f"dense_mlp: got nn.Sequential of {parts}, expected linear, activation, linear")
    for names in (*_GATED_NAMES, *_PLAIN_NAMES):
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(m, nn.Module) and _is_projection(m) for m in found):
            pointwise = next((getattr(module, a) for a in _ACTIVATION_ATTRIBUTES if hasattr(module, a)), None)
            return found, pointwise  # type: ignore[return-value]
    known = ", ".join("/".join(names) for names in (*_GATED_NAMES, *_PLAIN_NAMES))
    raise ValueError(f"dense_mlp: {type(module).__name__} has none of the projections {known}, and is no nn.Sequential")


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _weight(projection: nn.Module) -> Tensor:
    """``[out, in]``; transformers' Conv1D keeps the transpose."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(projection).__name__ == "Conv1D" else weight


def known_activation(pointwise: Any, gated: bool) -> str | None:
    """Our name of a pointwise function given as module, function or string, or of its gated form; None if unknown."""
    key = pointwise if isinstance(pointwise, str) else getattr(pointwise, "__name__", type(pointwise).__name__)
    if isinstance(pointwise, nn.GELU):
        key = "gelu_pytorch_tanh" if pointwise.approximate == "tanh" else "gelu"
    name = _POINTWISE.get(str(key).lower())
    return _GATED_FORM.get(name) if gated and name is not None else name


def _activation_name(pointwise: Any, gated: bool, module: nn.Module) -> str:
    if pointwise is None and gated:
        return "swiglu"  # Llama's own MLP keeps w1, w3, w2 and calls F.silu
    name = known_activation(pointwise, gated)
    if name is None:
        key = pointwise if isinstance(pointwise, str) else getattr(pointwise, "__name__", type(pointwise).__name__)
        raise ValueError(
            f"activation: {type(module).__name__}'s activation {key!r} is not recognised; "
            f"pass one of {', '.join(ACTIVATIONS)}"
        )
    return name
