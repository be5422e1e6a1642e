"""Small batches on a GPU: the verb with its plan, eagerly and in a CUDA graph, beside torch's grouped_mm.

    python benches/gpu_small.py [--shapes qwen3-30b-a3b,mixtral-8x7b] [--tokens 1,4,16,64,256] [--rounds 30]

Eager: wall time of a call and a synchronisation, as one caller sees it. Graph: GPU time of a replay. Every run follows
a write of more than the L2 holds, the two sides take turns, figures are medians. A table comes last;
`$OUT/gpu_small.json` gets all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moekern.backends import cuda
from moekern.backends.cuda import torch_path
from moekern.bench.shapes import GPU

FLUSHED = 256 << 20  # bytes written before every run


def eager(run: Callable[[], object], flush: torch.Tensor) -> float:
    """Milliseconds of a call and a synchronisation."""
    flush.zero_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def replayed(graph: torch.cuda.CUDAGraph, flush: torch.Tensor) -> float:
    """Milliseconds of a replay on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def bench(hidden: int, inter: int, experts: int, top_k: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of both sides, eagerly and in a graph."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    w_gate_up, w_down = normal(experts, 2 * inter, hidden), normal(experts, hidden, inter)
    x, scores = normal(tokens, hidden), torch.rand(tokens, top_k, device="cuda")
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices

    def forward(module: Any) -> object:
        plan = module.plan(ids, experts)
        return module.experts_forward(
            x, scores, *plan, w_gate_up, w_down, None, None, top_k, "swiglu", False, False, False
        )

    sides = {"moekern": partial(forward, cuda), "grouped_mm": partial(forward, torch_path)}
    graphs = {}
    for side, run in sides.items():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graphs[side] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[side]):
            run()
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for side, run in sides.items():
            taken[f"{side}, eager"].append(eager(run, flush))
            taken[f"{side}, graph"].append(replayed(graphs[side], flush))
    return {what: statistics.median(times) for what, times in taken.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b-a3b,mixtral-8x7b")
    parser.add_argument("--tokens", default="1,4,16,64,256")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    card = torch.cuda.get_device_name()
    columns = ("moekern, eager", "grouped_mm, eager", "moekern, graph", "grouped_mm, graph")
    print(f"{card}, torch {torch.__version__}, bfloat16, microseconds of plan and forward")
    print(f"{'shape':<14} {'T':>4} " + " ".join(f"{c:>18}" for c in columns))
    figures = []
    for name in options.shapes.split(","):
        for tokens in map(int, options.tokens.split(",")):
            taken = bench(*GPU[name].sizes[1:], tokens, options.rounds)
            figures += [{"shape": f"{name}, T = {tokens}", "what": c, "ms": taken[c]} for c in columns]
            print(f"{name:<14} {tokens:>4} " + " ".join(f"{1e3 * taken[c]:18.1f}" for c in columns), flush=True)
            torch.cuda.empty_cache()
    command = shlex.join(["python", *sys.argv])
    record = {"card": card, "torch": torch.__version__, "routing": "uniform", "command": command, "figures": figures}
    (Path(os.environ.get("OUT", ".")) / "gpu_small.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
