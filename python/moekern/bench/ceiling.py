"""The best that the machine could do, measured next to the work that is compared with it.

On a GPU the ceiling of a verb is cuBLAS doing dense matrix products of the same FLOPs over all rows: no gather, no
activation, one expert's weights. The ceiling of decode is a copy on the device, in bytes read and written. On a CPU the
ceiling is the larger of two times for each product: torch's dense matmul of the same FLOPs (in bfloat16 where the CPU
multiplies bfloat16 pairs, else in float32), and the bytes of the weights over the rate at which memory is read, or, for
gradients of weights, over the rate of writes past the caches. For decode it is the second time alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moekern import _core
from moekern.bench.problem import Problem
from moekern.bench.record import BOTH, DECODE
from moekern.bench.timing import Ceiling, Clock, Wait

COPIED = 512 << 20  # bytes read, and as many written: ten times a large L2 cache
SCANNED = 192 << 20
RECENT = 5  # this many scans are of the same minute; the median ignores a disturbed one


def ceiling_of(problem: Problem, verb: str, bytes: float, memory: Copy) -> Ceiling:
    """The ceiling of this verb of this problem, which moves at least this many bytes."""
    if problem.device == "cpu":
        return Bound(problem, verb, memory)
    return Streamed(bytes, memory) if verb == DECODE else Dense(problem, verb)


class Copy:
    """Memory to measure rates with: of a copy, and on a CPU of reading and of writing alone."""

    def __init__(self, device: str) -> None:
        bytes = COPIED if device == "cuda" else SCANNED
        if device == "cuda":
            self.memory = torch.ones(2 * bytes, dtype=torch.uint8, device=device)
        else:
            # On huge pages: the rate of the memory, without the time for walking page tables.
            pages: Any = _core.Pages(2 * bytes)
            self.memory = torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
        self.source, self.target = self.memory.split(bytes)
        self.rates: dict[bool, list[float]] = {False: [], True: []}

    @property
    def moved(self) -> int:
        """The number of bytes that a copy reads and writes."""
        return self.memory.numel()

    def run(self) -> None:
        self.target.copy_(self.source)

    def rate(self, write: bool) -> float:
        """Bytes per second of a CPU's memory: measured now; the median of this and the last few measurements."""
        start, bytes = self.source.data_ptr(), self.source.numel()
        self.rates[write].append(_core.memory_rate(start, bytes, torch.get_num_threads(), write))
        return statistics.median(self.rates[write][-RECENT:])

    def gbps(self, clock: Clock) -> float:
        """10^9 bytes per second of a copy, bytes read and bytes written both counted; the best of several runs."""
        self.run()
        waits = [clock(self.run) for _ in range(5)]
        clock.wait()
        return self.moved / min(wait() for wait in waits) / 1e9


class Dense:
    """Matrix products of all rows with one expert's weights, each into memory that is allocated already.

    Attributes:
        products: A stand-in for each product of the layer, by name: up, down, and of the backward pass dh (the gradient
            of the pre-activation), dgrad (of the rows), dw_down and dw_gate_up.
    """

    def __init__(self, problem: Problem, verb: str) -> None:
        s = problem.shape

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=problem.device, dtype=problem.dtype)

        rows, inner = normal(s.slots, s.hidden), normal(s.slots, s.intermediate)
        gate, down = problem.w_gate_up[0, : s.intermediate], problem.w_down[0]
        half, wide = torch.empty_like(inner), torch.empty_like(rows)
        d_gate, d_down = torch.empty_like(gate), torch.empty_like(down)

        def mm(a: Tensor, b: Tensor, out: Tensor, times: int = 1) -> Callable[[], object]:
            return lambda: [torch.mm(a, b, out=out) for _ in range(times)]

        self.products = {"up": mm(rows, gate.T, half, 2), "down": mm(inner, down.T, wide)}
        if verb == BOTH:
            self.products |= {
                "dh": mm(rows, down, half),
                "dgrad": mm(inner, gate, wide, 2),
                "dw_down": mm(rows.T, inner, d_down),
                "dw_gate_up": mm(inner.T, rows, d_gate, 2),
            }

    def __call__(self, clock: Clock) -> Wait:
        return clock(self.run)

    def run(self, names: Iterable[str] = ()) -> None:
        """Run all products, or those of these names."""
        for name in names or self.products:
            self.products[name]()


class Streamed:
    """The time in which a copy moves this many bytes, read and written ones counted."""

    def __init__(self, bytes: float, copy: Copy) -> None:
        self.copy, self.scale = copy, bytes / copy.moved

    def __call__(self, clock: Clock) -> Wait:
        wait = clock(self.copy.run)
        return lambda: wait() * self.scale


class Bound:
    """The sum, over a verb's products, of the larger of two times that are measured at the same moment."""

    def __init__(self, problem: Problem, verb: str, memory: Copy) -> None:
        s, size = problem.shape, problem.dtype.itemsize
        self.memory, self.decode = memory, verb == DECODE
        pairs = problem.dtype == torch.bfloat16 and _core.cpu_isa() == "avx512bf16"
        dtype = torch.bfloat16 if pairs else torch.float32
        rows, hidden, inner = s.slots, s.hidden, s.intermediate
        forward = [(rows, hidden, 2 * inner), (rows, inner, hidden)]
        backward = [(rows, hidden, inner), (rows, 2 * inner, hidden)]
        weights = [(hidden, rows, inner), (2 * inner, rows, hidden)]
        # The run, the bytes of weights, whether these are written.
        self.products: list[tuple[Callable[[], object], float, bool]] = []
        for m, k, n in forward + (backward if verb == BOTH else []):
            self.products.append((product(m, k, n, dtype, False), float(problem.active * k * n * size), False))
        for m, k, n in weights if verb == BOTH else []:
            self.products.append((product(m, k, n, dtype, True), float(s.experts * m * n * size), True))

    def __call__(self, clock: Clock) -> Wait:
        seconds: list[float] = []

        def all_products() -> None:
            for run, _, _ in self.products:
                began = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - began)

        if self.decode:
            seconds = [0.0] * len(self.products)
        else:
            clock(all_products)
        kinds = {written for _, _, written in self.products}
        rates: dict[bool, float] = {}
        for written in kinds:
            clock(lambda written=written: rates.update({written: self.memory.rate(written)}))  # type: ignore[misc]
        times = zip(seconds, self.products, strict=True)
        total = sum(max(each, bytes / rates[written]) for each, (_, bytes, written) in times)
        return lambda: total


def product(m: int, k: int, n: int, dtype: torch.dtype, gradient: bool, device: str = "cpu") -> Callable[[], object]:
    """A dense matmul with its operands laid out as the layer's: weights by output, gradients from rows."""

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    a, b = (normal(k, m).t(), normal(k, n)) if gradient else (normal(m, k), normal(n, k).t())
    out = torch.empty(m, n, dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=out)
