"""Choosing experts with ties to the lowest index, against torch.topk, which does not define ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moekern as mk
from cases import Case, run, streamed
from moekern.routing.router import choose

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(1, 128, 8), (4096, 8, 2), (4096, 128, 8), (16384, 128, 8), (4096, 256, 8)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: the choice is many short passes, and with two on a busy machine the scheduler would decide."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(tokens: int, experts: int, device: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(tokens, experts, device=device)


def stable_sort(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.sort(logits, dim=-1, descending=True, stable=True)[1][..., :k]


def topk(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.topk(logits, k, dim=-1)[1]


WAYS = {"choose": choose, "stable sort": stable_sort, "topk": topk}


@pytest.mark.benchmark(group="choose experts")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
@pytest.mark.parametrize("way", WAYS)
def bench_choose(benchmark: Any, way: str, tokens: int, experts: int, top_k: int, device: str) -> None:
    logits = logits_of(tokens, experts, device)

    def run() -> torch.Tensor:
        ids = WAYS[way](logits, top_k)
        if device == "cuda":
            torch.cuda.synchronize()
        return ids

    assert torch.equal(benchmark(run), stable_sort(logits, top_k))


@pytest.mark.benchmark(group="route")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["mixtral", "gpt_oss", "deepseek_v3", "llama4"])
def bench_route(benchmark: Any, method: str, device: str) -> None:
    """4096 tokens over 128 experts, eight each; DeepSeek's with bias and the best 4 of 8 groups."""
    logits = logits_of(4096, 128, device)
    options: dict[str, Any] = {}
    if method == "deepseek_v3":
        options = {"selection_bias": torch.zeros(128, device=device), "n_group": 8, "topk_group": 4}

    def run() -> torch.Tensor:
        weights, _ = mk.route(logits, 8, method=method, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return weights

    assert torch.isfinite(benchmark(run)).all()


@pytest.mark.benchmark(group="route, of the shapes")
def bench_route_of_shape(benchmark: Any, case: Case) -> None:
    """Softmax over all experts, the best of them, renormalised; float32 logits read, weights and int64 ids written."""
    s = case.shape
    logits = logits_of(s.tokens, s.experts, case.device)
    moved = 4.0 * logits.numel() + 12 * s.slots
    _, ids = run(benchmark, case, lambda: mk.route(logits, s.top_k), lambda: streamed(case, moved), bytes=moved)
    assert torch.equal(ids, stable_sort(logits, s.top_k))
