"""mk.route against its definition and transformers' router."""

from __future__ import annotations

import pytest
import torch

import moekern as mk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_softmax_then_top_k(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(30, 10, device=device).to(dtype)
    probabilities = torch.softmax(logits.double(), -1)
    for normalise in (False, True):
        weights, ids = mk.route(logits, 3, norm_topk_prob=normalise)
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ids.dtype == torch.int64
        expected = probabilities.gather(1, ids)
        assert (expected[:, :-1] >= expected[:, 1:]).all()
        assert (expected[:, -1:] >= probabilities.scatter(1, ids, -1)).all()  # nothing larger was left out
        if normalise:
            expected = expected / expected.sum(1, keepdim=True)
        assert torch.allclose(weights.double(), expected, atol=1e-6)


def test_top_k_then_softmax_is_the_renormalised_softmax() -> None:
    logits = torch.randn(30, 10, dtype=torch.float64)
    first, first_ids = mk.route(logits, 4, method="softmax_topk", norm_topk_prob=True)
    second, second_ids = mk.route(logits, 4, method="topk_softmax")
    assert torch.equal(first_ids, second_ids)
    assert torch.allclose(first, second)


@pytest.mark.parametrize("method", ["softmax_topk", "topk_softmax"])
@pytest.mark.parametrize("normalise", [False, True])
def test_derivatives(method: str, normalise: bool) -> None:
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def weights(logits: torch.Tensor) -> torch.Tensor:
        return mk.route(logits, 3, method=method, norm_topk_prob=normalise)[0]

    assert torch.autograd.gradcheck(weights, (logits,))
    assert torch.autograd.gradgradcheck(weights, (logits,))


def test_float32_under_autocast(device: str) -> None:
    logits = torch.randn(30, 10, device=device)
    expected, _ = mk.route(logits, 3)
    with torch.autocast(device, dtype=torch.bfloat16):
        weights, _ = mk.route(logits, 3)
    assert torch.equal(weights, expected)


def test_edges() -> None:
    weights, ids = mk.route(torch.randn(0, 4), 2)
    assert weights.shape == ids.shape == (0, 2)
    weights, ids = mk.route(torch.randn(2, 3, 4), 4)
    assert weights.shape == (2, 3, 4)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3))
    weights, _ = mk.route(torch.randn(5, 1), 1)
    assert torch.equal(weights, torch.ones(5, 1))


def test_transformers_routers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    mixtral = MixtralTopKRouter(transformers.MixtralConfig(hidden_size=16, num_local_experts=6, num_attention_heads=2))
    qwen = [
        Qwen3MoeTopKRouter(
            transformers.Qwen3MoeConfig(hidden_size=16, num_experts=6, num_experts_per_tok=3, norm_topk_prob=normalise)
        )
        for normalise in (False, True)
    ]
    x = torch.randn(20, 16)
    for router, normalise in ((mixtral, True), (qwen[0], False), (qwen[1], True)):
        torch.nn.init.normal_(router.weight)
        logits, their_weights, their_ids = router(x)
        weights, ids = mk.route(logits, router.top_k, norm_topk_prob=normalise)
        assert torch.equal(ids, their_ids)
        assert torch.allclose(weights, their_weights.float())
