"""A line of gpu_experts.py, and its timing: all run alternately, each directly after cuBLAS of the same FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moekern.bench.ceiling import Dense
from moekern.bench.timing import Clock, GpuClock, Wait, in_turns


@dataclass(frozen=True)
class Item:
    """One line.

    run: The timed work; its argument is the result of `prepare`, which runs before the clock starts, if there is one.
    base: The ceiling: dense products of the same FLOPs, or a copy of the same bytes.
    flops: 0 if the ceiling does not apply.
    passes: How often `run` does the work of `base`.
    """

    name: str
    run: Callable[..., object]
    base: Callable[[Clock], Wait]
    flops: float = 0.0
    prepare: Callable[[], object] | None = None
    passes: int = 1

    def __call__(self) -> object:
        return self.run(self.prepare()) if self.prepare else self.run()


@dataclass
class Figure:
    """One line of the record: `share` is the ceiling's time over the run's own, median of the pairs."""

    shape: str
    what: str
    ms: float
    base_ms: float | None = None
    tflops: float | None = None
    share: float | None = None


def base_of(dense: Dense, *products: str) -> Callable[[Clock], Wait]:
    """The ceiling of the named products, by default of all."""
    return lambda clock: clock(lambda: dense.run(products))


class WallClock(GpuClock):
    """The time of a call and a synchronisation, as a caller sees it; the L2 cache is swept before."""

    def __call__(self, work: Callable[[], object]) -> Wait:
        self.sweep.sum()
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return lambda: seconds


class Preparing:
    """A clock that starts when an item is prepared."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.wait = clock, clock.wait

    def __call__(self, work: Callable[[], object]) -> Wait:
        if isinstance(work, Item) and work.prepare is not None:
            run, ready = work.run, work.prepare()
            return self.clock(lambda: run(ready))
        return self.clock(work)


def measure(items: list[Item], shape: str, clock: Clock, rounds: int) -> list[Figure]:
    """Median time of every item, of its ceiling, and of the ratio to the ceiling's run just before it."""
    for item in items:
        item.base(clock)
        item()
    clock.wait()
    pairs = in_turns(
        {item.name: (item, item.passes) for item in items}, {item.name: item.base for item in items},
        Preparing(clock), 0.0, rounds,
    )  # fmt: skip
    figures = []
    for item in items:
        timed = pairs[item.name]
        figure = Figure(shape, item.name, 1e3 * timed.quartiles[1])
        if item.flops:
            figure.base_ms = 1e3 * statistics.median(timed.base)
            figure.tflops, figure.share = 1e-9 * item.flops / figure.ms, timed.share
        figures.append(figure)
    return figures
