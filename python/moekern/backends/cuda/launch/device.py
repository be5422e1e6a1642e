"""The device that is current, its stream, and sizes as memory is cut for its kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

# Of torch's own module where it has them: the public functions take several times as long.
stream_of: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def on_device(device: int) -> AbstractContextManager[Any]:
    """Make a device current, for nothing where it is: entering torch's own guard costs as much as a launch."""
    return nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device)


def round_up(size: int) -> int:
    """Bytes up to where the next buffer of one piece of memory begins."""
    return -(-size // 256) * 256


@cache
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a device, rounded down to whole clusters of two."""
    return torch.cuda.get_device_properties(device).multi_processor_count // 2 * 2
