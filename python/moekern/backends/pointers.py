"""Tensors as the kernels take them."""

from __future__ import annotations

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()
