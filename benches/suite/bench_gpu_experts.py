"""cards/gpu_experts.py: without a GPU, its lines over kernels that only check their arguments; with one, as a whole."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

import gpu_experts
import gpu_kernels
import tables
from gpu_items import measure
from gpu_layer import WrongError, whole
from moekern.bench.ceiling import Dense
from moekern.bench.peers import OURS, PEERS, Layer
from moekern.bench.problem import Problem
from moekern.bench.record import BOTH, FORWARD
from moekern.bench.shapes import SHAPES
from moekern.bench.timing import CpuClock

TINY = SHAPES["tiny"]
SINGLE = ("plan", "tiles", "combine", "combine of gradients")  # lines without a matmul to compare with


@pytest.fixture
def problem() -> Problem:
    return Problem(TINY, torch.bfloat16, "cpu")


@pytest.fixture
def _no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that would launch a kernel checks the names and number of its arguments, and does nothing."""
    for module, names in (
        (gpu_kernels, ("Tables",)),
        (gpu_kernels.up, ("up",)),
        (gpu_kernels.grouped, ("grouped_mm", "grouped_288", "grouped_product")),
        (gpu_kernels.combine, ("combine",)),
        (gpu_kernels.gradients, ("dh", "wgrad")),
        (gpu_kernels.forward, ("plan",)),
        (gpu_kernels.backward, ("experts_backward",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, create_autospec(getattr(module, name)))
    signature = inspect.signature(gpu_kernels.gradients.Rows)

    def rows(*arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(token=signature.bind(*arguments).arguments["token"])

    monkeypatch.setattr(gpu_kernels.gradients, "Rows", rows)


@pytest.mark.usefixtures("_no_launches")
def bench_kernels(problem: Problem) -> None:
    dense = Dense(problem, BOTH)
    items = [*gpu_kernels.of_forward(problem, dense), *gpu_kernels.of_backward(problem, dense)]
    figures = measure(items, "tiny", CpuClock(), 1)
    assert [f.what for f in figures if f.share is None] == list(SINGLE)
    flops = {f.what: f.tflops * f.ms * 1e9 for f in figures if f.tflops}
    product = 2.0 * TINY.slots * TINY.hidden * TINY.intermediate
    assert flops["up, training"] == pytest.approx(2 * product)
    assert flops["down, 4 stages"] == pytest.approx(product)
    assert flops["dh"] == pytest.approx(product)
    assert flops["backward"] == pytest.approx(6 * product)
    assert [item.name for item in gpu_kernels.of_backward(problem, dense, parts=False)] == ["backward"]


def bench_layer(problem: Problem) -> None:
    """moekern and a peer, on the CPU, up to the table of a record."""
    dense = Dense(problem, BOTH)
    items = [item for peer in (OURS, PEERS["grouped_mm"]) for item in whole(peer, problem, dense, forward_only=False)]
    figures = measure(items, "tiny", CpuClock(), 1)
    record = {"figures": [vars(figure) for figure in figures]}
    names = [f"{who}: {what}" for who in ("moekern", "torch grouped_mm")
             for what in ("forward, inference", "forward, training", "forward + backward")]  # fmt: skip
    assert [figure.what for figure in figures] == names
    assert tables.kernel_columns(record, names).count("| tiny |") == 1


def bench_rows() -> None:
    options = gpu_experts.parser().parse_args(["--rows", "16,300"])
    for rows in options.rows:
        shape = gpu_experts.at_rows(SHAPES["qwen3-30b-a3b"], rows)
        assert shape.slots == rows * shape.experts
        assert shape.name == f"qwen3-30b-a3b, {rows} rows"
    with pytest.raises(SystemExit):
        gpu_experts.parser().parse_args(["--rows", "16", "--tokens", "1"])


def bench_wrong_layer(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong or missing peer is named, not timed."""
    ours, dense = OURS.build(problem), Dense(problem, FORWARD)
    wrong = Layer(lambda x, scores, *weights: ours.forward(x, 2 * scores, *weights), ours.weights)
    monkeypatch.setattr(type(OURS), "build", lambda self, problem: wrong)
    with pytest.raises(WrongError, match=r"off by 1.0e\+00, allowed 2.0e-02"):
        whole(OURS, problem, dense, forward_only=True)
    with pytest.raises(ImportError, match="is not installed"):
        whole(PEERS["scattermoe"], problem, dense, forward_only=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--parts"], 27), (["--parts", "--forward-only", "--only-moekern", "--zipf"], 12),
        (["--backward-only"], 1), (["--tokens", "1,16"], 8), (["--rows", "8,20", "--only-moekern"], 6),
    ],
)  # fmt: skip
def bench_gpu_experts(arguments: list[str], lines: int, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    gpu_experts.main(["--shapes", "cpu-small", "--rounds", "1", "--json", str(path), *arguments])
    record = json.loads(path.read_text())
    assert "note" not in record
    assert len(record["figures"]) == lines
    assert "| cpu-small" in tables.page(path)
