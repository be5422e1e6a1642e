"""A session of `moekern bench`: implementations that are checked, timed, stopped, skipped, and their messages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from made_up_peers import Absent, Broken, Raising, Sleeping
from moekern.bench import cases, limits, peers, record, runner, shapes, timing
from moekern.bench.peers import Layer, Peer
from moekern.bench.problem import ALLOWED, Problem
from moekern.bench.record import BOTH, CEILING, DECODE, FAILED, FORWARD, OK, SKIPPED, VERBS, WRONG, Row

pytestmark = pytest.mark.usefixtures("small_and_quick")
TINY = shapes.SHAPES["tiny"]


def measure(*implementations: Peer, **options: object) -> dict[tuple[str, str], Row]:
    """One case; rows by verb and implementation."""
    chosen = {"shapes": (TINY,), "peers": implementations, "device": "cpu", "dtypes": ("fp32",), "seconds": 0.01}
    rows = [row for each in runner.Session(cases.Options(**{**chosen, **options})).run() for row in each]
    return {(row.verb, row.implementation): row for row in rows}


def test_saved_bytes_are_those_of_the_design() -> None:
    """x and the pre-activation, 2 T H + 4 T K I bytes in bf16, and also router weights and plan."""
    row = measure(dtypes=("bf16",))[BOTH, "moekern"]
    design = 2 * TINY.tokens * TINY.hidden + 4 * TINY.slots * TINY.intermediate
    plan = 4 * TINY.slots + 2 * 4 * TINY.slots + 4 * (TINY.experts + 1)
    assert row.saved_bytes == design + plan


def test_what_cannot_run_has_a_reason() -> None:
    rows = measure(Broken(), Raising(), Absent(), peers.PEERS["scattermoe"], peers.PEERS["llama.cpp"])
    assert {row.status for (_, name), row in rows.items() if name in ("moekern", CEILING)} == {OK}
    for verb in (FORWARD, BOTH):
        wrong, raising, absent = rows[verb, "broken"], rows[verb, "raising"], rows[verb, "absent"]
        assert (wrong.status, raising.status, absent.status) == (WRONG, FAILED, SKIPPED)
        assert wrong.error is not None
        assert wrong.error > ALLOWED[torch.float32]
        assert raising.reason == "ImportError: its library is older than this one needs"
        assert absent.reason == "absent is not installed"
        assert (rows[verb, "scattermoe"].status, rows[verb, "scattermoe"].reason) == (SKIPPED, "runs on cuda only")
    assert rows[BOTH, "llama.cpp"].reason == "has no backward pass"


def test_a_long_set_up_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SET_UP_SECONDS", 0.2)
    rows = measure(Sleeping())
    assert rows[FORWARD, "sleeping"].reason == "its set-up took longer than 0 s"
    assert rows[BOTH, "sleeping"].reason == "its set-up took longer than 0 s for tiny"
    assert rows[BOTH, "moekern"].status == OK


def test_a_named_peer_may_take_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    limits_given: dict[str, float] = {}

    @contextmanager
    def time_limit(seconds: float) -> Iterator[None]:
        limits_given[session.preparing] = seconds
        yield

    monkeypatch.setattr(runner, "time_limit", time_limit)
    named = frozenset(["dense"])
    peers_here = (peers.PEERS["dense"], peers.PEERS["grouped_mm"])
    session = runner.Session(cases.Options((TINY,), peers_here, "cpu", verbs=(FORWARD,), minutes=30, named=named))
    assert list(session.run())
    assert 1700 < limits_given["dense"] < 1800
    assert 0 < limits_given["grouped_mm"] <= 60


def test_time_limit_leaves_nothing_behind() -> None:
    with limits.time_limit(100):
        pass
    with pytest.raises(limits.TookTooLongError), limits.time_limit(0.01):
        time.sleep(10)


def test_after_the_time_limit_rows_are_skipped() -> None:
    rows = measure(minutes=1e-9)
    assert {row.status for row in rows.values()} == {SKIPPED}
    assert all("(--minutes)" in row.reason for row in rows.values())
    assert set(rows) == {(verb, name) for verb in (FORWARD, BOTH) for name in (CEILING, "moekern")}


def test_a_case_that_fails_costs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example for lack of memory; the later ones are measured."""
    real = runner.ceiling_of

    def fail(problem: Problem, verb: str, *rest: object) -> object:
        if verb == FORWARD:
            raise MemoryError("no room")
        return real(problem, verb, *rest)

    monkeypatch.setattr(runner, "ceiling_of", fail)
    rows = measure()
    assert {(row.status, row.reason) for (verb, _), row in rows.items() if verb == FORWARD} == {
        (FAILED, "MemoryError: no room")
    }
    assert {row.status for (verb, _), row in rows.items() if verb == BOTH} == {OK}


def test_sweeps() -> None:
    """Each varies one size, keeps the name, and holds the shape's own size."""
    shape = shapes.SHAPES["olmoe-1b-7b"]
    assert [s.tokens for s in cases.sweep_of(shape, "tokens")] == [512, 2048, 8192, 32768]
    assert [s.experts for s in cases.sweep_of(shape, "experts")] == [16, 32, 64, 128]
    assert [s.top_k for s in cases.sweep_of(shape, "top_k")] == [1, 2, 4, 8, 16]
    assert {s.name for s in cases.sweep_of(shape, "top_k")} == {"olmoe-1b-7b"}
    assert [s.experts for s in cases.sweep_of(TINY, "experts")] == [2, 4, 8, 16]
    assert [s.top_k for s in cases.sweep_of(shape, "top_k", coarse=True)] == [1, 4, 16]
    assert [s.tokens for s in cases.sweep_of(replace(TINY, tokens=2), "tokens", coarse=True)] == [2]
    session = runner.Session(cases.Options(
        (), (peers.PEERS["grouped_mm"], peers.PEERS["dense"]), "cpu", ("fp32",), sweeps=("top_k",), swept=(TINY,),
        verbs=(FORWARD,), seconds=0.01,
    ))  # fmt: skip
    rows = [row for each in session.run() for row in each]
    assert [(row.top_k, row.implementation, row.sweep) for row in rows] == [
        (k, name, "top_k") for k in (1, 2, 4, 8) for name in (CEILING, "moekern", "grouped_mm")
    ]


def test_what_is_timed_in_decode_is_checked() -> None:
    """The pass over the first experts may be right and the last of those that are timed wrong."""
    first: list[Layer] = []

    class Stale(Peer):
        name, about = "stale", "an implementation that keeps what it saw first"

        def build(self, problem: Problem) -> Layer:
            first.append(peers.OURS.build(problem))
            return first[0]

    row = measure(Stale(), shapes=(shapes.SHAPES["tiny-decode"],))[DECODE, "stale"]
    assert row.status == WRONG
    assert row.error is not None
    assert row.error > 0.1


def test_what_is_slow_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SLOW_SECONDS", 1e-9)
    row = measure(peers.PEERS["dense"], verbs=(FORWARD,))[FORWARD, "dense"]
    assert (row.status, row.runs, row.reason) == (OK, 1, "timed once, while it was checked")
    assert row.seconds == row.low == row.high
    assert row.share is not None


def test_figures_of_pairs() -> None:
    """The share is the median of ratios, so that a slow minute, which slows both, does not count."""
    pairs = timing.Pairs(own=[1.0, 2.0, 4.0], base=[0.5, 1.0, 2.2])
    assert pairs.share == 0.5
    assert pairs.quartiles == (1.5, 2.0, 3.0)
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_slow_work_runs_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_ROUNDS", 40)

    class Fake:
        """A clock on which work takes the seconds that it returns."""

        def __call__(self, work: Callable[[], object]) -> Callable[[], float]:
            seconds = work()
            return lambda: seconds

        def wait(self) -> None:
            pass

    runs = {"quick": (lambda: 0.002, 2), "slow": (lambda: 0.4, 1), "very slow": (lambda: 9.0, 1)}
    pairs = timing.in_turns(runs, lambda clock: clock(lambda: 1.0), Fake(), 1.0)
    assert {name: len(each.own) for name, each in pairs.items()} == {"quick": 40, "slow": 3, "very slow": 1}
    assert pairs["quick"].own[0] == 0.001
    assert pairs["slow"].share == 2.5
    ceilings = {name: lambda clock, at=at: clock(lambda: at) for name, at in (("quick", 0.004), ("slow", 0.2))}
    pairs = timing.in_turns({name: runs[name] for name in ceilings}, ceilings, Fake(), 0.0, rounds=5)
    assert {name: (len(each.own), each.share) for name, each in pairs.items()} == {"quick": (5, 4.0), "slow": (5, 0.5)}


def test_record_of_a_case_holds_all_verbs() -> None:
    rows = measure(verbs=tuple(VERBS))
    assert {verb for verb, _ in rows} == set(VERBS)
    assert json.dumps([record.rounded(vars(row)) for row in rows.values()])
