"""The host's time of a call on a GPU: the layer for few tokens, the planners, a layer's first call in a process.

    python benches/cards/gpu_host.py [--rounds 300]

Each call follows a synchronisation, so that no queue is full. Figures are the median and the least microseconds until
a call returns, and for planners until the plan is complete. First calls run in new processes, with compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import moekern as mk

LAYER = (2048, 768, 128, 8)  # hidden, intermediate, experts, top_k: of qwen3-30b-a3b
TOKENS = 16
SLOTS, EXPERTS = 262144, 128

FIRST = """
import sys, time, torch
import moekern as mk
tokens, training = int(sys.argv[1]), sys.argv[2] == "training"
x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=training)
begin = time.perf_counter()
moe = mk.MoE(2048, 768, 128, 8, device="cuda", dtype=torch.bfloat16).train(training)
torch.cuda.synchronize()
made = time.perf_counter()
with torch.set_grad_enabled(training):
    moe(x)
torch.cuda.synchronize()
print(1e3 * (made - begin), 1e3 * (time.perf_counter() - made))
"""


def microseconds(run: Callable[[], object], rounds: int, until_done: bool = False) -> tuple[float, float]:
    """Median and least time of many calls."""
    times = []
    for i in range(rounds + 20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if until_done:
            torch.cuda.synchronize()
        if i >= 20:
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def layer(rounds: int) -> dict[str, tuple[float, float]]:
    """The layer and its parts at few tokens."""
    moe = mk.MoE(*LAYER, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(TOKENS, LAYER[0], device="cuda", dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    figures = {"mk.MoE, training, forward": microseconds(lambda: moe(leaf), rounds)}
    moe.eval()
    with torch.no_grad():
        weights, ids = mk.route(moe.gate(x), LAYER[3])
        figures["mk.MoE, inference"] = microseconds(lambda: moe(x), rounds)
        figures["mk.experts, inference"] = microseconds(
            lambda: mk.experts(x, ids, weights, *moe.experts.projections), rounds
        )
    return figures


def planners(rounds: int) -> dict[str, tuple[float, float]]:
    """The time of a plan of many slots until it is complete, and until the host's call returns."""
    ids = torch.randint(0, EXPERTS, (SLOTS // 8, 8), device="cuda")
    return {
        f"mk.plan of {SLOTS} slots, device, done": microseconds(lambda: mk.plan(ids, EXPERTS), rounds, True),
        **{
            f"mk.plan of {SLOTS} slots, host, {name}": microseconds(
                lambda: mk.plan(ids, EXPERTS, planner="host"), rounds, name == "done"
            )
            for name in ("returned", "done")
        },
    }


def first_call(tokens: int, mode: str) -> list[float]:
    """Milliseconds that a process needs to make its first layer, and to call it for the first time."""
    for _ in range(2):  # the first process may compile
        command = [sys.executable, "-c", FIRST, str(tokens), mode]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(word) for word in result.stdout.split()]


def main() -> None:
    """Print all figures, and write them to `$OUT/gpu_host.json` if there is such a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    figures: dict[str, object] = {}
    for name, (median, least) in {**layer(rounds), **planners(rounds)}.items():
        figures[name] = [median, least]
        print(f"{name:45s} {median:7.1f} us, least {least:7.1f}", flush=True)
    for tokens, mode in ((4096, "training"), (TOKENS, "inference")):
        made, called = first_call(tokens, mode)
        figures[f"first call, {tokens} tokens, {mode}"] = [made, called]
        print(f"first call, {tokens} tokens, {mode}: layer made {made:.0f} ms, called {called:.1f} ms", flush=True)
    if "OUT" in os.environ:
        with open(os.path.join(os.environ["OUT"], "gpu_host.json"), "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
