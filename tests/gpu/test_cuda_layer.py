"""A layer's training as one program on a Hopper GPU, against the layer's own path, operator by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.layer import training
from moekern.routing import router
from problems import error, forbid_torch_path

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
INF = float("inf")


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    forbid_torch_path(monkeypatch)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("method", router.FORMULAS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (5, 8, 2), (16, 128, 8), (301, 60, 4), (77, 1000, 40), (9, 1024, 64), (33, 64, 64)],
)
def test_gradient_of_the_choice(
    tokens: int, experts: int, top_k: int, norm: bool, method: str, dtype: torch.dtype
) -> None:
    from moekern.backends.cuda.kernels import router as kernels

    logits = (torch.randn(tokens, experts, device="cuda") * 3).requires_grad_()
    how = kernels.formula(method, norm, 2.5)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device="cuda")
    weights = torch.empty(tokens, top_k, device="cuda")
    kernels.route(logits.detach(), ids, weights, how)
    dweights, elsewhere = torch.randn_like(weights), torch.randn_like(logits)
    exact = router.weights_of(logits.double(), ids.long(), method, norm, 2.5)
    for up, other in ((dweights, None), (None, elsewhere), (dweights, elsewhere)):
        out = torch.full((tokens + 1, experts), float("nan"), device="cuda", dtype=dtype)
        kernels.route_backward(logits.detach(), ids, weights, up, other, out[:tokens], how)
        assert out[tokens].isnan().all()
        wanted = torch.zeros_like(logits, dtype=torch.float64) if other is None else other.double()
        if up is not None:
            wanted = wanted + torch.autograd.grad(exact, logits, up.double(), retain_graph=True)[0]
        scale = 1e-5 * (0 if up is None else up.abs().sum(1, keepdim=True))
        bound = torch.finfo(dtype).eps * wanted.abs() + scale + torch.finfo(dtype).smallest_normal
        assert ((out[:tokens] - wanted).abs() <= bound).all()


def test_saturated_logits() -> None:
    """Where torch's gradient of a choice is finite, so is the kernel's."""
    from moekern.backends.cuda.kernels import router as kernels

    logits = torch.tensor([[90.0, -90.0, 0.0, 30.0], [-INF, 1.0, -INF, 2.0], [200.0, 199.0, -200.0, -100.0]])
    logits = logits.cuda().requires_grad_()
    for method in router.FORMULAS:
        for norm in (False, True):
            how = kernels.formula(method, norm, 1.0)
            ids = torch.empty(3, 2, dtype=torch.int32, device="cuda")
            weights, out = torch.empty(3, 2, device="cuda"), torch.empty(3, 4, device="cuda", dtype=BF16)
            kernels.route(logits.detach(), ids, weights, how)
            up = torch.tensor([[1.0, -2.0]], device="cuda").expand(3, 2).contiguous()
            kernels.route_backward(logits.detach(), ids, weights, up, None, out, how)
            wanted = torch.autograd.grad(router.weights_of(logits, ids.long(), method, norm, 1.0), logits, up)[0]
            assert ((out - wanted).abs() <= 1e-5 + 0.01 * wanted.abs()).all()


def step(moe: mk.MoE, x: Tensor, coefficient: float) -> tuple[list[Tensor], list[Tensor]]:
    """The router's decisions, exactly; output and gradients."""
    x = x.detach().requires_grad_()
    y = moe(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape)).sum()
    if coefficient:
        loss = loss + coefficient * mk.aux_loss(moe, balance=1.0, z=1.0)
    routing = moe.latest_routing
    assert routing is not None
    grads = torch.autograd.grad(loss, [x, *moe.parameters()])
    return [routing.logits.detach(), routing.tokens_per_expert, routing.topk_ids], [y.detach(), *grads]


@pytest.mark.parametrize("coefficient", [0.0, 5.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": "olmoe", "norm_topk_prob": False},
        {"routing": "gpt_oss", "bias": True, "router_bias": True, "activation": "swiglu_oai"},
        {"routing": "sigmoid_topk", "routed_scaling_factor": 2.5},
        {"routing": "sqrtsoftplus_topk", "activation": "gelu"},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 256), (3, 16, 256), (1, 256), (2, 4000, 256)])
def test_both_ways(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
    coefficient: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moe = mk.MoE(256, 136, 16, 2, **options).to("cuda", dtype)
    x = torch.randn(shape, device="cuda").to(dtype)
    decided, got = step(moe, x, coefficient)
    assert isinstance(moe.__dict__["_latest_routing"].logits.grad_fn, torch.autograd.function.BackwardCFunction)
    again = step(moe, x, coefficient)
    for a, b in zip([*decided, *got], [*again[0], *again[1]], strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("moekern.layer.moe.train", lambda layer, x: None)
    wanted_decided, wanted = step(moe, x, coefficient)
    for a, b in zip(decided, wanted_decided, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert error(a, b) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_gradients_against_float64(dtype: torch.dtype) -> None:
    """Error at most 2x that of plain torch in the same dtype, as everywhere; the choice is the layer's."""
    moe = mk.MoE(256, 136, 16, 2).to("cuda", dtype)
    x = torch.randn(200, 256, device="cuda").to(dtype)
    got = step(moe, x, 0.0)[1]

    def plain(kind: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, *moe.parameters())]
        rows, gate, up, down = leaves
        logits = rows @ gate.T
        assert moe.latest_routing is not None
        ids = moe.latest_routing.topk_ids
        scores = router.weights_of(logits if kind == torch.float64 else logits.float(), ids, "softmax_topk", True, 1.0)
        plan = mk.plan(ids, 16)
        from moekern.backends import reference
        from moekern.backends.call import Form, PlanTensors, Weights

        form = Form("swiglu", False, False, 2)
        out = reference.experts_forward(rows, scores, PlanTensors(*plan[:3]), Weights(up, down), form, False)[0]
        wide = out if kind == torch.float64 else out.float()
        loss = (wide * torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)).sum()
        return [out.detach(), *torch.autograd.grad(loss, leaves)]

    for a, half, exact in zip(got, plain(dtype), plain(torch.float64), strict=True):
        assert error(a, exact) <= 2 * error(half, exact) + 1e-3


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = mk.MoE(64, 32, 8, 2, bias=True, router_bias=True).to("cuda", BF16)
    x = torch.randn(50, 64, device="cuda").to(BF16)

    def second() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        loss = moe(leaf).float().square().sum() + mk.aux_loss(moe, z=1.0)
        first = torch.autograd.grad(loss, [leaf, *moe.parameters()], create_graph=True)
        total = sum(g.float().square().sum() for g in first)
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, [leaf, *moe.parameters()]))

    got = second()
    monkeypatch.setattr("moekern.layer.moe.train", lambda layer, x: None)
    for a, b in zip(got, second(), strict=True):
        assert error(a, b) <= 2e-2


def test_one_program_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = mk.MoE(256, 136, 16, 2).to("cuda", BF16)
    x = torch.randn(16, 256, device="cuda", dtype=BF16, requires_grad=True)
    moe(x).sum().backward()
    monkeypatch.setattr(router, "route", None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        y = moe(x)
        made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        y.backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made == 5  # logits, output, pre-activation, kept memory, working memory
    assert training.train(moe, x[:, ::1]) is not None
    misaligned = torch.zeros(16 * 256 + 1, device="cuda", dtype=BF16)[1:].view(16, 256)
    assert training.train(moe, misaligned) is None
