"""The activations an expert can use: names, codes for the kernels, and their definition in torch.

A gated activation reads two features of the pre-activation, gate ``g`` and up ``u``; a plain one reads ``g`` alone.
The torch definitions here are the specification that every backend is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moekern.backends.codes import ACTIVATION
from moekern.backends.observers import forward_mode

# gpt-oss, https://huggingface.co/openai/gpt-oss-20b: slope of the sigmoid and bound of both halves.
OAI_ALPHA = 1.702
OAI_LIMIT = 7.0

Forward = Callable[[Tensor, Tensor | None], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        name: The name that users pass.
        code: Its number in the kernels.
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
    if not forward_mode():
        return F.silu(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # torch's gradient of silu has no forward-mode rule
    return (wide * torch.sigmoid(wide)).to(x.dtype)


# The gradients are torch's own operators: one kernel each, float32 inside for half precision, and finite where those
# of autograd are.
def _silu_grad(da: Tensor, x: Tensor) -> Tensor:
    if not forward_mode():
        return torch.ops.aten.silu_backward(da, x)  # type: ignore[no-any-return]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    s = torch.sigmoid(wide)
    return (da * (s * (1 + wide * (1 - s)))).to(x.dtype)


def _gelu_grad(da: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(da, x)  # type: ignore[no-any-return]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_grad(da: Tensor, x: Tensor) -> Tensor:
    # From 30 on the slope is 0 or 1; from 1e13 on the formula gives 0 * inf.
    return torch.ops.aten.gelu_backward(da, x.clamp(-30, 30), approximate="tanh")  # type: ignore[no-any-return]


def _relu_grad(da: Tensor, x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0, da)


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _relu2_grad(da: Tensor, x: Tensor) -> Tensor:
    return da * (2 * torch.relu(x))


def _gated(f: Callable[[Tensor], Tensor], grad: Callable[[Tensor, Tensor], Tensor]) -> tuple[Forward, Backward]:
    def forward(g: Tensor, u: Tensor | None) -> Tensor:
        assert u is not None
        return f(g) * u

    def backward(da: Tensor, g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert u is not None
        return grad(da * u, g), da * f(g)

    return forward, backward


def _plain(f: Callable[[Tensor], Tensor], grad: Callable[[Tensor, Tensor], Tensor]) -> tuple[Forward, Backward]:
    return lambda g, u: f(g), lambda da, g, u: (grad(da, g), None)


# gpt-oss clamps. A clamped value is a constant, and the bound itself counts as clamped. torch's clamp has this rule
# from 2.14 on; before, it passed the gradient at the bound. Written out, the rule holds with every torch, and for
# second derivatives too. NaN is not clamped.
def _clamp_above(x: Tensor) -> Tensor:
    return torch.where(x >= OAI_LIMIT, OAI_LIMIT, x)


def _clamp(x: Tensor) -> Tensor:
    return torch.where(x <= -OAI_LIMIT, -OAI_LIMIT, _clamp_above(x))


def _swiglu_oai(g: Tensor, u: Tensor | None) -> Tensor:
    assert u is not None
    g = _clamp_above(g)
    return (_clamp(u) + 1) * (g * torch.sigmoid(OAI_ALPHA * g))  # the sigmoid first: (u + 1) * g overflows in float16


def _swiglu_oai_backward(da: Tensor, g: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert u is not None
    gc, uc = _clamp_above(g), _clamp(u)
    s = torch.sigmoid(OAI_ALPHA * gc)
    glu = gc * s
    dg = da * (uc + 1) * (s + OAI_ALPHA * (glu * (1 - s)))
    return torch.where(g >= OAI_LIMIT, 0, dg), torch.where((u >= OAI_LIMIT) | (u <= -OAI_LIMIT), 0, da * glu)


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
    name: Activation(name, ACTIVATION[name], gated, *functions) for name, gated, functions in _TABLE
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
