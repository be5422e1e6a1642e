"""Decode: the forward pass of few tokens, whose time is that of reading weights that no cache holds.

Several passes are timed as one, each over its own weights or, on a CPU, over other experts of the same weights: text
generation reads the weights of many layers before it returns to the first. On a GPU a CUDA graph holds the passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from moekern.bench.limits import TookTooLongError
from moekern.bench.peers.base import Layer, forward_of
from moekern.bench.problem import Problem, Results

STREAMED = 768 << 20  # bytes of active weights that a graph reads: many times the largest L2 cache
MOST_SETS = 12


def problems(problem: Problem, free_bytes: int) -> list[Problem]:
    """The problem, and others until `STREAMED` bytes are read: with other routing, on a GPU with other weights."""
    held = problem.w_gate_up.nbytes + problem.w_down.nbytes
    active = held * problem.active / problem.shape.experts
    sets = min(max(-(-STREAMED // int(active)), 2), MOST_SETS)
    if problem.device == "cpu":
        return [problem, *(problem.rerouted(seed) for seed in range(1, sets))]
    seeds = range(1, min(sets, free_bytes // 2 // held + 1))
    return [problem, *(Problem(problem.shape, problem.dtype, problem.device, problem.routing, s) for s in seeds)]


def work(layers: list[Layer], several: list[Problem], *, waits: bool = False) -> tuple[Callable[[], Results], int, str]:
    """The function to time, which gives the last pass's results; its number of passes; a remark if it is no CUDA graph.

    There is one layer per problem. `waits`: the host waits for the device in them, so that no graph can hold them.
    """
    passes = [forward_of(layer, problem) for layer, problem in zip(layers, several, strict=True)]

    def all_of_them() -> Results:
        return [run() for run in passes][-1]

    if several[0].device == "cpu":
        return all_of_them, len(passes), ""
    if waits:
        return all_of_them, len(passes), "no CUDA graph: it waits for the device"
    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exception says what failed
            with torch.cuda.graph(graph):
                results = all_of_them()
    except TookTooLongError:
        raise
    except Exception as error:
        torch.cuda.synchronize()
        return all_of_them, len(passes), f"no CUDA graph: {type(error).__name__}"

    def replay(kept: object = passes) -> Results:
        """The graph knows addresses only: `kept` holds the weights at these addresses."""
        graph.replay()
        return results

    return replay, len(passes), ""
