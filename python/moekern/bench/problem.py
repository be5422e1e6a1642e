"""One problem of the benchmark: inputs, least cost, and results in float32 that others are compared with."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moekern.bench.record import BOTH
from moekern.bench.routing import choose
from moekern.bench.shapes import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The largest relative error in the Frobenius norm of a right result: several roundings of the dtype. Arithmetic in
# tf32 exceeds that of float32.
ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3, torch.float32: 1e-4}


@dataclass
class Results:
    """An output ``[T, H]`` and, with a backward pass, the gradients of x, scores, w_gate_up and w_down."""

    out: Tensor
    gradients: tuple[Tensor, ...] = ()

    def error_against(self, wanted: Results) -> float:
        """The largest relative error in the Frobenius norm; infinite if there is a NaN or a shape differs."""
        pairs = zip((self.out, *self.gradients), (wanted.out, *wanted.gradients), strict=True)
        return max(relative_error(got, want) for got, want in pairs)


class Problem:
    """Random inputs of one shape on one device: SwiGLU experts without biases, in Hugging Face's layout.

    Attributes:
        ids, scores: ``[T, K]``, int64 and float32; scores are positive and sum to 1 for each token.
        x, dout: ``[T, H]``; dout is the gradient of the output.
        w_gate_up, w_down: ``[E, 2I, H]`` and ``[E, H, I]``, scaled so that outputs are of order one.
        active: The number of experts that have tokens.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, routing: str = "uniform", seed: int = 0) -> None:
        self.shape, self.dtype, self.device, self.routing = shape, dtype, device, routing
        generator = torch.Generator(device).manual_seed(seed)
        t, h, i, e = shape.tokens, shape.hidden, shape.intermediate, shape.experts

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).mul_(scale).to(dtype)

        def weights(rows: int, columns: int) -> Tensor:
            """Draw for one expert and shift for each: billions of variates would take longer than the benchmark."""
            drawn = normal(rows, columns, scale=columns**-0.5)
            result = drawn.new_empty(e, rows, columns)
            for expert in range(e):
                result[expert] = drawn.roll((3 * expert, 5 * expert), (0, 1))
            return result

        self._route(generator)
        self.x, self.dout = normal(t, h), normal(t, h)
        self.w_gate_up, self.w_down = weights(2 * i, h), weights(h, i)

    def _route(self, generator: torch.Generator) -> None:
        """Draw ids and scores."""
        s = self.shape
        self.ids = choose(self.routing, s.tokens, s.experts, s.top_k, generator)
        self.scores = torch.rand(s.tokens, s.top_k, generator=generator, device=self.device).add_(0.1)
        self.scores /= self.scores.sum(1, keepdim=True)
        self.active = int(self.ids.unique().numel())
        self._reference: Results | None = None

    def rerouted(self, seed: int) -> Problem:
        """The same tensors with other ids and scores."""
        other = copy(self)
        other._route(torch.Generator(self.device).manual_seed(seed))
        return other

    def flops(self, verb: str) -> float:
        """The FLOPs of the matrix products: 6TKHI forward, three times that with the backward pass."""
        s = self.shape
        return 6.0 * s.slots * s.hidden * s.intermediate * (3 if verb == BOTH else 1)

    def bytes(self, verb: str) -> float:
        """The fewest bytes that must be moved: each input read once per pass, each result written once.

        Forward: x, the weights of experts with tokens, the output. The backward pass adds: the pre-activation written
        and read, x, the output's gradient and those weights read again, the gradients of x and of all weights written.
        """
        s = self.shape
        row, expert, pre = s.tokens * s.hidden, 3 * s.hidden * s.intermediate, 2 * s.slots * s.intermediate
        elements = 2 * row + self.active * expert
        if verb == BOTH:
            elements += 2 * pre + 3 * row + (self.active + s.experts) * expert
        return float(elements * self.dtype.itemsize + s.slots * (self.scores.itemsize + self.ids.itemsize))

    def reference(self, backward: bool) -> Results:
        """The results in float32, computed one expert at a time and kept."""
        if self._reference is None or (backward and not self._reference.gradients):
            self._reference = in_float32(self, backward)
        return self._reference if backward else Results(self._reference.out)

    def leaves(self) -> tuple[Tensor, ...]:
        """x, scores and both weights as leaves that require gradients; they share the problem's memory."""
        tensors = (self.x, self.scores, self.w_gate_up, self.w_down)
        return tuple(t.detach().requires_grad_() for t in tensors)


def in_float32(problem: Problem, backward: bool) -> Results:
    """A loop over the experts that shares no code with the implementations; one expert at a time is in float32."""
    p = problem
    x, scores = (t.float().requires_grad_(backward) for t in (p.x, p.scores))
    out, dx, dscores = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(scores)
    weight_gradients = tuple(torch.zeros(w.shape, device=w.device) if backward else w for w in (p.w_gate_up, p.w_down))
    dout = p.dout.float()
    with torch.no_grad():
        for expert in p.ids.unique().tolist():
            token, k = torch.where(p.ids == expert)
            leaves = x[token], scores[token, k], p.w_gate_up[expert].float(), p.w_down[expert].float()
            if not backward:
                out.index_add_(0, token, one_expert(*leaves))
                continue
            for leaf in leaves:
                leaf.requires_grad_()
            with torch.enable_grad():
                y = one_expert(*leaves)
            gradients = torch.autograd.grad(y, leaves, dout[token])
            out.index_add_(0, token, y.detach())
            dx.index_add_(0, token, gradients[0])
            dscores[token, k] = gradients[1]
            for total, gradient in zip(weight_gradients, gradients[2:], strict=True):
                total[expert] = gradient
    return Results(out.detach(), (dx, dscores, *weight_gradients) if backward else ())


def one_expert(rows: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """One expert's contribution to the tokens it serves: ``[n, H]``."""
    gate, up = F.linear(rows, w_gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w_down) * scores.unsqueeze(1)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Error in the Frobenius norm, one slice at a time: gradients of weights fill gigabytes."""
    if got.shape != wanted.shape:
        return float("inf")
    error = norm = torch.zeros((), device=wanted.device, dtype=torch.float64)
    slices = zip(got.unbind(), wanted.unbind(), strict=True) if got.ndim == 3 else [(got, wanted)]
    for a, b in slices:
        error = error + (a.to(b.device).float() - b).norm().double() ** 2
        norm = norm + b.norm().double() ** 2
    relative = float((error / norm).sqrt()) if float(norm) else float(error)
    return relative if relative == relative else float("inf")
