"""The cases of a run of `moekern bench`: shapes, routings, dtypes and series, each with its verbs and peers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moekern.bench.peers import Peer
from moekern.bench.record import BOTH, DECODE, FORWARD
from moekern.bench.shapes import Shape

SWEPT_PEERS = ("grouped_mm", "scattermoe", "sonicmoe")  # the peers that are measured in series


@dataclass(frozen=True)
class Options:
    """The choices of one run.

    Attributes:
        named: Peers that may take all the time left to build, tune and compile; others have a minute.
        sweeps, swept: Series over these sizes of these shapes. coarse: Three sizes per series.
        seconds: Per figure, about. rounds: This many runs of each instead.
        minutes: For everything; cases that would begin later are skipped.
    """

    shapes: tuple[Shape, ...]
    peers: tuple[Peer, ...]
    device: str
    dtypes: tuple[str, ...] = ("bf16",)
    routings: tuple[str, ...] = ("uniform",)
    verbs: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()
    swept: tuple[Shape, ...] = ()
    coarse: bool = False
    seconds: float = 1.0
    minutes: float = 7.0
    named: frozenset[str] = frozenset()
    rounds: int | None = None


@dataclass(frozen=True)
class Case:
    """One problem, with the verbs and peers to measure on it."""

    shape: Shape
    dtype: str
    routing: str
    verbs: tuple[str, ...]
    peers: tuple[Peer, ...]
    sweep: str | None = None

    @property
    def steps(self) -> int:
        """The number of rows that it gives."""
        return len(self.verbs) * (2 + len(self.peers))


def cases(options: Options) -> list[Case]:
    """All cases to measure, in order."""
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
                for each in sweep_of(shape, sweep, options.coarse)
            ]
    return found


def sweep_of(shape: Shape, sweep: str, coarse: bool = False) -> list[Shape]:
    """The shape with one size varied in steps of 4 (tokens) or 2, its own included; if coarse, ends and middle."""
    if sweep == "tokens":
        sizes = [shape.tokens // 64, shape.tokens // 16, shape.tokens // 4, shape.tokens]
    elif sweep == "experts":
        sizes = [n for n in (shape.experts // 4, shape.experts // 2, shape.experts, 2 * shape.experts)
                 if n >= shape.top_k]  # fmt: skip
    else:
        sizes = [n for n in (1, 2, 4, 8, 16) if n <= shape.experts]
    sizes = list(dict.fromkeys(size for size in sizes if size >= 1))
    if coarse:
        sizes = list(dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])))
    changes: list[dict[str, Any]] = [{sweep: size} for size in sizes]
    return [replace(shape, **change) for change in changes]
