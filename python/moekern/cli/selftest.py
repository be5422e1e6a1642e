"""A numeric self-test of one backend: outputs and gradients of a small MoE against a loop in float64.

The loop below shares no code with the backends, the reference included.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import moekern as mk

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 200, 128, 64, 8, 2
RESULTS = ("output", "gradient of x", "gradient of scores", "gradient of w_gate_up", "gradient of w_down")
# Relative error in the Frobenius norm: about four roundings of each dtype in a row. In float32, where the order of sums
# decides, that is ten times the error of a sound backend.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@dataclass(frozen=True)
class SelfTest:
    """One backend in one dtype. error: the largest of all results; message: why it failed, or its warnings."""

    backend: str
    dtype: str
    passed: bool
    error: float | None
    allowed: float
    message: str


def run_self_test(backend: str, dtype: torch.dtype, device: str) -> SelfTest:
    """Compute with `backend` on `device`. An exception becomes part of the result: doctor reports it and continues."""
    name, allowed = str(dtype).removeprefix("torch."), ALLOWED[dtype]
    inputs, ids, upstream = make_inputs(dtype)
    wanted = in_float64(inputs, ids, upstream)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            moved = [t.to(device).requires_grad_() for t in inputs]
            x, router_weights, w_gate_up, w_down = moved
            with mk.backend(backend):
                y = mk.experts(x, ids.to(device), router_weights, w_gate_up, w_down)
                got = [y.detach(), *torch.autograd.grad(y, moved, upstream.to(device))]
    except Exception as error:
        return SelfTest(backend, name, False, None, allowed, f"{type(error).__name__}: {error}")
    errors = [relative_error(g, w) for g, w in zip(got, wanted, strict=True)]
    message = "; ".join(str(warning.message) for warning in caught)
    wrong = [f"{result} is off by {e:.1e}" for result, e in zip(RESULTS, errors, strict=True) if not e <= allowed]
    if wrong:
        message = f"{', '.join(wrong)} (allowed {allowed:.1e})"
    return SelfTest(backend, name, not wrong, max(errors), allowed, message)


def make_inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, router weights, w_gate_up, w_down; ids with two sentinels and an expert without tokens; upstream gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(scale).to(dtype)

    router_weights = torch.rand(TOKENS, TOP_K, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS - 1, generator=generator).argsort(dim=1)[:, :TOP_K]
    ids[0, 0], ids[1, 1] = -1, EXPERTS
    inputs = [
        normal(TOKENS, HIDDEN),
        router_weights,
        normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5),
        normal(EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5),
    ]
    return inputs, ids, normal(TOKENS, HIDDEN)


def in_float64(inputs: list[Tensor], ids: Tensor, upstream: Tensor) -> list[Tensor]:
    """The same results by a loop over slots' experts in float64, differentiated by autograd."""
    x, router_weights, w_gate_up, w_down = wide = [t.double().requires_grad_() for t in inputs]
    y = torch.zeros_like(x)
    for expert in range(EXPERTS):
        gate, up = F.linear(x, w_gate_up[expert]).chunk(2, dim=-1)
        share = (router_weights * (ids == expert)).sum(dim=1, keepdim=True)
        y = y + share * F.linear(F.silu(gate) * up, w_down[expert])
    return [y.detach(), *torch.autograd.grad(y, wide, upstream.double())]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Error in the Frobenius norm; infinite if anything is not a number."""
    error = ((got.cpu().double() - wanted).norm() / wanted.norm()).item()
    return error if error == error else float("inf")
