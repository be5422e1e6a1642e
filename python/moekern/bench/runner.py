"""The run of `moekern bench`: every problem, verb and implementation, each checked before it is timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moekern.bench import decode
from moekern.bench.ceiling import Copy, ceiling_of
from moekern.bench.limits import TookTooLongError, time_limit
from moekern.bench.peers import OURS, Layer, Peer
from moekern.bench.peers.base import both_of, forward_of, results_of, saved_bytes, wanted_of
from moekern.bench.problem import ALLOWED, DTYPES, Problem
from moekern.bench.record import BOTH, CEILING, DECODE, FAILED, FORWARD, OK, SKIPPED, WRONG, Row
from moekern.bench.shapes import Shape
from moekern.bench.timing import Pairs, Work, clock_of, in_turns, quartiles

Tick = Callable[[str], None]

# What a peer may take to build, tune or compile: so much once, and for each shape its share of the time left. One that
# compiles for all shapes does so at the first, and one that tunes each must not use up the others' time.
SET_UP_SECONDS = 60.0
LEAST_SET_UP = 10.0
SLOW_SECONDS = 12.0  # a pass expected to take longer is left out, one that does is not run again
WARM_SECONDS = 1.0  # after longer runs nothing is cold
SWEPT_PEERS = ("grouped_mm", "scattermoe", "sonicmoe")  # of the peers, those whose growth is of interest


@dataclass(frozen=True)
class Options:
    """What to measure.

    seconds: For each figure, about; or `rounds` runs of each. minutes: For everything; what would begin later is
    skipped.
    """

    shapes: tuple[Shape, ...]
    peers: tuple[Peer, ...]
    device: str
    dtypes: tuple[str, ...] = ("bf16",)
    routings: tuple[str, ...] = ("uniform",)
    verbs: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()
    swept: tuple[Shape, ...] = ()
    seconds: float = 1.0
    minutes: float = 7.0
    rounds: int | None = None


@dataclass(frozen=True)
class Case:
    """One problem and what is to be done with it."""

    shape: Shape
    dtype: str
    routing: str
    verbs: tuple[str, ...]
    peers: tuple[Peer, ...]
    sweep: str | None = None

    @property
    def steps(self) -> int:
        """How many rows it gives."""
        return len(self.verbs) * (2 + len(self.peers))


def cases(options: Options) -> list[Case]:
    """Everything to measure, in order."""
    found = []
    for dtype in options.dtypes:
        for routing in options.routings:
            for shape in options.shapes:
                verbs = options.verbs or ((DECODE,) if shape.decode else (FORWARD, BOTH))
                found.append(Case(shape, dtype, routing, verbs, options.peers))
    few = tuple(peer for peer in options.peers if peer.name in SWEPT_PEERS)
    for sweep in options.sweeps:
        for shape in options.swept:
            found += [
                Case(each, options.dtypes[0], options.routings[0], options.verbs or (FORWARD, BOTH), few, sweep)
                for each in sweep_of(shape, sweep)
            ]
    return found


def sweep_of(shape: Shape, sweep: str) -> list[Shape]:
    """The shape with one of its sizes in steps of 4 (tokens) or 2, its own size among them."""
    if sweep == "tokens":
        sizes = [shape.tokens // 64, shape.tokens // 16, shape.tokens // 4, shape.tokens]
    elif sweep == "experts":
        sizes = [n for n in (shape.experts // 4, shape.experts // 2, shape.experts, 2 * shape.experts)
                 if n >= shape.top_k]  # fmt: skip
    else:
        sizes = [n for n in (1, 2, 4, 8, 16) if n <= shape.experts]
    changes: list[dict[str, Any]] = [{sweep: size} for size in dict.fromkeys(sizes) if size >= 1]
    return [replace(shape, **change) for change in changes]


@dataclass
class Entry:
    """An implementation on its way through one verb. once: its seconds, if it is too slow to be run again."""

    peer: Peer
    row: Row
    work: Work | None = None
    repeats: int = 1
    once: float = 0.0


@dataclass
class Session:
    """What outlives a case: the time left, and who has used up theirs."""

    options: Options
    tick: Tick = lambda text: None
    began: float = field(default_factory=time.monotonic)
    gave_up: dict[str, str] = field(default_factory=dict)
    broken: str = ""

    def __post_init__(self) -> None:
        self.clock = clock_of(self.options.device)
        self.memory = Copy(self.options.device)
        self.copy_gbps = self.memory.gbps(self.clock)
        self.layers: dict[str, Layer] = {}
        self.slow: dict[str, float] = {}
        self.set_up: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.options.minutes - (time.monotonic() - self.began)

    def run(self) -> Iterator[list[Row]]:
        """The rows of one case after the other."""
        todo = cases(self.options)
        for done, case in enumerate(todo):
            if self.broken:
                yield [row for verb in case.verbs for row in self.unmeasured(case, verb, (), FAILED, self.broken)]
                continue
            yield self.measure(case, self.left / (len(todo) - done))
            try:
                self.clean_up()
            except RuntimeError as error:  # after an illegal access no call to the GPU succeeds in this process
                self.broken = f"the GPU was lost in {case.shape.name}, {case.verbs[-1]}: {short(error)}"

    def clean_up(self) -> None:
        """Give back the memory of a case."""
        self.layers.clear()
        self.slow.clear()
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def unmeasured(self, case: Case, verb: str, present: Collection[str], status: str, reason: str) -> list[Row]:
        """A row for each implementation that has none."""
        names = (CEILING, OURS.name, *(peer.name for peer in case.peers))
        rows = [blank(case, verb, name, self.options.device) for name in names if name not in present]
        return [replace(row, status=status, reason=reason) for row in rows]

    def measure(self, case: Case, share: float) -> list[Row]:
        """The rows of a case, whose share of the time left is `share` seconds."""
        rows: list[Row] = []
        try:
            if self.left <= 0:
                raise TookTooLongError(f"the time limit of {self.options.minutes:g} minutes was reached (--minutes)")
            problem = Problem(case.shape, DTYPES[case.dtype], self.options.device, case.routing)
            for verb in case.verbs:
                rows += self.verb(case, problem, verb, share)
        except (TookTooLongError, MemoryError, RuntimeError) as error:
            status = SKIPPED if isinstance(error, TookTooLongError) else FAILED
            for verb in case.verbs:
                present = {row.implementation for row in rows if row.verb == verb}
                rows += self.unmeasured(case, verb, present, status, short(error))
        return rows

    def verb(self, case: Case, problem: Problem, verb: str, share: float) -> list[Row]:
        """The ceiling's row and one for each implementation."""
        several = decode.problems(problem, free_bytes()) if verb == DECODE else [problem]
        flops, moved = problem.flops(verb), sum(each.bytes(verb) for each in several) / len(several)
        ceiling = ceiling_of(problem, verb, moved, self.memory)
        entries = []
        for peer in (OURS, *case.peers):
            entry = Entry(peer, blank(case, verb, peer.name, self.options.device))
            entry.row.flops, entry.row.bytes = flops, moved
            self.prepare(entry, problem, several, verb, share)
            entries.append(entry)
            self.tick(f"{case.shape.name} {verb} {peer.name}")
        self.tick(f"{case.shape.name} {verb}: timing")
        runs = {e.peer.name: (e.work, e.repeats) for e in entries if e.work is not None}
        pairs = in_turns(runs, ceiling, self.clock, self.options.seconds, self.options.rounds)
        for entry in entries:
            if entry.once:
                wait = ceiling(self.clock)
                self.clock.wait()
                pairs[entry.peer.name] = Pairs([entry.once], [wait()])
        top = blank(case, verb, CEILING, self.options.device)
        top.flops, top.bytes, top.status, top.share = flops, moved, OK, 1.0
        if pairs:
            base = [seconds for each in pairs.values() for seconds in each.base]
            (top.low, top.seconds, top.high), top.runs = quartiles(base), len(base)
        else:
            top.status, top.reason, top.share = SKIPPED, "nothing was timed beside it", None
        for entry in entries:
            if entry.peer.name in pairs:
                timed = pairs[entry.peer.name]
                entry.row.low, entry.row.seconds, entry.row.high = timed.quartiles
                entry.row.share, entry.row.runs = timed.share, len(timed.own)
        return [top, *(entry.row for entry in entries)]

    def prepare(self, entry: Entry, problem: Problem, several: list[Problem], verb: str, share: float) -> None:
        """Build, check against float32, and run once more: into the entry go its work or the reason for having none."""
        peer, row = entry.peer, entry.row
        row.reason = self.reason_to_skip(peer, problem, verb)
        if row.reason:
            row.status = SKIPPED
            return
        limit, began = max(self.left, 5.0), time.monotonic()
        if peer is not OURS:
            unspent = SET_UP_SECONDS - self.set_up.get(peer.name, 0.0)
            limit = min(limit, max(unspent, min(SET_UP_SECONDS, max(share, LEAST_SET_UP))))
        try:
            with time_limit(limit):
                self.check(entry, problem, verb)
                if self.slow[peer.name] > SLOW_SECONDS and verb != DECODE and not peer.compiles:
                    entry.once, row.reason = self.slow[peer.name], row.reason or "timed once, while it was checked"
                    return
                if verb == DECODE:
                    entry.work, entry.repeats, row.reason = decode.work(peer, several)
                else:
                    layer = self.layers[peer.name]
                    entry.work = both_of(layer, problem) if verb == BOTH else forward_of(layer, problem)
                self.warm(entry, problem, verb)
        except TookTooLongError:
            row.status, row.reason, entry.work = SKIPPED, f"its set-up took longer than {limit:.0f} s", None
            self.gave_up[peer.name] = f"{row.reason} for {problem.shape.name}"
        except Exception as error:  # a peer may fail in any way, and the others' figures stand
            row.status, row.reason, entry.work = FAILED, short(error), None
            gc.collect()
        finally:
            self.set_up[peer.name] = self.set_up.get(peer.name, 0.0) + time.monotonic() - began

    def reason_to_skip(self, peer: Peer, problem: Problem, verb: str) -> str:
        """Empty if there is none."""
        if self.options.device not in peer.devices:
            return f"runs on {' and '.join(peer.devices)} only"
        if verb == BOTH and not peer.backward:
            return "has no backward pass"
        if peer.name in self.gave_up:
            return self.gave_up[peer.name]
        expected = 3 * self.slow.get(peer.name, 0.0)
        if verb == BOTH and expected > SLOW_SECONDS:
            return f"would take {expected:.0f} s a run, after its forward pass"
        return peer.missing(problem) or ""

    def check(self, entry: Entry, problem: Problem, verb: str) -> None:
        """The error against float32, and what is saved for the backward pass."""
        peer, row = entry.peer, entry.row
        if peer.name not in self.layers:
            self.layers[peer.name] = peer.build(problem)
        layer = self.layers[peer.name]
        wanted = wanted_of(layer, problem, verb == BOTH)
        began = time.perf_counter()
        results = results_of(layer, problem, verb == BOTH)
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        self.slow[peer.name] = time.perf_counter() - began
        row.error = results.error_against(wanted)
        row.status = OK if row.error <= ALLOWED[problem.dtype] else WRONG
        if row.status == WRONG:
            row.reason = f"off by {row.error:.1e}, allowed {ALLOWED[problem.dtype]:.1e}"
        if verb == BOTH:
            row.saved_bytes = saved_bytes(layer, problem)

    def warm(self, entry: Entry, problem: Problem, verb: str) -> None:
        """One more run, for the allocator and the caches, unless it is slow; on a GPU with its memory counted."""
        assert entry.work is not None
        if self.options.device == "cpu":
            if entry.peer.compiles or self.slow[entry.peer.name] < WARM_SECONDS:
                began = time.perf_counter()
                entry.work()
                self.slow[entry.peer.name] = time.perf_counter() - began
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        began = time.perf_counter()
        entry.work()
        torch.cuda.synchronize()
        self.slow[entry.peer.name] = time.perf_counter() - began
        if verb != DECODE:
            entry.row.peak_bytes = torch.cuda.max_memory_allocated() - held


def blank(case: Case, verb: str, implementation: str, device: str) -> Row:
    """A row of the case before anything was measured."""
    s = case.shape
    return Row(
        s.name, s.tokens, s.hidden, s.intermediate, s.experts, s.top_k, case.dtype, case.routing, device, verb,
        implementation, FAILED, sweep=case.sweep,
    )  # fmt: skip


def free_bytes() -> int:
    """Of the GPU's memory; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def short(error: BaseException) -> str:
    """An exception in one line of a table."""
    text = " ".join(str(error).split())
    name = "" if isinstance(error, TookTooLongError) else type(error).__name__ + (": " if text else "")
    return name + (text if len(text) <= 160 else text[:157] + "...")
