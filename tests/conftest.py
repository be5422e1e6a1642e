"""Devices to test on, and memory that shows when it was never written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from problems import forbid_torch_path

# Workers of pytest-xdist share the cores: each with threads for all of them would mostly wait.
if WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

NEEDS_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    # What the kernels do not serve (float32, float64, odd sizes) is tested too; that it says so is tested elsewhere.
    quiet = pytest.mark.filterwarnings("ignore:moekern.*runs through torch:UserWarning")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(quiet if torch.cuda.is_available() else skip)


@pytest.fixture(params=["cpu", NEEDS_GPU])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


PLACES = [
    pytest.param((device, dtype), id=f"{device}-{str(dtype).removeprefix('torch.')}", marks=marks)
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, torch.dtype]:
    """A device and a dtype. On a Hopper GPU the kernels must serve half precision: the torch path raises."""
    device, dtype = request.param
    if device == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability() == (9, 0):
        forbid_torch_path(monkeypatch)
    return device, dtype


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty and its like hand out NaN (and the largest integers), so that an unwritten element is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`moekern bench` with two rounds, little memory, and one thread, which waits for no other."""
    from moekern.bench import ceiling, timing

    monkeypatch.setattr(ceiling, "SCANNED", 2 << 20)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
