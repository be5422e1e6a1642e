"""Launching a kernel: what its source states, what the launcher gives by name, and the loaded function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from moekern.backends.cuda.build import loader
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.device import multiprocessors
from moekern.backends.cuda.launch.params import signatures
from moekern.backends.cuda.launch.program import Map, collected, submit

NO_MAPS: Mapping[str, Map] = {}


def launch(
    source: KernelSource,
    name: str,
    device: int,
    params: Mapping[str, Any],
    *,
    maps: Mapping[str, Map] = NO_MAPS,
    blocks: int | None = None,
    shared: int | None = None,
    most_shared: int = 0,
    carve_out: int | None = None,
) -> None:
    """Launch the kernel `name` of a variant on torch's current stream, or keep the launch for a program.

    Args:
        source, name, device: Which kernel, and the device whose tensors it gets.
        params, maps: Every field of the kernel's structure and every tensor map, by the names of the source.
        blocks: One for each multiprocessor unless given; threads are the source's `THREADS`.
        shared: Bytes of dynamic shared memory; the source's `SHARED_BYTES` unless given, or none.
        most_shared: Where `shared` differs from call to call, the most it can be.
        carve_out: See :func:`moekern.backends.cuda.build.loader.load`.
    """
    signature, stated = signatures(source.file)[name], constants(source)
    if maps.keys() != set(signature.maps):
        raise TypeError(f"{name}: got the maps {sorted(maps)}, expected {sorted(signature.maps)}")
    if shared is None:
        shared = stated.get("SHARED_BYTES", 0)
    function = handle(source, name, device, max(shared, most_shared), carve_out)
    grid = multiprocessors(device) if blocks is None else blocks
    in_order = [maps[map_name] for map_name in signature.maps]
    submit(function, device, grid, stated["THREADS"], shared, in_order, signature.params.pack(params))


def handle(source: KernelSource, name: str, device: int, shared: int = 0, carve_out: int | None = None) -> int:
    """The loaded function of a kernel; while a program only collects what it needs, a note of it and 0."""
    return 0 if collected(source) else _loaded(source, name, device, shared, carve_out)


@cache
def _loaded(source: KernelSource, name: str, device: int, shared: int, carve_out: int | None) -> int:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the kernel {name} is used for the first time while a CUDA graph is being captured, where nothing can be "
            "loaded: run the layer once with these shapes and dtype before the capture"
        )
    return loader.load(source, name, device, shared, carve_out).handle
