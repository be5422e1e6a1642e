"""Addresses of tensors, for the kernels."""

from __future__ import annotations

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
