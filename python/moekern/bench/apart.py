"""Measures in a process of its own, so that the loss of a GPU costs one figure and not all that follow.

After an illegal access, no call to the GPU succeeds in the process that made it. A crash or a hang ends the process.
The measuring process sends its rows one verb at a time. When it is lost, another one continues: without the peer that
was running, or, if several were, with moekern alone for that verb.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from moekern.bench.cases import Case, Options, cases
from moekern.bench.record import FAILED, MOEKERN, Machine, Row
from moekern.bench.runner import SET_UP_SECONDS, LostError, Session, Tick, seconds_left, short, unmeasured

SILENT_SECONDS = 60.0  # beyond the time that a peer may take to set up; then the process counts as hung
GRACE_SECONDS = 10.0  # for a finished process to end by itself
ROWS, DOING, MACHINE, LOST = "rows", "doing", "machine", "lost"


@contextmanager
def session_of(options: Options, tick: Tick) -> Iterator[Session | Apart]:
    """A session for this device: in this process on a CPU, in another process on a GPU."""
    if options.device == "cpu":
        yield Session(options, tick)
        return
    apart = Apart(options, tick)
    try:
        yield apart
    finally:
        apart.stop()


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside the block never see Ctrl-C, not even while they start; this one sees it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # first: it would clear the mask when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Apart:
    """A session in another process, which can be started again.

    Raises:
        OSError: The first process could not start; the message says why.
    """

    def __init__(self, options: Options, tick: Tick = lambda text: None) -> None:
        self.options, self.tick = options, tick
        self.began = time.monotonic()
        self.gave_up: dict[str, tuple[str, str]] = {}
        self.pending = deque(cases(options))
        self.owed: list[Row] = []  # of peers that lost the GPU together; sent with the next rows
        self.doing = ""  # named by the last message about progress
        kind, content = self.start()
        if kind != MACHINE:
            self.stop()
            raise OSError(f"{options.device} cannot be measured: {content[1]}")
        self.machine: Machine = content

    def start(self) -> tuple[str, Any]:
        """Start a process for the pending cases; gives its first message."""
        context = multiprocessing.get_context("spawn")
        self.link, theirs = context.Pipe(duplex=False)
        todo = list(self.pending)
        arguments = (theirs, self.options, todo, self.began, self.gave_up, torch.get_num_threads())
        self.process = context.Process(target=serve, args=arguments)
        with deaf_to_interrupts():
            self.process.start()
        theirs.close()
        self.doing = ""
        return self.receive()

    def stop(self) -> None:
        """End the process, whatever it does; a finished one may release its semaphores first."""
        if not self.pending:
            self.process.join(GRACE_SECONDS)
        self.process.kill()
        self.process.join()
        self.link.close()

    def receive(self) -> tuple[str, Any]:
        """The next message that is not about progress; LOST if the process is lost."""
        while True:
            limit = SILENT_SECONDS + SET_UP_SECONDS
            if self.doing in self.options.named:
                limit = max(limit, SILENT_SECONDS + seconds_left(self.options, self.began))
            try:
                if not self.link.poll(limit):
                    return LOST, (self.doing, f"it gave no sign of life for {limit:.0f} s")
                kind, content = self.link.recv()
            except (EOFError, OSError):
                self.process.join()
                return LOST, (self.doing, f"the process ended with {ending(self.process.exitcode)}")
            if kind != DOING:
                return kind, content
            text, self.doing = content
            self.tick(text)

    def run(self) -> Iterator[list[Row]]:
        """Give the rows of one verb of one case at a time."""
        while self.pending:
            kind, content = self.receive()
            if kind == ROWS:
                self.advance()
                yield [*content, *self.owed]
                self.owed = []
                continue
            yield from self.go_on_without(*content)
            self.stop()
            if not self.pending:
                return
            kind, content = self.start()
            if kind != MACHINE:
                while self.pending:
                    yield self.failed(content[1])

    def advance(self) -> None:
        """Drop the first verb of the first case, which is done."""
        case = self.pending.popleft()
        if case.verbs[1:]:
            self.pending.appendleft(replace(case, verbs=case.verbs[1:]))

    def go_on_without(self, culprit: str, reason: str) -> Iterator[list[Row]]:
        """Change the pending cases so that the loss is not repeated; gives the rows that are lost for good."""
        case = self.pending[0]
        verb = case.verbs[0]
        reason = f"lost in {case.shape.name}, {verb}: {reason}"
        names = [peer.name for peer in case.peers]
        if culprit in names and culprit not in self.gave_up:
            self.gave_up[culprit] = FAILED, reason
        elif names and culprit != MOEKERN:
            self.owed += unmeasured(case, verb, self.options.device, FAILED, f"together {reason}", names)
            self.advance()
            self.pending.appendleft(replace(case, verbs=(verb,), peers=()))
        else:
            yield self.failed(reason)

    def failed(self, reason: str) -> list[Row]:
        """Drop the first verb of the first case; gives rows that say why it was not measured."""
        case = self.pending[0]
        rows = [*unmeasured(case, case.verbs[0], self.options.device, FAILED, reason), *self.owed]
        self.owed = []
        self.advance()
        return rows


def serve(
    link: Connection,
    options: Options,
    todo: list[Case],
    began: float,
    gave_up: dict[str, tuple[str, str]],
    threads: int,
) -> None:
    """Run in the other process: measure, and send rows, progress and errors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    session = None

    def tick(text: str) -> None:
        link.send((DOING, (text, session.preparing if session else "")))

    try:
        torch.set_num_threads(threads)
        session = Session(options, tick, began, gave_up)
        link.send((MACHINE, session.machine))
        for rows in session.run(todo):
            link.send((ROWS, rows))
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        culprit, reason = (error.culprit, error.reason) if isinstance(error, LostError) else ("", short(error))
        link.send((LOST, (culprit, reason)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: after the loss of a GPU the destructor of every object complains


def ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
