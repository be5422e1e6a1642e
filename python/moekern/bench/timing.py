"""Times several pieces of work fairly: alternately, in random order, each directly after the machine's ceiling.

The speed of a machine drifts by more than the differences of interest: a card at its power limit lowers its clock, a
shared host has other guests. Work and ceiling therefore run in pairs, a moment apart, and the figure is the median of
the pairs' ratios.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Work = Callable[[], object]
Wait = Callable[[], float]

REST = 0.005  # seconds; without it, work that follows a matmul of torch reads memory a fifth slower
MOST_ROUNDS = 40
FEWEST_ROUNDS = 3


class Clock(Protocol):
    """Starts a piece of work; the returned function gives its seconds, once :meth:`wait` has returned."""

    def __call__(self, work: Callable[[], object]) -> Wait: ...

    def wait(self) -> None: ...


class Ceiling(Protocol):
    """Starts a measurement of the best possible time of one verb of one problem, on the given clock."""

    def __call__(self, clock: Clock) -> Wait: ...


class CpuClock:
    """Runs the work at once, after a rest: threads of torch's last operator would still spin, waiting for the next."""

    def __call__(self, work: Callable[[], object]) -> Wait:
        time.sleep(REST)
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return lambda: seconds

    def wait(self) -> None:
        pass


class GpuClock:
    """Queues the work between two events. The L2 cache is swept first, so that the work reads its inputs from memory.

    The sweep only reads: lines that it wrote would have to leave the cache during the work.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.sweep = torch.ones(2 * cache // 4, device="cuda")

    def __call__(self, work: Callable[[], object]) -> Wait:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.sweep.sum()
        start.record()
        work()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    """The clock for "cpu" or "cuda"."""
    return GpuClock() if device == "cuda" else CpuClock()


@dataclass
class Pairs:
    """Seconds of the work and of the ceiling just before it, in order."""

    own: list[float] = field(default_factory=list)
    base: list[float] = field(default_factory=list)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile of the work's own time."""
        return quartiles(self.own)

    @property
    def share(self) -> float:
        """The ceiling's time over the work's, median of the pairs."""
        return statistics.median(base / own for own, base in zip(self.own, self.base, strict=True))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Of a single value, three times that value."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def in_turns(
    runs: dict[str, tuple[Work, int]],
    ceiling: Ceiling | Mapping[str, Ceiling],
    clock: Clock,
    seconds: float,
    rounds: int | None = None,
) -> dict[str, Pairs]:
    """Time every run for about `seconds`, three to forty times; slow ones less often, at least once. Or `rounds` times.

    All of it, with ceilings and rests, takes at most about four times `seconds` per run, unless three rounds take more.

    Each has been run before, so that nothing is loaded or compiled now. The number that comes with a run says how often
    it does the work that the ceiling stands for. There is one ceiling, or one per run.
    """
    pairs = {name: Pairs() for name in runs}
    waiting, began = list(runs), time.perf_counter()
    for round_ in range(rounds or MOST_ROUNDS):
        if not rounds and round_ >= FEWEST_ROUNDS and time.perf_counter() - began > 4 * seconds * len(runs):
            break
        begun = []
        for name in random.sample(waiting, len(waiting)):
            base = (ceiling[name] if isinstance(ceiling, Mapping) else ceiling)(clock)
            begun.append((name, base, clock(runs[name][0])))
        clock.wait()
        for name, base, own in begun:
            pairs[name].base.append(base())
            pairs[name].own.append(own() / runs[name][1])
        waiting = [name for name in waiting if rounds or unfinished(pairs[name], seconds)]
        if not waiting:
            break
    return pairs


def unfinished(pairs: Pairs, seconds: float) -> bool:
    """Whether another round is worth its time."""
    spent = sum(pairs.own)
    return spent < seconds or (len(pairs.own) < FEWEST_ROUNDS and spent < 3 * seconds)
