"""A whole layer's forward pass in training as one recorded program, router included, and the way back through it.

What the router decided and the plan lie in one piece of memory, :class:`Kept`, which is saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import grouped, router
from moekern.backends.cuda.launch.device import current_device, on_device, round_up, stream_of
from moekern.backends.cuda.launch.program import Placeholder, record
from moekern.backends.cuda.passes import backward, forward
from moekern.backends.cuda.torch_path import ALIGNMENT
from moekern.backends.pointers import address

# Places of the addresses in a replay.
X, ROUTER, ROUTER_BIAS, W_UP, W_DOWN, B_UP, B_DOWN, LOGITS, KEPT, OUT, PRE, WORK = range(12)


class Kept:
    """Where in int32 words the parts of what is kept lie, and the parts as tensors."""

    def __init__(self, tokens: int, top_k: int, experts: int):
        """Lay out; parts begin at multiples of 16 bytes."""
        self._slots = (tokens, top_k)
        slots = tokens * top_k
        step = -(-slots // 4) * 4
        self.ids, self.scores, self.order, self.inverse, self.offsets = (i * step for i in range(5))
        self.size = 4 * step + experts + 1

    def plan(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Order, inverse and offsets."""
        slots = self._slots[0] * self._slots[1]
        parts = (self.order, slots), (self.inverse, slots), (self.offsets, self.size - self.offsets)
        order, inverse, offsets = (kept.narrow(0, start, count) for start, count in parts)
        return order, inverse, offsets

    def chosen(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 and weights float32, both ``[T, K]``."""
        slots = self._slots[0] * self._slots[1]
        ids, scores = (kept.narrow(0, start, slots).view(self._slots) for start in (self.ids, self.scores))
        return ids, scores.view(torch.float32)


class Layer:
    """Forward and backward for all calls with tensors of given sizes, none of them empty."""

    def __init__(
        self,
        x: Tensor,
        router_weight: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        top_k: int,
        activation: str,
        formula: router.Formula,
        chosen: Configuration,
        experts_backward: Callable[..., tuple[Tensor, ...]],
    ):
        """Record the forward pass; x is ``[T, H]``, the weights in Hugging Face's layout.

        `experts_backward` is the backend's verb, for gradients whose memory may be as it likes.
        """
        self._experts_backward = experts_backward
        self._device, dtype = x.get_device(), x.dtype
        (tokens, hidden), experts = x.shape, w_gate_up.shape[0]
        slots, columns = tokens * top_k, w_gate_up.shape[1]
        inter = columns // 2 if ACTIVATIONS[activation].gated else columns
        self._formula = formula
        self._settings: tuple[int, str, bool, bool] = (top_k, activation, False, False)
        self.kept = kept = Kept(tokens, top_k, experts)
        self._rows, self._pre_shape = (tokens, hidden), (slots, columns)
        self._logits_shape = (tokens, experts)
        self._makes_logits = router.makes_logits(tokens, experts, hidden)
        counts = grouped.plan_counts(slots, experts)
        verb_bytes = forward.work_bytes(slots, hidden, inter, experts)
        self._work_size = round_up(4 * counts) + verb_bytes

        def place(index: int, shape: tuple[int, ...], kind: torch.dtype = dtype, byte: int = 0) -> Any:
            return Placeholder(index, shape, kind, self._device, byte)

        def part(start: int, shape: tuple[int, ...], kind: torch.dtype = torch.int32) -> Any:
            return place(KEPT, shape, kind, 4 * start)

        def verb() -> None:
            logits = place(LOGITS, (tokens, experts), torch.float32)
            if self._makes_logits:
                # Without a bias its address is 0, which the kernel takes for none.
                weight, bias = place(ROUTER, (experts, hidden)), place(ROUTER_BIAS, (experts,))
                router.logits(place(X, (tokens, hidden)), weight, bias, logits)
            ids, scores = part(kept.ids, (tokens, top_k)), part(kept.scores, (tokens, top_k), torch.float32)
            router.route(logits, ids, scores, formula)
            order, inverse = part(kept.order, (slots,)), part(kept.inverse, (slots,))
            offsets = part(kept.offsets, (experts + 1,))
            grouped.plan(ids, order, inverse, offsets, place(WORK, (counts,), torch.int32))
            forward.launch_all(
                place(X, (tokens, hidden)), scores, order, inverse, offsets,
                place(W_UP, w_gate_up.shape), place(W_DOWN, w_down.shape),
                None if b_gate_up is None else place(B_UP, b_gate_up.shape),
                None if b_down is None else place(B_DOWN, b_down.shape),
                place(OUT, (tokens, hidden)), place(PRE, (slots, columns)),
                place(WORK, (verb_bytes,), torch.uint8, round_up(4 * counts)), *self._settings, chosen,
            )  # fmt: skip

        def of_the_backward_pass() -> list[KernelSource]:
            has_biases = b_gate_up is not None, b_down is not None
            sources = backward.sources(
                self._device, dtype, tokens, hidden, inter, experts, *self._settings, True, *has_biases, chosen
            )
            return [*sources, KernelSource.of("route_backward.cu", dict(router.logits_variant(dtype)))]

        with on_device(self._device):
            self._replay = record(self._device, verb, of_the_backward_pass).replay
        # Half the cost of torch.empty.
        self._floats = torch.empty(0, dtype=torch.float32, device=x.device).new_empty
        self._words = torch.empty(0, dtype=torch.int32, device=x.device).new_empty
        self._bytes = torch.empty(0, dtype=torch.uint8, device=x.device).new_empty
        self._stream_of = stream_of

    def accepts(self, x: Tensor, router_weight: Tensor, w_gate_up: Tensor, w_down: Tensor) -> bool:
        """Whether the kernels can read these where they lie."""
        addresses = x.data_ptr() | router_weight.data_ptr() | w_gate_up.data_ptr() | w_down.data_ptr()
        return addresses % ALIGNMENT == 0 and router_weight.is_contiguous()

    def forward(
        self,
        x: Tensor,
        router_weight: Tensor,
        router_bias: Tensor | None,
        w_gate_up: Tensor,
        w_down: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, logits ``[T, E]``, what :class:`Kept` describes, and the pre-activation; x has any leading sizes."""
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self.forward(x, router_weight, router_bias, w_gate_up, w_down, b_gate_up, b_down)
        if self._makes_logits:
            logits = self._floats(self._logits_shape)
        else:
            logits = torch.mm(x.view(self._rows), router_weight.mT, out_dtype=torch.float32)
            if router_bias is not None:
                logits = logits + router_bias.float()
        out, pre = torch.empty_like(x), x.new_empty(self._pre_shape)
        kept, work = self._words(self.kept.size), self._bytes(self._work_size)
        self._replay(
            self._stream_of(self._device),
            (
                x.data_ptr(), router_weight.data_ptr(), address(router_bias), w_gate_up.data_ptr(), w_down.data_ptr(),
                address(b_gate_up), address(b_down), logits.data_ptr(), kept.data_ptr(), out.data_ptr(), pre.data_ptr(),
                work.data_ptr(),
            ),
        )  # fmt: skip
        return out, logits, kept, pre

    def backward(
        self,
        dout: Tensor | None,
        dlogits: Tensor | None,
        x: Tensor,
        router_weight: Tensor,
        router_bias: Tensor | None,
        w_gate_up: Tensor,
        w_down: Tensor,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        logits: Tensor,
        kept: Tensor,
        pre: Tensor,
        needs: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Gradients of x, the router's weight and bias and the four weights, where `needs` asks for them.

        `dout` is the output's gradient, `dlogits` one that the logits have from elsewhere; not both are None.
        """
        rows = x.view(self._rows)
        through_router = any(needs[:3])
        ids, scores = self.kept.chosen(kept)
        grads: list[Tensor | None] = [None] * 7
        dscores: Tensor | None = None
        if dout is not None:
            wanted = [needs[0], through_router, *needs[3:]]
            order, inverse, offsets = self.kept.plan(kept)
            found = self._experts_backward(
                dout.reshape(self._rows).contiguous(), rows, pre, scores, order, inverse, offsets, w_gate_up, w_down,
                b_gate_up, b_down, *self._settings, wanted,
            )  # fmt: skip
            grads = [found[0], None, None, *found[2:]]
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
            dscores = found[1] if through_router else None
        if through_router:
            total = x.new_empty(self._logits_shape)
            elsewhere = None if dlogits is None else dlogits.contiguous()
            with on_device(self._device):
                router.route_backward(logits, ids, scores, dscores, elsewhere, total, self._formula)
            dx = grads[0]
            if needs[0]:
                grads[0] = total @ router_weight if dx is None else dx.addmm_(total, router_weight)
            if needs[1]:
                grads[1] = total.mT @ rows
            if needs[2]:
                grads[2] = total.sum(0)
        dx = grads[0]
        grads[0] = None if dx is None else dx.view(x.shape)
        return grads
