"""Router's logits and choice, planner and forward pass of an eager inference call as one recorded program.

Two allocations and one call into Rust. For a few tokens the host's time decides, and one program halves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekern.backends.call import Form, PlanTensors, Weights
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import planner, router
from moekern.backends.cuda.launch.device import current_device, on_device, round_up, stream_of
from moekern.backends.cuda.launch.program import record
from moekern.backends.cuda.passes import forward
from moekern.backends.cuda.passes.sizes import Sizes
from moekern.backends.cuda.torch_path import ALIGNMENT

# Places of the addresses in a replay.
X, ROUTED_BY, SCORES, *WEIGHTS, OUT, WORK, ROUTER_BIAS = range(10)
Inference = Callable[..., Tensor | None]


def make(
    x: Tensor,
    routed_by: Tensor,
    topk_weights: Tensor | None,
    weights: Weights,
    form: Form,
    formula: router.Formula | None,
    configuration: Configuration,
    makes_logits: bool = False,
) -> Inference:
    """A function of the first four arguments for all calls with tensors of these sizes, none of them empty.

    `routed_by` are the chosen experts ``[T, K]``; or, with a formula, the router's logits float32 ``[T, E]``, and there
    are no weights; or, with `makes_logits`, the router's weight ``[E, H]``, and a fifth argument is its bias or None.
    The function returns None if the kernels cannot read a tensor's memory: the general path copies it, or raises.
    """
    has_scores = formula is not None or topk_weights is not None
    sizes = Sizes.of(x, has_scores, weights, form, configuration)
    device, place = sizes.device, sizes.place
    tokens, hidden, experts, slots, top_k = sizes.tokens, sizes.hidden, sizes.experts, sizes.slots, form.top_k
    parts = {
        "order": 4 * slots,
        "inverse": 4 * slots,
        "offsets": 4 * (experts + 1),
        "counts": 4 * planner.plan_counts(slots, experts),
        "ids": 4 * slots if formula is not None else 0,
        "scores": 4 * slots if formula is not None else 0,
        "logits": 4 * tokens * experts if makes_logits else 0,
        "verb": forward.work_bytes(sizes),
    }
    offset, size = {}, 0
    for name, part in parts.items():
        offset[name] = size
        size += round_up(part)

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
                # Without a bias the address is 0, by which the kernel knows that there is none.
                weight, bias = place(ROUTED_BY, (experts, hidden)), place(ROUTER_BIAS, (experts,))
                router.logits(place(X, (tokens, hidden)), weight, bias, logits)
            router.route(logits, ids, scores, formula)
        plan = PlanTensors(buffer("order", slots), buffer("inverse", slots), buffer("offsets", experts + 1))
        planner.plan(ids, *plan, buffer("counts", parts["counts"] // 4))
        work = place(WORK, (parts["verb"],), torch.uint8, offset["verb"])
        rows, out = place(X, (tokens, hidden)), place(OUT, (tokens, hidden))
        forward.launch_all(sizes, rows, scores, plan, sizes.weights(WEIGHTS), out, None, work)

    with on_device(device):
        replay = record(device, verb).replay
    allocate = torch.empty(0, dtype=torch.uint8, device=x.device).new_empty  # half the cost of torch.empty

    def run(
        x: Tensor,
        routed_by: Tensor,
        topk_weights: Tensor | None,
        weights: Weights,
        router_bias: Tensor | None = None,
    ) -> Tensor | None:
        w_gate_up, w_down, b_gate_up, b_down = weights
        a, b, c, r = x.data_ptr(), w_gate_up.data_ptr(), w_down.data_ptr(), routed_by.data_ptr()
        if (a | b | c | (r if makes_logits else 0)) % ALIGNMENT or not routed_by.is_contiguous():
            return None
        if current_device() != device:
            with torch.cuda.device(device):
                return run(x, routed_by, topk_weights, weights, router_bias)
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
