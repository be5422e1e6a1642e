"""Whether forward-mode differentiation is under way."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether tensors may carry tangents, by torch.func or dual levels."""
    return not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0
