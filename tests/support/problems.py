"""Problems to test the experts with, and comparisons with the float64 truth and with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.backends.activations import ACTIVATIONS

NAMES = ("x", "weights", "w_gate_up", "w_down", "b_gate_up", "b_down")


@dataclass(frozen=True)
class Problem:
    """Inputs of :func:`moekern.experts`, scaled so that the output is of order one."""

    x: Tensor
    ids: Tensor
    weights: Tensor | None
    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None
    b_down: Tensor | None
    activation: str = "swiglu"
    transposed: bool = False
    interleaved: bool = False

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in NAMES)

    def run(self, **replaced: Tensor) -> Tensor:
        p = replace(self, **replaced)
        return mk.experts(
            p.x, p.ids, p.weights, p.w_gate_up, p.w_down, p.b_gate_up, p.b_down,
            activation=p.activation, transposed=p.transposed, interleaved=p.interleaved,
        )  # fmt: skip

    def cast(self, dtype: torch.dtype) -> Problem:
        """Same values in another dtype; the router weights stay in float32 unless it is float64."""
        score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        to = {n: t.to(score_dtype if n == "weights" else dtype) for n in NAMES if (t := getattr(self, n)) is not None}
        return replace(self, **to)


def make(
    tokens: int,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    activation: str = "swiglu",
    bias: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
    ids: Tensor | None = None,
    seed: int = 0,
) -> Problem:
    """A random problem whose values are exact in ``dtype``; ids are drawn without repetition unless given."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=rng) * scale).to(dtype).to(device)

    features = intermediate * (2 if ACTIVATIONS[activation].gated else 1)
    up = (experts, hidden, features) if transposed else (experts, features, hidden)
    down = (experts, intermediate, hidden) if transposed else (experts, hidden, intermediate)
    if ids is None:
        ids = torch.rand(tokens, experts, generator=rng).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=rng) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        normal(tokens, hidden),
        ids.to(device),
        weights.to(device, score_dtype),
        normal(*up, scale=1.5 / hidden**0.5),
        normal(*down, scale=2.0 / intermediate**0.5),
        normal(experts, features, scale=0.5) if bias else None,
        normal(experts, hidden, scale=0.5) if bias else None,
        activation,
        transposed,
        interleaved,
    )


def gradients(problem: Problem, dout: Tensor, wanted: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    leaves = {
        name: t.detach().clone().requires_grad_(name in wanted)
        for name, t in zip(NAMES, problem.floating, strict=True)
        if t is not None
    }
    out = problem.run(**leaves)
    asked = [n for n in leaves if n in wanted]
    result = torch.autograd.grad(out, [leaves[n] for n in asked], dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(asked, result, strict=True))}


def error(value: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; NaN anywhere gives NaN, which exceeds every bound."""
    difference = (value.detach().double().cpu() - truth.detach().double().cpu()).norm()
    scale = truth.detach().double().norm().cpu()
    return float(difference / scale) if scale > 0 else float(difference)


HANDFUL = 16  # elements; fewer can be exact by luck


def check_against_truth(
    run: Callable[[Problem], dict[str, Tensor]], problem: Problem, factor: float = 2.0, slack: float = 1.0
) -> dict[str, float]:
    """Every tensor's error against float64 is at most ``factor`` times that of plain torch in the same dtype.

    Plain torch can be exact by luck on a tiny problem, so one rounding of the dtype is always allowed, and five in
    float32, where each step of the chain (sum, bias, exponential, quotient, product) makes one of that size;
    ``slack`` times as many where a result may be the difference of nearly equal numbers.
    """
    with mk.backend("reference"):
        truth = run(problem.cast(torch.float64))
        plain = run(problem)
    ours = run(problem)
    assert ours.keys() == truth.keys()
    errors = {}
    for name, value in ours.items():
        # Gradients of the router's weights are float32, made of values in the dtype of the rows: where they are a
        # handful, plain torch can hit them exactly.
        kinds = (value.dtype, problem.x.dtype) if value.numel() <= HANDFUL else (value.dtype,)
        coarsest = max(kinds, key=lambda dtype: torch.finfo(dtype).eps)
        rounding = torch.finfo(coarsest).eps / 2 * (5 if coarsest == torch.float32 else 1) * slack
        allowed = max(factor * error(plain[name], truth[name]), rounding)
        errors[name] = error(value, truth[name])
        assert value.shape == truth[name].shape
        assert errors[name] <= allowed, f"{name}: error {errors[name]:.3g}, allowed {allowed:.3g}"
    return errors


def forbid_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail where torch serves what the Hopper kernels should."""
    from moekern.backends.cuda import torch_path

    def refusing(verb: Callable[..., object]) -> Callable[..., object]:
        def refuse(rows: Tensor, *args: object) -> object:
            assert rows.numel() == 0, "served by torch, not by the kernels"
            return verb(rows, *args)  # there is nothing to multiply

        return refuse

    for name in ("experts_forward", "experts_backward", "grouped_mm", "permute", "combine", "combine_backward"):
        monkeypatch.setattr(torch_path, name, refusing(getattr(torch_path, name)))
