"""mk.route against its definition and transformers' router."""

from __future__ import annotations

import importlib

import pytest
import torch

import moekern as mk
from moekern.routing.router import FORMULAS
from problems import error


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
        assert (expected[:, -1:] >= probabilities.scatter(1, ids, -1)).all()  # nothing larger is left out
        if normalise:
            expected = expected / expected.sum(1, keepdim=True)
        assert torch.allclose(weights.double(), expected, atol=1e-6)


def test_top_k_then_softmax_is_the_renormalised_softmax(device: str) -> None:
    logits = torch.randn(30, 10, dtype=torch.float64, device=device)
    first, first_ids = mk.route(logits, 4, method="softmax_topk", norm_topk_prob=True)
    second, second_ids = mk.route(logits, 4, method="topk_softmax")
    assert torch.equal(first_ids, second_ids)
    assert torch.allclose(first, second)


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("normalise", [False, True])
def test_derivatives(device: str, method: str, normalise: bool) -> None:
    logits = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)

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


def test_edges(device: str) -> None:
    weights, ids = mk.route(torch.randn(0, 4, device=device), 2)
    assert weights.shape == ids.shape == (0, 2)
    weights, ids = mk.route(torch.randn(2, 3, 4, device=device), 4)
    assert weights.shape == (2, 3, 4)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, device=device))
    weights, _ = mk.route(torch.randn(5, 1, device=device), 1)
    assert torch.equal(weights, torch.ones(5, 1, device=device))


H, E = 16, 8


def config(family: str, name: str, **options: object) -> object:
    """A configuration of transformers that asks for E experts of inputs of H features, K of 3."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    return cls(hidden_size=H, num_experts_per_tok=3, num_attention_heads=2, **options)


def router_of(family: str, name: str, cfg: object) -> torch.nn.Module:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if not hasattr(module, name):
        pytest.skip(f"this version of transformers has no {name}")
    router = getattr(module, name)(cfg)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    if hasattr(router, "e_score_correction_bias"):
        # Not negative: transformers 5.0 scores experts outside the best groups zero, not minus infinity.
        router.e_score_correction_bias.uniform_(0, 0.6)
    return router


def decide(family: str, router: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of this release of transformers, which compute and return them in different ways."""
    out = router(x)
    if isinstance(out, torch.Tensor):  # 5.0: logits alone, and the block decides
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        block = getattr(module, {"deepseek_v3": "DeepseekV3MoE", "glm4_moe": "Glm4MoeMoE"}[family])(router.config)
        block.gate = router
        ids, weights = block.route_tokens_to_experts(out)
    else:
        ids = next(t for t in out if not t.is_floating_point())
        weights = out[1]
    return weights, ids


FAMILIES: list[tuple[str, str, str, dict[str, object], dict[str, object]]] = [
    # folder, configuration class, router class, its options, ours
    ("mixtral", "MixtralConfig", "MixtralTopKRouter", {"num_local_experts": E}, {}),
    ("minimax", "MiniMaxConfig", "MiniMaxTopKRouter", {"num_local_experts": E}, {}),
    ("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeTopKRouter", {"num_experts": E, "norm_topk_prob": False}, {}),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter", {"num_experts": E, "norm_topk_prob": True}, {}),
    ("olmoe", "OlmoeConfig", "OlmoeTopKRouter", {"num_experts": E, "norm_topk_prob": False}, {}),
    ("jamba", "JambaConfig", "JambaTopKRouter", {"num_experts": E}, {"norm_topk_prob": False}),
    ("granitemoe", "GraniteMoeConfig", "GraniteMoeTopKRouter", {"num_local_experts": E}, {}),
    ("gpt_oss", "GptOssConfig", "GptOssTopKRouter", {"num_local_experts": E}, {}),
    (
        "deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter",
        {"n_routed_experts": E, "topk_method": "greedy", "routed_scaling_factor": 1.5, "norm_topk_prob": False},
        {"routed_scaling_factor": 1.5},
    ),
    (
        "deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter",
        {"n_routed_experts": E, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 1.5, "norm_topk_prob": False},
        {"routed_scaling_factor": 1.5, "n_group": 4, "topk_group": 2},
    ),
    *(
        (
            family, name, router,
            {"n_routed_experts": E, "n_group": groups, "topk_group": (groups + 1) // 2, "routed_scaling_factor": 2.5,
             "norm_topk_prob": normalise},
            {"routed_scaling_factor": 2.5, "n_group": groups, "topk_group": (groups + 1) // 2},
        )
        for family, name, router in (
            ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter"),
            ("glm4_moe", "Glm4MoeConfig", "Glm4MoeTopkRouter"),
        )
        for groups in (1, 4)
        for normalise in (False, True)
    ),
    (
        "deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter",
        {"n_routed_experts": E, "routed_scaling_factor": 2.5, "scoring_func": "sqrtsoftplus"},
        {"routed_scaling_factor": 2.5},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config_name", "router_name", "theirs", "ours"), FAMILIES)
def test_is_the_router_of_transformers(
    device: str, family: str, config_name: str, router_name: str, theirs: dict[str, object], ours: dict[str, object]
) -> None:
    """Weights of every expert, zero for those not chosen, and the gradients of router weights and input."""
    router = router_of(family, router_name, config(family, config_name, **theirs)).to(device)
    if "norm_topk_prob" in theirs:
        ours = {"norm_topk_prob": theirs["norm_topk_prob"], **ours}
    x = torch.randn(40, H, device=device, requires_grad=True)
    their_weights, their_ids = decide(family, router, x)
    bias = getattr(router, "bias", None)
    logits = torch.nn.functional.linear(x, router.weight, bias)
    weights, ids = mk.route(
        logits, 3, method=family, selection_bias=getattr(router, "e_score_correction_bias", None), **ours
    )
    assert torch.equal(ids.sort(1)[0], their_ids.sort(1)[0])
    dense = torch.zeros(40, E, device=device).scatter(1, ids, weights)
    their_dense = torch.zeros(40, E, device=device).scatter(1, their_ids, their_weights.float())
    assert torch.allclose(dense, their_dense, atol=1e-6)
    dout = torch.randn(40, E, device=device)
    leaves = (x, *(p for p in (router.weight, bias) if p is not None))
    expected = torch.autograd.grad(their_dense, leaves, dout)
    for value, wanted in zip(torch.autograd.grad(dense, leaves, dout), expected, strict=True):
        assert error(value, wanted) < 1e-5


def test_llama4_router(device: str) -> None:
    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4", reason="transformers is not installed")
    for top_k in (1, 2):
        cfg = llama4.Llama4TextConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=top_k)
        router = llama4.Llama4Router(cfg).to(device)
        x = torch.randn(40, H, device=device, requires_grad=True)
        theirs, logits = router(x)
        weights, ids = mk.route(logits, top_k, method="llama4")
        dense = torch.zeros(40, E, device=device).scatter(1, ids, weights)
        assert torch.allclose(dense, theirs)
        dout = torch.randn(40, E, device=device)
        (ours,) = torch.autograd.grad(dense, router.weight, dout, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs, router.weight, dout)
        assert error(ours, expected) < 1e-5


@pytest.mark.parametrize("shape", [(3, 8), (600, 8), (50, 300)])  # a sort for the small one, packed keys for the others
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_go_to_the_lowest_index(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, device=device, dtype=dtype).round().clamp(-1, 1)
    logits[0] = 0
    logits[0, ::2] = -0.0  # equal to 0
    expected = torch.argsort(logits.cpu(), dim=1, descending=True, stable=True)[:, :5]
    for method in ("softmax_topk", "topk_softmax", "sigmoid_topk"):
        _, ids = mk.route(logits, 5, method=method)
        assert torch.equal(ids.cpu(), expected)
        _, ids = mk.route(logits, 5, method=method, selection_bias=torch.zeros(shape[1], device=device))
        assert torch.equal(ids.cpu(), expected)
    _, ids = mk.route(torch.zeros(600, 8, device=device, dtype=dtype), 3, method="deepseek_v3", n_group=4, topk_group=2)
    assert torch.equal(ids.cpu(), torch.arange(3).expand(600, 3))


def test_extreme_logits_stay_in_order(device: str) -> None:
    """Also infinities and denormals; saturated scores do not tie."""
    row = torch.tensor([1e-45, float("inf"), -3e38, 3e38, -1e-45, 40.0, 30.0, float("-inf")], device=device)
    _, ids = mk.route(row.expand(512, 8), 8, method="topk_sigmoid")
    assert ids[0].tolist() == [1, 3, 5, 6, 0, 4, 2, 7]
    assert torch.equal(ids, ids[:1].expand(512, 8))


def test_selection_bias_chooses_and_does_not_weigh(device: str) -> None:
    logits = torch.randn(30, E, device=device)
    bias = torch.zeros(E, device=device, requires_grad=True)
    with torch.no_grad():
        bias[5] = 10
    weights, ids = mk.route(logits, 2, method="sigmoid_topk", norm_topk_prob=False, selection_bias=bias)
    assert (ids[:, 0] == 5).all()
    assert torch.allclose(weights, torch.sigmoid(logits).gather(1, ids))
    assert not weights.requires_grad


def test_only_experts_of_the_best_groups(device: str) -> None:
    logits = torch.randn(50, 12, device=device)
    _, ids = mk.route(logits, 4, method="deepseek_v2", n_group=3, topk_group=1)
    best = logits.unflatten(1, (3, 4)).amax(2).argmax(1, keepdim=True)
    assert torch.equal(ids // 4, best.expand(-1, 4))


def nan_of_both_signs(device: str) -> torch.Tensor:
    """A NaN without and one with a sign: a router's NaN is mostly inf - inf, which has a sign on x86."""
    return torch.tensor([0x7FC00000, -0x00400000], dtype=torch.int32, device=device).view(torch.float32)


@pytest.mark.parametrize("tokens", [1, 4, 255, 256, 400])  # from 2048 logits on the CPU packs value and index
@pytest.mark.parametrize("sign", [0, 1])
def test_nan_is_chosen_first(device: str, tokens: int, sign: int) -> None:
    logits = torch.randn(tokens, 8, device=device)
    logits[:, 2] = float("inf")
    logits[:, 5] = nan_of_both_signs(device)[sign]
    logits[:, 6] = float("-inf")
    expected = torch.tensor([5, 2], device=device).expand(tokens, 2)
    for method in ("softmax_topk", "topk_softmax", "sigmoid_topk", "topk_sigmoid"):
        weights, ids = mk.route(logits, 2, method=method)
        assert torch.equal(ids, expected)
        assert weights[:, 0].isnan().all()
        compiled = torch.compile(mk.route, backend="eager", dynamic=False)(logits, 2, method=method)
        assert torch.equal(compiled[1], expected)
    _, ids = mk.route(logits, 2, method="topk_softmax", selection_bias=torch.zeros(8, device=device))
    assert (ids == torch.arange(2, device=device)).all()  # a softmax over a NaN is NaN everywhere
    _, ids = mk.route(logits, 2, method="deepseek_v3", n_group=4, topk_group=1)
    assert (ids[:, 0] == 5).all()  # its group of two is the best one
    assert (ids[:, 1] == 4).all()


def test_several_nans_are_equal(device: str) -> None:
    """NaN of any sign and payload: the lowest index first."""
    row = torch.tensor([0, -0x00400000, 0x7FC00001, -1, 0x7F800001, 0x7F800000], dtype=torch.int32, device=device)
    logits = row.view(torch.float32).expand(400, 6)
    for rows in (2, 400):
        _, ids = mk.route(logits[:rows], 6, method="topk_sigmoid")
        assert torch.equal(ids, torch.tensor([1, 2, 3, 4, 5, 0], device=device).expand(rows, 6))


@pytest.mark.parametrize("tokens", [8, 400])
def test_expert_choice_takes_the_tokens_with_nan(device: str, tokens: int) -> None:
    logits = torch.randn(tokens, 8, device=device)
    logits[3] = nan_of_both_signs(device)[1]
    weights, chosen = mk.expert_choice(logits, 2)
    assert (chosen[:, 0] == 3).all()
    assert weights[:, 0].isnan().all()


@pytest.mark.parametrize("tokens", [3, 600])
def test_a_bias_of_minus_infinity_does_not_open_other_groups(device: str, tokens: int) -> None:
    """Experts switched off by their bias tie with those outside of the best groups, which must not be chosen."""
    bias = torch.tensor([0.0, 0, 0, 0, 9, float("-inf"), float("-inf"), float("-inf")], device=device)
    bias[6] = 9  # the group of the experts 4 to 7 is the best one
    logits = torch.randn(tokens, 8, device=device)
    _, ids = mk.route(logits, 4, method="deepseek_v3", n_group=2, topk_group=1, selection_bias=bias)
    assert torch.equal(ids.sort()[0], torch.arange(4, 8, device=device).expand(tokens, 4))


def test_a_diverged_router_shows_in_the_output(device: str) -> None:
    layer = mk.MoE(32, 16, 8, 2, device=device)
    with torch.no_grad():
        layer.gate.weight[5] = float("inf")  # logits: sums of both infinities
    for tokens in (4, 255, 256, 400):
        for train in (True, False):
            y = layer.train(train)(torch.randn(tokens, 32, device=device))
            assert y.isnan().any(1).all(), (tokens, train)
