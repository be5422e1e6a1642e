"""Every kernel once, on sizes that compute-sanitizer can follow, which makes a kernel a thousand times slower.

`make sanitize` runs this file. Inputs are drawn and results compared on the CPU, so that a tool sees hardly a kernel of
others. The pipelines still go round more than once, and experts have no row, one, and more than a tile.
"""

from __future__ import annotations

import copy

import pytest
import torch

import moekern as mk
from moekern.backends import reference
from moekern.backends.cuda import configuration
from moekern.backends.cuda.passes import backward
from problems import Problem, error, gradients, make

pytestmark = pytest.mark.gpu
BF16, F16 = torch.bfloat16, torch.float16
H, I = 328, 296  # six and five k-blocks, the last of them ragged

# tokens, top_k, rows of all experts but the last, which has the rest; whether the up projection's consumers run its
# epilogue, whether even if it saves, whether tiles have up to 288 rows
ROUTINGS = {
    "many": (1400, 1, (500,), (False, False, False)),
    "few": (1000, 1, (545,), (True, False, False)),
    "fewer": (700, 1, (345, 1, 0), (True, True, False)),
    "288": (490, 2, (300, 340, 1), (True, True, True)),
    "a handful": (30, 2, (17, 0, 1, 33, 0), (True, True, False)),
}
KINDS = {
    "bfloat16": {"dtype": BF16},
    "gpt_oss": {"dtype": BF16, "activation": "swiglu_oai", "bias": True, "transposed": True, "interleaved": True},
    "float16": {"dtype": F16, "activation": "gelu", "bias": True},
}


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def problem(routing: str, **options: object) -> tuple[Problem, tuple[bool, ...]]:
    tokens, top_k, rows, choice = ROUTINGS[routing]
    experts = len(rows) + 1
    last = tokens * top_k - sum(rows)
    ids = torch.repeat_interleave(torch.arange(experts), torch.tensor((*rows, last)))
    ids = ids[torch.randperm(len(ids))].reshape(tokens, top_k)
    return make(tokens, H, I, experts, top_k, ids=ids, **options), choice  # type: ignore[arg-type]


def on_the_gpu(p: Problem) -> Problem:
    tensors = {name: None if t is None else t.cuda() for name, t in vars(p).items() if t is None or hasattr(t, "cuda")}
    return Problem(**{**vars(p), **tensors})


def check(p: Problem) -> None:
    """Inference, training and every gradient against float64 and plain torch, on the CPU."""
    dout = torch.randn(p.x.shape).to(p.x.dtype)
    with mk.backend("reference"):
        truth = gradients(p.cast(torch.float64), dout)
        plain = gradients(p, dout)
    there = on_the_gpu(p)
    got = gradients(there, dout.cuda())
    with torch.no_grad():
        got["inferred"], truth["inferred"], plain["inferred"] = there.run(), truth["out"], plain["out"]
    for name, value in got.items():
        allowed = max(2 * error(plain[name], truth[name]), torch.finfo(value.dtype).eps / 2, 1e-6)
        assert error(value, truth[name]) <= allowed, f"{name}: {error(value, truth[name]):.3g}, allowed {allowed:.3g}"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts(routing: str, kind: str) -> None:
    p, choice = problem(routing, **KINDS[kind])
    p.ids[::7] = -1  # sentinels
    found = configuration.choose(p.x.dtype, (9, 0), p.ids.numel(), len(p.w_down), H, I)
    assert (found.up_by_consumers, found.saving_up_by_consumers, found.tiles_288) == choice
    check(p)


@pytest.mark.usefixtures("poisoned")
def test_combine_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of dX's rows and dS on the second stream, during a weight gradient of fewer registers."""
    monkeypatch.setattr(backward, "LEAST_BESIDE", 0)
    tokens, hidden, inter, experts, top_k = 130, 136, 512, 3, 2
    assert backward.combines_beside(tokens * top_k, hidden, inter, top_k)
    check(make(tokens, hidden, inter, experts, top_k, dtype=BF16))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_grouped_products(dtype: torch.dtype) -> None:
    counts = (0, 1, 136, 257, 300)
    offsets = torch.tensor((0, *counts)).cumsum(0).int()
    a, b = (torch.randn(sum(counts) + 9, n).to(dtype) for n in (H, I))
    w = (torch.randn(len(counts), I, H) / H**0.5).to(dtype)
    for kind, left, right in (("nt", a, w), ("nn", b, w), ("tn", b, a)):
        from moekern.backends import cuda

        got = cuda.grouped_mm(left.cuda(), right.cuda(), offsets.cuda(), kind).cpu()
        wanted = reference.grouped_mm(left.double(), right.double(), offsets, kind)
        assert error(got, wanted) <= torch.finfo(dtype).eps / 2


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("hidden", [H, 330, 131])  # vectors of 16 bytes, of 4 and of 2, or of an element
@pytest.mark.parametrize("dtype", [BF16, F16, torch.float32])
def test_permute_and_combine(dtype: torch.dtype, hidden: int) -> None:
    for tokens, top_k in ((130, 2), (90, 3), (5, 35)):
        plan = mk.plan(torch.randint(-1, 7, (tokens, top_k)), 7)
        x, y = (torch.randn(n, hidden).to(dtype) for n in (tokens, tokens * top_k))
        weights = torch.rand(tokens, top_k)
        results = []
        for there in ("cpu", "cuda"):
            moved = plan.to(there)
            leaves = [(t.double() if there == "cpu" else t.cuda()).requires_grad_() for t in (x, y, weights)]
            with mk.backend("reference" if there == "cpu" else "auto"):
                outs = mk.permute(leaves[0], moved), mk.combine(leaves[1], moved, leaves[2])
                upstream = [t.detach() for t in (leaves[1], leaves[0])]
                results.append((*outs, *torch.autograd.grad(outs, leaves, upstream)))
        for truth, got in zip(*results, strict=True):
            assert error(got, truth) <= max(torch.finfo(got.dtype).eps / 2, 1e-6)


@pytest.mark.parametrize("planner", ["device", "host"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plans(planner: str, dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 130, (3000, 3), dtype=dtype)
    got = mk.plan(ids.cuda(), 130, planner=planner)
    for ours, wanted in zip(got[:3], reference.plan(ids, 130), strict=True):
        assert torch.equal(ours.cpu(), wanted)


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("routing", ["softmax_topk", "gpt_oss"])
def test_layer(routing: str, tokens: int) -> None:
    """The router's kernels: its product for few tokens, the choice, the backward pass."""
    moe = mk.MoE(128, 72, 6, 2, routing=routing, bias=routing == "gpt_oss").to(BF16)
    exact, there = copy.deepcopy(moe).double(), copy.deepcopy(moe).cuda()
    x = torch.randn(tokens, 128).to(BF16)
    results = []
    for layer, like in ((exact, x.double()), (moe, x), (there, x.cuda())):
        like.requires_grad_()
        with mk.backend("auto" if layer is there else "reference"):
            out = layer(like)
            grads = torch.autograd.grad(out, (like, *layer.parameters()), torch.ones_like(out))
            with torch.no_grad():
                results.append((out, layer.eval()(like), *grads))
    for truth, plain, got in zip(*results, strict=True):
        assert error(got, truth) <= max(2 * error(plain, truth), 2**-8)
