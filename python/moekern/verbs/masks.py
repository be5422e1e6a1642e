"""Masks that tell real tokens from padding, for statistics, losses, capacity and rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.verbs import checks

_INTEGER = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def of_input(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of a layer's input as bool ``[T]``.

    Raises:
        TypeError, ValueError: It is no bool or integer tensor of the shape of ``x`` without its last dimension, on the
            device of ``x``. A floating mask is refused: zero is a real token in those that are added to scores.
    """
    checks.is_tensor("x", x)
    check_kind(mask)
    checks.has_shape("mask", mask, tuple(x.shape[:-1]), "the shape of x without its last dimension, True for a token")
    checks.same_device("mask", mask, "x", x)
    return (mask if mask.dtype == torch.bool else mask != 0).reshape(-1)


def check_kind(mask: object) -> None:
    """Raises TypeError unless it is a bool or integer tensor."""
    checks.is_tensor("mask", mask)
    assert isinstance(mask, Tensor)
    checks.has_dtype("mask", mask, _INTEGER)


def of_losses(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of tokens that lie as `shape` says, as bool ``[T]``.

    Dimensions of size one do not matter. Tokens or a mask in one dimension have the order of the other; where both have
    more, the shapes must be the same, so that a mask ``[N, B]`` is not taken for one of ``[B, N]`` tokens.
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
    """The mask as bool: zero for padding. A floating one must hold zeros and ones, which is
    checked on the CPU: any other value counts as a token.
    """
    if mask.dtype == torch.bool:
        return mask
    checks.has_dtype(name, mask, (*_INTEGER, *checks.FLOATING))
    real = mask != 0
    can_look = mask.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would synchronise
    if mask.is_floating_point() and can_look and not bool((~real | (mask == 1)).all()):
        raise ValueError(
            f"{name}: got a floating mask with other values than 0 and 1, expected 1 for a token and 0 for padding; "
            "a mask that is added to attention scores has 0 for a token"
        )
    return real


def counts(topk_ids: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """Slots of real tokens that chose each expert, int32 ``[E]``, of ids without sentinels ``[T, K]``."""
    real = mask.unsqueeze(1).expand(topk_ids.shape).reshape(-1).to(torch.int32)
    total = torch.zeros(num_experts, dtype=torch.int32, device=topk_ids.device)
    return total.scatter_add(0, topk_ids.reshape(-1).to(torch.int64), real)
