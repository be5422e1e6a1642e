"""moekern itself, measured by the same rules as its peers."""

from __future__ import annotations

from torch import Tensor

import moekern as mk
from moekern.bench.peers.base import Layer, Peer
from moekern.bench.problem import Problem
from moekern.bench.record import MOEKERN


class Moekern(Peer):
    """`moekern.experts`, planning included."""

    name = MOEKERN
    about = "moekern.experts"
    compiles = True  # kernels that are not in the machine's cache yet

    def build(self, problem: Problem) -> Layer:
        def forward(x: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            return mk.experts(x, problem.ids, scores, w_gate_up, w_down)

        return Layer(forward, (problem.w_gate_up, problem.w_down))
