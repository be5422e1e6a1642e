"""The forward pass on Hopper: its three kernels and the tile table, and the planner, as recorded programs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moekern.backends.call import Form, PlanTensors, Weights
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import combine, grouped, planner, up
from moekern.backends.cuda.kernels.tables import Tables
from moekern.backends.cuda.launch.device import on_device, round_up, stream_of
from moekern.backends.cuda.launch.program import PROGRAMS, Placeholder, record
from moekern.backends.cuda.passes.sizes import Sizes
from moekern.backends.pointers import address

# Places of the addresses in a replay.
X, SCORES, ORDER, INVERSE, OFFSETS, *WEIGHTS, OUT, PRE, WORK = range(12)


@lru_cache(maxsize=PROGRAMS)
def _plan_program(device: int, dtype: torch.dtype, slots: int, experts: int) -> Any:
    def place(index: int, words: int, kind: torch.dtype = torch.int32) -> Any:
        return Placeholder(index, (words,), kind, device)

    counts = planner.plan_counts(slots, experts)
    return record(
        device,
        lambda: planner.plan(
            place(0, slots, dtype), place(1, slots), place(2, slots), place(3, experts + 1), place(4, counts)
        ),
    )


def plan(topk_ids: Tensor, num_experts: int) -> PlanTensors:
    """Order, inverse and offsets of the slots; see :func:`moekern.backends.reference.plan`."""
    device, slots = topk_ids.get_device(), topk_ids.numel()
    order = torch.empty(slots, dtype=torch.int32, device=topk_ids.device)
    inverse = torch.empty_like(order)
    offsets = order.new_empty(num_experts + 1)
    words = planner.plan_counts(slots, num_experts)
    counts = order.new_empty(words) if words else offsets
    with on_device(device):
        program = _plan_program(device, topk_ids.dtype, slots, num_experts)
        program.replay(stream_of(device), [t.data_ptr() for t in (topk_ids, order, inverse, offsets, counts)])
    return PlanTensors(order, inverse, offsets)


def work_bytes(sizes: Sizes) -> int:
    """Bytes of working memory: the tile table, the activation ``[S, I]``, the rows ``[S, H]``."""
    table_bytes = Tables.size(sizes.slots, sizes.experts)
    return round_up(table_bytes) + round_up(2 * sizes.slots * sizes.inter) + 2 * sizes.slots * sizes.hidden


def launch_all(
    sizes: Sizes, x: Any, scores: Any, plan: PlanTensors, weights: Weights, out: Any, pre: Any, work: Any
) -> None:
    """Every launch of the verb, on placeholders; `work` has :func:`work_bytes`."""
    order, inverse, offsets = plan
    w_gate_up, w_down, b_gate_up, b_down = sizes.given(weights)
    activation, transposed, interleaved, top_k = sizes.form
    configuration, slots = sizes.configuration, sizes.slots
    table_bytes = Tables.size(slots, sizes.experts)
    tables = Tables(offsets, slots, work.part((table_bytes,), torch.uint8), ordered=False)
    activated = work.part((slots, sizes.inter), sizes.dtype, round_up(table_bytes))
    before = round_up(table_bytes) + round_up(2 * slots * sizes.inter)
    rows = work.part((slots, sizes.hidden), sizes.dtype, before)
    by_consumers = configuration.up_by_consumers if pre is None else configuration.saving_up_by_consumers
    up.up(
        x, order, w_gate_up, b_gate_up, activated, pre, tables, top_k, activation, transposed, interleaved,
        by_consumers, configuration.split_tile_rows,
    )  # fmt: skip
    grouped.grouped_product(activated, w_down, b_down, rows, tables, transposed, configuration)
    combine.combine(rows, scores, inverse, offsets, out, top_k)


@lru_cache(maxsize=PROGRAMS)
def _forward_program(sizes: Sizes, save: bool) -> tuple[Any, int]:
    """The program, and its bytes of working memory."""
    tokens, hidden, slots, place = sizes.tokens, sizes.hidden, sizes.slots, sizes.place
    size = work_bytes(sizes)

    def verb() -> None:
        launch_all(
            sizes,
            place(X, (tokens, hidden)),
            place(SCORES, (tokens, sizes.form.top_k), torch.float32) if sizes.has_scores else None,
            PlanTensors(
                place(ORDER, (slots,), torch.int32),
                place(INVERSE, (slots,), torch.int32),
                place(OFFSETS, (sizes.experts + 1,), torch.int32),
            ),
            sizes.weights(WEIGHTS),
            place(OUT, (tokens, hidden)),
            place(PRE, (slots, sizes.columns)) if save else None,
            place(WORK, (size,), torch.uint8),
        )

    def of_the_backward_pass() -> list[KernelSource]:
        from moekern.backends.cuda.passes import backward

        return backward.sources(sizes)

    return record(sizes.device, verb, of_the_backward_pass if save else None), size


def experts_forward(
    x: Tensor,
    scores: Tensor | None,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    save: bool,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """Arguments of :func:`moekern.backends.reference.experts_forward`, none of them empty, and the configuration."""
    sizes = Sizes.of(x, scores is not None, weights, form, configuration)
    out = torch.empty_like(x)
    pre = x.new_empty((sizes.slots, sizes.columns) if save else 0)
    with on_device(sizes.device):
        program, size = _forward_program(sizes, save)
        work = torch.empty(size, dtype=torch.uint8, device=x.device)
        tensors = (x, scores, *plan, *weights, out, pre, work)
        program.replay(stream_of(sizes.device), [address(t) for t in tensors])
    return out, pre
