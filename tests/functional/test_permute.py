"""Permute and combine: Rust against the plain torch expressions, and their gradients of any order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import moekern as mk
from moekern.functional.permute import combine, permute
from moekern.functional.plan import Plan, plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rounding to the dtype once, plus fp32 sums whose order may differ.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-14}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def case(tokens: int, top_k: int, experts: int, hidden: int, dtype: torch.dtype) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """A plan with sentinels, tokens, rows with NaN where sentinels are, weights."""
    p = plan(torch.randint(-1, experts + 1, (tokens, top_k)), experts)
    y = torch.randn(tokens * top_k, hidden).to(dtype)
    y[int(p.offsets[-1]) :] = float("nan")
    return p, torch.randn(tokens, hidden).to(dtype), y, torch.rand(tokens, top_k, dtype=accumulator(dtype))


def gradients(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients for a fixed upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = f(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert not a.isnan().any()
        scale = b.abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(scale, 1.0))


@given(
    tokens=st.integers(0, 30),
    top_k=st.integers(1, 9),
    experts=st.integers(1, 40),
    hidden=st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130]),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_matches_the_expression(
    tokens: int, top_k: int, experts: int, hidden: int, dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    p, x, y, weights = case(tokens, top_k, experts, hidden, dtype)
    extra = (weights,) if weighted else ()

    def results() -> tuple[Tensor, ...]:
        return gradients(lambda x: permute(x, p), x) + gradients(lambda y, *w: combine(y, p, *w), y, *extra)

    ours = results()
    with mk.backend("reference"):
        theirs = results()
    assert torch.equal(ours[0], theirs[0])
    assert_same(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 33, 1024])
def test_every_element_is_written(dtype: torch.dtype, hidden: int, poisoned: None) -> None:
    p, x, y, weights = case(50, 4, 6, hidden, dtype)
    outputs = gradients(lambda x: permute(x, p), x) + gradients(lambda y, w: combine(y, p, w), y, weights)
    assert not any(t.isnan().any() for t in outputs)
    real = int(p.offsets[-1])
    assert real < 200
    assert torch.equal(outputs[0][real:], torch.zeros(200 - real, hidden, dtype=dtype))
    assert torch.equal(outputs[3][real:], torch.zeros(200 - real, hidden, dtype=dtype))
    sentinels = p.inverse.reshape(50, 4) >= real
    assert (outputs[4][sentinels] == 0).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_sentinels_weight_counts_for_nothing(backend: str) -> None:
    p, _, y, weights = case(20, 3, 4, 5, torch.float32)
    sentinels = p.inverse.reshape(20, 3) >= p.offsets[-1]
    assert sentinels.any()
    with mk.backend(backend):
        results = [
            gradients(lambda y, w: combine(y, p, w), y, torch.where(sentinels, value, weights))
            for value in (0.0, float("nan"))
        ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once(dtype: torch.dtype) -> None:
    p, _, y, weights = case(64, 8, 16, 129, dtype)
    y = y.nan_to_num()
    used = (p.inverse < p.offsets[-1]).unsqueeze(1)
    exact = (y.double()[p.inverse.long()] * weights.double().reshape(-1, 1) * used).reshape(64, 8, -1).sum(1)
    spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    fp32_sum = 8 * torch.finfo(accumulator(dtype)).eps * exact.abs().max()
    assert ((combine(y, p, weights).double() - exact).abs() <= 0.5001 * spacing + fp32_sum).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time_and_for_any_number_of_threads(dtype: torch.dtype) -> None:
    p, x, y, weights = case(700, 8, 32, 257, dtype)

    def results() -> tuple[Tensor, ...]:
        return gradients(lambda x: permute(x, p), x) + gradients(lambda y, w: combine(y, p, w), y, weights)

    expected = results()
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("hidden", [1, 5])
def test_gradients_of_first_and_second_order(backend: str, hidden: int) -> None:
    p, x, y, weights = case(6, 3, 4, hidden, torch.float64)
    x.requires_grad_()
    y = y.nan_to_num().requires_grad_()
    weights.requires_grad_()
    with mk.backend(backend):
        for f, inputs in (
            (lambda x: permute(x, p), (x,)),
            (lambda y: combine(y, p), (y,)),
            (lambda y, w: combine(y, p, w), (y, weights)),
            (lambda w: combine(y.detach(), p, w), (weights,)),
        ):
            assert gradcheck(f, inputs)
            assert gradgradcheck(f, inputs)


def test_func_transforms() -> None:
    p, x, _, weights = case(9, 3, 4, 7, torch.float64)

    def loss(x: Tensor, weights: Tensor) -> Tensor:
        return combine(permute(x, p).sin(), p, weights).square().sum()

    leaves = (x.requires_grad_(), weights.requires_grad_())
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, (0, 1))(*leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    weights_of = {}

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        p = plan(ids, 5)
        return combine(permute(x, p) * 2, p, weights)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (11, 6):
        x = torch.randn(tokens, 12, requires_grad=True)
        weights_of[tokens] = weights = torch.rand(tokens, 3, requires_grad=True)
        ids = torch.randint(-1, 6, (tokens, 3))
        results = []
        for f in (compiled, layer):
            out = f(x, ids, weights)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, weights))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_operators_pass_opcheck() -> None:
    p, x, y, weights = case(6, 3, 4, 5, torch.float32)
    y = y.nan_to_num()
    tail = (p[:3], 3)
    check = torch.library.opcheck
    check(torch.ops.moekern.permute.default, (x, *tail, "cpu"))
    check(torch.ops.moekern.combine.default, (y, weights, *tail, "cpu"))
    for needs in ([True, True], [True, False], [False, True]):
        check(torch.ops.moekern.combine_backward.default, (x, y, weights, *tail, needs, "cpu"))


def test_strided_inputs_and_gradients() -> None:
    p, x, y, weights = case(10, 4, 4, 16, torch.float32)
    y = y.nan_to_num()
    strided = torch.randn(16, 20).T[::2]
    assert torch.equal(permute(strided, p), permute(strided.contiguous(), p))
    wide = torch.stack((y, y), 2)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(combine(wide, p, weights.T.contiguous().T), combine(y, p, weights))
    for f, leaf in ((lambda t: permute(t, p), x), (lambda t: combine(t, p, weights), y)):
        leaf = leaf.clone().requires_grad_()
        (zero_stride,) = torch.autograd.grad(f(leaf).sum(), leaf)
        (ones,) = torch.autograd.grad(f(leaf), leaf, torch.ones_like(f(leaf)))
        assert torch.equal(zero_stride, ones)


def test_misaligned_rows() -> None:
    p, x, _, _ = case(6, 2, 3, 8, torch.float32)
    buffer = bytearray(1 + x.numel() * 4)
    buffer[1:] = x.numpy().tobytes()
    misaligned = torch.frombuffer(buffer, dtype=torch.float32, offset=1).reshape(6, 8)
    assert torch.equal(permute(misaligned, p), permute(x, p))


def test_frozen_inputs_get_no_gradient() -> None:
    p, _, y, weights = case(6, 2, 3, 8, torch.float32)
    y = y.nan_to_num()
    only_rows, only_weights = y.clone().requires_grad_(), weights.clone().requires_grad_()
    combine(only_rows, p, weights).sum().backward()
    combine(y, p, only_weights).sum().backward()
    both_rows, both_weights = y.clone().requires_grad_(), weights.clone().requires_grad_()
    combine(both_rows, p, both_weights).sum().backward()
    assert torch.equal(only_rows.grad, both_rows.grad)
    assert torch.equal(only_weights.grad, both_weights.grad)


def test_half_precision_weights_keep_their_dtype_of_gradient() -> None:
    p, _, y, weights = case(6, 2, 3, 8, torch.bfloat16)
    leaf = weights.bfloat16().requires_grad_()
    combine(y, p, leaf).float().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_many_python_threads_at_once() -> None:
    p, x, y, weights = case(400, 4, 8, 128, torch.bfloat16)
    expected = permute(x, p), combine(y, p, weights)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(15):
            got = permute(x, p), combine(y, p, weights)
            wrong.extend(i for a, b in zip(got, expected, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


IDS = torch.tensor([[0, 1], [1, 2]])
X, Y, W = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: permute(None, p), TypeError, "x: got NoneType"),
        (lambda p: permute(X.numpy(), p), TypeError, "x: got ndarray"),
        (lambda p: permute(X.int(), p), TypeError, "x: got dtype int32"),
        (lambda p: permute(X.to(torch.complex64), p), TypeError, "x: got dtype complex64"),
        (lambda p: permute(X.to_sparse(), p), TypeError, "x: got layout"),
        (lambda p: permute(X[0], p), ValueError, r"x: got shape \(3,\)"),
        (lambda p: permute(torch.ones(3, 3), p), ValueError, "x: got 3 tokens, expected 2"),
        (lambda p: permute(X.to("meta"), p), ValueError, "plan: got device cpu"),
        (lambda p: permute(X, tuple(p)), TypeError, "plan: got tuple"),
        (lambda p: permute(X, None), TypeError, "plan: got NoneType"),
        (lambda p: permute(X[:0], p._replace(top_k=0)), ValueError, "plan: got top_k 0"),
        (lambda p: combine([1.0], p), TypeError, "y_sorted: got list"),
        (lambda p: combine(X, p), ValueError, r"y_sorted: got shape \(2, 3\), expected \[4, hidden\]"),
        (lambda p: combine(Y, p, IDS), TypeError, "weights: got dtype int64"),
        (lambda p: combine(Y, p, [1.0]), TypeError, "weights: got list"),
        (lambda p: combine(Y, p, W[0]), ValueError, r"weights: got shape \(2,\), expected \[2, 2\]"),
        (lambda p: combine(Y, p, W.to("meta")), ValueError, "weights: got device meta"),
    ],
)
def test_bad_arguments(call: Callable[[Plan], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(plan(IDS, 3))
