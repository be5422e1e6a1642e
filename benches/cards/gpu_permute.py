"""Permute and combine on a GPU, forward and backward, against a copy of as many bytes and against torch.

    python benches/cards/gpu_permute.py [--shapes qwen3-30b-a3b,mixtral-8x7b] [--tokens 16384] [--hidden 2050]
        [--dtype bf16] [--shares 1,2,4,8] [--rounds 12] [--no-peers] [--json FILE]

Lines are moekern's functions as a caller sees them, the same on the backend "reference", which is plain torch, and the
shortest torch code that moves the same rows (index_select and index_add_, whose sums are in the dtype and in no fixed
order). Bytes are those that have to move: each tensor read or written once. Every measured run directly follows a copy,
in random order, the L2 cache swept before both; "of copy" is the median of the pairs' ratios. Results are compared
with float32 first. --shares adds the gradients of combine with this many slots of a token per warp; `share_of` chooses
among them. FILE, by default `$OUT/gpu_permute.json`, is in the form of benches/cards/gpu_experts.py.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import moekern as mk
from gpu_items import Figure
from moekern.backends import reference
from moekern.bench.ceiling import Copy, Streamed
from moekern.bench.facts import commit
from moekern.bench.problem import ALLOWED, DTYPES, relative_error
from moekern.bench.routing import choose
from moekern.bench.shapes import SHAPES, Shape
from moekern.bench.timing import Clock, GpuClock, in_turns

VERBS = ("permute", "permute, backward", "combine", "combine, backward")


class WrongError(Exception):
    """A result differs from float32 by more than rounding."""


@dataclass(frozen=True)
class Line:
    """A function to time, and the bytes that it has to move."""

    name: str
    run: Callable[[], object]
    bytes: float


class Rows:
    """The tensors of one problem."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cuda") -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        ids = choose("uniform", shape.tokens, shape.experts, shape.top_k, generator)
        self.plan = mk.plan(ids, shape.experts)
        self.x, self.rows = normal(shape.tokens, shape.hidden), normal(shape.slots, shape.hidden)
        self.weights = torch.rand(shape.tokens, shape.top_k, generator=generator, device=device)
        self.token = self.plan.order.long() // shape.top_k
        self.row_weights = self.weights.flatten()[self.plan.order.long()].unsqueeze(1)
        self.inverse = self.plan.inverse.long()

    def bytes(self, verb: str) -> float:
        """Each input read once, each result written once."""
        index, scores = self.inverse.numel() * 4, self.weights.nbytes
        return float(index + {
            "permute": self.x.nbytes + self.rows.nbytes,
            "permute, backward": self.x.nbytes + self.rows.nbytes,
            "combine": self.x.nbytes + self.rows.nbytes + scores,
            "combine, backward": self.x.nbytes + 2 * self.rows.nbytes + 2 * scores,
        }[verb])  # fmt: skip

    def functions(self, backend: str = "auto") -> dict[str, Callable[[], object]]:
        """moekern's functions on this backend; backward passes repeat over one forward pass."""
        x, y, w = (t.detach().requires_grad_() for t in (self.x, self.rows, self.weights))
        with mk.backend(backend):
            permuted, combined = mk.permute(x, self.plan), mk.combine(y, self.plan, w)

        def on_backend(run: Callable[[], object]) -> Callable[[], object]:
            def there() -> object:
                with mk.backend(backend):
                    return run()

            return run if backend == "auto" else there

        return {
            "permute": on_backend(lambda: mk.permute(self.x, self.plan)),
            "permute, backward": lambda: torch.autograd.grad(permuted, x, self.rows, retain_graph=True),
            "combine": on_backend(lambda: mk.combine(self.rows, self.plan, self.weights)),
            "combine, backward": lambda: torch.autograd.grad(combined, (y, w), self.x, retain_graph=True),
        }

    def in_torch(self) -> dict[str, Callable[[], object]]:
        """The shortest code: no sentinels, sums in the dtype."""

        def gradients() -> tuple[Tensor, Tensor]:
            wide = self.x[self.token]
            return wide * self.row_weights.to(wide.dtype), (wide * self.rows).sum(1)[self.inverse]

        return {
            "permute": lambda: self.x.index_select(0, self.token),
            "permute, backward": lambda: torch.zeros_like(self.x).index_add_(0, self.token, self.rows),
            "combine": lambda: torch.zeros_like(self.x).index_add_(
                0, self.token, self.rows * self.row_weights.to(self.rows.dtype)
            ),
            "combine, backward": gradients,
        }

    def check(self) -> None:
        """Raise WrongError if a result is off by more than the dtype's rounding."""
        plan, top_k = self.plan[:3], self.plan.top_k
        x, rows = self.x.float(), self.rows.float()
        wanted = {
            "permute": (reference.permute(x, plan, top_k),),
            "permute, backward": (reference.combine(rows, None, plan, top_k),),
            "combine": (reference.combine(rows, self.weights, plan, top_k),),
            "combine, backward": reference.combine_backward(x, rows, self.weights, plan, top_k, [True, True]),
        }
        for verb, run in self.functions().items():
            results = run()
            for got, want in zip(results if isinstance(results, tuple) else (results,), wanted[verb], strict=True):
                error = relative_error(got, want)
                if not error <= ALLOWED[self.x.dtype]:
                    raise WrongError(f"{verb}: off by {error:.1e}, allowed {ALLOWED[self.x.dtype]:.1e}")

    def with_shares(self, shares: list[int]) -> list[Line]:
        """The gradients of combine, the kernel alone."""
        from moekern.backends.cuda.kernels import permute as kernels

        if not shares:
            return []
        drows, dweights = torch.empty_like(self.rows), torch.empty_like(self.weights)

        def run(share: int) -> None:
            kernels.combine_backward(
                self.x, self.rows, self.weights, self.plan.inverse, self.plan.offsets, drows, dweights,
                self.plan.top_k, share,
            )  # fmt: skip

        moved = self.bytes("combine, backward")
        return [Line(f"combine, backward, share {n}", lambda n=n: run(n), moved) for n in shares]  # type: ignore[misc]

    def lines(self, shares: list[int], peers: bool) -> list[Line]:
        """All lines to time."""
        found = [Line(verb, run, self.bytes(verb)) for verb, run in self.functions().items()]
        found += self.with_shares(shares)
        if peers:
            runs = {"reference": self.functions("reference"), "torch": self.in_torch()}
            found += [Line(f"{who}: {v}", run, self.bytes(v)) for who, of in runs.items() for v, run in of.items()]
        return found


def measure(lines: list[Line], name: str, clock: Clock, memory: Copy, rounds: int) -> list[Figure]:
    """Measure and print one figure per line."""
    for line in lines:
        line.run()
    clock.wait()
    pairs = in_turns(
        {line.name: (line.run, 1) for line in lines}, {line.name: Streamed(line.bytes, memory) for line in lines},
        clock, 0.0, rounds,
    )  # fmt: skip
    figures = []
    for line in lines:
        timed = pairs[line.name]
        seconds = timed.quartiles[1]
        print(f"{name:<32} {line.name:<28} {1e3 * seconds:8.4f} {line.bytes / seconds / 1e12:6.2f} {timed.share:7.3f}")
        figures.append(Figure(name, line.name, 1e3 * seconds, share=timed.share))
    return figures


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", default="qwen3-30b-a3b,mixtral-8x7b,deepseek-v3-rank", help="names with commas")
    made.add_argument("--tokens", type=numbers, default=[16384], help="numbers with commas")
    made.add_argument("--hidden", type=int, help="instead of the shapes' own")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    made.add_argument("--shares", type=numbers, default=[], help="slots of a token per warp, numbers with commas")
    made.add_argument("--rounds", type=int, default=12)
    made.add_argument("--no-peers", action="store_false", dest="peers", help="moekern alone")
    made.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_permute.json")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parser().parse_args(arguments)
    warnings.simplefilter("ignore")
    random.seed(0)
    memory, clock, figures = Copy("cuda"), GpuClock(), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}")
    print(f"copy: {memory.gbps(clock):.0f} GB/s")
    print(f"{'shape':<32} {'what':<28} {'ms':>8} {'TB/s':>6} {'of copy':>7}")
    for name in options.shapes.split(","):
        for tokens in options.tokens:
            shape = replace(SHAPES[name], tokens=tokens, hidden=options.hidden or SHAPES[name].hidden)
            label = f"{name}, T = {tokens}" + (f", H = {options.hidden}" if options.hidden else "")
            rows = Rows(shape, DTYPES[options.dtype])
            rows.check()
            figures += measure(rows.lines(options.shares, options.peers), label, clock, memory, options.rounds)
            del rows
            torch.cuda.empty_cache()
    record = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "routing": "uniform",
        "command": shlex.join(["python", *sys.argv]), "commit": commit(__file__),
        "ceiling": "a copy of as many bytes",
        "figures": [{key: value for key, value in asdict(f).items() if value is not None} for f in figures],
    }  # fmt: skip
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
