"""The three implementations of the verbs: reference (pure torch), cpu (Rust) and cuda (CuPy)."""

from __future__ import annotations

from torch import Tensor


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin, as the kernels take it; 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()
