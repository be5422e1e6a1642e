"""The experts on a GPU against cuBLAS doing dense matrix products of the same FLOPs.

    python benches/gpu_experts.py [--shapes qwen3-30b-a3b,olmoe-1b-7b] [--zipf] [--parts] [--forward-only]

Every measured run directly follows a run of cuBLAS in the same process, in random order; the figure is the median of
the paired ratios, because the clock of a power-limited card drifts by more than the differences of interest
(moekern.bench.timing). The L2 cache is swept before both. Data are random normal, the routing is given (uniform, or
Zipf-1 with --zipf), plans are made inside the timing. A table comes last; `$OUT/gpu_experts.json` gets all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bounds import without_copies
from moekern.backends import cuda, reference
from moekern.backends.cuda import torch_path
from moekern.bench.routing import choose
from moekern.bench.shapes import GPU, chosen
from moekern.bench.timing import GpuClock, in_turns

Run = Callable[[], object]


@dataclass
class Figure:
    """One line: `share` is the time of cuBLAS over the run's own, median of the pairs."""

    shape: str
    what: str
    ms: float
    tflops: float
    share: float


class Layer:
    """Random inputs of one shape, and cuBLAS's dense products of the same FLOPs."""

    def __init__(self, name: str, zipf: bool):
        self.name = name
        self.tokens, self.hidden, self.inter, self.experts, self.top_k = t, h, i, e, k = GPU[name].sizes
        slots = self.slots = t * k

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale

        generator = torch.Generator("cuda").manual_seed(0)
        self.ids = choose("zipf" if zipf else "uniform", t, e, k, generator)
        self.scores = torch.rand(t, k, device="cuda")
        self.x, self.dout = normal(t, h), normal(t, h)
        self.w_gate_up, self.w_down = normal(e, 2 * i, h, scale=h**-0.5), normal(e, h, i, scale=i**-0.5)
        self.plan = reference.plan(self.ids, e)
        self.flops = 6.0 * slots * h * i

        rows, w1, w2 = normal(slots, h), self.w_gate_up[0], self.w_down[0]
        a, half = normal(slots, i), torch.empty(slots, i, device="cuda", dtype=torch.bfloat16)
        wide = torch.empty(slots, h, device="cuda", dtype=torch.bfloat16)
        gate, dw1, dw2 = w1[:i], torch.empty(i, h, device="cuda", dtype=torch.bfloat16), torch.empty_like(w2)
        self.mm_up = lambda: [torch.mm(rows, gate.T, out=half) for _ in range(2)]
        self.mm_down = lambda: [torch.mm(a, w2.T, out=wide)]

        def backward() -> None:
            torch.mm(rows, w2, out=half)
            for _ in range(2):
                torch.mm(a, gate, out=wide)
            torch.mm(rows.T, a, out=dw2)
            for _ in range(2):
                torch.mm(a.T, rows, out=dw1)

        self.mm_forward = lambda: (self.mm_up(), self.mm_down())
        self.mm_backward = backward

    def forward(self, module: object, save: bool) -> tuple[Tensor, Tensor]:
        """The verb of a backend, its planner included."""
        plan = module.plan(self.ids, self.experts)
        return module.experts_forward(
            self.x,
            self.scores,
            *plan,
            self.w_gate_up,
            self.w_down,
            None,
            None,
            self.top_k,
            "swiglu",
            False,
            False,
            save,
        )

    def backward(self, module: object, pre: Tensor) -> tuple[Tensor, ...]:
        """Gradients of everything."""
        return module.experts_backward(
            self.dout, self.x, pre, self.scores, *self.plan, self.w_gate_up, self.w_down, None, None,
            self.top_k, "swiglu", False, False, [True, True, True, True, False, False],
        )  # fmt: skip

    def parts(self) -> list[tuple[str, Run, Run | None, float]]:
        """Each kernel of the forward pass: name, run, cuBLAS of the same FLOPs, FLOPs."""
        from moekern.backends.cuda import forward, kernels

        order, inverse, offsets = self.plan
        activated, pre = self.x.new_empty(self.slots, self.inter), self.x.new_empty(self.slots, 2 * self.inter)
        rows, out = self.x.new_empty(self.slots, self.hidden), torch.empty_like(self.x)

        def up(save: bool, few: bool) -> Run:
            return lambda: kernels.up(
                self.x, order, self.w_gate_up, None, activated, pre if save else None,
                kernels.Tables(offsets, self.slots), self.top_k, "swiglu", False, False, few,
            )  # fmt: skip

        def down(stages: int, store_rows: int) -> Run:
            return lambda: kernels.grouped_mm(
                activated, self.w_down, None, rows, kernels.Tables(offsets, self.slots), False, stages, store_rows
            )

        return [
            ("plan", lambda: forward.plan(self.ids, self.experts), None, 0),
            ("tiles", lambda: kernels.Tables(offsets, self.slots), None, 0),
            ("up, training", up(True, False), self.mm_up, self.flops * 2 / 3),
            ("up, inference", up(False, False), self.mm_up, self.flops * 2 / 3),
            ("up, few rows", up(False, True), self.mm_up, self.flops * 2 / 3),
            ("down, 3 stages", down(3, 256), self.mm_down, self.flops / 3),
            ("down, 4 stages", down(4, 128), self.mm_down, self.flops / 3),
            ("combine", lambda: kernels.combine(rows, self.scores, inverse, offsets, out, self.top_k), None, 0),
        ]


def measure(runs: list[tuple[str, Run, Run, float]], shape: str, rounds: int) -> list[Figure]:
    """Median time of every run, and of the ratio to the run of cuBLAS just before it."""
    for _, run, base, _ in runs:
        base()
        run()
    torch.cuda.synchronize()
    works = {name: (run, 1) for name, run, _, _ in runs}
    ceilings = {name: lambda clock, base=base: clock(base) for name, _, base, _ in runs}
    pairs = in_turns(works, ceilings, GpuClock(), 0.0, rounds)
    figures = []
    for name, _, _, flops in runs:
        seconds = pairs[name].quartiles[1]
        figures.append(Figure(shape, name, 1e3 * seconds, flops / seconds / 1e12, pairs[name].share if flops else 0.0))
    return figures


def bench(name: str, arguments: argparse.Namespace) -> list[Figure]:
    """All figures of one shape."""
    layer = Layer(name, arguments.zipf)
    runs: list[tuple[str, Run, Run, float]] = []
    if arguments.parts:
        runs += [(what, run, base or layer.mm_down, flops) for what, run, base, flops in layer.parts()]
    f, b = layer.mm_forward, layer.mm_backward
    for label, module in (("moekern", cuda), ("torch grouped_mm", torch_path)):
        if arguments.only_moekern and module is torch_path:
            continue
        runs.append((f"{label}: forward, inference", lambda m=module: layer.forward(m, False), f, layer.flops))
        runs.append((f"{label}: forward, training", lambda m=module: layer.forward(m, True), f, layer.flops))
        if not arguments.forward_only:

            def both(m: object = module) -> None:
                layer.backward(m, layer.forward(m, True)[1])

            def ceiling() -> None:
                f()
                b()

            runs.append((f"{label}: forward + backward", both, ceiling, 3 * layer.flops))
    return measure(runs, name, arguments.rounds)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(list(GPU)[:5]), help="names with commas, or all")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--zipf", action="store_true", help="Zipf-1 routing")
    parser.add_argument("--parts", action="store_true", help="each kernel alone too")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--only-moekern", action="store_true", help="no peers")
    parser.add_argument("--without-copies", action="store_true", help="the gather's bound: wrong results")
    arguments = parser.parse_args()
    if arguments.without_copies:
        without_copies()
    names = [shape.name for shape in chosen(arguments.shapes.split(","), "cuda") if not shape.decode]
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    random.seed(0)
    figures: list[Figure] = []
    for name in names:
        try:
            figures += bench(name, arguments)
        except Exception as error:  # a shape that fails must not cost the others
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
    card, routing = torch.cuda.get_device_name(), "Zipf-1" if arguments.zipf else "uniform"
    target = Path(os.environ.get("OUT", "."))
    record = {
        "card": card,
        "torch": torch.__version__,
        "routing": routing,
        "command": shlex.join(["python", *sys.argv]),
        "figures": [asdict(f) for f in figures],
    }
    (target / "gpu_experts.json").write_text(json.dumps(record, indent=1))
    print(f"\n{card}, torch {torch.__version__}, {routing} routing, bfloat16; share of cuBLAS at the same FLOPs")
    print(f"{'shape':<18} {'what':<38} {'ms':>9} {'TFLOP/s':>8} {'share':>6}")
    for f in figures:
        print(f"{f.shape:<18} {f.what:<38} {f.ms:9.4f} " + (f"{f.tflops:8.0f} {f.share:6.3f}" if f.tflops else ""))


if __name__ == "__main__":
    main()
