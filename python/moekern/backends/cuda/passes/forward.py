"""The forward pass on Hopper: its three kernels and the tile table, and the planner, as recorded programs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import grouped
from moekern.backends.cuda.launch.device import on_device, round_up, stream_of
from moekern.backends.cuda.launch.program import PROGRAMS, Placeholder, record
from moekern.backends.pointers import address

# Places of the addresses in a replay.
X, SCORES, ORDER, INVERSE, OFFSETS, W_UP, W_DOWN, B_UP, B_DOWN, OUT, PRE, WORK = range(12)


@lru_cache(maxsize=PROGRAMS)
def _plan_program(device: int, dtype: torch.dtype, slots: int, experts: int) -> Any:
    def place(index: int, words: int, kind: torch.dtype = torch.int32) -> Any:
        return Placeholder(index, (words,), kind, device)

    counts = grouped.plan_counts(slots, experts)
    return record(
        device,
        lambda: grouped.plan(
            place(0, slots, dtype), place(1, slots), place(2, slots), place(3, experts + 1), place(4, counts)
        ),
    )


def plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, inverse and offsets of the slots; see :func:`moekern.backends.reference.plan`."""
    device, slots = topk_ids.get_device(), topk_ids.numel()
    order = torch.empty(slots, dtype=torch.int32, device=topk_ids.device)
    inverse = torch.empty_like(order)
    offsets = order.new_empty(num_experts + 1)
    words = grouped.plan_counts(slots, num_experts)
    counts = order.new_empty(words) if words else offsets
    with on_device(device):
        program = _plan_program(device, topk_ids.dtype, slots, num_experts)
        program.replay(stream_of(device), [t.data_ptr() for t in (topk_ids, order, inverse, offsets, counts)])
    return order, inverse, offsets


def work_bytes(slots: int, hidden: int, inter: int, experts: int) -> int:
    """Bytes the verb works in: the tile table, the activation ``[S, I]``, the rows ``[S, H]``."""
    return round_up(grouped.Tables.size(slots, experts)) + round_up(2 * slots * inter) + 2 * slots * hidden


def launch_all(
    x: Any, scores: Any, order: Any, inverse: Any, offsets: Any, w_up: Any, w_down: Any, b_up: Any, b_down: Any,
    out: Any, pre: Any, work: Any, top_k: int, activation: str, transposed: bool, interleaved: bool,
    chosen: Configuration,
) -> None:  # fmt: skip
    """Every launch of the verb, on placeholders; `work` has :func:`work_bytes`."""
    hidden, slots, experts = x.shape[1], order.numel(), w_up.shape[0]
    inter = w_down.shape[1 if transposed else 2]
    table_bytes = grouped.Tables.size(slots, experts)
    tables = grouped.Tables(offsets, slots, work.part((table_bytes,), torch.uint8), ordered=False)
    activated = work.part((slots, inter), x.dtype, round_up(table_bytes))
    rows = work.part((slots, hidden), x.dtype, round_up(table_bytes) + round_up(2 * slots * inter))
    few_rows = chosen.few_rows if pre is None else chosen.few_saved
    grouped.up(
        x, order, w_up, b_up, activated, pre, tables, top_k, activation, transposed, interleaved, few_rows,
        chosen.one_tile,
    )  # fmt: skip
    grouped.grouped_product(activated, w_down, b_down, rows, tables, transposed, chosen)
    grouped.combine(rows, scores, inverse, offsets, out, top_k)


@lru_cache(maxsize=PROGRAMS)
def _forward_program(
    device: int,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    inter: int,
    experts: int,
    top_k: int,
    activation: str,
    transposed: bool,
    interleaved: bool,
    save: bool,
    has_scores: bool,
    has_up_bias: bool,
    has_down_bias: bool,
    chosen: Configuration,
) -> tuple[Any, int]:
    """The program, and the bytes it works in."""
    slots, columns = tokens * top_k, inter * (2 if ACTIVATIONS[activation].gated else 1)
    size = work_bytes(slots, hidden, inter, experts)

    def place(index: int, shape: tuple[int, ...], kind: torch.dtype = dtype) -> Any:
        return Placeholder(index, shape, kind, device)

    def verb() -> None:
        launch_all(
            place(X, (tokens, hidden)),
            place(SCORES, (tokens, top_k), torch.float32) if has_scores else None,
            place(ORDER, (slots,), torch.int32),
            place(INVERSE, (slots,), torch.int32),
            place(OFFSETS, (experts + 1,), torch.int32),
            place(W_UP, (experts, hidden, columns) if transposed else (experts, columns, hidden)),
            place(W_DOWN, (experts, inter, hidden) if transposed else (experts, hidden, inter)),
            place(B_UP, (experts, columns)) if has_up_bias else None,
            place(B_DOWN, (experts, hidden)) if has_down_bias else None,
            place(OUT, (tokens, hidden)),
            place(PRE, (slots, columns)) if save else None,
            Placeholder(WORK, (size,), torch.uint8, device),
            top_k, activation, transposed, interleaved, chosen,
        )  # fmt: skip

    def of_the_backward_pass() -> list[KernelSource]:
        from moekern.backends.cuda.passes import backward

        return backward.sources(
            device, dtype, tokens, hidden, inter, experts, top_k, activation, transposed, interleaved,
            has_scores, has_up_bias, has_down_bias, chosen,
        )  # fmt: skip

    return record(device, verb, of_the_backward_pass if save else None), size


def experts_forward(
    x: Tensor,
    scores: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    top_k: int,
    activation: str,
    transposed: bool,
    interleaved: bool,
    save: bool,
    chosen: Configuration,
) -> tuple[Tensor, Tensor]:
    """Arguments of :func:`moekern.backends.reference.experts_forward`, none of them empty, and the configuration."""
    slots, experts = order.shape[0], w_gate_up.shape[0]
    (tokens, hidden), columns = x.shape, w_gate_up.shape[2 if transposed else 1]
    inter = columns // 2 if ACTIVATIONS[activation].gated else columns
    out = torch.empty_like(x)
    pre = x.new_empty((slots, columns) if save else 0)
    device = x.get_device()
    with on_device(device):
        program, size = _forward_program(
            device, x.dtype, tokens, hidden, inter, experts, top_k, activation, transposed, interleaved, save,
            scores is not None, b_gate_up is not None, b_down is not None, chosen,
        )  # fmt: skip
        work = torch.empty(size, dtype=torch.uint8, device=x.device)
        tensors = (x, scores, order, inverse, offsets, w_gate_up, w_down, b_gate_up, b_down, out, pre, work)
        program.replay(stream_of(device), [address(t) for t in tensors])
    return out, pre
