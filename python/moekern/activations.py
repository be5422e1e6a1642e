"""The activations an expert can use: names, codes for the kernels, and their definition in torch.

A gated activation reads two features of the pre-activation, gate ``g`` and up ``u``; a plain one reads ``g`` alone.
The torch definitions here are the specification that every backend is tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moekern import eager

# gpt-oss, https://huggingface.co/openai/gpt-oss-20b: slope of the sigmoid and bound of both halves.
OAI_ALPHA = 1.702
OAI_LIMIT = 7.0

Forward = Callable[[Tensor, Tensor | None], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: The name users pass.
        code: The number the kernels know it by.
        gated: Whether it reads gate and up halves.
        forward: ``(g, u) -> a``.
        backward: ``(da, g, u) -> (dg, du)``.
    """

    name: str
    code: int
    gated: bool
    forward: Forward
    backward: Backward


def _silu(x: Tensor) -> Tensor:
    if not eager.forward_mode():
        return F.silu(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # torch's gradient of silu has no forward-mode rule
    return (wide * torch.sigmoid(wide)).to(x.dtype)


def _silu_grad(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_grad(x: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_grad(x: Tensor) -> Tensor:
    beta, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(beta * (x + cubic * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * beta * (1 + 3 * cubic * x * x)


def _relu_grad(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _relu2_grad(x: Tensor) -> Tensor:
    return 2 * torch.relu(x)


def _gated(f: Callable[[Tensor], Tensor], grad: Callable[[Tensor], Tensor]) -> tuple[Forward, Backward]:
    def forward(g: Tensor, u: Tensor | None) -> Tensor:
        assert u is not None
        return f(g) * u

    def backward(da: Tensor, g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert u is not None
        return da * u * grad(g), da * f(g)

    return forward, backward


def _plain(f: Callable[[Tensor], Tensor], grad: Callable[[Tensor], Tensor]) -> tuple[Forward, Backward]:
    return lambda g, u: f(g), lambda da, g, u: (da * grad(g), None)


def _swiglu_oai(g: Tensor, u: Tensor | None) -> Tensor:
    assert u is not None
    g = g.clamp(max=OAI_LIMIT)
    u = u.clamp(min=-OAI_LIMIT, max=OAI_LIMIT)
    return (u + 1) * g * torch.sigmoid(OAI_ALPHA * g)


def _swiglu_oai_backward(da: Tensor, g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert u is not None
    gc = g.clamp(max=OAI_LIMIT)
    uc = u.clamp(min=-OAI_LIMIT, max=OAI_LIMIT)
    s = torch.sigmoid(OAI_ALPHA * gc)
    dg = da * (uc + 1) * s * (1 + OAI_ALPHA * gc * (1 - s))
    du = da * gc * s
    # A clamped value is a constant; torch counts the bound itself as inside.
    return dg * (g <= OAI_LIMIT), du * ((u >= -OAI_LIMIT) & (u <= OAI_LIMIT))


_TABLE: tuple[tuple[str, bool, tuple[Forward, Backward]], ...] = (
    ("swiglu", True, _gated(_silu, _silu_grad)),
    ("geglu", True, _gated(F.gelu, _gelu_grad)),
    ("geglu_tanh", True, _gated(_gelu_tanh, _gelu_tanh_grad)),
    ("reglu", True, _gated(torch.relu, _relu_grad)),
    ("swiglu_oai", True, (_swiglu_oai, _swiglu_oai_backward)),
    ("silu", False, _plain(_silu, _silu_grad)),
    ("gelu", False, _plain(F.gelu, _gelu_grad)),
    ("gelu_tanh", False, _plain(_gelu_tanh, _gelu_tanh_grad)),
    ("relu", False, _plain(torch.relu, _relu_grad)),
    ("relu2", False, _plain(_relu2, _relu2_grad)),
)

ACTIVATIONS: dict[str, Activation] = {
    name: Activation(name, code, gated, *functions) for code, (name, gated, functions) in enumerate(_TABLE)
}


def split(pre: Tensor, activation: Activation, interleaved: bool) -> tuple[Tensor, Tensor | None]:
    """The gate and up halves of a pre-activation ``[..., 2I]`` (or ``[..., I]`` and None for a plain activation)."""
    if not activation.gated:
        return pre, None
    if interleaved:
        return pre[..., 0::2], pre[..., 1::2]
    g, u = pre.chunk(2, dim=-1)
    return g, u


def join(g: Tensor, u: Tensor | None, interleaved: bool) -> Tensor:
    """The inverse of :func:`split`."""
    if u is None:
        return g
    if interleaved:
        return torch.stack((g, u), dim=-1).reshape(*g.shape[:-1], 2 * g.shape[-1])  # flatten has no rule for vmap
    return torch.cat((g, u), dim=-1)
