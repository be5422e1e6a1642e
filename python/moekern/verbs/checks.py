"""Argument checks of the public functions: each names the argument, what was got and what is accepted.

They read shapes, dtypes and devices, never values, so that they take about a microsecond and can be traced by
torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.uint8, torch.uint16)
OFFSETS = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def is_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a dense (strided) tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense tensor (torch.strided)")


def has_dtype(name: str, value: Tensor, accepted: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype is one of those accepted."""
    if value.dtype not in accepted:
        raise TypeError(f"{name}: got dtype {_names([value.dtype])}, expected {_names(accepted)}")


def has_shape(name: str, value: Tensor, shape: Sequence[int | str], hint: str = "") -> None:
    """Raise ValueError unless the shape fits.

    Args:
        shape: One entry per dimension: a number that it must equal, or the name of a free dimension.
        hint: The meaning of the numbers, added to the message. It is text without sizes: a size in it would make
            torch.compile build a graph for every value of that size.
    """
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected [{wanted}]" + (f" ({hint})" if hint else "")
        )


def same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if value.device != reference.device:
        raise ValueError(
            f"{name}: got device {value.device}, expected {reference.device}, the device of {reference_name}"
        )


def is_int(name: str, value: object, low: int, high: int | None = None, hint: str = "") -> None:
    """Raise TypeError unless ``value`` is an integer (symbolic too), ValueError unless ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {value}, expected {bounds}" + (f" ({hint})" if hint else ""))


def is_bool(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")


def one_of(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise TypeError unless ``value`` is a string, ValueError unless it is one of those accepted."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}, expected one of {', '.join(accepted)}")
    if value not in accepted:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(accepted)}")


def topk_ids(name: str, value: object) -> None:
    """Check the experts chosen for each token: an integer tensor ``[T, K]``."""
    is_tensor(name, value)
    assert isinstance(value, Tensor)
    has_dtype(name, value, INTEGER)
    has_shape(name, value, ("tokens", "top_k"))
    if value.numel() >= 2**31:
        raise ValueError(f"{name}: got {value.numel()} slots, expected fewer than 2**31")


def is_number(name: str, value: object, *, above: float | None = None, low: float | None = None) -> None:
    """Raise TypeError unless ``value`` is an int or float, ValueError unless finite, ``> above`` and ``>= low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    bounds = "a finite number"
    bounds += f" above {above}" if above is not None else ""
    bounds += f" of at least {low}" if low is not None else ""
    in_bounds = (above is None or value > above) and (low is None or value >= low)
    if not (-math.inf < value < math.inf and in_bounds):  # torch.compile cannot trace isfinite of a symbol
        raise ValueError(f"{name}: got {value}, expected {bounds}")
