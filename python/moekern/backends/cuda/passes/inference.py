"""Router's logits and choice, planner and forward pass of an eager inference call as one recorded program.

Two allocations and one call into Rust. For a handful of tokens the host's time is all that counts, and one program
halves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import grouped, router
from moekern.backends.cuda.launch.device import current_device, on_device, round_up, stream_of
from moekern.backends.cuda.launch.program import Placeholder, record
from moekern.backends.cuda.passes import forward
from moekern.backends.cuda.torch_path import ALIGNMENT

# Places of the addresses in a replay.
X, ROUTED_BY, SCORES, W_UP, W_DOWN, B_UP, B_DOWN, OUT, WORK, ROUTER_BIAS = range(10)
Inference = Callable[..., Tensor | None]


def make(
    x: Tensor,
    routed_by: Tensor,
    topk_weights: Tensor | None,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    top_k: int,
    activation: str,
    transposed: bool,
    interleaved: bool,
    formula: router.Formula | None,
    chosen: Configuration,
    makes_logits: bool = False,
) -> Inference:
    """A function of the first seven arguments for all calls with tensors of these sizes, none of them empty.

    `routed_by` are the chosen experts ``[T, K]``; or, with a formula, the router's logits float32 ``[T, E]``, and there
    are no weights; or, with `makes_logits`, the router's weight ``[E, H]``, and an eighth argument is its bias or None.
    The function returns None where a tensor's memory is not as the kernels need it: the long way copies it, or says why
    not.
    """
    device, dtype = x.get_device(), x.dtype
    (tokens, hidden), experts = x.shape, w_gate_up.shape[0]
    slots = tokens * top_k
    columns = w_gate_up.shape[2 if transposed else 1]
    inter = columns // 2 if ACTIVATIONS[activation].gated else columns
    sizes = {
        "order": 4 * slots,
        "inverse": 4 * slots,
        "offsets": 4 * (experts + 1),
        "counts": 4 * grouped.plan_counts(slots, experts),
        "ids": 4 * slots if formula is not None else 0,
        "scores": 4 * slots if formula is not None else 0,
        "logits": 4 * tokens * experts if makes_logits else 0,
        "verb": forward.work_bytes(slots, hidden, inter, experts),
    }
    offset, size = {}, 0
    for name, part in sizes.items():
        offset[name] = size
        size += round_up(part)

    def place(index: int, shape: tuple[int, ...], kind: torch.dtype = dtype, byte: int = 0) -> Any:
        return Placeholder(index, shape, kind, device, byte)

    def buffer(name: str, words: int) -> Any:
        return place(WORK, (words,), torch.int32, offset[name])

    def verb() -> None:
        ids = place(ROUTED_BY, (tokens, top_k), routed_by.dtype)
        scores = None if topk_weights is None else place(SCORES, (tokens, top_k), torch.float32)
        if formula is not None:
            ids = place(WORK, (tokens, top_k), torch.int32, offset["ids"])
            scores = place(WORK, (tokens, top_k), torch.float32, offset["scores"])
            logits = place(ROUTED_BY, (tokens, experts), torch.float32)
            if makes_logits:
                logits = place(WORK, (tokens, experts), torch.float32, offset["logits"])
                # Without a bias its address is 0, which the kernel takes for none.
                weight, bias = place(ROUTED_BY, (experts, hidden)), place(ROUTER_BIAS, (experts,))
                router.logits(place(X, (tokens, hidden)), weight, bias, logits)
            router.route(logits, ids, scores, formula)
        order, inverse, offsets = buffer("order", slots), buffer("inverse", slots), buffer("offsets", experts + 1)
        grouped.plan(ids, order, inverse, offsets, buffer("counts", sizes["counts"] // 4))
        forward.launch_all(
            place(X, (tokens, hidden)),
            scores,
            order, inverse, offsets,
            place(W_UP, w_gate_up.shape), place(W_DOWN, w_down.shape),
            None if b_gate_up is None else place(B_UP, b_gate_up.shape),
            None if b_down is None else place(B_DOWN, b_down.shape),
            place(OUT, (tokens, hidden)), None, place(WORK, (sizes["verb"],), torch.uint8, offset["verb"]),
            top_k, activation, transposed, interleaved, chosen,
        )  # fmt: skip

    with on_device(device):
        replay = record(device, verb).replay
    allocate = torch.empty(0, dtype=torch.uint8, device=x.device).new_empty  # half the cost of torch.empty

    def run(
        x: Tensor,
        routed_by: Tensor,
        topk_weights: Tensor | None,
        w_gate_up: Tensor,
        w_down: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        router_bias: Tensor | None = None,
    ) -> Tensor | None:
        a, b, c, r = x.data_ptr(), w_gate_up.data_ptr(), w_down.data_ptr(), routed_by.data_ptr()
        if (a | b | c | (r if makes_logits else 0)) % ALIGNMENT or not routed_by.is_contiguous():
            return None
        if current_device() != device:
            with torch.cuda.device(device):
                return run(x, routed_by, topk_weights, w_gate_up, w_down, b_gate_up, b_down, router_bias)
        out = torch.empty_like(x)
        work = allocate(size)
        replay(
            stream_of(device),
            (
                a, r, 0 if topk_weights is None else topk_weights.data_ptr(), b, c,
                0 if b_gate_up is None else b_gate_up.data_ptr(), 0 if b_down is None else b_down.data_ptr(),
                out.data_ptr(), work.data_ptr(), 0 if router_bias is None else router_bias.data_ptr(),
            ),
        )  # fmt: skip
        return out

    return run
