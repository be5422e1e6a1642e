"""The backward pass of the experts on Hopper: its kernels, their order, and those left out.

Order: dH (with the recomputed activation and dS), the down projection's weight gradient, whose operand A' is then
freed, the input gradient by rows, its sum over a token's rows, the up projection's weight gradient. Buffers, apart
from the gradients, are dH and the larger of A' and the rows of the input gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS, split
from moekern.backends.call import Form, PlanTensors, Weights
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import combine, grouped
from moekern.backends.cuda.kernels import gradients as own
from moekern.backends.cuda.kernels.tables import Tables
from moekern.backends.cuda.launch.device import round_up, stream_of
from moekern.backends.cuda.launch.program import PROGRAMS, record_parts, sources_of
from moekern.backends.cuda.passes.sizes import Sizes
from moekern.backends.pointers import address

# Places of the addresses in a replay.
DOUT, X, PRE, SCORES, ORDER, INVERSE, OFFSETS, *WEIGHTS, WORK = range(12)
GRADIENTS = range(12, 18)  # of x, scores, *weights

# For a combine of fewer bytes the events of a second stream cost more than they hide; below this intermediate size the
# weight gradient is shorter than the combine (on an H200, I = 256 loses 4 % of the backward pass, 768 gains 1.9 %).
LEAST_BESIDE = 32 << 20
LEAST_BESIDE_INTER = 512


def combines_beside(slots: int, hidden: int, inter: int, top_k: int) -> bool:
    """Whether the sum over a token's rows runs on a second stream, during the weight gradient of the up projection."""
    pays = 2 * slots * hidden >= LEAST_BESIDE and inter >= LEAST_BESIDE_INTER
    return pays and combine.fits_beside(hidden, top_k)


class _Work:
    """The place of each buffer in the working memory; the scaled activation and, later, the rows of dx share one."""

    def __init__(self, sizes: Sizes, wanted: tuple[bool, ...]):
        """Lay out the buffers of a problem."""
        slots = sizes.slots
        rows_of_dx = 2 * slots * sizes.hidden if wanted[0] else 0
        scaled = 2 * slots * sizes.inter if wanted[3] else 0
        parts = {
            "table": Tables.size(slots, sizes.experts),
            "token": 4 * slots,
            "score": 4 * slots,
            "partials": 4 * slots * own.partial_sums(sizes.inter) if wanted[1] else 0,
            "grad_pre": 2 * slots * sizes.columns,
            "in_turn": max(rows_of_dx, scaled),
        }
        self.offset = {}
        self.size = 0
        for name, part in parts.items():
            self.offset[name] = self.size
            self.size += round_up(part)


class _Launches:
    """The launches of a problem in three parts: the first ones, the up projection's gradients, the combine."""

    def __init__(self, sizes: Sizes, wanted: tuple[bool, ...]):
        """Prepare to launch on placeholders; `wanted` tells which gradients are requested."""
        z = self.z = sizes
        self.wanted, self.work = wanted, _Work(z, wanted)
        pays = z.configuration.combine_beside and combines_beside(z.slots, z.hidden, z.inter, z.form.top_k)
        self.beside = wanted[0] and wanted[2] and pays
        self.weights = z.weights(WEIGHTS)
        self.dx, self.dscores = (
            z.place(place, shape)
            for place, shape in zip(GRADIENTS[:2], ((z.tokens, z.hidden), (z.tokens, z.form.top_k)), strict=True)
        )
        self.grads = z.weights(GRADIENTS[2:])
        self.dout, self.x = z.place(DOUT, (z.tokens, z.hidden)), z.place(X, (z.tokens, z.hidden))
        self.inverse = z.place(INVERSE, (z.slots,), torch.int32)
        self.offsets = z.place(OFFSETS, (z.experts + 1,), torch.int32)
        self.token = self._buffer("token", (z.slots,), torch.int32)
        self.score = self._buffer("score", (z.slots,), torch.float32)
        self.grad_pre = self._buffer("grad_pre", (z.slots, z.columns))
        self.grad_rows = self._buffer("in_turn", (z.slots, z.hidden))
        self.partials = self._buffer("partials", (z.slots, own.partial_sums(z.inter)), torch.float32)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Any:
        return self.z.place(WORK, shape, dtype, self.work.offset[name])

    def first(self) -> None:
        """All launches up to the rows of dx, and their sum and dS unless these run on a second stream."""
        z, wanted = self.z, self.wanted
        activation, transposed, interleaved, top_k = z.form
        order = z.place(ORDER, (z.slots,), torch.int32)
        scores = z.place(SCORES, (z.tokens, top_k), torch.float32) if z.has_scores else None
        table_bytes = Tables.size(z.slots, z.experts)
        self.tables = Tables(self.offsets, z.slots, self._buffer("table", (table_bytes,), torch.uint8))
        rows = own.Rows(self.dout, order, scores, top_k, self.token, self.score)
        scaled = self._buffer("in_turn", (z.slots, z.inter)) if wanted[3] else None
        partials = self.partials if wanted[1] else None
        own.dh(
            self.dout, self.weights.w_down, z.place(PRE, (z.slots, z.columns)), rows, self.tables, activation,
            transposed, interleaved, self.grad_pre, scaled, partials, z.configuration.split_tile_rows,
        )  # fmt: skip
        if not self.beside:
            self._score_gradient()
        if scaled is not None:
            own.wgrad(
                self.dout, scaled, self.token, self.offsets, self.tables, self.grads.w_down, transposed,
                stages=z.configuration.wgrad_stages,
            )  # fmt: skip
        if wanted[5]:
            assert self.grads.b_down is not None
            own.bias_gradient(self.dout, self.token, self.score, self.offsets, self.grads.b_down)
        if wanted[0]:
            grouped.grouped_product(
                self.grad_pre, self.weights.w_gate_up, None, self.grad_rows, self.tables, not transposed,
                z.configuration,
            )  # fmt: skip
            if not self.beside:
                combine.combine(self.grad_rows, None, self.inverse, self.offsets, self.dx, top_k)

    def _score_gradient(self) -> None:
        if self.wanted[1]:
            bias = self.z.given(self.weights).b_down
            own.score_gradient(
                self.partials, self.inverse, self.offsets, self.dout, bias, self.z.form.top_k, self.dscores
            )

    def up_projection(self) -> None:
        """The gradients of the up projection's weights and bias."""
        z, tables = self.z, copy(self.tables)  # a part may be recorded more than once: with the same counter each time
        if self.wanted[2]:
            own.wgrad(
                self.x, self.grad_pre, self.token, self.offsets, tables, self.grads.w_gate_up, not z.form.transposed,
                160 if self.beside else 168, z.configuration.wgrad_stages,
            )  # fmt: skip
        if self.wanted[4]:
            assert self.grads.b_gate_up is not None
            own.bias_gradient(self.grad_pre, None, None, self.offsets, self.grads.b_gate_up)

    def all(self) -> None:
        """All launches, with the combine on the same stream."""
        self.first()
        self.up_projection()

    @property
    def parts(self) -> list[Callable[[], None]]:
        """One part, or three if the combine runs on a second stream."""
        return [self.first, self.up_projection, self.combine] if self.beside else [self.all]

    def combine(self) -> None:
        """The sum of the rows of dx, in the registers that the weight gradient leaves free; then dS, which is short."""
        combine.combine_beside(self.grad_rows, self.inverse, self.offsets, self.dx, self.z.form.top_k)
        self._score_gradient()


@lru_cache(maxsize=PROGRAMS)
def _programs(sizes: Sizes, wanted: tuple[bool, ...]) -> tuple[list[Any], int]:
    """One program, or three if the combine runs on a second stream; and their bytes of working memory."""
    launches = _Launches(sizes, wanted)
    return record_parts(sizes.device, launches.parts), launches.work.size


def sources(sizes: Sizes) -> list[KernelSource]:
    """The kernels for the gradients of all inputs, which are compiled while the forward pass runs."""
    wanted = (True, sizes.has_scores, True, True, sizes.has_up_bias, sizes.has_down_bias)
    return [source for part in _Launches(sizes, wanted).parts for source in sources_of(part)]


@lru_cache(maxsize=64)
def _side_stream(device: int, main: int) -> torch.cuda.Stream:
    """A second stream for `main`. Each stream has its own: during a capture it must not get work of another stream."""
    beside = torch.cuda.Stream(device)
    while beside.cuda_stream == main:  # torch gives about thirty different ones, again and again
        beside = torch.cuda.Stream(device)
    return beside


def _only_down_projection(
    dout: Tensor,
    pre: Tensor,
    scores: Tensor | None,
    plan: PlanTensors,
    form: Form,
    dw_down: Tensor | None,
    db_down: Tensor | None,
) -> None:
    """The rare case that nothing before the down projection is trained: torch computes A', and no dA is needed."""
    order, _, offsets = plan
    slots = order.shape[0]
    token, score = torch.empty_like(order), torch.empty(slots, dtype=torch.float32, device=order.device)
    own.Rows(dout, order, scores, form.top_k, token, score)
    if db_down is not None:
        own.bias_gradient(dout, token, score, offsets, db_down)
    if dw_down is not None:
        act = ACTIVATIONS[form.activation]
        scaled = (act.forward(*split(pre.float(), act, form.interleaved)) * score.unsqueeze(1)).to(pre.dtype)
        tables = Tables(offsets, slots)
        own.wgrad(dout, scaled, token, offsets, tables, dw_down, p_innermost=form.transposed)


def experts_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    scores: Tensor | None,
    plan: PlanTensors,
    weights: Weights,
    form: Form,
    needs: list[bool],
    configuration: Configuration,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scores, w_gate_up, w_down, b_gate_up, b_down; empty where ``needs`` is false.

    Arguments are those of :func:`moekern.backends.reference.experts_backward`, and the configuration. The tensors are
    not empty and their device is current.
    """
    inputs = (x, scores, *weights)
    wanted = tuple(t is not None and need for t, need in zip(inputs, needs, strict=True))
    empty = x.new_empty(0)
    grads = [torch.empty_like(t) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)]
    if wanted[0] or wanted[1] or wanted[2] or wanted[4]:
        sizes = Sizes.of(x, scores is not None, weights, form, configuration)
        programs, size = _programs(sizes, wanted)
        work = torch.empty(size, dtype=torch.uint8, device=x.device)
        tensors = (dout, x, pre, scores, *plan, *weights, work, *grads)
        addresses = [address(t) for t in tensors]
        programs[0].replay(stream_of(sizes.device), addresses)
        if len(programs) == 3:
            # The second stream starts when the rows of dx are complete, and the first one waits for it: memory that is
            # handed out again on the first stream is used after both.
            main = torch.cuda.current_stream(sizes.device)
            side = _side_stream(sizes.device, main.cuda_stream)
            side.wait_stream(main)
            programs[1].replay(main.cuda_stream, addresses)
            programs[2].replay(side.cuda_stream, addresses)
            main.wait_stream(side)
    elif wanted[3] or wanted[5]:
        _only_down_projection(dout, pre, scores, plan, form, grads[3], grads[5])
    return tuple(empty if grad is None else grad for grad in grads)  # type: ignore[return-value]
