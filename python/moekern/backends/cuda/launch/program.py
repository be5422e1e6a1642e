"""A verb's launches recorded once for its sizes and replayed for any tensors: one call into Rust a verb.

Building tensor maps and parameters in Python takes some ten microseconds a launch, which is most of a small batch's
time. They depend on sizes alone but for the addresses of the tensors. So the functions of
the kernels' folder are called once with placeholders whose addresses name a tensor's place in a list;
what they would launch is kept, and a replay puts real addresses in.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moekern import _core  # type: ignore[attr-defined]
from moekern.backends.cuda.build.loader import all_present, compile_missing
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.launch.device import stream_of

PROGRAMS = 512  # kept a verb: one for every combination of sizes that comes along
Map = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]

# Place i is the address FIRST + (i + 1) * SPACING. As two int32 its upper half is negative, so no sizes in a kernel's
# parameters look like it; and neither the shift of a ragged map nor an offset reaches half way to the next place.
FIRST, SPACING = 1 << 63, 1 << 53


def placeholder_address(place: int) -> int:
    """The address that stands for place `place` of a replay's list."""
    return FIRST + (place + 1) * SPACING


def _relocation(address: int) -> tuple[int, int]:
    """Place and byte offset of a placeholder's address, maybe shifted."""
    place = round((address - FIRST) / SPACING) - 1
    return place, address - placeholder_address(place)


class Placeholder:
    """As much of a tensor as the launching functions look at."""

    def __init__(self, place: int, shape: tuple[int, ...], dtype: torch.dtype, device: int, offset: int = 0):
        """Stand for the tensor at `offset` bytes behind the address of `place`."""
        self.shape, self.dtype = torch.Size(shape), dtype
        self._device, self._address = device, placeholder_address(place) + offset

    def part(self, shape: tuple[int, ...], dtype: torch.dtype, byte: int = 0) -> Placeholder:
        """What lies `byte` bytes further on, as a tensor of its own."""
        piece = Placeholder(0, shape, dtype, self._device)
        piece._address = self._address + byte
        return piece

    def data_ptr(self) -> int:
        """The address that a replay replaces."""
        return self._address

    def get_device(self) -> int:
        """Index of the device."""
        return self._device

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


_active = threading.local()


@contextmanager
def _recording() -> Iterator[list[Any]]:
    launches: list[Any] = []
    _active.launches = launches
    try:
        yield launches
    finally:
        _active.launches = None


def submit(function: int, device: int, grid: int, block: int, shared: int, maps: list[Map], params: bytes) -> None:
    """Launch a kernel on torch's current stream, or keep the launch while a program is being recorded."""
    launches = getattr(_active, "launches", None)
    if launches is None:
        stream = stream_of(device)
        _core.cuda_launch(function, device, grid, block, shared, stream, maps, params)
        return
    words = struct.unpack(f"<{len(params) // 8}Q", params)
    pointers = [(8 * i, *_relocation(word)) for i, word in enumerate(words) if word >= FIRST]
    relocated = [(element, *_relocation(base), *rest) for element, base, *rest in maps]
    launches.append((function, grid, block, shared, relocated, params, pointers))


def collected(source: KernelSource) -> bool:
    """Whether a variant is only being noted, to be compiled with others at once, and not yet wanted."""
    sources = getattr(_active, "sources", None)
    if sources is None:
        return False
    sources.append(source)
    return True


def sources_of(verb: Callable[[], None]) -> list[KernelSource]:
    """The variants that `verb` launches, without loading any."""
    sources: list[KernelSource] = []
    with _recording():
        _active.sources = sources
        try:
            verb()
        finally:
            _active.sources = None
    return sources


def record_parts(device: int, parts: list[Callable[[], None]]) -> list[Any]:
    """A program for each part of a verb, for several streams; their kernels are compiled together."""
    compile_missing([source for part in parts for source in sources_of(part)])
    return [record(device, part) for part in parts]


def record(device: int, verb: Callable[[], None], meanwhile: Callable[[], list[KernelSource]] | None = None) -> Any:
    """Run `verb` on placeholders and keep its launches; ``replay(stream, addresses)`` of the result launches them.

    Kernels that it needs and that are not in the cache are compiled first, all at once. Behind them and unwaited for,
    those that `meanwhile` names.
    """
    sources = sources_of(verb)
    if meanwhile is not None and not all_present(sources):
        compile_missing(sources, wait=False)
        if not all_present(sources):
            compile_missing(meanwhile(), wait=False)
    compile_missing(sources)
    with _recording() as launches:
        verb()
    return _core.CudaProgram(device, launches)
