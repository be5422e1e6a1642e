"""The backward pass on one GPU, kernel by kernel and as a whole, against cuBLAS at the same number of operations.

    python benches/gpu_backward.py [--shapes qwen3-30b-a3b,olmoe-1b-7b] [--rounds 12] [--routing uniform|zipf|hot|empty]

Method: bf16, random data, top-k given. Every run directly follows a cuBLAS run of the same FLOPs (dense matmuls over
all rows: no gather, no activation) that streams more than the L2 holds; order is random, the figure is the median of
the paired ratios. The whole backward counts every launch, and the four cuBLAS matmuls are its ceiling; "serial" is the
same with the combine of the input gradient on the same stream.

`--without-copies` builds the gathering kernels without their cp.async: the bound that their gather has to reach.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bounds import without_copies
from moekern.backends import reference
from moekern.backends.cuda import backward, backward_kernels, kernels
from moekern.backends.cuda.configuration import choose
from moekern.bench.routing import ROUTINGS
from moekern.bench.routing import choose as choose_experts
from moekern.bench.shapes import GPU
from moekern.bench.shapes import chosen as chosen_shapes


class Item(NamedTuple):
    """What is timed: `prepare` runs before the clock starts; `base` is the matmul of the same FLOPs."""

    name: str
    flops: float
    prepare: Callable[[], object]
    run: Callable[[object], object]
    base: Callable[[], object]


def items_of(shape: tuple[int, int, int, int, int], routing: str) -> list[Item]:
    """Everything that is timed for a shape."""
    tokens, hidden, inter, experts, top_k = shape
    slots = tokens * top_k

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16).mul_(scale)

    generator = torch.Generator("cuda").manual_seed(0)
    order, inverse, offsets = reference.plan(choose_experts(routing, tokens, experts, top_k, generator), experts)
    scores = torch.rand(tokens, top_k, device="cuda") + 0.1
    x, dout, pre = normal(tokens, hidden), normal(tokens, hidden), normal(slots, 2 * inter)
    w_gate_up, w_down = (
        normal(experts, 2 * inter, hidden, scale=hidden**-0.5),
        normal(experts, hidden, inter, scale=inter**-0.5),
    )
    chosen = choose(torch.bfloat16, (9, 0), slots, experts, hidden, inter)
    alone = replace(chosen, combine_beside=False)
    settings = (top_k, "swiglu", False, False)
    arguments = (dout, x, pre, scores, order, inverse, offsets, w_gate_up, w_down, None, None, *settings, [True] * 6)

    rows = backward_kernels.Rows(x, order, scores, top_k, torch.empty_like(order), torch.empty(slots, device="cuda"))
    columns = -(-inter // backward_kernels.DH_FEATURES)
    dh, scaled, partials = pre.clone(), normal(slots, inter), torch.empty(slots, columns, device="cuda")
    grad_rows, dx = normal(slots, hidden), torch.empty_like(x)
    dw_gate_up, dw_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)
    gathered, spare, spare_inter = normal(slots, hidden), normal(slots, hidden), normal(slots, inter)
    dense_up, dense_down = normal(2 * inter, hidden), normal(hidden, inter)

    def base_dh() -> None:
        torch.mm(gathered, w_down[0], out=spare_inter)

    def base_dgrad() -> None:
        torch.mm(pre, w_gate_up[0], out=spare)

    def base_dw_down() -> None:
        torch.mm(gathered.mT, scaled, out=dense_down)

    def base_dw_gate_up() -> None:
        torch.mm(pre.mT, gathered, out=dense_up)

    def base_backward() -> None:
        base_dh()
        base_dgrad()
        base_dw_down()
        base_dw_gate_up()

    def run_dh(t: kernels.Tables) -> None:
        backward_kernels.dh(dout, w_down, pre, rows, t, "swiglu", False, False, dh, scaled, partials)

    def run_dgrad(t: kernels.Tables) -> None:
        kernels.grouped_mm(dh, w_gate_up, None, grad_rows, t, True, chosen.stages, chosen.store_rows)

    def run_dw_down(t: kernels.Tables, stages: int) -> None:
        backward_kernels.wgrad(dout, scaled, rows.token, offsets, t, dw_down, False, stages=stages)

    def run_dw_gate_up(t: kernels.Tables, stages: int) -> None:
        backward_kernels.wgrad(x, dh, rows.token, offsets, t, dw_gate_up, True, stages=stages)

    def run_combine(_: object) -> None:
        kernels.combine(grad_rows, None, inverse, offsets, dx, top_k)

    def run_backward(_: object) -> None:
        backward.experts_backward(*arguments, chosen)

    def run_backward_serially(_: object) -> None:
        backward.experts_backward(*arguments, alone)

    def tables() -> kernels.Tables:
        return kernels.Tables(offsets, slots)

    flops = 2.0 * slots * hidden * inter
    return [
        Item("dh", flops, tables, run_dh, base_dh),
        Item("dgrad", 2 * flops, tables, run_dgrad, base_dgrad),
        *(
            item
            for s in (3, 4)
            for item in (
                Item(f"dw_down, {s} stages", flops, tables, partial(run_dw_down, stages=s), base_dw_down),
                Item(f"dw_gate_up, {s} stages", 2 * flops, tables, partial(run_dw_gate_up, stages=s), base_dw_gate_up),
            )
        ),
        Item("combine", 0.0, tables, run_combine, base_dh),
        Item("serial", 6 * flops, tables, run_backward_serially, base_backward),
        Item("backward", 6 * flops, tables, run_backward, base_backward),
    ]


def measure(items: list[Item], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each item and of its base, and the median of base / item."""
    for item in items:
        item.run(item.prepare())
        item.base()
    torch.cuda.synchronize()
    samples: dict[str, list[tuple[float, float]]] = {item.name: [] for item in items}
    for _ in range(rounds):
        begun = []
        for item in random.sample(items, len(items)):
            ready = item.prepare()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            events[0].record()
            item.base()
            events[1].record()
            events[2].record()
            item.run(ready)
            events[3].record()
            begun.append((item.name, events))
        torch.cuda.synchronize()
        for name, (a, b, c, d) in begun:
            samples[name].append((c.elapsed_time(d), a.elapsed_time(b)))
    result = {}
    for item in items:
        own, base = zip(*samples[item.name], strict=True)
        result[item.name] = {
            "ms": statistics.median(own),
            "base_ms": statistics.median(base),
            "share": statistics.median(b / o for o, b in samples[item.name]),
            "tflops": item.flops / statistics.median(own) / 1e9,
        }
    return result


def main() -> None:
    """Measure, print a table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(GPU))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--routing", choices=tuple(ROUTINGS), default="uniform")
    parser.add_argument(
        "--only", default="", help="names of the items to measure, separated by semicolons; all by default"
    )
    parser.add_argument("--without-copies", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.without_copies:
        without_copies()
    torch.manual_seed(0)
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "routing": options.routing,
        "command": shlex.join(["python", *sys.argv]),
        "shapes": {},
    }
    print(f"{results['device']}, torch {results['torch']}, {options.routing} routing, bf16; % = cuBLAS time / own time")
    for shape in chosen_shapes(options.shapes.split(","), "cuda"):
        items = items_of(shape.sizes, options.routing)
        if options.only:
            items = [item for item in items if item.name in options.only.split(";")]
        measured = measure(items, options.rounds)
        del items
        torch.cuda.empty_cache()
        results["shapes"][shape.name] = measured
        cells = [
            f"{key} {100 * value['share']:.1f}% {value['ms']:.3f} ms {value['tflops']:.0f} TF"
            if value["tflops"]
            else f"{key} {value['ms']:.3f} ms"
            for key, value in measured.items()
        ]
        print(f"{shape.name:16s} | " + " | ".join(cells), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
