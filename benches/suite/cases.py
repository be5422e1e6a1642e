"""The problems of the suite, and the figures that it adds to each time.

The usual problem of a machine is one of its named shapes with uniform routing in bfloat16 on the fastest backend; from
there one thing at a time is varied: the routing, the dtype, the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

import moekern as mk
from moekern.bench.ceiling import Copy, Streamed, ceiling_of
from moekern.bench.problem import ALLOWED, DTYPES, Problem
from moekern.bench.routing import ROUTINGS
from moekern.bench.shapes import SHAPES, Shape
from moekern.bench.timing import Ceiling, Clock, clock_of, in_turns

ONCE = {"cpu": ["tiny"], "cuda": ["tiny"]}
ONCE_DECODE = {"cpu": ["tiny-decode"], "cuda": ["tiny-decode"]}
TIMED = {"cpu": ["cpu-small", "cpu-olmoe"], "cuda": ["olmoe-1b-7b", "qwen3-30b-a3b"]}
TIMED_DECODE = {"cpu": ["cpu-olmoe-decode-1"], "cuda": ["qwen3-decode-1", "qwen3-decode-64"]}
PARAMETERS = ("shape", "routing", "dtype", "backend")
SECONDS = 0.3  # of the timing against the ceiling


@dataclass(frozen=True)
class Case:
    """One problem on one backend."""

    shape: Shape
    routing: str
    dtype: str
    backend: str

    @property
    def device(self) -> str:
        return "cuda" if self.backend == "cuda" else "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def problem(self) -> Problem:
        return Problem(self.shape, self.torch_dtype, self.device, self.routing)

    @property
    def params(self) -> dict[str, Any]:
        """For the table of the record."""
        values = (self.shape.name, self.routing, self.dtype, self.backend)
        return dict(zip(PARAMETERS, values, strict=True))


def cases(once: bool, benchmark: str, names: Sequence[str] = ()) -> list[Any]:
    """Parameters for the fixture `case` of a benchmark; those of the GPU are marked so.

    Benchmarks of decode get decode shapes. Those of the layer and of the router do not vary the routing, which their
    own router decides.
    """
    decode, decides = "decode" in benchmark, "layer" in benchmark or "route" in benchmark
    found: list[Any] = []
    for device in ("cpu", "cuda"):
        usual = (ONCE_DECODE if once else TIMED_DECODE) if decode else (ONCE if once else TIMED)
        chosen = [name for name in names if SHAPES[name].decode == decode] if names else usual[device]
        for name in chosen:
            base = Case(SHAPES[name], "uniform", "bf16", device)
            varied = [base, *(replace(base, routing=way) for way in ROUTINGS if way != "uniform" and not decides)]
            varied.append(replace(base, dtype="fp32" if device == "cpu" else "fp16"))  # the dtypes that kernels serve
            if device == "cpu":
                varied.append(replace(base, backend="reference"))
            marks = [pytest.mark.gpu] if device == "cuda" else []
            found += [pytest.param(c, id="-".join(map(str, c.params.values())), marks=marks) for c in varied]
    return found


@cache
def memory_of(device: str) -> Copy:
    """Memory for rates, taken once."""
    return Copy(device)


@cache
def the_clock(device: str) -> Clock:
    return clock_of(device)


def streamed(case: Case, bytes: float) -> Ceiling:
    """The ceiling of work that only moves memory: a copy of as many bytes."""
    return Streamed(bytes, memory_of(case.device))


def of_verb(case: Case, problem: Problem, verb: str) -> Ceiling:
    """The ceiling of the experts, as `moekern bench` has it."""
    return ceiling_of(problem, verb, problem.bytes(verb), memory_of(case.device))


def run(
    benchmark: Any,
    case: Case,
    work: Callable[[], Any],
    ceiling: Callable[[], Ceiling],
    *,
    bytes: float,
    flops: float = 0.0,
    error: Callable[[Any], float] | None = None,
    saved: int | None = None,
    repeats: int = 1,
) -> Any:
    """Benchmark `work` on the case's backend, and add its cost and the ceiling of the machine.

    `error` gives the relative error of the result, which must be within the dtype's rounding.
    """
    on_gpu = case.device == "cuda"

    def whole() -> Any:
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        return result

    with mk.backend(case.backend):
        result = benchmark(whole)
        info = benchmark.extra_info
        info.update(case.params)
        if error is not None:
            info["error"] = error(result)
            assert info["error"] <= ALLOWED[case.torch_dtype]
        if not benchmark.enabled:
            return result
        info.update({**({"FLOPs": flops} if flops else {}), "minimum bytes": bytes})
        if on_gpu:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            whole()
            info["peak bytes"] = torch.cuda.max_memory_allocated() - held
        if saved is not None:
            info["saved bytes"] = saved
        pairs = in_turns({"work": (work, repeats)}, ceiling(), the_clock(case.device), SECONDS)["work"]
    seconds = pairs.quartiles[1]
    if flops:
        info["TFLOP/s"] = flops / seconds / 1e12
    info.update({"GB/s": bytes / seconds / 1e9, "of ceiling": pairs.share})
    return result
