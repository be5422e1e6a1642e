"""Decode: the forward pass of few tokens, which is the time of reading weights that no cache holds.

Several passes are timed as one, each over weights of its own or, on a CPU, over other experts of the same weights: text
generation reads the weights of many layers before it comes back to the first. On a GPU a CUDA graph holds the passes.
"""

from __future__ import annotations

import warnings

import torch

from moekern.bench.peers.base import Peer, forward_of
from moekern.bench.problem import Problem
from moekern.bench.timing import Work

STREAMED = 768 << 20  # bytes of active weights that a graph reads: many times the largest L2
MOST_SETS = 12


def problems(problem: Problem, free_bytes: int) -> list[Problem]:
    """The problem and as many like it, with other routing and on a GPU other weights, as `STREAMED` asks for."""
    held = problem.w_gate_up.nbytes + problem.w_down.nbytes
    active = held * problem.active / problem.shape.experts
    sets = min(max(-(-STREAMED // int(active)), 2), MOST_SETS)
    if problem.device == "cpu":
        return [problem, *(problem.rerouted(seed) for seed in range(1, sets))]
    seeds = range(1, min(sets, free_bytes // 2 // held + 1))
    return [problem, *(Problem(problem.shape, problem.dtype, problem.device, problem.routing, s) for s in seeds)]


def work(peer: Peer, several: list[Problem]) -> tuple[Work, int, str]:
    """What to time, how many passes it makes, and a remark if it runs without a CUDA graph."""
    passes = [forward_of(peer.build(problem), problem) for problem in several]

    def all_of_them() -> None:
        for run in passes:
            run()

    if several[0].device == "cpu":
        return all_of_them, len(passes), ""
    if peer.waits:
        return all_of_them, len(passes), "no CUDA graph: it waits for the device"
    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what fails is told by the exception
            with torch.cuda.graph(graph):
                all_of_them()
    except Exception as error:
        torch.cuda.synchronize()
        return all_of_them, len(passes), f"no CUDA graph: {type(error).__name__}"

    def replay(kept: object = passes) -> None:
        """The graph knows addresses only: `kept` holds the weights that are there."""
        graph.replay()

    return replay, len(passes), ""
