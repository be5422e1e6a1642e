"""Masks that tell real tokens from padding, for statistics, losses, capacity and rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.verbs import checks

_INTEGER = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def of_input(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of a layer's input as bool ``[T]``.

    Raises:
        TypeError, ValueError: It is not a bool or integer tensor (see :func:`truth`) of the shape of ``x`` without its
            last dimension, on the device of ``x``.
    """
    checks.is_tensor("x", x)
    real = truth("mask", mask)
    checks.has_shape("mask", mask, tuple(x.shape[:-1]), "the shape of x without its last dimension, True for a token")
    checks.same_device("mask", mask, "x", x)
    return real.reshape(-1)


def of_losses(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of tokens of this shape, as bool ``[T]``.

    Dimensions of size one are ignored. If the tokens or the mask have one dimension, it has the order of the other. If
    both have more, their shapes must be equal, so that a mask ``[N, B]`` does not pass for one of ``[B, N]`` tokens.
    """
    checks.is_tensor(name, mask)
    own, wanted = [size for size in mask.shape if size != 1], [size for size in shape if size != 1]
    tokens = 1
    for size in shape:
        tokens *= size
    if mask.numel() != tokens or (own != wanted and min(len(own), len(wanted)) > 1):
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, expected {tuple(shape)} or {tokens} elements in one dimension, "
            "the tokens of the layers' latest input"
        )
    return truth(name, mask).reshape(-1)


def truth(name: str, mask: Tensor) -> Tensor:
    """The mask as bool, False for padding.

    Raises:
        TypeError: It is not a bool or integer tensor. A floating mask is refused: the usual one is added to attention
            scores and is zero for a token; to distinguish it from zeros and ones would wait for a GPU.
    """
    checks.is_tensor(name, mask)
    if mask.is_floating_point():
        raise TypeError(
            f"{name}: got {mask.dtype}, expected bool or integers, zero for padding; of a floating mask of zeros and "
            f"ones pass {name} != 0, of one that is added to attention scores pass {name} == 0"
        )
    checks.has_dtype(name, mask, _INTEGER)
    return mask if mask.dtype == torch.bool else mask != 0


def counts(topk_ids: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """Slots of real tokens that chose each expert, int32 ``[E]``, of ids without sentinels ``[T, K]``."""
    real = mask.unsqueeze(1).expand(topk_ids.shape).reshape(-1).to(torch.int32)
    total = torch.zeros(num_experts, dtype=torch.int32, device=topk_ids.device)
    return total.scatter_add(0, topk_ids.reshape(-1).to(torch.int64), real)
