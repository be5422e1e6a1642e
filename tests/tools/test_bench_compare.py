"""Comparison of two records: changes, their display, and failures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from made_up_records import MACHINE, record, row, without_time
from moekern.bench.compare import Comparison, compare
from moekern.bench.record import CEILING, DECODE, FAILED, FORWARD, MOEKERN, OK, SKIPPED, WRONG, Record, Row

SHAPE = "mixtral-8x7b"


def recorded(*rows: Row, **machine: Any) -> Record:
    return Record("2030-01-02T03:04:05+00:00", "moekern bench", replace(MACHINE, **machine), list(rows))


def timed(seconds: float, spread: float = 0.01, implementation: str = MOEKERN, **changes: Any) -> Row:
    times = {"seconds": seconds, "low": seconds * (1 - spread), "high": seconds * (1 + spread)}
    return row(SHAPE, FORWARD, implementation, **(times | changes))


def test_a_record_against_itself() -> None:
    outcome = compare(record(), record())
    assert not outcome.regressed
    assert not outcome.warnings
    assert not outcome.vanished
    assert not outcome.appeared
    assert {change.ratio for change in outcome.changes if change.new.seconds} == {1.0}
    assert {change.verdict for change in outcome.changes} == {""}
    assert "; 0 regressed, 0 faster" in outcome.verdict()


@pytest.mark.parametrize(
    ("factor", "spread", "verdict"),
    [(1.1, 0.01, "slower"), (0.9, 0.01, "faster"), (1.1, 0.08, ""), (0.9, 0.08, ""), (1.015, 0.001, "")],
    ids=["slower", "faster", "slower within the scatter", "faster within the scatter", "less than two runs differ"],
)
def test_beyond_the_scatter(factor: float, spread: float, verdict: str) -> None:
    outcome = compare(recorded(timed(1.0, spread)), recorded(timed(factor, spread)))
    assert outcome.changes[0].ratio == pytest.approx(factor)
    assert outcome.changes[0].verdict == verdict
    assert outcome.regressed == (verdict == "slower")


def test_the_drift_of_the_ceiling_excuses() -> None:
    """A machine that became a tenth slower slows everything; a fifth is more than that."""
    old = recorded(timed(1.0), timed(0.9, implementation=CEILING))
    assert not compare(old, recorded(timed(1.1), timed(0.99, implementation=CEILING))).regressed
    assert compare(old, recorded(timed(1.2), timed(0.99, implementation=CEILING))).regressed
    # A faster machine excuses nothing, and makes nothing faster.
    faster = compare(old, recorded(timed(0.9), timed(0.81, implementation=CEILING)))
    assert [change.verdict for change in faster.changes] == ["", "faster"]


def test_only_moekern_regresses() -> None:
    outcome = compare(recorded(timed(1.0, implementation="peer")), recorded(timed(2.0, implementation="peer")))
    assert outcome.changes[0].verdict == "slower"
    assert not outcome.regressed
    assert "nothing to compare" in outcome.verdict()


@pytest.mark.parametrize(("status", "regressed"), [(WRONG, True), (FAILED, True), (SKIPPED, False)])
def test_status(status: str, regressed: bool) -> None:
    new = recorded(row(SHAPE, FORWARD, MOEKERN, **without_time(status, "a reason")))
    outcome = compare(recorded(timed(1.0)), new)
    assert outcome.regressed == regressed
    assert f"{OK} -> {status}: a reason" in outcome.text()
    assert not compare(new, recorded(timed(1.0))).regressed


@pytest.mark.parametrize(("before", "after"), [(OK, WRONG), (WRONG, OK)])
def test_what_is_wrong_is_neither_fast_nor_slow(before: str, after: str) -> None:
    outcome = compare(recorded(timed(1.0, status=before)), recorded(timed(0.5, status=after)))
    assert outcome.changes[0].verdict == ""
    assert outcome.regressed == (after == WRONG)


def test_memory() -> None:
    old, more = recorded(timed(1.0, saved_bytes=1000)), recorded(timed(1.0, saved_bytes=1500))
    outcome = compare(old, more)
    assert outcome.regressed
    assert "REGRESSED; saved 1.00 kB -> 1.50 kB" in outcome.text()
    back = compare(more, old)
    assert not back.regressed
    assert back.changes[0].notes == ["saved 1.50 kB -> 1.00 kB"]


def test_times_without_quartiles_are_not_judged() -> None:
    bare = {"low": None, "high": None}
    outcome = compare(recorded(timed(1.0, **bare)), recorded(timed(2.0, **bare)))
    assert outcome.changes[0].verdict == "?"
    assert not outcome.regressed


def test_rows_of_one_record_only() -> None:
    gone, come = row("qwen3-decode-1", DECODE, MOEKERN), timed(1.0, implementation="peer")
    outcome = compare(recorded(gone, timed(1.0)), recorded(come, timed(1.0)))
    assert outcome.vanished == [gone]
    assert outcome.appeared == [come]
    text = outcome.text()
    assert "no longer measured: qwen3-decode-1 (bf16), decode, moekern: " in text
    assert "new: mixtral-8x7b (bf16), forward, peer: 1.00 s" in text


def test_other_machines_are_warned_of() -> None:
    outcome = compare(recorded(timed(1.0)), recorded(timed(1.0), gpu="Another", commit="def", copy_gbps=1.0))
    assert len(outcome.warnings) == 1
    assert "gpu 'Some GPU', now 'Another'" in outcome.text().splitlines()[0]


def test_table() -> None:
    lines = compare(recorded(timed(1.0, share=0.9)), recorded(timed(0.5, share=0.95))).text().splitlines()
    assert lines[0].split() == ["old", "new", "new/old", "of", "ceiling"]
    assert lines[1].split() == [
        "mixtral-8x7b", "(bf16)", "forward", "moekern", "1.00", "s", "500", "ms", "0.500", "0.90", "->", "0.95",
        "faster",
    ]  # fmt: skip
    assert lines[2] == "moekern: 1 rows compared, new/old 0.500 in geometric mean; 0 regressed, 1 faster."


def test_nothing() -> None:
    assert Comparison([], [], []).text() == "No row of moekern is in both records: nothing to compare."
