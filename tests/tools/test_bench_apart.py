"""Measuring in a process of its own: a peer that takes the process with it costs its own figures only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from made_up_peers import Deadly, Losing
from moekern.bench import apart, peers, shapes
from moekern.bench.apart import DOING, LOST, MACHINE, ROWS, Apart, session_of
from moekern.bench.cases import Options
from moekern.bench.facts import machine_of
from moekern.bench.record import BOTH, CEILING, DECODE, FAILED, FORWARD, MOEKERN, OK, Row
from moekern.bench.runner import LostError, Session, unmeasured

TINY = shapes.SHAPES["tiny"]


def test_a_crash_costs_no_other_figure() -> None:
    """The rows are those of one process, but for the peer's; its second verb is not tried."""
    options = Options((TINY,), (Deadly(), peers.PEERS["grouped_mm"]), "cpu", ("fp32",), rounds=1)
    session, said = Apart(options), []
    session.tick = said.append
    try:
        rows = {(row.verb, row.implementation): row for each in session.run() for row in each}
    finally:
        session.stop()
    assert session.machine.copy_gbps
    assert set(rows) == {(v, n) for v in (FORWARD, BOTH) for n in (CEILING, MOEKERN, "deadly", "grouped_mm")}
    for (_, name), row in rows.items():
        assert row.status == (FAILED if name == "deadly" else OK)
        if name == "deadly":
            assert row.reason == "lost in tiny, forward: the process ended with SIGKILL"
    assert said[:2] == ["tiny forward moekern", "tiny forward deadly"]


@pytest.mark.gpu
def test_a_lost_gpu_costs_no_other_figure() -> None:
    """A peer before it and one behind it are measured, in both verbs and in decode."""
    chosen = (peers.PEERS["dense"], Losing(), peers.PEERS["grouped_mm"])
    options = Options((TINY, shapes.SHAPES["tiny-decode"]), chosen, "cuda", rounds=1)
    with session_of(options, lambda text: None) as session:
        rows = [row for each in session.run() for row in each]
    assert [(row.verb, row.implementation) for row in rows] == [
        (verb, name) for verb in (FORWARD, BOTH, DECODE) for name in (CEILING, MOEKERN, "dense", "losing", "grouped_mm")
    ]
    for row in rows:
        assert row.status == (FAILED if row.implementation == "losing" else OK), row
        if row.status == FAILED:
            assert row.reason.startswith("lost in tiny, forward: ")


def test_a_session_on_a_cpu_is_in_this_process() -> None:
    with session_of(Options((), (), "cpu"), lambda text: None) as session:
        assert isinstance(session, Session)


def scripted(monkeypatch: pytest.MonkeyPatch, options: Options, *lives: list[tuple[str, Any]]) -> list[list[Row]]:
    """The rows of a session whose processes say this, one list per process; a process knows the pending cases."""
    waiting = iter(lives)
    pending: list[Any] = []

    def start(session: Apart) -> tuple[str, Any]:
        session.now = iter(next(waiting))
        pending.append((list(session.pending), dict(session.gave_up)))
        return session.receive()

    def receive(session: Apart) -> tuple[str, Any]:
        return next(session.now)

    monkeypatch.setattr(Apart, "start", start)
    monkeypatch.setattr(Apart, "receive", receive)
    monkeypatch.setattr(Apart, "stop", lambda session: None)
    rows = list(Apart(options).run())
    assert list(waiting) == []
    scripted.pending = pending
    return rows


BEGUN = (MACHINE, machine_of("cpu"))


def measured(*names: str) -> tuple[str, list[Row]]:
    case = next(iter(apart.cases(Options((TINY,), (), "cpu"))))
    return ROWS, unmeasured(case, FORWARD, "cpu", OK, "", names)


def outcome(rows: list[Row]) -> dict[str, tuple[str, str]]:
    return {row.implementation: (row.status, row.reason) for row in rows}


def test_several_at_work_are_left_out_of_that_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options((TINY,), (peers.PEERS["dense"],), "cpu")
    first, second = scripted(
        monkeypatch, options, [BEGUN, (LOST, ("", "illegal access"))],
        [BEGUN, measured(CEILING, MOEKERN), measured(CEILING, MOEKERN, "dense")],
    )  # fmt: skip
    assert outcome(first) == {
        CEILING: (OK, ""), MOEKERN: (OK, ""), "dense": (FAILED, "together lost in tiny, forward: illegal access"),
    }  # fmt: skip
    assert outcome(second) == dict.fromkeys((CEILING, MOEKERN, "dense"), (OK, ""))
    (alone, rest), gave_up = scripted.pending[1]
    assert (alone.verbs, alone.peers, rest.verbs, rest.peers) == ((FORWARD,), (), (BOTH,), options.peers)
    assert gave_up == {}


@pytest.mark.parametrize("culprit", [MOEKERN, ""])
def test_what_fails_alone_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, culprit: str) -> None:
    """moekern itself, or a case without peers to leave out."""
    options = Options((TINY,), (peers.PEERS["dense"],) if culprit else (), "cpu")
    loss = (LOST, (culprit, "illegal access"))
    first, second = scripted(monkeypatch, options, [BEGUN, loss], [BEGUN, measured(CEILING, MOEKERN)])
    assert set(outcome(first).values()) == {(FAILED, "lost in tiny, forward: illegal access")}
    assert outcome(second)[MOEKERN] == (OK, "")
    assert [case.verbs for case in scripted.pending[1][0]] == [(BOTH,)]


def test_a_gpu_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options((TINY, shapes.SHAPES["tiny-decode"]), (), "cpu")
    found = scripted(monkeypatch, options, [BEGUN, (LOST, (MOEKERN, "a"))], [(LOST, ("", "no device"))])
    assert [row.reason for rows in found for row in rows if row.implementation == MOEKERN] == [
        "lost in tiny, forward: a", "no device", "no device",
    ]  # fmt: skip
    with pytest.raises(OSError, match="cpu cannot be measured: no device"):
        scripted(monkeypatch, options, [(LOST, ("", "no device"))])


@pytest.mark.parametrize(("named", "seconds"), [((), 120), (("deadly",), 1860)])
def test_a_hang_is_a_loss(named: tuple[str, ...], seconds: int) -> None:
    """A named peer may tune as long as there is time."""

    class Link:
        """Says what it does, and then nothing."""

        said = iter([(DOING, ("tiny forward deadly", "deadly"))])

        def __init__(self) -> None:
            self.waiting: Iterator[bool] = iter([True, False])

        def poll(self, seconds: float) -> bool:
            return next(self.waiting)

        def recv(self) -> tuple[str, Any]:
            return next(self.said)

    session = object.__new__(Apart)
    session.options, session.began = Options((), (), "cpu", minutes=30, named=frozenset(named)), time.monotonic()
    session.link, session.tick, session.doing = Link(), lambda text: None, ""
    assert session.receive() == (LOST, ("deadly", f"it gave no sign of life for {seconds} s"))


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks here")
def test_ctrl_c_while_the_process_starts_reaches_this_one_alone() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    started = []

    def start() -> None:
        with apart.deaf_to_interrupts():
            started.append(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True))
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start()
    (process,) = started
    assert process.communicate(timeout=60)[0] == "alive\n"
    assert process.returncode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_the_process_tells_why_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Link:
        send = staticmethod(sent.append)

    def run(session: Session, todo: object) -> Iterator[list[Row]]:
        raise LostError("dense", "illegal access")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr(os, "_exit", end)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            apart.serve(Link(), Options((), (), "cpu"), [], 0.0, {}, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sent[1:] == [(LOST, ("dense", "illegal access"))]
    assert apart.ending(-11) == "SIGSEGV"
    assert apart.ending(3) == "exit code 3"
