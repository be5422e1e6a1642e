"""Limits on an expert's tokens, by score and by position, and experts that choose their tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import moekern as mk
from moekern.routing.capacity import capacity_of
from problems import error, make

H, I, E, K = 16, 8, 5, 2


def expected_ids(
    ids: torch.Tensor, weights: torch.Tensor, experts: int, capacity: int | None, multiple: int, by: str
) -> torch.Tensor:
    """Slot by slot, as by hand."""
    flat, scores = ids.flatten().tolist(), weights.flatten().tolist()
    kept: set[int] = set()
    for e in range(experts):
        slots = [s for s, i in enumerate(flat) if i == e]
        if by == "score":
            slots.sort(key=lambda s: -scores[s])
        limit = len(slots) if capacity is None else min(capacity, len(slots))
        kept |= set(slots[: limit // multiple * multiple])
    return torch.tensor([i if s in kept else -1 for s, i in enumerate(flat)]).reshape(ids.shape)


@given(
    tokens=st.integers(0, 40), experts=st.integers(1, 7), capacity=st.none() | st.integers(0, 20),
    multiple=st.integers(1, 9), by=st.sampled_from(["score", "position"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_who_stays(
    device: str, tokens: int, experts: int, capacity: int | None, multiple: int, by: str, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (tokens, 3), generator=rng)  # with sentinels
    weights = torch.randint(0, 9, (tokens, 3), generator=rng) / 9  # with ties
    ours = mk.limit_tokens(ids.to(device), weights.to(device), experts, capacity=capacity, multiple=multiple, by=by)
    assert torch.equal(ours.cpu(), expected_ids(ids, weights, experts, capacity, multiple, by))


def test_dropped_slots_have_no_output_and_no_gradient(place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    p = make(30, H, I, E, K, device=device, dtype=dtype)
    ids = mk.limit_tokens(p.ids, p.weights, E, capacity=6)
    dropped = ids < 0
    assert dropped.any()
    weights = p.weights.clone().requires_grad_()
    out = mk.experts(p.x, ids, weights, p.w_gate_up, p.w_down)
    masked = mk.experts(p.x, p.ids, torch.where(dropped, 0, p.weights), p.w_gate_up, p.w_down)
    assert error(out, masked) < (1e-6 if dtype == torch.float32 else 2**-8)
    out.square().sum().backward()
    assert not weights.grad[dropped].any()


@pytest.mark.parametrize("by", ["score", "position"])
def test_layer_with_a_capacity(place: tuple[str, torch.dtype], by: str) -> None:
    device, dtype = place
    moe = mk.MoE(H, I, E, K, capacity_factor=0.75, drop_by=by, round_tokens_to=2).to(device, dtype)
    x = torch.randn(4, 10, H, device=device, dtype=dtype)
    weights, ids = mk.route(moe.gate(x.reshape(-1, H)), K)
    for training, multiple in ((True, 2), (False, 1)):
        kept = mk.limit_tokens(ids, weights, E, capacity=12, multiple=multiple, by=by)
        expected = mk.experts(x.reshape(-1, H), kept, weights, moe.experts.gate_up_proj, moe.experts.down_proj)
        assert torch.equal(moe.train(training)(x), expected.reshape(x.shape))
    counts = mk.plan(ids, E).counts
    assert torch.equal(moe.latest_routing.tokens_per_expert, counts)  # the losses see the router's choice
    moe.train()(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in moe.parameters())


def test_expert_choice(device: str) -> None:
    logits = torch.randn(20, E, device=device)
    weights, tokens = mk.expert_choice(logits, 7)
    scores = torch.softmax(logits, 1)
    assert torch.equal(weights, scores.T.gather(1, tokens))
    worst_chosen = weights.amin(1, keepdim=True)
    assert torch.equal((worst_chosen <= scores.T).sum(1), torch.full((E,), 7, device=device))
    _, tokens = mk.expert_choice(torch.zeros(20, E, device=device), 3)
    assert torch.equal(tokens.cpu(), torch.arange(3).expand(E, 3))


def test_layer_with_expert_choice(place: tuple[str, torch.dtype]) -> None:
    """Against every expert run on every token, value and gradient."""
    device, dtype = place
    small = 1e-6 if dtype == torch.float32 else 2**-7
    moe = mk.MoE(H, I, E, K, routing="expert_choice", bias=True, routed_scaling_factor=2.0).to(device, dtype)
    x = torch.randn(3, 9, H, device=device, dtype=dtype, requires_grad=True)
    flat = x.reshape(-1, H)
    capacity = 11  # ceil(27 * 2 / 5)
    scores = torch.softmax(moe.gate(flat), 1)
    chosen = torch.zeros(27, E, device=device).scatter(0, scores.topk(capacity, 0)[1], 1.0)
    every = torch.arange(E, device=device).expand(27, E)
    expected = mk.experts(flat, every, 2 * scores * chosen, *moe.experts.projections).reshape(x.shape)
    ours = moe(x)
    assert error(ours, expected) < small
    dout = torch.randn_like(x)
    leaves = (x, *moe.parameters())
    for value, wanted in zip(
        torch.autograd.grad(ours, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        assert error(value, wanted) < 10 * small
    assert torch.equal(moe.latest_routing.tokens_per_expert.cpu(), torch.full((E,), capacity, dtype=torch.int32))
    assert float(mk.aux_loss(moe).detach()) == pytest.approx(E * capacity / 27, rel=1e-5)
    assert moe(x[:0]).shape == (0, 9, H)


def test_expert_choice_repeats_bit_for_bit(place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    moe = mk.MoE(H, I, E, K, routing="expert_choice").to(device, dtype)
    x = torch.randn(200, H, device=device, dtype=dtype, requires_grad=True)
    runs = [torch.autograd.grad(moe(x).square().sum(), (x, *moe.parameters())) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_weight_of_nan_stays(device: str) -> None:
    """A NaN is chosen first, as by a router; also with the sign that x86 gives it."""
    weights = torch.rand(600, 1, device=device)
    weights[500] = torch.tensor(-0x00400000, dtype=torch.int32).view(torch.float32)
    kept = mk.limit_tokens(torch.zeros(600, 1, dtype=torch.int64, device=device), weights, 1, capacity=1)
    assert (kept.flatten() >= 0).nonzero().flatten().tolist() == [500]


def test_capacities_are_rounded_without_error() -> None:
    """Capacities are rounded as in decimal arithmetic: 1.1 * 50 is 55, although the product of the floats is more."""
    for hundredths in range(1, 400):
        for tokens, top_k, experts in ((10, 1, 1), (100, 1, 8), (4096, 8, 128), (700, 2, 7), (1, 1, 64), (0, 2, 3)):
            want = -(-min(hundredths, 100 * experts) * tokens * top_k // (100 * experts))
            assert capacity_of(hundredths / 100, tokens, top_k, experts) == want, (hundredths, tokens)
    assert capacity_of(4 / 3, 9, 1, 3) == 4
    assert capacity_of(1e-7, 10, 1, 1) == 1
    assert capacity_of(2, 3, 1, 2) == 3


def test_capacity_of_a_symbolic_number_of_tokens(device: str) -> None:
    """One graph for all token counts."""
    counted = CompileCounter()
    compiled = torch.compile(lambda x: x[: capacity_of(1.1, x.shape[0], 2, 8)] + 1, backend=counted, dynamic=True)
    for tokens in (10, 20, 30, 41):
        assert len(compiled(torch.zeros(tokens, 3, device=device))) == min(tokens, -(-11 * tokens // 40))
    assert counted.frame_count == 1


def test_layer_takes_the_exact_capacity(device: str) -> None:
    """55 of the 100 tokens that all choose the same one of two experts."""
    layer = mk.MoE(H, I, 2, 1, capacity_factor=1.1, router_bias=True, device=device).eval()
    with torch.no_grad():
        layer.gate.bias[1] = 1e4
        x = torch.randn(100, H, device=device)
        for run in (layer, torch.compile(layer, backend="eager", dynamic=True)):
            assert (run(x) != 0).any(1).sum() == 55
