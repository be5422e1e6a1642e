"""The experts on a GPU, and each of their kernels, against cuBLAS doing dense matrix products of the same FLOPs.

    python benches/cards/gpu_experts.py [--shapes qwen3-30b-a3b,olmoe-1b-7b] [--routing zipf] [--parts]
        [--peers grouped_mm,sonicmoe] [--forward-only | --backward-only] [--tokens 1,4,16,64,256 | --rows 128,256,512]
        [--json FILE]

The whole layer is measured as by `moekern bench`, and also the forward pass of training. --parts adds each kernel.
--backward-only measures the backward pass alone, without its plan and forward pass ("serial" is the same with the
combine of the input gradient on the same stream). With --tokens the shapes have this few tokens; one line is the time
of a call and a synchronisation on the host, another that of a pass in a CUDA graph, both against a copy of as many
bytes. With --rows they have this many rows per expert on average, the number by which configuration.py decides.

Every measured run directly follows a run of its ceiling in the same process, in random order; the figure is the median
of the paired ratios, because the clock of a power-limited card drifts by more than the differences of interest
(moekern.bench.timing). The L2 cache is swept before both. Data are random normal, the routing is given, plans are timed
too. Results are compared with float32 first; a wrong one is named and not timed. FILE, by default
`$OUT/gpu_experts.json`, gets all figures in the form that `python benches/records/figures.py` reads, after every shape.

--without-copies builds the gathering kernels without their cp.async: the limit of their gather.
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
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import gpu_kernels
from bounds import without_copies
from gpu_items import Figure, Item, WallClock, measure
from gpu_layer import few_tokens, label, whole
from moekern.bench import decode, peers
from moekern.bench.ceiling import Copy, Dense
from moekern.bench.facts import commit
from moekern.bench.peers import OURS
from moekern.bench.problem import Problem
from moekern.bench.record import BOTH, FORWARD
from moekern.bench.routing import ROUTINGS
from moekern.bench.runner import free_bytes
from moekern.bench.shapes import GPU, Shape, chosen
from moekern.bench.timing import GpuClock


class Run:
    """The options of the command line, the figures so far, and notes on lines that were not measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.peers = [OURS, *peers.chosen(options.peers.split(","), "cuda")]
        self.clock = GpuClock()
        self.check = not options.without_copies
        self.figures: list[Figure] = []
        self.left_out: list[str] = []

    @cached_property
    def memory(self) -> Copy:
        """Memory for copies; only few tokens are measured against a copy."""
        return Copy("cuda")

    def attempt(self, what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `work`, or None after a failure, which is noted; the others go on, unless the GPU is lost."""
        try:
            return work(*arguments)
        except Exception as error:
            said = f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"
            print(said, flush=True)
            self.left_out.append(said)
            torch.cuda.synchronize()
            return None

    def items_of(self, problem: Problem) -> list[Item]:
        """The lines of a shape at its usual batch."""
        o, name = self.options, problem.shape.name
        dense = Dense(problem, FORWARD if o.forward_only else BOTH)
        found: list[list[Item] | None] = []
        if o.parts and not o.backward_only:
            found.append(self.attempt(f"{name}, parts", gpu_kernels.of_forward, problem, dense))
        if o.backward_only or (o.parts and not o.forward_only):
            found.append(self.attempt(f"{name}, backward", gpu_kernels.of_backward, problem, dense, o.parts))
        found += [
            self.attempt(f"{name}, {label(peer)}", whole, peer, problem, dense, o.forward_only, self.check)
            for peer in ([] if o.backward_only else self.peers)
        ]
        named = o.only.split(";") if o.only else None
        return [item for items in found for item in items or [] if named is None or item.name in named]

    def shape(self, shape: Shape) -> None:
        """Measure a shape at its usual batch."""
        problem = Problem(shape, torch.bfloat16, "cuda", self.options.routing)
        self.figures += measure(self.items_of(problem), shape.name, self.clock, self.options.rounds)

    def few(self, shape: Shape, tokens: int) -> None:
        """Measure a shape with few tokens: eagerly on the wall clock, then in CUDA graphs."""
        problem = Problem(replace(shape, tokens=tokens), torch.bfloat16, "cuda", self.options.routing)
        several, name = decode.problems(problem, free_bytes()), f"{shape.name}, T = {tokens}"
        pairs = [
            self.attempt(f"{name}, {label(peer)}", few_tokens, peer, problem, several, self.memory, self.check)
            for peer in self.peers
        ]
        for kind, clock in enumerate((WallClock(), self.clock)):
            items = [pair[kind] for pair in pairs if pair]
            self.figures += measure(items, name, clock, self.options.rounds)

    def record(self) -> dict[str, object]:
        """The record in the form that `python benches/records/figures.py` reads."""
        figures = [{key: value for key, value in asdict(f).items() if value is not None} for f in self.figures]
        return {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "routing": self.options.routing,
            "command": shlex.join(["python", *sys.argv]), "commit": commit(__file__),
            "ceiling": "a copy of as many bytes" if self.options.tokens else "cuBLAS at the same FLOPs",
            **({"note": "Not measured: " + "; ".join(self.left_out)} if self.left_out else {}), "figures": figures,
        }  # fmt: skip

    def show(self, shown: int) -> None:
        """Print one line for each figure after the first ones."""
        for f in self.figures[shown:]:
            rate = f"{f.tflops:8.1f} {f.share:6.3f}" if f.share is not None else ""
            print(f"{f.shape:<24} {f.what:<38} {f.ms:9.4f} {rate}".rstrip(), flush=True)


def at_rows(shape: Shape, rows: int) -> Shape:
    """The shape with `rows` rows per expert on average, or a little less where K does not divide them."""
    return replace(shape, name=f"{shape.name}, {rows} rows", tokens=rows * shape.experts // shape.top_k)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", default=",".join(list(GPU)[:5]), help="names with commas, or all")
    made.add_argument("--rounds", type=int, default=12)
    made.add_argument("--routing", choices=tuple(ROUTINGS), default="uniform")
    made.add_argument("--zipf", action="store_const", const="zipf", dest="routing", help="--routing zipf")
    made.add_argument("--peers", default="grouped_mm", help="as `moekern bench` has them (default: %(default)s)")
    made.add_argument("--only-moekern", action="store_const", const="none", dest="peers", help="--peers none")
    made.add_argument("--parts", action="store_true", help="each kernel alone too")
    one_pass = made.add_mutually_exclusive_group()
    one_pass.add_argument("--forward-only", action="store_true")
    one_pass.add_argument("--backward-only", action="store_true")
    size = made.add_mutually_exclusive_group()
    size.add_argument("--tokens", type=numbers, default=[], help="numbers with commas, instead of the shapes' own")
    size.add_argument("--rows", type=numbers, default=[], help="the same, by rows per expert")
    made.add_argument("--only", default="", help="only lines of these names, with semicolons")
    made.add_argument("--without-copies", action="store_true", help="the gather's limit: wrong results")
    made.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_experts.json")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parser().parse_args(arguments)
    if options.without_copies:
        without_copies()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    random.seed(0)
    run = Run(options)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.routing} routing, bfloat16")
    print(f"{'shape':<24} {'what':<38} {'ms':>9} {'TFLOP/s':>8} {'share':>6}")
    for shape in chosen(options.shapes.split(","), "cuda"):
        works = [partial(run.few, shape, number) for number in options.tokens]
        works += [partial(run.shape, at_rows(shape, number)) for number in options.rows]
        works = works or [partial(run.shape, shape)]
        for work in [] if shape.decode else works:
            shown = len(run.figures)
            run.attempt(shape.name, work)
            run.show(shown)
            options.json.write_text(json.dumps(run.record(), indent=1) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
