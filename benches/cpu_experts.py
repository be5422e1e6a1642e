"""The experts' forward pass on the CPU, whole verb, beside torch and beside what the machine allows.

    python benches/cpu_experts.py --shapes 64x8 --tokens 64 256 --dtypes bf16 fp32 --rounds 5

One line a shape: up projection with gather, activation, down projection and weighted sum, in ms and GFLOP/s. "bound"
is the larger of two times measured in the same rounds: two dense matmuls of the same FLOPs (fp32, or bf16 where the
CPU has bf16 units), and reading the weights of the experts that have tokens at the rate at which torch sums a large
tensor. "share" is bound / moekern. The peers are ``torch.nn.functional.grouped_mm`` around torch's gather, activation
and weighted sum, and the loop over experts that transformers runs. All are timed in turn; the best of the rounds
counts, for everything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekern import _core
from moekern.backends import cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READ_BYTES = 1 << 29


def route(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Random ids without repetition, so counts are uneven, and scores."""
    generator = torch.Generator().manual_seed(1)
    scores, ids = torch.rand(tokens, experts, generator=generator).topk(top_k)
    return ids, scores / scores.sum(1, keepdim=True)


def loop(x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """As in transformers: for every expert that has tokens, two linear layers and an index_add."""
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, w_down.shape[0]).permute(2, 1, 0)
    for expert in mask.sum((1, 2)).nonzero().flatten().tolist():
        k, token = torch.where(mask[expert])
        gate, up = F.linear(x[token], w_gate_up[expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, w_down[expert]) * scores[token, k, None]
        out.index_add_(0, token, rows.to(out.dtype))
    return out


def grouped(x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """As in transformers: rows sorted by expert, two grouped_mm."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    offsets = torch.bincount(flat, minlength=w_down.shape[0]).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // ids.shape[1]], w_gate_up.mT, offs=offsets).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, w_down.mT, offs=offsets) * scores.flatten()[order, None]
    return rows[order.argsort()].view(*ids.shape, -1).sum(1).to(x.dtype)


def best(functions: dict[str, Callable[[], Any]], rounds: int, patience: float) -> dict[str, float]:
    """Seconds of each, the best of interleaved rounds; what takes longer than ``patience`` runs once."""
    seconds: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            if seconds.get(name, 0.0) > patience:
                continue
            start = time.perf_counter()
            function()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return seconds


def measure(
    weights: tuple[Tensor, Tensor], experts: int, top_k: int, tokens: int, save: bool, rounds: int
) -> dict[str, Any]:
    """All contenders on one shape."""
    w_gate_up, w_down = weights[0][:experts], weights[1][:experts]
    hidden, dtype = w_gate_up.shape[2], w_down.dtype
    ids, scores = route(tokens, experts, top_k)
    x = torch.randn(tokens, hidden).to(dtype)
    order, inverse, offsets = cpu.plan(ids, experts)
    native = dtype if dtype == torch.bfloat16 and _core.cpu_isa() == "avx512bf16" else torch.float32
    rows = torch.randn(tokens * top_k, hidden).to(native)
    inner = torch.randn(tokens * top_k, w_down.shape[2]).to(native)
    dense_up, dense_down = w_gate_up[0].to(native).T, w_down[0].to(native).T
    read = torch.ones(READ_BYTES // 4)

    def ours() -> Tensor:
        return cpu.experts_forward(
            x, scores, order, inverse, offsets, w_gate_up, w_down, None, None, top_k, "swiglu", False, False, save
        )[0]  # fmt: skip

    def peer(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(x, ids, scores, w_gate_up, w_down)

    seconds = best(
        {
            "moekern": ours,
            "dense": lambda: (rows @ dense_up, inner @ dense_down),
            "read": read.sum,
            "grouped_mm": peer(grouped),
            "loop": peer(loop),
        },
        rounds,
        patience=2.0,
    )
    error = (ours().float() - loop(x, ids, scores, w_gate_up, w_down).float()).norm() / ours().float().norm()
    if not error < 0.02:
        raise AssertionError(f"the results differ by {error:.1e}")
    flops = 2 * tokens * top_k * (w_gate_up[0].numel() + w_down[0].numel())
    active = int((offsets.diff() > 0).sum())
    weight_bytes = active * (w_gate_up[0].numel() + w_down[0].numel()) * w_down.element_size()
    by_bytes = weight_bytes / READ_BYTES * seconds["read"]
    bound = max(seconds["dense"], by_bytes)
    return {
        "experts": experts,
        "top_k": top_k,
        "tokens": tokens,
        "dtype": next(name for name, d in DTYPES.items() if d == dtype),
        "isa": _core.cpu_isa(),
        "rows_an_expert": tokens * top_k / active,
        "gflops": flops / seconds["moekern"] / 1e9,
        "share": bound / seconds["moekern"],
        "decided_by": "bytes" if by_bytes > seconds["dense"] else "flops",
        "read_gb_s": READ_BYTES / seconds["read"] / 1e9,
        "ms": {name: 1e3 * s for name, s in seconds.items() if name != "read"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x2", "64x8", "128x8"], help="experts x top-k")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inter", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="store the pre-activations too, as for training")
    parser.add_argument("--json", help="also write the records to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    most = max(experts for experts, _ in shapes)
    records = []
    with torch.inference_mode():
        for name in args.dtypes:
            dtype = DTYPES[name]
            weights = (
                torch.empty(most, 2 * args.inter, args.hidden, dtype=dtype).normal_(0, args.hidden**-0.5),
                torch.empty(most, args.hidden, args.inter, dtype=dtype).normal_(0, args.inter**-0.5),
            )
            for experts, top_k in shapes:
                for tokens in args.tokens:
                    r = measure(weights, experts, top_k, tokens, args.save, args.rounds)
                    records.append(r)
                    peers = " ".join(f"{peer} {r['ms'][peer]:8.2f}" for peer in ("grouped_mm", "loop"))
                    print(
                        f"E{experts:<3} K{top_k} T{tokens:<5} {name} {r['isa']}: {r['ms']['moekern']:8.2f} ms "
                        f"{r['gflops']:4.0f} GFLOP/s, share {r['share']:.2f} ({r['decided_by']}, read "
                        f"{r['read_gb_s']:.0f} GB/s); {peers} ms",
                        flush=True,
                    )
            del weights
    if args.json:
        with open(args.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
