"""Observers and transforms of a call that the formulas must take into account."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether tensors may carry tangents: forward-mode differentiation is under way, by torch.func or dual levels."""
    return not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0


def is_exporting() -> bool:
    """As torch.compiler.is_exporting(), which torch 2.11's Dynamo evaluates to true in every compilation."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag
