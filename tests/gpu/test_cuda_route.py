"""The router's choice in a kernel, and the layer's inference on it, against moekern.route."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.routing import router
from problems import error

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
INF = float("inf")


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def route(logits: Tensor, top_k: int, method: str, norm: bool, scale: float) -> tuple[Tensor, Tensor]:
    from moekern.backends.cuda.kernels import router as kernels

    tokens = logits.shape[0]
    ids = torch.full((tokens + 1, top_k), -7, dtype=torch.int32, device="cuda")
    weights = torch.full((tokens + 1, top_k), float("nan"), device="cuda")
    how = kernels.formula(router.METHODS[method], norm, scale)
    kernels.route(logits, ids[:tokens], weights[:tokens], how)
    assert (ids[tokens] == -7).all()
    assert weights[tokens].isnan().all()
    return weights[:tokens], ids[:tokens]


@pytest.mark.parametrize("method", router.FORMULAS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(1, 1, 1), (5, 8, 2), (16, 128, 8), (301, 60, 4), (1000, 256, 8), (77, 1000, 40), (9, 1024, 64), (33, 64, 64)],
)
def test_the_kernel_chooses_what_route_chooses(tokens: int, experts: int, top_k: int, norm: bool, method: str) -> None:
    logits = torch.randn(tokens, experts, device="cuda") * 3
    wanted, ids = mk.route(logits, top_k, method=method, norm_topk_prob=norm, routed_scaling_factor=2.5)
    got, got_ids = route(logits, top_k, method, norm, 2.5)
    assert torch.equal(got_ids.long(), ids)
    torch.testing.assert_close(got, wanted, rtol=3e-6, atol=1e-7)


def test_ties_infinities_and_nan() -> None:
    rows = [
        [0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
        [1.0, 3.0, 3.0, -INF, 3.0, 1.0],
        [-INF] * 6,
        [-INF, 2.0, -INF, -INF, 2.0, -INF],
        [1.0, INF, 0.0, INF, 2.0, 3.0],
        [1.0, float("nan"), 0.0, 2.0, INF, 3.0],
        [-1e38, -1e-45, 1e-45, 0.0, -3e38, -1.0],
    ]
    logits = torch.tensor(rows, device="cuda")
    for method in router.FORMULAS:
        wanted, ids = mk.route(logits, 4, method=method)
        got, got_ids = route(logits, 4, method, True, 1.0)
        assert torch.equal(got_ids.long(), ids)
        torch.testing.assert_close(got, wanted, equal_nan=True)
    few = torch.randint(0, 4, (500, 96), device="cuda").float()
    assert torch.equal(route(few, 8, "softmax_topk", True, 1.0)[1].long(), mk.route(few, 8)[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routing": "olmoe", "norm_topk_prob": False},
        {"routing": "gpt_oss", "bias": True, "router_bias": True, "activation": "swiglu_oai"},
        {"routing": "sigmoid_topk", "routed_scaling_factor": 2.5, "shared_intermediate_size": 64, "shared_gate": True},
        {"routing": "deepseek_v3", "selection_bias": True, "n_group": 4, "topk_group": 2},
        {"capacity_factor": 1.0},
        {"routing": "llama4", "scale_input": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_inference_of_the_layer_is_what_training_computes(dtype: torch.dtype, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    moe = mk.MoE(256, 136, 16, 2, **options).to("cuda", dtype)  # type: ignore[arg-type]
    for shape in ((33, 256), (3, 16, 256), (1, 256), (0, 256), (2, 2000, 256)):
        x = torch.randn(shape, device="cuda").to(dtype)
        wanted = moe.train()(x)
        with torch.no_grad():
            got, again = moe.eval()(x), moe(x)
        assert got.shape == wanted.shape
        assert torch.equal(got, again)
        assert not x.numel() or error(got, wanted) <= 3 * torch.finfo(dtype).eps


def test_inference_runs_as_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = mk.MoE(256, 136, 16, 2).to("cuda", BF16).eval()
    x = torch.randn(16, 256, dtype=BF16, device="cuda")
    with torch.no_grad():
        out = moe(x)
        monkeypatch.setattr(router, "route", None)
        assert torch.equal(moe(x), out)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        moe(x)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 2  # output, working memory


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "hidden"),
    [(1, 1, 8), (16, 8, 256), (17, 9, 264), (5, 128, 2048), (64, 60, 2880), (33, 1024, 248), (300, 130, 40)],
)
def test_logits_of_few_tokens(tokens: int, experts: int, hidden: int, bias: bool, dtype: torch.dtype) -> None:
    from moekern.backends.cuda.kernels import router as kernels

    assert kernels.makes_logits(tokens, experts, hidden)
    x = torch.randn(tokens, hidden, device="cuda").to(dtype)
    weight = torch.randn(experts, hidden, device="cuda").to(dtype)
    b = torch.randn(experts, device="cuda").to(dtype) if bias else None
    out = torch.full((tokens + 1, experts), float("nan"), device="cuda")
    kernels.logits(x, weight, b, out[:tokens])
    assert out[tokens].isnan().all()
    wanted = x.double() @ weight.double().T + (0 if b is None else b.double())
    size = x.double().abs() @ weight.double().abs().T + 1
    assert ((out[:tokens] - wanted).abs() <= 1e-6 * size).all()
    again = torch.empty_like(out[:tokens])
    kernels.logits(x, weight, b, again)
    assert torch.equal(out[:tokens], again)


def test_a_router_of_another_size_is_refused() -> None:
    moe = mk.MoE(256, 136, 16, 2).to("cuda", BF16)
    x = torch.randn(16, 256, dtype=BF16, device="cuda")
    moe.gate.weight = torch.nn.Parameter(torch.zeros(16, 128, dtype=BF16, device="cuda"))
    for mode in (True, False):
        with pytest.raises(RuntimeError, match="cannot be multiplied"), torch.set_grad_enabled(mode):
            moe.train(mode)(x)
    with pytest.raises(RuntimeError):
        moe.gate(x.view(4, 4, 256))


def test_a_router_that_was_changed_is_asked() -> None:
    torch.manual_seed(0)
    moe = mk.MoE(256, 136, 16, 2, router_bias=True).to("cuda", BF16).eval()
    x = torch.randn(16, 256, dtype=BF16, device="cuda")
    with torch.no_grad():
        out = moe(x)
        handle = moe.gate.register_forward_hook(lambda module, args, logits: -logits)
        turned = moe(x)
        handle.remove()
        assert torch.equal(moe(x), out)
        moe.gate.weight.neg_()
        assert error(moe(x), turned) <= 1e-2
        moe.gate.bias.add_(torch.randn(16, device="cuda"))
        wanted = moe(x)
        moe.gate.forward = lambda tokens: torch.nn.functional.linear(tokens, moe.gate.weight, moe.gate.bias).float()
        assert error(moe(x), wanted) <= 5e-2
    assert error(turned, out) > 0.1


def test_bad_input_of_the_layer_is_found_after_good_input() -> None:
    moe = mk.MoE(256, 136, 16, 2).to("cuda", BF16).eval()
    x = torch.randn(16, 256, dtype=BF16, device="cuda")
    with torch.no_grad():
        out = moe(x)
        for bad in (x.float(), x.cpu(), x[:, :128].contiguous(), x.to_sparse(), [x]):
            with pytest.raises((TypeError, ValueError), match=r"^x: got"):
                moe(bad)
        assert torch.equal(moe(x), out)
        assert torch.equal(moe(x.mT.contiguous().mT), out)
        buffer = torch.zeros(16 * 256 + 1, dtype=BF16, device="cuda")
        misaligned = buffer[1:].view(16, 256).copy_(x)
        assert error(moe(misaligned), out) <= 1e-2
