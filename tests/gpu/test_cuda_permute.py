"""Permute, combine and their gradients on a Hopper GPU: the kernels against float64, for rows of any length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.backends import cuda, reference
from moekern.backends.cuda.kernels import permute as kernels
from moekern.backends.cuda.passes import permute as passes
from problems import error, forbid_torch_path
from ragged import GUARD, assert_guards, guarded

pytestmark = pytest.mark.gpu
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [BF16, F16, F32]
Results = tuple[Tensor, ...]


def allowed(value: Tensor, usual: Tensor, truth: Tensor, terms: int = 1) -> float:
    """Twice the error of plain torch, which may be exact by luck; or that of a sum of so many terms in one chain.

    Each term rounds in float32, independently of the others, and the result once more.
    """
    rounding = torch.finfo(value.dtype).eps / 2 + terms**0.5 * torch.finfo(F32).eps / 2
    return max(2 * error(usual, truth), rounding)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    forbid_torch_path(monkeypatch)


class Problem:
    """A plan with sentinels and empty experts. NaN: what surrounds the tensors, the rows and weights of sentinels."""

    def __init__(self, tokens: int, top_k: int, hidden: int, dtype: torch.dtype, experts: int = 9) -> None:
        ids = torch.randint(-1, experts, (tokens, top_k), device="cuda")
        ids[ids == 3] = -1
        self.plan, self.top_k = reference.plan(ids, experts), top_k
        self.x, self.y = self.matrix(tokens, hidden, dtype), self.matrix(tokens * top_k, hidden, dtype)
        self.y[self.plan[2][-1] :] = float("nan")
        self.weights = torch.rand(tokens, top_k, device="cuda").masked_fill(ids < 0, float("nan"))

        # In a chain of additions: a lane has every 32nd vector of a row, or every 32nd element.
        self.terms = (1, top_k, top_k, 1, hidden // 32 + hidden // 512 + 6)

    @staticmethod
    def matrix(rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        whole, inside = guarded(rows, hidden, dtype=dtype)
        assert len(whole) == rows + 2 * GUARD
        return inside.copy_(torch.randn(rows, hidden, device="cuda"))

    def truth(self, weights: Tensor | None) -> Results:
        """In float64: rows, the gradient of the tokens, output, gradients of rows and weights."""
        wide = None if weights is None else weights.double()
        x, y = self.x.double(), self.y.double()
        return (
            reference.permute(x, self.plan, self.top_k),
            reference.combine(y, None, self.plan, self.top_k),
            reference.combine(y, wide, self.plan, self.top_k),
            *reference.combine_backward(x, y, wide, self.plan, self.top_k, [True, True]),
        )

    def run(self, weights: Tensor | None, on: object = passes) -> Results:
        """The same by the kernels."""
        rest = (self.plan, self.top_k)
        return (
            on.permute(self.x, *rest),  # type: ignore[attr-defined]
            on.combine(self.y, None, *rest),  # type: ignore[attr-defined]
            on.combine(self.y, weights, *rest),  # type: ignore[attr-defined]
            *on.combine_backward(self.x, self.y, weights, *rest, [True, True]),  # type: ignore[attr-defined]
        )


def check(problem: Problem) -> None:
    """As near to float64 as plain torch, or within one rounding; twice the same bits."""
    for weights in (problem.weights, None):
        truth, plain = problem.truth(weights), problem.run(weights, reference)
        got, again = problem.run(weights), problem.run(weights)
        for value, repeated, want, usual, n in zip(got, again, truth, plain, problem.terms, strict=True):
            assert value.dtype == usual.dtype
            assert value.shape == usual.shape
            assert torch.equal(value, repeated)
            assert error(value, want) <= allowed(value, usual, want, n)
        for i in (0, 3):  # rows, and their gradients: one product, rounded once
            assert torch.equal(got[i], plain[i])


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 35])
@pytest.mark.parametrize("hidden", [1, 7, 8, 130, 264, 2048, 2050, 7169])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_matches_float64(dtype: torch.dtype, hidden: int, top_k: int) -> None:
    check(Problem(301, top_k, hidden, dtype))


@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 1, 1), (1, 8, 2048), (3, 64, 24), (70001, 2, 72)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_few_tokens_and_many(dtype: torch.dtype, tokens: int, top_k: int, hidden: int) -> None:
    check(Problem(tokens, top_k, hidden, dtype))


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 64), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_move(dtype: torch.dtype, tokens: int, hidden: int) -> None:
    problem = Problem(tokens, 3, hidden, dtype)
    for weights in (problem.weights, None):
        for got, plain in zip(problem.run(weights), problem.run(weights, reference), strict=True):
            assert torch.equal(got, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_nothing_but_sentinels(dtype: torch.dtype) -> None:
    problem = Problem(40, 3, 200, dtype)
    problem.plan = reference.plan(torch.full((40, 3), 99, device="cuda"), 9)
    problem.y.fill_(float("nan"))
    problem.weights.fill_(float("nan"))
    assert not any(t.any() for t in problem.run(problem.weights))


@pytest.mark.parametrize("hidden", [6, 64, 1030])
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_begin_anywhere(dtype: torch.dtype, first: int, hidden: int) -> None:
    """Aligned to their elements only; nothing is written around the results."""
    problem = Problem(50, 3, hidden, dtype)

    def moved(t: Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.full((t.numel() + first + 64,), float("nan"), dtype=t.dtype, device="cuda")
        return flat, flat[first : first + t.numel()].view(t.shape).copy_(t)

    wanted = problem.run(problem.weights)
    _, x = moved(problem.x)
    _, y = moved(problem.y)
    around, targets = zip(*(moved(torch.full_like(t, float("nan"))) for t in (y, y)), strict=True)
    _, inverse, offsets = problem.plan
    kernels.permute(x, inverse, offsets, targets[0], 3)
    dweights = torch.full_like(problem.weights, float("nan"))
    kernels.combine_backward(x, y, problem.weights, inverse, offsets, targets[1], dweights, 3)
    assert torch.equal(targets[0], wanted[0])
    assert torch.equal(targets[1], wanted[3])
    # Fewer elements per lane are added in another order.
    assert error(dweights, wanted[4]) <= 1e-6
    assert torch.equal(passes.combine(y, problem.weights, problem.plan, 3), wanted[2])
    for flat in around:
        assert flat[:first].isnan().all()
        assert flat[first + y.numel() :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_guards(dtype: torch.dtype) -> None:
    problem = Problem(77, 5, 1000, dtype)
    _, inverse, offsets = problem.plan
    for hidden in (1000, 999):
        x, y = problem.x[:, :hidden].contiguous(), problem.y[:, :hidden].contiguous()
        wholes, targets = zip(*(guarded(77 * 5, hidden, dtype=dtype) for _ in range(2)), strict=True)
        kernels.permute(x, inverse, offsets, targets[0], 5)
        kernels.combine_backward(x, y, problem.weights, inverse, offsets, targets[1], None, 5)
        assert_guards(*wholes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_change_no_bit(dtype: torch.dtype) -> None:
    """However many warps share a token: the sum of a slot is one warp's."""
    problem = Problem(130, 35, 1000, dtype)
    _, inverse, offsets = problem.plan
    results = []
    for share in (1, 2, 8, 31, 32):
        drows, dweights = torch.full_like(problem.y, float("nan")), torch.full_like(problem.weights, float("nan"))
        kernels.combine_backward(
            problem.x, problem.y, problem.weights, inverse, offsets, drows, dweights, 35, share
        )  # fmt: skip
        results.append((drows, dweights))
    for drows, dweights in results:
        assert torch.equal(drows, results[0][0])
        assert torch.equal(dweights, results[0][1])


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    tokens, top_k, hidden = 40000, 8, 8192
    assert tokens * top_k * hidden > 1 << 31
    ids = torch.randint(-1, 16, (tokens, top_k), device="cuda")
    plan = reference.plan(ids, 16)
    token = plan[0].long() // top_k
    last = int(plan[2][-1])
    x = torch.randn(tokens, hidden, device="cuda").to(BF16)
    weights = torch.rand(tokens, top_k, device="cuda")
    rows = passes.permute(x, plan, top_k)
    for part in range(0, len(token), 1 << 15):
        real = (torch.arange(part, min(part + (1 << 15), len(token)), device="cuda") < last).unsqueeze(1)
        assert torch.equal(rows[part : part + (1 << 15)], x[token[part : part + (1 << 15)]] * real)
    real = (ids >= 0).float()
    out = passes.combine(rows, weights, plan, top_k)
    for some in (slice(0, 2048), slice(-2048, None)):
        wanted = x[some].double() * (weights * real)[some].double().sum(1, keepdim=True)
        assert error(out[some], wanted) <= 2.0**-8
    drows, dweights = passes.combine_backward(x, rows, weights, plan, top_k, [True, True])
    assert error(dweights, torch.cat([p.double().square().sum(1) for p in x.split(4096)]).unsqueeze(1) * real) <= 1e-6
    row_weights = weights.flatten()[plan[0].long()].unsqueeze(1)
    for part in (0, (1 << 18) - 5, last - 7):  # the middle one is beyond 2^31 elements
        some = slice(part, part + 7)
        assert torch.equal(drows[some], (x[token[some]].float() * row_weights[some]).to(BF16))
    assert not drows[last:].any()


# ------------------------------------------------------------------------------------------------ through the functions


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> Results:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = f(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("hidden", [64, 67])
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_and_their_gradients(dtype: torch.dtype, hidden: int) -> None:
    ids = torch.randint(-1, 6, (200, 4), device="cuda")
    plan = mk.plan(ids, 6)
    x, y = (torch.randn(n, hidden, device="cuda").to(dtype) for n in (200, 800))
    weights = torch.rand(200, 4, device="cuda")

    def results(*inputs: Tensor) -> Results:
        x, y, weights = inputs
        return (
            *gradients(lambda x: mk.permute(x, plan), x),
            *gradients(lambda y: mk.combine(y, plan), y),
            *gradients(lambda y, w: mk.combine(y, plan, w), y, weights),
        )

    ours = results(x, y, weights)
    with mk.backend("reference"):
        truth, plain = results(x.double(), y.double(), weights.double()), results(x, y, weights)
    for got, want, usual in zip(ours, truth, plain, strict=True):
        assert error(got, want) <= allowed(got, usual, want, 4)


def test_frozen_inputs_and_strided_gradients() -> None:
    plan = mk.plan(torch.randint(-1, 6, (50, 4), device="cuda"), 6)
    y, weights = torch.randn(200, 96, device="cuda").to(BF16), torch.rand(50, 4, device="cuda")

    def run(*wanted: bool) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(want) for t, want in zip((y, weights), wanted, strict=True)]
        mk.combine(leaves[0], plan, leaves[1]).sum().backward()  # a gradient of stride zero
        return [leaf.grad for leaf in leaves]

    both, rows, scores = run(True, True), run(True, False), run(False, True)
    assert rows[1] is None
    assert scores[0] is None
    assert torch.equal(both[0], rows[0])  # type: ignore[arg-type]
    assert torch.equal(both[1], scores[1])  # type: ignore[arg-type]
    wide = torch.stack((y, y), 2)[..., 0]
    assert torch.equal(mk.combine(wide, plan, weights.T.contiguous().T), mk.combine(y, plan, weights))


def test_float64_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cuda.torch_path.warn_once.cache_clear()
    plan = mk.plan(torch.randint(-1, 6, (50, 4), device="cuda"), 6)
    x = torch.randn(50, 33, dtype=F64, device="cuda")
    with pytest.warns(UserWarning, match="not float64: this runs through torch"):
        rows = mk.permute(x, plan)
    assert torch.equal(rows, reference.permute(x, plan[:3], 4))


def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    plan = mk.plan(ids, 6)
    return mk.combine(mk.permute(x, plan) * 2, plan, weights)


@pytest.mark.slow
def test_compiled() -> None:
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (300, 117):
        x = torch.randn(tokens, 96, device="cuda").to(BF16).requires_grad_()
        weights = torch.rand(tokens, 4, device="cuda", requires_grad=True)
        ids = torch.randint(-1, 6, (tokens, 4), device="cuda")
        results = []
        for f in (compiled, layer):
            out = f(x, ids, weights)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, weights))))
        for a, b in zip(*results, strict=True):
            assert error(a, b) <= 1e-2


def test_in_a_cuda_graph() -> None:
    """Forward and backward, replayed with another routing; nothing waits for the device."""
    x = torch.randn(64, 200, device="cuda").to(BF16).requires_grad_()
    weights = torch.rand(64, 4, device="cuda", requires_grad=True)
    ids = torch.randint(-1, 6, (64, 4), device="cuda")
    dout = torch.randn(64, 200, device="cuda").to(BF16)

    def step() -> Results:
        out = layer(x, ids, weights)
        return out.detach(), *torch.autograd.grad(out, (x, weights), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        ids.copy_(torch.randint(-1, 6, (64, 4), device="cuda"))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


def test_operators_pass_opcheck() -> None:
    problem = Problem(6, 3, 5, F32)
    y, weights = problem.y.nan_to_num(), problem.weights.nan_to_num()
    tail, check = (problem.plan, 3), torch.library.opcheck
    check(torch.ops.moekern.permute.default, (problem.x, *tail, "cuda"))
    check(torch.ops.moekern.combine.default, (y, weights, *tail, "cuda"))
    for needs in ([True, True], [True, False], [False, True]):
        check(torch.ops.moekern.combine_backward.default, (problem.x, y, weights, *tail, needs, "cuda"))
