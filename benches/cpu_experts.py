"""The experts on the CPU, forward alone and with the backward pass, against the machine's own bound and torch.

    python benches/cpu_experts.py [--experts 8,64,128] [--tokens 64,256,2048] [--dtypes bf16,fp32]
        [--passes forward,both] [--peers loop,grouped_mm] [--rounds 3] [--out FILE.md]

H = 2048, I = 1024, SwiGLU, top-8 (top-2 with 8 experts), random routing, uneven counts, all threads. In every round
each candidate runs once and the memory's rates are measured between them, so that all see the same minutes of a shared
host; times are the best of the rounds, rates the medians.

bound: the sum over the matrix products of the larger of two times: one dense torch matmul of the same FLOPs (fp32;
bf16 where the CPU multiplies bf16 pairs), and the bytes of weights over the read rate or, for gradients of weights,
their bytes over the rate of writes past the caches. Activation, gather and routing count for nothing in it.
loop: one torch matmul an expert. grouped_mm: torch.nn.functional.grouped_mm over gathered rows. Both as multiples of
moekern's time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import moekern as mk
from moekern import _core, machine

HIDDEN, INTER = 2048, 1024
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, every one equally likely, and positive weights."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k, 1).indices
    return ids, torch.rand(tokens, top_k, generator=generator)


def loop(x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The experts of Hugging Face's models: one after the other, rows added to the output."""
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, k = torch.where(ids == expert)
        gate, up = F.linear(x[token], w_gate_up[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, w_down[expert]) * scores[token, k, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out


def grouped(x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Sorted rows through torch's own grouped matmul."""
    top_k = ids.shape[1]
    order = ids.reshape(-1).argsort(stable=True)
    ends = torch.bincount(ids.reshape(-1), minlength=w_down.shape[0]).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // top_k], w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    y = y * scores.reshape(-1)[order, None]
    return torch.zeros_like(x).index_add(0, order // top_k, y.to(x.dtype))


PEERS = {"loop": loop, "grouped_mm": grouped}


def clock(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def products(rows: int, backward: bool) -> list[tuple[int, int, int, bool]]:
    """(m, k, n, writes a gradient of weights) of the dense products with the same FLOPs."""
    forward = [(rows, HIDDEN, 2 * INTER, False), (rows, INTER, HIDDEN, False)]
    gradients = [(rows, HIDDEN, INTER, False), (rows, 2 * INTER, HIDDEN, False)]
    weights = [(HIDDEN, rows, INTER, True), (2 * INTER, rows, HIDDEN, True)]
    return forward + (gradients + weights if backward else [])


def dense(
    shapes: list[tuple[int, int, int, bool]], dtype: torch.dtype
) -> dict[tuple[int, int, int, bool], Callable[[], object]]:
    """One matmul for each product, operands laid out as the layer's."""
    runs: dict[tuple[int, int, int, bool], Callable[[], object]] = {}
    for shape in shapes:
        m, k, n, gradient = shape
        a = torch.randn(k, m).to(dtype).t() if gradient else torch.randn(m, k).to(dtype)
        b = torch.randn(k, n).to(dtype) if gradient else torch.randn(n, k).to(dtype).t()
        out = torch.empty(m, n, dtype=dtype)
        runs[shape] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
    return runs


class Case:
    """One line of the table for each pass."""

    def __init__(self, experts: int, top_k: int, tokens: int, dtype: torch.dtype) -> None:
        self.experts, self.top_k, self.tokens, self.dtype = experts, top_k, tokens, dtype
        self.ids, self.scores = routing(tokens, experts, top_k)
        torch.manual_seed(0)
        self.x = torch.randn(tokens, HIDDEN).to(dtype)
        self.grad = torch.randn(tokens, HIDDEN).to(dtype)
        # One expert's values for all: normal variates for gigabytes of weights take longer than the measurement.
        self.w_gate_up = (torch.randn(1, 2 * INTER, HIDDEN) / HIDDEN**0.5).to(dtype).repeat(experts, 1, 1)
        self.w_down = (torch.randn(1, HIDDEN, INTER) / INTER**0.5).to(dtype).repeat(experts, 1, 1)

    def run(self, layer: Callable[..., Tensor], backward: bool) -> Callable[[], object]:
        leaves = (self.x, self.scores, self.w_gate_up, self.w_down)
        for leaf in leaves:
            leaf.requires_grad_(backward)

        def work() -> None:
            x, scores, w_gate_up, w_down = leaves
            if not backward:
                with torch.no_grad():
                    layer(x, self.ids, scores, w_gate_up, w_down)
                return
            # Weights' gradients are freed at once, as an optimizer with set_to_none does.
            layer(x, self.ids, scores, w_gate_up, w_down).backward(self.grad)
            for leaf in leaves:
                leaf.grad = None

        return work

    def measure(self, backward: bool, rounds: int, memory: Tensor, peers: list[str]) -> str:
        rows = self.tokens * self.top_k
        shapes = products(rows, backward)
        pairs = self.dtype == torch.bfloat16 and _core.cpu_isa() == "avx512bf16"
        layers = {"moekern": mk.experts, **{name: PEERS[name] for name in peers}}
        runs: dict[object, Callable[[], object]] = {n: self.run(layer, backward) for n, layer in layers.items()}
        runs.update(dense(shapes, torch.bfloat16 if pairs else torch.float32))
        best = dict.fromkeys(runs, float("inf"))
        rates: dict[bool, list[float]] = {False: [], True: []}
        for round_ in range(rounds + 1):
            for name, work in list(runs.items()):
                seconds = clock(work)
                if round_ or seconds > 10:
                    best[name] = min(best[name], seconds)
                if seconds > 10:
                    del runs[name]
                if round_ and isinstance(name, tuple):
                    rate = _core.memory_rate(memory.data_ptr(), memory.numel(), torch.get_num_threads(), name[3])
                    rates[name[3]].append(rate)
        read, write = (statistics.median(rates[kind] or [float("inf")]) for kind in (False, True))
        bound = 0.0
        for shape in shapes:
            m, k, n, gradient = shape
            elements = self.experts * (m * n if gradient else k * n)
            size = elements * self.dtype.itemsize
            bound += max(best[shape], size / (write if gradient else read))
        flops = sum(2 * m * k * n for m, k, n, _ in shapes)
        cells = [
            "forward+backward" if backward else "forward", "bf16" if self.dtype == torch.bfloat16 else "fp32",
            self.experts, self.top_k, self.tokens, f"{rows / self.experts:.0f}", f"{best['moekern'] * 1e3:.1f}",
            f"{flops / best['moekern'] / 1e9:.0f}", f"**{bound / best['moekern']:.2f}**",
            *(f"{best[name] / best['moekern']:.1f}x" if name in best else "-" for name in PEERS),
            f"{read / 1e9:.0f} / {write / 1e9:.0f}" if backward else f"{read / 1e9:.0f}",
        ]  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--experts", type=numbers, default=[8, 64, 128])
    parser.add_argument("--tokens", type=numbers, default=[64, 256, 2048])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bf16", "fp32"])
    parser.add_argument("--passes", type=lambda text: text.split(","), default=["forward", "both"])
    parser.add_argument("--peers", type=lambda text: [p for p in text.split(",") if p], default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)

    memory = torch.ones(256 << 20, dtype=torch.uint8)
    lines = [
        f"`python benches/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        f"{machine.cpu_name()}, {torch.get_num_threads()} threads, {_core.cpu_isa()}, torch {torch.__version__}",
        "",
        "| pass | dtype | E | K | T | rows/E | ms | GFLOP/s | of bound | loop | grouped_mm | GB/s |",
        "|" + " --- |" * 12,
    ]
    print("\n".join(lines), flush=True)
    for experts in options.experts:
        for dtype in options.dtypes:
            for tokens in options.tokens:
                case = Case(experts, 2 if experts == 8 else 8, tokens, DTYPES[dtype])
                for which in options.passes:
                    lines.append(case.measure(which == "both", options.rounds, memory, options.peers))
                    print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
