"""The verbs on any NVIDIA GPU in plain torch: the reference with torch's own grouped matrix multiplications.

It serves the calls that the Hopper kernels do not: other GPUs, float32 and float64, H or I not a multiple of 8.
"""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekern.backends import reference

ALIGNMENT = 16  # bytes, of the rows and matrices that torch's grouped_mm accepts


@cache
def warn_once(reason: str) -> None:
    """Warn, once for each reason, that the torch path runs."""
    warnings.warn(f"moekern: {reason}: this runs through torch, correctly but slower", stacklevel=2)


# Public in newer versions of torch; before, the same function under a private name.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@cache
def _has_grouped_mm(device: int) -> bool:
    return _grouped_mm is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _torch_groups(a: Tensor, b: Tensor, kind: str) -> bool:
    """Whether torch's grouped_mm accepts these operands and works without reading the offsets on the host."""
    if a.dtype != torch.bfloat16 or not a.is_cuda or not _has_grouped_mm(a.get_device()):
        return False
    # "tn" contracts over the rows, whose number need not be aligned.
    sizes = (a.shape[1], b.shape[1]) if kind == "tn" else (a.shape[1], b.shape[1], b.shape[2])
    return a.numel() > 0 and b.numel() > 0 and all(n * a.element_size() % ALIGNMENT == 0 for n in sizes)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, kind: str) -> Tensor:
    """As :func:`moekern.backends.reference.grouped_mm`; bfloat16 without a synchronisation."""
    if not _torch_groups(a, b, kind):
        return reference.grouped_mm(a, b, offsets, kind)
    left, right = (a.mT, b) if kind == "tn" else (a, b.mT if kind == "nt" else b)
    try:
        out: Tensor = _grouped_mm(left, right, offs=offsets[1:])
    except RuntimeError as error:
        warn_once(f"torch's grouped_mm refused a product, a loop over the experts serves instead ({error})")
        return reference.grouped_mm(a, b, offsets, kind)
    if kind == "tn":
        return out.masked_fill_((offsets[1:] == offsets[:-1]).reshape(-1, 1, 1), 0)
    rows = torch.arange(a.shape[0], device=a.device, dtype=offsets.dtype)
    return out.masked_fill_((rows >= offsets[-1]).unsqueeze(1), 0)


plan = reference.plan
permute = reference.permute
combine = reference.combine
combine_backward = reference.combine_backward
experts_forward = partial(reference.experts_forward, multiply=grouped_mm)
experts_backward = partial(reference.experts_backward, multiply=grouped_mm)
