"""The backward pass of the experts on Hopper: which kernels run, in which order, and what they leave out.

Order: dH (with the recomputed activation and dS), the down projection's weight gradient, whose operand A' is then
freed, the input gradient by rows, its sum over a token's rows, the up projection's weight gradient. Buffers beyond the
gradients are dH and the larger of A' and the rows of the input gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS, split
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import gradients as own
from moekern.backends.cuda.kernels import grouped
from moekern.backends.cuda.launch.device import round_up, stream_of
from moekern.backends.cuda.launch.program import PROGRAMS, Placeholder, record_parts, sources_of
from moekern.backends.pointers import address

# Places of the addresses in a replay.
DOUT, X, PRE, SCORES, ORDER, INVERSE, OFFSETS, W_UP, W_DOWN, B_DOWN, WORK = range(11)
GRADIENTS = range(11, 17)  # of x, scores, w_gate_up, w_down, b_gate_up, b_down

# Bytes of a combine under which the events of a second stream cost more than they hide; and the intermediate size under
# which the weight gradient is shorter than the combine (on an H200, I = 256 loses 4 % of the backward, 768 wins 1.9 %).
LEAST_BESIDE = 32 << 20
LEAST_BESIDE_INTER = 512


def combines_beside(slots: int, hidden: int, inter: int, top_k: int) -> bool:
    """Whether the sum over a token's rows runs on a second stream, beside the weight gradient of the up projection."""
    fits = hidden <= 16 * own.BESIDE_FEATURES  # blocks that share a token; more would leave too many without one
    pays = 2 * slots * hidden >= LEAST_BESIDE and inter >= LEAST_BESIDE_INTER
    return fits and pays and top_k in own.BESIDE_TOP_K


@dataclass(frozen=True)
class _Sizes:
    """All that the launches depend on but the addresses."""

    device: int
    dtype: torch.dtype
    tokens: int
    hidden: int
    inter: int
    experts: int
    top_k: int
    activation: str
    transposed: bool
    interleaved: bool
    has_scores: bool
    has_down_bias: bool
    wanted: tuple[bool, ...]
    chosen: Configuration

    @property
    def columns(self) -> int:
        return self.inter * (2 if ACTIVATIONS[self.activation].gated else 1)


class _Work:
    """Where in the working memory each buffer lies; the scaled activation and the rows of dx share a place in turn."""

    def __init__(self, z: _Sizes):
        """Lay out the buffers of a problem."""
        slots, wanted = z.tokens * z.top_k, z.wanted
        rows_of_dx = 2 * slots * z.hidden if wanted[0] else 0
        scaled = 2 * slots * z.inter if wanted[3] else 0
        sizes = {
            "table": grouped.Tables.size(slots, z.experts),
            "token": 4 * slots,
            "score": 4 * slots,
            "partials": 4 * slots * -(-z.inter // own.DH_FEATURES) if wanted[1] else 0,
            "grad_pre": 2 * slots * z.columns,
            "in_turn": max(rows_of_dx, scaled),
        }
        self.offset = {}
        self.size = 0
        for name, size in sizes.items():
            self.offset[name] = self.size
            self.size += round_up(size)


class _Launches:
    """The launches of a problem in three parts: what comes first, the up projection's gradients, the combine."""

    def __init__(self, z: _Sizes):
        """Prepare to launch on placeholders."""
        self.z, self.work = z, _Work(z)
        self.slots = z.tokens * z.top_k
        pays = z.chosen.combine_beside and combines_beside(self.slots, z.hidden, z.inter, z.top_k)
        self.beside = z.wanted[0] and z.wanted[2] and pays
        dw_up = (z.experts, z.hidden, z.columns) if z.transposed else (z.experts, z.columns, z.hidden)
        dw_down = (z.experts, z.inter, z.hidden) if z.transposed else (z.experts, z.hidden, z.inter)
        self.w_up, self.w_down = self._place(W_UP, dw_up), self._place(W_DOWN, dw_down)
        shapes = (
            (z.tokens, z.hidden),
            (z.tokens, z.top_k),
            dw_up,
            dw_down,
            (z.experts, z.columns),
            (z.experts, z.hidden),
        )
        self.grads = [self._place(place, shape) for place, shape in zip(GRADIENTS, shapes, strict=True)]
        self.dout, self.x = self._place(DOUT, (z.tokens, z.hidden)), self._place(X, (z.tokens, z.hidden))
        self.inverse = self._place(INVERSE, (self.slots,), torch.int32)
        self.offsets = self._place(OFFSETS, (z.experts + 1,), torch.int32)
        self.token = self._buffer("token", (self.slots,), torch.int32)
        self.score = self._buffer("score", (self.slots,), torch.float32)
        self.grad_pre = self._buffer("grad_pre", (self.slots, z.columns))
        self.grad_rows = self._buffer("in_turn", (self.slots, z.hidden))
        self.partials = self._buffer("partials", (self.slots, -(-z.inter // own.DH_FEATURES)), torch.float32)

    def _place(self, place: int, shape: tuple[int, ...], dtype: torch.dtype | None = None, offset: int = 0) -> Any:
        return Placeholder(place, shape, dtype or self.z.dtype, self.z.device, offset)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Any:
        return self._place(WORK, shape, dtype, self.work.offset[name])

    def first(self) -> None:
        """Everything up to the rows of dx, and their sum and dS unless these run beside."""
        z, wanted = self.z, self.z.wanted
        order = self._place(ORDER, (self.slots,), torch.int32)
        scores = self._place(SCORES, (z.tokens, z.top_k), torch.float32) if z.has_scores else None
        table_bytes = grouped.Tables.size(self.slots, z.experts)
        self.tables = grouped.Tables(self.offsets, self.slots, self._buffer("table", (table_bytes,), torch.uint8))
        rows = own.Rows(self.dout, order, scores, z.top_k, self.token, self.score)
        scaled = self._buffer("in_turn", (self.slots, z.inter)) if wanted[3] else None
        partials = self.partials if wanted[1] else None
        own.dh(
            self.dout, self.w_down, self._place(PRE, (self.slots, z.columns)), rows, self.tables, z.activation,
            z.transposed, z.interleaved, self.grad_pre, scaled, partials, z.chosen.one_tile,
        )  # fmt: skip
        if not self.beside:
            self._score_gradient()
        if scaled is not None:
            own.wgrad(
                self.dout, scaled, self.token, self.offsets, self.tables, self.grads[3], z.transposed,
                stages=z.chosen.wgrad_stages,
            )  # fmt: skip
        if wanted[5]:
            own.bias_gradient(self.dout, self.token, self.score, self.offsets, self.grads[5])
        if wanted[0]:
            grouped.grouped_product(
                self.grad_pre, self.w_up, None, self.grad_rows, self.tables, not z.transposed, z.chosen
            )
            if not self.beside:
                grouped.combine(self.grad_rows, None, self.inverse, self.offsets, self.grads[0], z.top_k)

    def _score_gradient(self) -> None:
        z = self.z
        if z.wanted[1]:
            bias = self._place(B_DOWN, (z.experts, z.hidden)) if z.has_down_bias else None
            own.score_gradient(self.partials, self.inverse, self.offsets, self.dout, bias, z.top_k, self.grads[1])

    def up_projection(self) -> None:
        """The gradients of the up projection's weights and bias."""
        z, tables = self.z, copy(self.tables)  # a part may be gone through more than once: the same counter each time
        if z.wanted[2]:
            own.wgrad(
                self.x, self.grad_pre, self.token, self.offsets, tables, self.grads[2], not z.transposed,
                160 if self.beside else 168, z.chosen.wgrad_stages,
            )  # fmt: skip
        if z.wanted[4]:
            own.bias_gradient(self.grad_pre, None, None, self.offsets, self.grads[4])

    def all(self) -> None:
        """Everything, where the combine does not run beside."""
        self.first()
        self.up_projection()

    @property
    def parts(self) -> list[Callable[[], None]]:
        """One part, or three with the combine beside."""
        return [self.first, self.up_projection, self.combine] if self.beside else [self.all]

    def combine(self) -> None:
        """The sum of the rows of dx, in the registers that the weight gradient leaves free; then dS, as it is short."""
        own.combine_beside(self.grad_rows, self.inverse, self.offsets, self.grads[0], self.z.top_k)
        self._score_gradient()


@lru_cache(maxsize=PROGRAMS)
def _programs(z: _Sizes) -> tuple[list[Any], int]:
    """One program, or three with the combine beside; and the bytes they work in."""
    launches = _Launches(z)
    return record_parts(z.device, launches.parts), launches.work.size


def sources(
    device: int, dtype: torch.dtype, tokens: int, hidden: int, inter: int, experts: int, top_k: int, activation: str,
    transposed: bool, interleaved: bool, has_scores: bool, has_up_bias: bool, has_down_bias: bool,
    chosen: Configuration,
) -> list[KernelSource]:  # fmt: skip
    """The kernels for the gradients of all inputs, to be compiled while the forward pass runs."""
    wanted = (True, has_scores, True, True, has_up_bias, has_down_bias)
    z = _Sizes(
        device, dtype, tokens, hidden, inter, experts, top_k, activation, transposed, interleaved, has_scores,
        has_down_bias, wanted, chosen,
    )  # fmt: skip
    return [source for part in _Launches(z).parts for source in sources_of(part)]


@lru_cache(maxsize=64)
def _side_stream(device: int, main: int) -> torch.cuda.Stream:
    """A stream beside `main`. Each has its own: one that a graph is being captured on takes the work of no other."""
    beside = torch.cuda.Stream(device)
    while beside.cuda_stream == main:  # torch hands out some thirty, over and over
        beside = torch.cuda.Stream(device)
    return beside


def _only_down_projection(
    dout: Tensor, pre: Tensor, scores: Tensor | None, order: Tensor, offsets: Tensor, top_k: int,
    activation: str, transposed: bool, interleaved: bool, dw_down: Tensor | None, db_down: Tensor | None,
) -> None:  # fmt: skip
    """The rare case that nothing before the down projection is trained: A' comes from torch, no dA is needed."""
    slots = order.shape[0]
    token, score = torch.empty_like(order), torch.empty(slots, dtype=torch.float32, device=order.device)
    own.Rows(dout, order, scores, top_k, token, score)
    if db_down is not None:
        own.bias_gradient(dout, token, score, offsets, db_down)
    if dw_down is not None:
        act = ACTIVATIONS[activation]
        scaled = (act.forward(*split(pre.float(), act, interleaved)) * score.unsqueeze(1)).to(pre.dtype)
        own.wgrad(dout, scaled, token, offsets, grouped.Tables(offsets, slots), dw_down, p_innermost=transposed)


def experts_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
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
    needs: list[bool],
    chosen: Configuration,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scores, w_gate_up, w_down, b_gate_up, b_down; empty where ``needs`` says no.

    Arguments are those of :func:`moekern.backends.reference.experts_backward`, and the configuration. The tensors are
    not empty and their device is current.
    """
    inputs = (x, scores, w_gate_up, w_down, b_gate_up, b_down)
    wanted = tuple(t is not None and need for t, need in zip(inputs, needs, strict=True))
    empty = x.new_empty(0)
    grads = [torch.empty_like(t) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)]
    if wanted[0] or wanted[1] or wanted[2] or wanted[4]:
        device, (tokens, hidden) = x.get_device(), x.shape
        sizes = _Sizes(
            device, x.dtype, tokens, hidden, w_down.shape[1 if transposed else 2], w_down.shape[0], top_k, activation,
            transposed, interleaved, scores is not None, b_down is not None, wanted, chosen,
        )  # fmt: skip
        programs, size = _programs(sizes)
        work = torch.empty(size, dtype=torch.uint8, device=x.device)
        tensors = (dout, x, pre, scores, order, inverse, offsets, w_gate_up, w_down, b_down, work, *grads)
        addresses = [address(t) for t in tensors]
        programs[0].replay(stream_of(device), addresses)
        if len(programs) == 3:
            # The second stream starts when the rows of dx are there, and the first one waits for it: memory that is
            # handed out again on the first stream is used after both.
            main = torch.cuda.current_stream(device)
            side = _side_stream(device, main.cuda_stream)
            side.wait_stream(main)
            programs[1].replay(main.cuda_stream, addresses)
            programs[2].replay(side.cuda_stream, addresses)
            main.wait_stream(side)
    elif wanted[3] or wanted[5]:
        _only_down_projection(
            dout, pre, scores, order, offsets, top_k, activation, transposed, interleaved, grads[3], grads[5]
        )
    return tuple(empty if grad is None else grad for grad in grads)  # type: ignore[return-value]
