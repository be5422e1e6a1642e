"""Implementations for the tests of `moekern bench`, each with its own defect."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import torch

from moekern.bench import peers
from moekern.bench.peers import Layer, Peer
from moekern.bench.problem import Problem


class Broken(Peer):
    """Forgets the router's weights."""

    name, about = "broken", "a wrong implementation"

    def build(self, problem: Problem) -> Layer:
        ours = peers.OURS.build(problem)
        return replace(ours, forward=lambda x, scores, *weights: ours.forward(x, scores * 0 + 1, *weights))


class Raising(Peer):
    name, about = "raising", "an implementation that cannot be built"

    def build(self, problem: Problem) -> Layer:
        raise ImportError("its\nlibrary is older than this one needs")


class Absent(Peer):
    name, about = "absent", "an implementation that is not installed"

    def missing(self, problem: Problem) -> str | None:
        return "absent is not installed"

    def build(self, problem: Problem) -> Layer:
        raise AssertionError


class Sleeping(Peer):
    name, about = "sleeping", "an implementation that tunes for minutes"

    def build(self, problem: Problem) -> Layer:
        time.sleep(100)
        raise AssertionError


class Deadly(Peer):
    """Ends the process that builds it, as a crash in a library does."""

    name, about = "deadly", "an implementation that crashes"

    def build(self, problem: Problem) -> Layer:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Losing(Peer):
    """Reads past the end of a tensor on the GPU, after which no call to it succeeds in this process."""

    name, about = "losing", "an implementation that loses the GPU"

    def build(self, problem: Problem) -> Layer:
        beyond = torch.tensor([1 << 20], device=problem.device)

        def forward(x: torch.Tensor, scores: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            return x[beyond]

        return Layer(forward, (problem.w_gate_up, problem.w_down))
