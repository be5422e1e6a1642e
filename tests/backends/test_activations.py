"""The activations over the whole range of each dtype: finite and right where torch's own operators are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moekern as mk
from moekern.backends.activations import ACTIVATIONS, OAI_ALPHA, OAI_LIMIT
from problems import error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def swiglu_oai(g: Tensor, u: Tensor) -> Tensor:
    """gpt-oss's activation, its rule at the bound written out: clamped values, the bound included, are constants."""
    g = torch.where(g < OAI_LIMIT, g, OAI_LIMIT)
    u = torch.where(u.abs() < OAI_LIMIT, u, OAI_LIMIT * u.detach().sign())
    return (u + 1) * (g * torch.sigmoid(g * OAI_ALPHA))


EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "geglu": lambda g, u: F.gelu(g) * u,
    "geglu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "reglu": lambda g, u: F.relu(g) * u,
    "swiglu_oai": swiglu_oai,
    "silu": lambda g, _: F.silu(g),
    "gelu": lambda g, _: F.gelu(g),
    "gelu_tanh": lambda g, _: F.gelu(g, approximate="tanh"),
    "relu": lambda g, _: F.relu(g),
    "relu2": lambda g, _: F.relu(g).square(),
}


def values_of(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    sizes = [0.0, info.smallest_normal / 8, info.smallest_normal, 1e-3, 0.3, 1, 2.5, 6.9, 7, 7.1, 11, 30, 88, 200, 700]
    sizes += [s for s in (9000.0, 4e4, 1e7, 1e13, 3e15, 1e19, 1e22, 1e30, 2e38) if s < info.max] + [info.max]
    positive = torch.tensor(sizes, dtype=torch.float64).to(dtype)
    return torch.cat((positive, -positive))


def through_experts(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """The activation of every pair, as an expert whose matrices pass the features through."""
    gated = ACTIVATIONS[name].gated
    x = torch.stack((gate, up), 1) if gated else gate.unsqueeze(1)
    width = x.shape[1]
    first = torch.eye(width, dtype=x.dtype, device=x.device).unsqueeze(0)
    down = torch.zeros(1, width, 1, dtype=x.dtype, device=x.device)
    down[0, 0, 0] = 1
    ids = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    return mk.experts(x, ids, None, first, down, activation=name)[:, 0]


def derived(f: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and gradients by gate and up."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = f(gate, up)
    d_gate, d_up = torch.autograd.grad(y, (gate, up), torch.ones_like(y), allow_unused=True)
    return y.detach(), d_gate, torch.zeros_like(up) if d_up is None else d_up


@pytest.mark.parametrize("name", sorted(EAGER))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", None])
def test_as_torch_over_the_whole_range(device: str, name: str, dtype: torch.dtype, backend: str | None) -> None:
    values = values_of(dtype).to(device)
    gate, up = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    with mk.backend(backend or "auto"):
        ours = derived(lambda g, u: through_experts(name, g, u), gate, up)
    eager = derived(EAGER[name], gate, up)
    truth = derived(EAGER[name], gate.double(), up.double())
    info = torch.finfo(dtype)
    g, u = gate.double().abs(), up.double().abs() if ACTIVATIONS[name].gated else torch.ones_like(up.double())
    if name == "swiglu_oai":
        u = u.clamp(max=OAI_LIMIT) + 1
    # Both gradients pass through one product with a matrix that has zeros: an infinite one would spoil the other.
    both = eager[1].isfinite() & eager[2].isfinite()
    slope = {"relu2": g, "swiglu_oai": 1 + OAI_ALPHA * g.clamp(max=OAI_LIMIT)}.get(name, torch.ones_like(g))
    scales = (g * u, u * slope, g)
    denormal = (g > 0) & (g < info.smallest_normal) & (dtype == torch.bfloat16)
    for of, mine, theirs, want, scale in zip(("y", "d gate", "d up"), ours, eager, truth, scales, strict=True):
        # bfloat16 instructions read denormal operands as zero, where relu has its kink.
        allowed = 4 * info.eps * torch.maximum(scale, want.abs()) + info.smallest_normal * (1 + u + g)
        wrong = (theirs.isfinite() if of == "y" else both) & ~((mine.double() - want).abs() <= allowed)
        wrong &= ~(denormal & (of == "d gate"))
        at = wrong.nonzero().flatten()[:4]
        assert not wrong.any(), (of, gate[at], up[at], mine[at], theirs[at])


@pytest.mark.parametrize("name", sorted(EAGER))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_nan_and_infinity(device: str, name: str, dtype: torch.dtype) -> None:
    """NaN is passed on; where torch is finite at an infinity, so are we."""
    for gate, up in ((float("nan"), 1.0), (float("inf"), 1.0), (float("-inf"), 1.0)):
        g = torch.tensor([gate], dtype=dtype, device=device)
        u = torch.tensor([up], dtype=dtype, device=device)
        act = ACTIVATIONS[name]
        ours = (act.forward(g, u), *act.backward(torch.ones_like(g), g, u))
        eager = derived(EAGER[name], g, u)
        for mine, theirs in zip(ours, eager, strict=True):
            if mine is not None and theirs.isfinite() and gate == gate:
                assert mine.isfinite()
        assert ours[0].isnan().item() == (gate != gate) or not eager[0].isfinite()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", ["reference", None])
def test_no_gradient_at_the_clamps_bound(device: str, dtype: torch.dtype, backend: str | None) -> None:
    """The bound itself counts as clamped, with every version of torch."""
    below = 7 * (1 - torch.finfo(dtype).eps)
    gate = torch.tensor([7.0, 1, 1, below, 1, 1, 8, -7, -8], dtype=dtype, device=device)
    up = torch.tensor([1.0, 7, -7, 1, below, -below, 1, 1, 1], dtype=dtype, device=device)
    with mk.backend(backend or "auto"):
        _, d_gate, d_up = derived(lambda g, u: through_experts("swiglu_oai", g, u), gate, up)
    assert (d_gate == 0).tolist() == [True, False, False, False, False, False, True, False, False]
    assert (d_up == 0).tolist() == [False, True, True, False, False, False, False, False, False]
    _, *expected = derived(swiglu_oai, gate.double(), up.double())
    for value, wanted in zip((d_gate, d_up), expected, strict=True):
        assert error(value, wanted) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", sorted(EAGER))
def test_second_derivatives(device: str, name: str) -> None:
    """In half precision too, at ordinary and at large values, finite where torch is."""
    for dtype in (torch.float64, torch.float16):
        points = torch.tensor([-700.0, -30, -1.5, 0.4, 2, 7, 8, 700], dtype=dtype, device=device)
        gate, up = (v.flatten().requires_grad_() for v in torch.meshgrid(points, points, indexing="ij"))
        results = []
        for f in (lambda g, u: through_experts(name, g, u), EAGER[name]):
            y = f(gate, up)
            first = torch.autograd.grad(y.sum(), (gate, up), create_graph=True, allow_unused=True)
            total = sum((d * k).sum() for k, d in enumerate(first, 1) if d is not None)
            results.append(torch.autograd.grad(total, (gate, up), allow_unused=True))
        finite = torch.ones_like(
            gate, dtype=torch.bool
        )  # one infinite derivative times a zero of the matrix spoils both
        for theirs in results[1]:
            finite &= torch.tensor(True) if theirs is None else theirs.isfinite()
        for mine, theirs in zip(*results, strict=True):
            if theirs is None:
                assert mine is None or (mine[finite] == 0).all()
                continue
            assert mine[finite].isfinite().all()
            if dtype == torch.float64:
                assert torch.allclose(mine[finite], theirs[finite], atol=1e-12)
