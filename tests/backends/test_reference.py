"""The reference itself: against a plain loop over tokens, and against numerical derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.backends import reference
from moekern.backends.activations import ACTIVATIONS
from moekern.backends.call import Form, Weights
from moekern.verbs import autograd
from problems import Problem, error, gradients, make


@pytest.fixture(autouse=True)
def _reference() -> object:
    with mk.backend("reference"):
        yield


def token_by_token(p: Problem) -> Tensor:
    """One token and one expert at a time, from the definition."""
    rows = []
    for t in range(p.x.shape[0]):
        total = torch.zeros_like(p.x[t])
        for k, e in enumerate(p.ids[t].tolist()):
            if not 0 <= e < p.w_down.shape[0]:
                continue
            w1 = p.w_gate_up[e].T if p.transposed else p.w_gate_up[e]
            w2 = p.w_down[e].T if p.transposed else p.w_down[e]
            h = w1 @ p.x[t] + (0 if p.b_gate_up is None else p.b_gate_up[e])
            act = ACTIVATIONS[p.activation]
            if not act.gated:
                a = act.forward(h, None)
            elif p.interleaved:
                a = act.forward(h[0::2], h[1::2])
            else:
                a = act.forward(h[: len(h) // 2], h[len(h) // 2 :])
            total = total + p.weights[t, k] * (w2 @ a + (0 if p.b_down is None else p.b_down[e]))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_against_a_loop_over_tokens(activation: str, transposed: bool) -> None:
    interleaved = ACTIVATIONS[activation].gated and transposed
    ids = torch.randint(-1, 5, (9, 2))
    p = make(
        9, 6, 4, 4, 2, dtype=torch.float64, activation=activation, bias=True, transposed=transposed,
        interleaved=interleaved, ids=ids,
    )  # fmt: skip
    assert error(p.run(), token_by_token(p)) < 1e-14
    dout = torch.randn_like(p.x)
    ours = gradients(p, dout)
    leaves = {n: t.clone().requires_grad_() for n in ("x", "weights", "w_gate_up", "w_down", "b_gate_up", "b_down")
              if (t := getattr(p, n)) is not None}  # fmt: skip
    loop = torch.autograd.grad(token_by_token(Problem(**{**p.__dict__, **leaves})), list(leaves.values()), dout)
    for name, value in zip(leaves, loop, strict=True):
        assert error(ours[name], value) < 1e-12, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(activation: str) -> None:
    p = make(5, 4, 3, 3, 2, dtype=torch.float64, activation=activation, bias=True, ids=torch.randint(0, 4, (5, 2)))
    inputs = tuple(t.requires_grad_() for t in p.floating)
    plan = reference.plan(p.ids, 3)

    def f(x: Tensor, s: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return autograd.experts(x, s, plan, Weights(w1, w2, b1, b2), Form(activation, False, False, 2), "reference")

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("kind", ["nt", "nn", "tn"])
def test_derivatives_of_grouped_mm(kind: str) -> None:
    offsets = torch.tensor([0, 3, 3, 6], dtype=torch.int32)
    shape = {"nt": (3, 5, 4), "nn": (3, 4, 5), "tn": (8, 5)}[kind]
    a = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(a: Tensor, b: Tensor) -> Tensor:
        return autograd.grouped_mm(a, b, offsets, kind, "reference")

    assert torch.autograd.gradcheck(f, (a, b))
    assert torch.autograd.gradgradcheck(f, (a, b))
