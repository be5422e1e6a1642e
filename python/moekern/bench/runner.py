"""The run of `moekern bench`: every problem, verb and implementation, each checked before it is timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from moekern.bench import decode
from moekern.bench.cases import Case, Options, cases
from moekern.bench.ceiling import Copy, ceiling_of
from moekern.bench.facts import machine_of
from moekern.bench.limits import TookTooLongError, time_limit
from moekern.bench.peers import OURS, Layer, Peer
from moekern.bench.peers.base import both_of, forward_of, results_of, saved_bytes, wanted_of
from moekern.bench.problem import ALLOWED, DTYPES, Problem, Results
from moekern.bench.record import BOTH, CEILING, DECODE, FAILED, OK, SKIPPED, WRONG, Row
from moekern.bench.timing import Pairs, Work, clock_of, in_turns, quartiles

Tick = Callable[[str], None]

# How long a peer that --peers does not name may build, tune or compile: this long once, and for each shape its share of
# the time left. One that compiles for all shapes does so at the first; one that tunes each must leave time for others.
SET_UP_SECONDS = 60.0
LEAST_SET_UP = 10.0
SLOW_SECONDS = 12.0  # a pass expected to take longer is left out; one that took longer is not run again
WARM_SECONDS = 1.0  # after runs this long nothing is cold


@dataclass
class Entry:
    """The state of one implementation within one verb. once: its seconds, if it is too slow to be run again."""

    peer: Peer
    row: Row
    work: Work | None = None
    repeats: int = 1
    once: float = 0.0


class LostError(Exception):
    """No call to the GPU succeeds in this process any more, for example after an illegal access.

    culprit: The implementation that ran; empty if several did. reason: The GPU's message.
    """

    def __init__(self, culprit: str, reason: str) -> None:
        super().__init__(f"the GPU was lost{' by ' + culprit if culprit else ''}: {reason}")
        self.culprit, self.reason = culprit, reason


@dataclass
class Session:
    """The state that outlives a case: the time left, and the peers that have used up theirs.

    Attributes:
        gave_up: Status and reason of the peers that are not tried again, by name.
        preparing: The implementation that is being built and checked; empty while several are timed.
        machine: This machine's facts, with its copy rate measured.
    """

    options: Options
    tick: Tick = lambda text: None
    began: float = field(default_factory=time.monotonic)
    gave_up: dict[str, tuple[str, str]] = field(default_factory=dict)
    preparing: str = ""

    def __post_init__(self) -> None:
        self.clock = clock_of(self.options.device)
        self.memory = Copy(self.options.device)
        self.machine = machine_of(self.options.device)
        self.machine.copy_gbps = self.memory.gbps(self.clock)
        self.layers: dict[str, Layer] = {}
        self.slow: dict[str, float] = {}
        self.set_up: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return seconds_left(self.options, self.began)

    def run(self, todo: Sequence[Case] | None = None) -> Iterator[list[Row]]:
        """Give the rows of one verb of one case at a time; of all cases unless some are given.

        Raises:
            LostError: The GPU was lost; :mod:`moekern.bench.apart` survives that.
        """
        todo = cases(self.options) if todo is None else todo
        for done, case in enumerate(todo):
            yield from self.measure(case, self.left / (len(todo) - done))
            self.clean_up()

    def clean_up(self) -> None:
        """Free the memory of a case."""
        self.layers.clear()
        self.slow.clear()
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def measure(self, case: Case, share: float) -> Iterator[list[Row]]:
        """Give the rows of each verb of a case; its share of the time left is `share` seconds."""
        problem = None
        for verb in case.verbs:
            try:
                if self.left <= 0:
                    raise TookTooLongError(
                        f"the time limit of {self.options.minutes:g} minutes was reached (--minutes)"
                    )
                problem = problem or Problem(case.shape, DTYPES[case.dtype], self.options.device, case.routing)
                rows = self.verb(case, problem, verb, share)
            except TookTooLongError as error:
                rows = unmeasured(case, verb, self.options.device, SKIPPED, short(error))
            except LostError:
                raise
            except Exception as error:  # a case may fail in any way, for example for lack of memory
                self.ensure_gpu("")
                rows = unmeasured(case, verb, self.options.device, FAILED, short(error))
            yield rows

    def ensure_gpu(self, culprit: str) -> None:
        """Raise LostError if the GPU was lost with the failure of `culprit`."""
        if self.options.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise LostError(culprit, short(error)) from error

    def verb(self, case: Case, problem: Problem, verb: str, share: float) -> list[Row]:
        """The ceiling's row and one for each implementation."""
        several = decode.problems(problem, free_bytes()) if verb == DECODE else [problem]
        flops, moved = problem.flops(verb), sum(each.bytes(verb) for each in several) / len(several)
        ceiling = ceiling_of(problem, verb, moved, self.memory)
        entries = []
        for peer in (OURS, *case.peers):
            entry = Entry(peer, blank(case, verb, peer.name, self.options.device))
            entry.row.flops, entry.row.bytes = flops, moved
            self.preparing = peer.name
            self.tick(f"{case.shape.name} {verb} {peer.name}")
            self.prepare(entry, problem, several, verb, share)
            entries.append(entry)
        self.preparing = ""
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
            top.status, top.reason, top.share = SKIPPED, "no other implementation was timed", None
        for entry in entries:
            if entry.peer.name in pairs:
                timed = pairs[entry.peer.name]
                entry.row.low, entry.row.seconds, entry.row.high = timed.quartiles
                entry.row.share, entry.row.runs = timed.share, len(timed.own)
        return [top, *(entry.row for entry in entries)]

    def prepare(self, entry: Entry, problem: Problem, several: list[Problem], verb: str, share: float) -> None:
        """Build, check against float32 and run once more; the entry gets the work to time, or why there is none."""
        peer, row = entry.peer, entry.row
        row.status, row.reason = self.excuse(peer, problem, verb)
        if row.reason:
            return
        limit, began = max(self.left, 5.0), time.monotonic()
        if peer is not OURS and peer.name not in self.options.named:
            unspent = SET_UP_SECONDS - self.set_up.get(peer.name, 0.0)
            limit = min(limit, max(unspent, min(SET_UP_SECONDS, max(share, LEAST_SET_UP))))
        try:
            with time_limit(limit):
                self.check(entry, problem, verb)
                if self.slow[peer.name] > SLOW_SECONDS and verb != DECODE and not peer.compiles:
                    entry.once, row.reason = self.slow[peer.name], row.reason or "timed once, while it was checked"
                    return
                layer = self.layers[peer.name]
                if verb == DECODE:
                    layers = [layer, *(peer.build(each) for each in several[1:])]
                    entry.work, entry.repeats, remark = decode.work(layers, several, waits=peer.waits)
                    judge(row, entry.work(), wanted_of(layers[-1], several[-1], False))
                    row.reason = row.reason or remark
                else:
                    entry.work = both_of(layer, problem) if verb == BOTH else forward_of(layer, problem)
                self.warm(entry, verb)
        except TookTooLongError:
            row.status, row.reason, entry.work = SKIPPED, f"its set-up took longer than {limit:.0f} s", None
            self.gave_up[peer.name] = SKIPPED, f"{row.reason} for {problem.shape.name}"
        except Exception as error:  # a peer may fail in any way; the figures of the others stand
            row.status, row.reason, entry.work = FAILED, short(error), None
            self.ensure_gpu(peer.name)
            gc.collect()
        finally:
            self.set_up[peer.name] = self.set_up.get(peer.name, 0.0) + time.monotonic() - began

    def excuse(self, peer: Peer, problem: Problem, verb: str) -> tuple[str, str]:
        """Status and reason of an implementation that is not run; an empty reason means that it is run."""
        expected = 3 * self.slow.get(peer.name, 0.0)
        if self.options.device not in peer.devices:
            reason = f"runs on {' and '.join(peer.devices)} only"
        elif verb == BOTH and not peer.backward:
            reason = "has no backward pass"
        elif peer.name in self.gave_up:
            return self.gave_up[peer.name]
        elif verb == BOTH and expected > SLOW_SECONDS:
            reason = f"would take {expected:.0f} s a run, after its forward pass"
        else:
            reason = peer.missing(problem) or ""
        return SKIPPED, reason

    def check(self, entry: Entry, problem: Problem, verb: str) -> None:
        """The error against float32, and the bytes saved for the backward pass."""
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
        judge(row, results, wanted)
        if verb == BOTH:
            row.saved_bytes = saved_bytes(layer, problem)

    def warm(self, entry: Entry, verb: str) -> None:
        """Run once more, for the allocator and the caches, unless it is slow; on a GPU with its memory counted."""
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


def judge(row: Row, results: Results, wanted: Results) -> None:
    """Mark the row by the larger of its error so far and that of these results."""
    row.error = max(row.error or 0.0, results.error_against(wanted))
    allowed = ALLOWED[DTYPES[row.dtype]]
    row.status = OK if row.error <= allowed else WRONG
    if row.status == WRONG:
        row.reason = f"off by {row.error:.1e}, allowed {allowed:.1e}"


def seconds_left(options: Options, began: float) -> float:
    """Seconds left of the minutes for everything, counted from this time of the monotonic clock."""
    return 60 * options.minutes - (time.monotonic() - began)


def blank(case: Case, verb: str, implementation: str, device: str) -> Row:
    """A row of the case before anything is measured."""
    s = case.shape
    return Row(
        s.name, s.tokens, s.hidden, s.intermediate, s.experts, s.top_k, case.dtype, case.routing, device, verb,
        implementation, FAILED, sweep=case.sweep,
    )  # fmt: skip


def unmeasured(
    case: Case, verb: str, device: str, status: str, reason: str, names: Iterable[str] | None = None
) -> list[Row]:
    """One row for the ceiling and one per implementation of a case, or those with these names."""
    every = (CEILING, OURS.name, *(peer.name for peer in case.peers)) if names is None else names
    return [replace(blank(case, verb, name, device), status=status, reason=reason) for name in every]


def free_bytes() -> int:
    """Free bytes of the GPU's memory; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def short(error: BaseException) -> str:
    """An exception as one line for a table."""
    text = " ".join(str(error).split())
    name = "" if isinstance(error, TookTooLongError) else type(error).__name__ + (": " if text else "")
    return name + (text if len(text) <= 160 else text[:157] + "...")
