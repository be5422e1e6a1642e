"""Token rounding: which slots are dropped and which are added, and the layer that runs them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moekern as mk
from moekern.routing import router
from moekern.routing.rounding import Rounded
from problems import error

H, I, E, K = 16, 8, 5, 2


def by_hand(
    scores: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, multiple: int, mode: str, capacity: int | None
) -> tuple[torch.Tensor, list[list[int]]]:
    """Expert by expert: the ids, -1 for dropped slots, and the tokens added to each expert."""
    tokens, experts = scores.shape
    kept, added = torch.where((ids >= 0) & (ids < experts), ids, -1), []
    for e in range(experts):
        slots = [(t, k) for t in range(tokens) for k in range(ids.shape[1]) if ids[t, k] == e]
        others = [t for t in range(tokens) if e not in ids[t].tolist()]
        count, rest = len(slots), len(slots) % multiple
        missing = multiple - rest
        up = {"down": False, "nearest": 2 * rest > multiple, "up": rest > 0}[mode] and missing <= len(others)
        target = count + missing if up else count - rest
        if capacity is not None:
            target = min(target, capacity // multiple * multiple)
        slots.sort(key=lambda slot: -float(weights[slot]))
        for slot in slots[target:]:
            kept[slot] = -1
        others.sort(key=lambda t: -float(scores[t, e]))
        added.append(others[: max(0, target - count)])
    return kept, added


@given(
    tokens=st.integers(0, 40), experts=st.integers(2, 7), multiple=st.integers(1, 9), seed=st.integers(0, 99),
    mode=st.sampled_from(["down", "nearest", "up"]), capacity=st.none() | st.integers(0, 20),
)  # fmt: skip
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_who_is_dropped_and_who_added(
    device: str, tokens: int, experts: int, multiple: int, seed: int, mode: str, capacity: int | None
) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 30, (tokens, experts), generator=rng) / 30  # with ties
    ids = torch.rand(tokens, experts + 1, generator=rng).argsort(1)[:, :2]  # the last one is a sentinel
    weights = torch.randint(0, 9, (tokens, 2), generator=rng) / 9
    result = mk.round_tokens(
        scores.to(device), ids.to(device), weights.to(device), multiple, mode=mode, capacity=capacity
    )
    kept, added = by_hand(scores, ids, weights, multiple, mode, capacity)
    assert torch.equal(result.topk_ids.cpu(), kept)
    for e, given_tokens in enumerate(result.extra_tokens.tolist()):
        count = len(added[e])
        assert given_tokens == added[e] + [-1] * (len(given_tokens) - count)
        assert torch.equal(result.extra_weights[e, :count].cpu(), scores[added[e], e])
        assert not result.extra_weights[e, count:].any()
        rows = int((kept == e).sum()) + count
        assert rows % multiple == 0
        wanted = int((ids == e).sum())
        if capacity is None:
            assert abs(rows - wanted) < multiple
            assert mode != "down" or rows <= wanted
            assert mode != "nearest" or rows <= wanted + multiple / 2
            assert mode != "up" or rows >= wanted or tokens < wanted + multiple


@pytest.mark.parametrize("method", router.FORMULAS)
@pytest.mark.parametrize("normalise", [False, True])
def test_weights_of_all_experts_are_those_of_the_chosen_ones(device: str, method: str, normalise: bool) -> None:
    logits = torch.randn(20, 9, device=device)
    weights, ids = mk.route(logits, 3, method=method, norm_topk_prob=normalise, routed_scaling_factor=2.5)
    every = router.weights_of_all(logits, ids, method, normalise, 2.5)
    assert error(every.gather(1, ids), weights) < 1e-6
    others = every.scatter(1, ids, 0)
    assert (others.amax(1) <= weights.amin(1) * (1 + 1e-6)).all()  # at most the smallest of the chosen


@pytest.mark.parametrize("mode", ["nearest", "up", "down"])
@pytest.mark.parametrize("options", [{}, {"routing": "deepseek_v3"}, {"routing": "llama4", "scale_input": True}])
def test_layer_that_rounds(place: tuple[str, torch.dtype], mode: str, options: dict[str, object]) -> None:
    """Against every expert run on every token, with weights of zero for those without it: value and gradient."""
    device, dtype = place
    small = 1e-6 if dtype == torch.float32 else 2**-7
    moe = mk.MoE(H, I, E, K, round_tokens_to=4, rounding=mode, **options).to(device, dtype)  # type: ignore[arg-type]
    # The same numbers on every device; some expert is rounded up in every mode but "down".
    x = torch.randn(3, 11, H).to(device, dtype).requires_grad_()
    flat = x.reshape(-1, H)
    method = moe.routing
    logits = moe.gate(flat)
    weights, ids = mk.route(logits, K, method=method)
    every = router.weights_of_all(logits, ids, method, True, 1.0)
    rounded = mk.round_tokens(every, ids, weights, 4, mode=mode)
    mask = torch.zeros(33, E + 1, device=device)
    mask[torch.arange(33).unsqueeze(1), rounded.topk_ids] = 1  # -1 marks the column past the last expert
    extra = rounded.extra_tokens
    assert bool((extra >= 0).any()) == (mode != "down")
    for e in range(E):
        mask[extra[e][extra[e] >= 0], e] = 1
    given = every * mask[:, :E]
    if moe.scale_input:
        expected = sum(
            mk.experts(flat * given[:, e : e + 1].to(dtype), torch.full_like(ids[:, :1], e), None,
                       *moe.experts.projections)
            for e in range(E)
        )  # fmt: skip
    else:
        expected = mk.experts(flat, torch.arange(E, device=device).expand(33, E), given, *moe.experts.projections)
    expected = expected.reshape(x.shape)
    ours = moe(x)
    assert error(ours, expected) < small
    dout = torch.randn_like(x)
    leaves = (x, *moe.parameters())
    for value, wanted in zip(
        torch.autograd.grad(ours, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        assert error(value, wanted) < 10 * small
    counts = mk.plan(ids, E).counts
    assert torch.equal(moe.latest_routing.tokens_per_expert, counts)  # the losses see the router's choice
    whole = mk.experts(flat, ids, weights, *moe.experts.projections).reshape(x.shape)
    assert moe.scale_input or error(moe.eval()(x), whole) < small  # in training only


def test_the_same_bits_at_every_run(place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    moe = mk.MoE(H, I, E, K, round_tokens_to=16).to(device, dtype)
    x = torch.randn(200, H, device=device, dtype=dtype, requires_grad=True)
    runs = [torch.autograd.grad(moe(x).square().sum(), (x, *moe.parameters())) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("multiple", [2, 128])
def test_fewer_tokens_than_a_multiple(device: str, tokens: int, multiple: int) -> None:
    """Every expert is left without any."""
    for mode in ("nearest", "up"):
        moe = mk.MoE(H, I, E, 1, round_tokens_to=multiple, rounding=mode).to(device)
        y = moe(torch.randn(tokens, H, device=device))
        assert y.shape == (tokens, H)
        assert multiple == 2 or not y.any()


@pytest.mark.parametrize("tokens", [40, 700])
def test_tokens_of_score_minus_infinity_count_less_than_none_chosen_twice(device: str, tokens: int) -> None:
    """A score of minus infinity is low, yet the token can be added; one that has the expert already cannot."""
    scores = torch.full((tokens, 4), float("-inf"), device=device)
    ids = torch.zeros(tokens, 1, dtype=torch.int64, device=device)
    ids[3:] = 1
    rounded = mk.round_tokens(scores, ids, torch.rand(tokens, 1, device=device), 8, mode="up")
    added = rounded.extra_tokens[0][rounded.extra_tokens[0] >= 0]
    assert added.tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_of_a_thousand_experts_is_added_up_in_float32(device: str, dtype: torch.dtype) -> None:
    """A sum in bfloat16 stops at 256 ones."""
    count = 1024
    extra = torch.zeros(count, 1, dtype=torch.int64, device=device)
    rounded = Rounded(torch.zeros(1, 1, dtype=torch.int64, device=device), extra, torch.ones(count, 1, device=device))
    y = torch.ones(1 + count, 4, dtype=dtype, device=device)
    assert (rounded.fold(y).double() - (1 + count)).abs().max() <= 1
    x = torch.ones(1, 4, dtype=dtype, device=device, requires_grad=True)
    rows = rounded.extend(x, torch.ones(1, 1, device=device))[0]
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert (gradient.double() - (1 + count)).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_that_every_expert_takes(device: str, dtype: torch.dtype) -> None:
    """Its gradient of expert choice is summed in float32."""
    layer = mk.MoE(H, I, 512, 512, routing="expert_choice", device=device).to(dtype)
    x = torch.randn(2, H, device=device).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(layer.double()(exact).sum(), exact)
    assert error(gradient, expected) < {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}[dtype]
