"""The choice of a backend for the verbs: by the tensors' device unless the user names one."""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar

import torch
from torch._dynamo.variables import misc as _misc

BACKENDS = ("auto", "cpu", "cuda", "reference")
ENVIRONMENT_VARIABLE = "MOEKERN_BACKEND"


def _check(name: object, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: got {type(name).__name__}, expected one of {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_default = os.environ.get(ENVIRONMENT_VARIABLE, "auto")

# A block holds for its thread, task or generator's context: each sees the innermost of its own open blocks.
_chosen: ContextVar[str | None] = ContextVar("moekern_backend", default=None)
_blocks: ContextVar[tuple[backend, ...]] = ContextVar("moekern_backend_blocks", default=())
# For compiled code, which may not set context variables: the name in a block of the traced function itself.
_traced: str | None = None
# For a Dynamo that cannot guard on context variables: the name in the block that was entered last, in any thread.
_latest: str | None = None
_open: dict[backend, str] = {}
_guards_on_context = hasattr(_misc, "ContextVarVariable")

_is_compiling = torch.compiler.is_compiling


class backend:  # noqa: N801  used like a function
    """Use one implementation within a ``with`` block, in this thread or task.

    Args:
        name: ``"auto"`` (by device, the default), ``"cpu"`` (Rust), ``"cuda"`` or ``"reference"`` (plain torch, any
            device). The environment variable ``MOEKERN_BACKEND`` sets the default of the process.

    Raises:
        TypeError, ValueError: ``name`` is not one of these.
    """

    def __init__(self, name: str) -> None:
        self.name = _check(name, "backend")
        self._previous: list[str | None] = []

    def __enter__(self) -> None:
        global _traced, _latest
        if _is_compiling():
            self._previous.append(_traced)
            _traced = self.name
            return
        _blocks.set((*_blocks.get(), self))
        _chosen.set(self.name)
        _open[self] = _latest = self.name

    def __exit__(self, *_: object) -> None:
        global _traced, _latest
        if self._previous:
            _traced = self._previous.pop()
            return
        blocks = list(_blocks.get())
        if self in blocks:  # not if a generator is closed in another context than the one that started it
            blocks.reverse()
            blocks.remove(self)
            blocks.reverse()
            _blocks.set(tuple(blocks))
            _chosen.set(blocks[-1].name if blocks else None)
        _open.pop(self, None)
        _latest = next(reversed(list(_open.values())), None)


def current() -> str:
    """The current name: ``"auto"`` or the implementation that the user named."""
    if _is_compiling():
        return _traced or (_chosen.get() if _guards_on_context else _latest) or _default
    return in_eager_call()


def in_eager_call() -> str:
    """The same if nothing is known to compile: asking torch costs more than the rest."""
    return _traced or _chosen.get() or (_open and _of_backward()) or _default


def _of_backward() -> str | None:
    """In a thread of autograd, the name in the block that was entered last: checkpoints run a forward pass there.

    Such a thread has no context, and nothing tells which thread began its backward pass. (`torch._C._stash_obj_in_tls`
    would pass an object to it, but torch 2.11 frees that object too early.)
    """
    in_autograds_thread = torch._C._current_graph_task_id() != -1 and isinstance(
        threading.current_thread(), threading._DummyThread
    )
    return _latest if in_autograds_thread else None


def resolve(device_type: str) -> str:
    """The backend that serves tensors on this kind of device.

    Raises:
        ValueError: The named backend does not work on such tensors.
    """
    name = current()
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
