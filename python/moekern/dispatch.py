"""Which implementation of the verbs runs: chosen by the tensors' device unless the user asks for one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "cpu", "cuda", "reference")
ENVIRONMENT_VARIABLE = "MOEKERN_BACKEND"


def _check(name: object, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: got {type(name).__name__}, expected one of {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


# A plain global, not a context variable: torch.compile guards on it, and autograd's threads never ask for it
# because the forward pass hands the resolved name on.
_current = os.environ.get(ENVIRONMENT_VARIABLE, "auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one implementation within a ``with`` block.

    Args:
        name: ``"auto"`` (by device, the default), ``"cpu"`` (Rust), ``"cuda"`` or ``"reference"`` (plain torch, any
            device). The environment variable ``MOEKERN_BACKEND`` sets the default of the process.

    Raises:
        TypeError, ValueError: ``name`` is not one of these.
    """
    global _current
    name = _check(name, "backend")
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def current() -> str:
    """The name in force: ``"auto"`` or the implementation that was asked for."""
    return _current


def resolve(device_type: str) -> str:
    """The backend that serves tensors on this kind of device.

    Raises:
        ValueError: The backend asked for does not work on such tensors.
    """
    name = _current
    if name not in BACKENDS:  # only the environment can have put it there
        _check(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    if name == "auto":
        return device_type if device_type in ("cpu", "cuda") else "reference"
    if name != "reference" and name != device_type:
        raise ValueError(
            f"backend: {name!r} was asked for, but the tensors are on {device_type!r}; use 'auto' or 'reference', "
            f"or move them to {name!r}"
        )
    return name
