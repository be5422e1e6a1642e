"""Permute, combine and its gradients: one launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekern.backends.cuda.kernels import combine as sums
from moekern.backends.cuda.kernels import permute as kernels
from moekern.backends.cuda.launch.device import on_device


def _whole(t: Tensor) -> Tensor:
    """Contiguous, with aligned elements: a view of foreign memory may begin anywhere."""
    t = t.contiguous()
    return t if t.data_ptr() % t.element_size() == 0 else t.clone()


def permute(x: Tensor, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """See :func:`moekern.backends.reference.permute`."""
    x, (_, inverse, offsets) = _whole(x), map(Tensor.contiguous, plan)
    out = x.new_empty(inverse.shape[0], x.shape[1])
    if out.numel():
        with on_device(x.get_device()):
            kernels.permute(x, inverse, offsets, out, top_k)
    return out


def combine(y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int) -> Tensor:
    """See :func:`moekern.backends.reference.combine`."""
    y, (_, inverse, offsets) = _whole(y), map(Tensor.contiguous, plan)
    weights = None if weights is None else _whole(weights)
    out = y.new_empty(y.shape[0] // top_k, y.shape[1])
    if out.numel():
        with on_device(y.get_device()):
            sums.combine(y, weights, inverse, offsets, out, top_k)
    return out


def combine_backward(
    dout: Tensor, y: Tensor, weights: Tensor | None, plan: Sequence[Tensor], top_k: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """See :func:`moekern.backends.reference.combine_backward`."""
    dout, y, (_, inverse, offsets) = _whole(dout), _whole(y), map(Tensor.contiguous, plan)
    weights = None if weights is None else _whole(weights)
    dy = torch.empty_like(y) if needs[0] else None
    dweights = torch.empty_like(weights) if needs[1] and weights is not None else None
    if not dout.numel():
        return (y.new_empty(0) if dy is None else dy), (y.new_empty(0) if dweights is None else dweights.zero_())
    if dy is not None or dweights is not None:
        with on_device(dout.get_device()):
            kernels.combine_backward(dout, y, weights, inverse, offsets, dy, dweights, top_k)
    return (y.new_empty(0) if dy is None else dy), (y.new_empty(0) if dweights is None else dweights)
