"""A whole layer's forward pass in training as one recorded program, with the router, and its backward pass.

The router's choice and the plan share one piece of memory, :class:`Kept`, which is saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekern.backends.call import Form, PlanTensors, Weights
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import planner, router
from moekern.backends.cuda.launch.device import current_device, on_device, round_up, stream_of
from moekern.backends.cuda.launch.program import record
from moekern.backends.cuda.passes import backward, forward
from moekern.backends.cuda.passes.sizes import Sizes
from moekern.backends.cuda.torch_path import ALIGNMENT
from moekern.backends.pointers import address

# Places of the addresses in a replay.
X, ROUTER, ROUTER_BIAS, *WEIGHTS, LOGITS, KEPT, OUT, PRE, WORK = range(12)


class Kept:
    """The layout of the kept memory in int32 words, and its parts as tensors."""

    def __init__(self, tokens: int, top_k: int, experts: int):
        """Compute the layout; parts begin at multiples of 16 bytes."""
        self._slots = (tokens, top_k)
        slots = tokens * top_k
        step = -(-slots // 4) * 4
        self.ids, self.scores, self.order, self.inverse, self.offsets = (i * step for i in range(5))
        self.size = 4 * step + experts + 1

    def plan(self, kept: Tensor) -> PlanTensors:
        """Order, inverse and offsets."""
        slots = self._slots[0] * self._slots[1]
        parts = (self.order, slots), (self.inverse, slots), (self.offsets, self.size - self.offsets)
        return PlanTensors(*(kept.narrow(0, start, count) for start, count in parts))

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
        weights: Weights,
        form: Form,
        formula: router.Formula,
        configuration: Configuration,
        experts_backward: Callable[..., tuple[Tensor, ...]],
    ):
        """Record the forward pass; x is ``[T, H]``.

        `experts_backward` is the backend's verb, for gradients in any memory layout.
        """
        self._experts_backward = experts_backward
        self.form, self._formula = form, formula
        sizes = Sizes.of(x, True, weights, form, configuration)
        self._device, place = sizes.device, sizes.place
        tokens, hidden, experts, slots, top_k = sizes.tokens, sizes.hidden, sizes.experts, sizes.slots, form.top_k
        self.kept = kept = Kept(tokens, top_k, experts)
        self._rows, self._pre_shape = (tokens, hidden), (slots, sizes.columns)
        self._logits_shape = (tokens, experts)
        self._makes_logits = router.makes_logits(tokens, experts, hidden)
        counts = planner.plan_counts(slots, experts)
        verb_bytes = forward.work_bytes(sizes)
        self._work_size = round_up(4 * counts) + verb_bytes

        def part(start: int, shape: tuple[int, ...], kind: torch.dtype = torch.int32) -> Any:
            return place(KEPT, shape, kind, 4 * start)

        def verb() -> None:
            logits = place(LOGITS, (tokens, experts), torch.float32)
            if self._makes_logits:
                # Without a bias the address is 0, by which the kernel knows that there is none.
                weight, bias = place(ROUTER, (experts, hidden)), place(ROUTER_BIAS, (experts,))
                router.logits(place(X, (tokens, hidden)), weight, bias, logits)
            ids, scores = part(kept.ids, (tokens, top_k)), part(kept.scores, (tokens, top_k), torch.float32)
            router.route(logits, ids, scores, formula)
            plan = PlanTensors(
                part(kept.order, (slots,)), part(kept.inverse, (slots,)), part(kept.offsets, (experts + 1,))
            )
            planner.plan(ids, *plan, place(WORK, (counts,), torch.int32))
            forward.launch_all(
                sizes,
                place(X, (tokens, hidden)),
                scores,
                plan,
                sizes.weights(WEIGHTS),
                place(OUT, (tokens, hidden)),
                place(PRE, (slots, sizes.columns)),
                place(WORK, (verb_bytes,), torch.uint8, round_up(4 * counts)),
            )

        def of_the_backward_pass() -> list[KernelSource]:
            return [*backward.sources(sizes), router.route_backward_variant(sizes.dtype)]

        with on_device(self._device):
            self._replay = record(self._device, verb, of_the_backward_pass).replay
        # Half the cost of torch.empty.
        self._floats = torch.empty(0, dtype=torch.float32, device=x.device).new_empty
        self._words = torch.empty(0, dtype=torch.int32, device=x.device).new_empty
        self._bytes = torch.empty(0, dtype=torch.uint8, device=x.device).new_empty
        self._stream_of = stream_of

    def accepts(self, x: Tensor, router_weight: Tensor, weights: Weights) -> bool:
        """Whether the kernels can read these without a copy."""
        addresses = x.data_ptr() | router_weight.data_ptr() | weights.w_gate_up.data_ptr() | weights.w_down.data_ptr()
        return addresses % ALIGNMENT == 0 and router_weight.is_contiguous()

    def forward(
        self, x: Tensor, router_weight: Tensor, router_bias: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, logits ``[T, E]``, the memory of :class:`Kept`, and the pre-activation; x has any leading sizes."""
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self.forward(x, router_weight, router_bias, weights)
        if self._makes_logits:
            logits = self._floats(self._logits_shape)
        else:
            logits = torch.mm(x.view(self._rows), router_weight.mT, out_dtype=torch.float32)
            if router_bias is not None:
                logits = logits + router_bias.float()
        out, pre = torch.empty_like(x), x.new_empty(self._pre_shape)
        kept, work = self._words(self.kept.size), self._bytes(self._work_size)
        tensors = (x, router_weight, router_bias, *weights, logits, kept, out, pre, work)
        self._replay(self._stream_of(self._device), [address(t) for t in tensors])
        return out, logits, kept, pre

    def backward(
        self,
        dout: Tensor | None,
        dlogits: Tensor | None,
        x: Tensor,
        router_weight: Tensor,
        router_bias: Tensor | None,
        weights: Weights,
        logits: Tensor,
        kept: Tensor,
        pre: Tensor,
        needs: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Gradients of x, the router's weight and bias and the experts' weights, where `needs` is true.

        `dout` is the output's gradient, `dlogits` a gradient of the logits from other users; not both are None.
        """
        rows = x.view(self._rows)
        through_router = any(needs[:3])
        ids, scores = self.kept.chosen(kept)
        grads: list[Tensor | None] = [None] * len(needs)
        dscores: Tensor | None = None
        if dout is not None:
            wanted = [needs[0], through_router, *needs[3:]]
            grad_rows = dout.reshape(self._rows).contiguous()
            plan = self.kept.plan(kept)
            found = self._experts_backward(grad_rows, rows, pre, scores, plan, weights, self.form, wanted)
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
