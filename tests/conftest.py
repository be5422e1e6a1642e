"""Devices to test on, and memory that shows when it was never written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

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
