"""The experts of every backend against the float64 reference: values, gradients, unusual shapes."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import moekern as mk
from moekern.backends.activations import ACTIVATIONS
from moekern.functional import experts as functional
from problems import NAMES, Problem, check_against_truth, error, gradients, make

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def forward_and_backward(problem: Problem) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    dout = torch.randn(problem.x.shape, generator=rng).to(torch.bfloat16).to(problem.x)
    return gradients(problem, dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("poisoned")
def test_every_activation_in_every_dtype(device: str, activation: str, dtype: torch.dtype) -> None:
    check_against_truth(
        forward_and_backward, make(37, 64, 40, 5, 2, dtype=dtype, device=device, activation=activation, bias=True)
    )


@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "experts", "top_k"),
    [
        (1, 8, 8, 1, 1),
        (1, 256, 128, 64, 8),
        (3, 8, 24, 4, 4),
        (33, 200, 136, 7, 3),
        (64, 1, 1, 3, 2),
        (19, 7, 13, 3, 2),
        (50, 33, 9, 4, 1),
        (300, 136, 72, 1, 1),
        (515, 96, 64, 128, 6),
        (100, 40, 2080, 2, 2),
        (40, 2088, 16, 3, 2),
        (130, 64, 64, 1024, 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_any_shape(
    device: str, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, dtype: torch.dtype
) -> None:
    problem = make(tokens, hidden, intermediate, experts, top_k, dtype=dtype, device=device, bias=True)
    few_numbers = tokens * top_k < 16  # plain torch's own error then depends on luck
    check_against_truth(forward_and_backward, problem, factor=4.0 if few_numbers else 2.0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_weight_layouts(device: str, transposed: bool, interleaved: bool, dtype: torch.dtype) -> None:
    problem = make(
        50, 72, 48, 6, 3, dtype=dtype, device=device, bias=True, activation="swiglu_oai",
        transposed=transposed, interleaved=interleaved,
    )  # fmt: skip
    check_against_truth(forward_and_backward, problem)


def routings(tokens: int, experts: int, top_k: int) -> dict[str, Tensor]:
    """Extreme routings."""
    one = torch.zeros(tokens, top_k, dtype=torch.int64)
    alternating = torch.arange(tokens * top_k).reshape(tokens, top_k) % 2 * (experts - 1)
    sentinels = torch.randint(-2, experts + 3, (tokens, top_k))
    far = torch.tensor([-(2**40), 2**40, 1]).repeat(tokens * top_k)[: tokens * top_k]
    return {
        "one expert takes all": one,
        "first and last expert only": alternating,
        "sentinels among them": sentinels,
        "sentinels only": torch.full((tokens, top_k), experts),
        "far out of range": far.reshape(tokens, top_k),
    }


@pytest.mark.parametrize("name", routings(2, 2, 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_odd_routings(device: str, name: str, dtype: torch.dtype) -> None:
    ids = routings(45, 6, 2)[name]
    problem = make(45, 48, 32, 6, 2, dtype=dtype, device=device, bias=True, ids=ids)
    check_against_truth(forward_and_backward, problem)


@pytest.mark.usefixtures("poisoned")
def test_sentinels_give_exact_zeros(device: str) -> None:
    ids = torch.tensor([[0, -1], [9, 4], [2, 3]])
    problem = make(3, 16, 8, 4, 2, device=device, ids=ids)
    weights = problem.weights.clone()
    weights[0, 1] = weights[1] = float("nan")  # a sentinel's weight is never read
    result = gradients(Problem(**{**problem.__dict__, "weights": weights}), torch.ones(3, 16, device=device))
    assert torch.equal(result["out"][1], torch.zeros(16, device=device))
    assert torch.equal(result["x"][1], torch.zeros(16, device=device))
    assert torch.equal(result["weights"][1], torch.zeros(2, device=device))
    assert result["weights"][0, 1] == 0
    assert torch.equal(result["w_down"][1], torch.zeros(16, 8, device=device))  # an empty expert
    assert all(torch.isfinite(t).all() for t in result.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(device: str, dtype: torch.dtype) -> None:
    problem = make(0, 16, 8, 4, 2, dtype=dtype, device=device, bias=True)
    result = gradients(problem, torch.empty(0, 16, device=device, dtype=dtype))
    assert result["out"].shape == (0, 16)
    assert result["x"].shape == (0, 16)
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        assert torch.equal(result[name], torch.zeros_like(result[name]))


@pytest.mark.parametrize("ids_dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_every_integer_type_of_ids(device: str, ids_dtype: torch.dtype) -> None:
    problem = make(20, 16, 8, 5, 2, device=device)
    narrow = Problem(**{**problem.__dict__, "ids": problem.ids.to(ids_dtype)})
    assert torch.equal(narrow.run(), problem.run())


@pytest.mark.parametrize("frozen", [(), ("x",), ("w_gate_up", "w_down"), ("weights", "b_down"), NAMES[1:]])
@pytest.mark.usefixtures("poisoned")
def test_frozen_inputs_change_no_other_gradient(device: str, frozen: tuple[str, ...]) -> None:
    problem = make(30, 32, 24, 4, 2, device=device, bias=True)
    dout = torch.randn(30, 32, device=device)
    everything = gradients(problem, dout)
    wanted = tuple(n for n in NAMES if n not in frozen)
    part = gradients(problem, dout, wanted)
    assert set(part) == {"out", *wanted}
    for name, value in part.items():
        assert torch.equal(value, everything[name]), name


def test_zero_stride_gradient(device: str) -> None:
    problem = make(30, 32, 24, 4, 2, device=device)
    x = problem.x.clone().requires_grad_()
    problem.run(x=x).sum().backward()
    dense = gradients(problem, torch.ones(30, 32, device=device), ("x",))
    assert torch.equal(x.grad, dense["x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_any_kind(device: str, dtype: torch.dtype) -> None:
    problem = make(30, 32, 24, 4, 2, dtype=dtype, device=device)
    expected = problem.run()
    wide = torch.randn(60, 70, device=device).to(dtype)
    wide[::2, 3:35] = problem.x
    strided = problem.run(x=wide[::2, 3:35])
    weights_view = problem.run(w_gate_up=problem.w_gate_up.mT.contiguous().mT)
    ids_view = Problem(**{**problem.__dict__, "ids": problem.ids.T.contiguous().T}).run()
    for value in (strided, weights_view, ids_view):
        assert torch.equal(value, expected)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_elements_that_straddle_addresses() -> None:
    problem = make(6, 16, 8, 4, 2)
    shifted = bytearray(1) + problem.x.numpy().tobytes()
    x = torch.frombuffer(shifted, dtype=torch.float32, offset=1).reshape(6, 16)
    assert x.data_ptr() % 4 != 0
    assert torch.equal(problem.run(x=x), problem.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(device: str, dtype: torch.dtype) -> None:
    problem = make(257, 96, 72, 9, 3, dtype=dtype, device=device, bias=True)
    dout = torch.randn(257, 96, device=device)
    first = gradients(problem, dout)
    for _ in range(4):
        again = gradients(problem, dout)
        for name, value in again.items():
            assert torch.equal(value, first[name]), name


def test_an_expert_with_nan_spoils_only_its_own_tokens(device: str) -> None:
    problem = make(64, 32, 24, 8, 2, device=device)
    w_down = problem.w_down.clone()
    w_down[3] = float("nan")
    touched = (problem.ids == 3).any(1)
    out = problem.run(w_down=w_down)
    assert torch.equal(out[~touched], problem.run()[~touched])
    x = problem.x.clone()
    x[5] = float("inf")
    result = gradients(Problem(**{**problem.__dict__, "x": x}), torch.ones(64, 32, device=device))
    clean = gradients(problem, torch.ones(64, 32, device=device))
    others = [e for e in range(8) if e not in problem.ids[5].tolist()]
    assert torch.equal(result["w_gate_up"][others], clean["w_gate_up"][others])
    assert torch.equal(result["w_down"][others], clean["w_down"][others])


def test_router_weights_may_be_left_out(device: str) -> None:
    problem = make(20, 16, 8, 5, 2, device=device)
    ones = Problem(**{**problem.__dict__, "weights": torch.ones(20, 2, device=device)})
    none = Problem(**{**problem.__dict__, "weights": None})
    assert error(none.run(), ones.run()) < 1e-6
    dout = torch.randn(20, 16, device=device)
    with_ones, without = gradients(ones, dout, ("x", "w_down")), gradients(none, dout, ("x", "w_down"))
    for name in ("x", "w_down"):
        assert error(without[name], with_ones[name]) < 1e-6


def test_a_plan_can_be_reused(device: str) -> None:
    p = make(20, 16, 8, 5, 2, device=device)
    plan = mk.plan(p.ids, 5)
    again = mk.experts(p.x, None, p.weights, p.w_gate_up, p.w_down, plan=plan)
    assert torch.equal(again, p.run())


@given(
    tokens=st.integers(0, 70),
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 70),
    experts=st.integers(1, 20),
    top_k=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("poisoned")
def test_anything(
    device: str, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, dtype: torch.dtype,
    activation: str, bias: bool, transposed: bool, seed: int,
) -> None:  # fmt: skip
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    problem = make(
        tokens, hidden, intermediate, experts, top_k, dtype=dtype, device=device, activation=activation, bias=bias,
        transposed=transposed, ids=ids, seed=seed,
    )  # fmt: skip
    # Few numbers: a single rounding or cancellation changes the quotient, so the bound is wider here.
    check_against_truth(forward_and_backward, problem, factor=4.0, slack=10.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_views_are_taken_as_they_lie(place: tuple[str, torch.dtype], transposed: bool) -> None:
    """Outputs and gradients are bitwise those of contiguous weights in the memory's layout; no copy is made."""
    device, dtype = place
    experts, hidden, inter = 4, 64, 48
    x = torch.randn(9, hidden, device=device).to(dtype)
    ids = torch.randint(0, experts, (9, 2), device=device)
    shapes = ((experts, hidden, 2 * inter), (experts, inter, hidden))
    shapes = shapes if transposed else tuple((e, b, a) for e, a, b in shapes)
    own = [(torch.randn(shape, device=device) / 8).to(dtype).requires_grad_() for shape in shapes]
    views = [w.detach().clone().requires_grad_() for w in own]
    for call in (mk.experts, mk.grouped_mlp):
        routing = (ids, None) if call is mk.experts else (torch.tensor([0, 3, 3, 8, 9], device=device),)
        want = call(x, *routing, *own, transposed=transposed)
        got = call(x, *routing, *(w.mT for w in views), transposed=not transposed)
        assert torch.equal(got, want)
        dout = torch.randn_like(want)
        for a, b in zip(torch.autograd.grad(want, own, dout), torch.autograd.grad(got, views, dout), strict=True):
            assert torch.equal(a, b)


def test_weights_in_neither_layout_are_named_once(device: str) -> None:
    functional._warn_of_copy.cache_clear()
    x, ids = torch.randn(5, 32, device=device), torch.randint(0, 4, (5, 2), device=device)
    w_gate_up, w_down = torch.randn(4, 32, 64, device=device)[:, :, ::2], torch.randn(4, 32, 16, device=device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = [mk.experts(x, ids, None, w_gate_up, w_down) for _ in range(2)]
    ours = [str(w.message) for w in seen if "strided view" in str(w.message)]
    assert len(ours) == 1
    assert "w_gate_up" in ours[0]
    assert torch.equal(got[0], mk.experts(x, ids, None, w_gate_up.contiguous(), w_down))
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives_without_tokens(device: str, dtype: torch.dtype) -> None:
    p = make(0, 6, 4, 3, 2, device=device, dtype=dtype, bias=True)
    leaves = [t.requires_grad_() for t in (p.x, p.w_gate_up, p.w_down, p.b_gate_up, p.b_down) if t is not None]
    first = torch.autograd.grad(mk.experts(p.x, p.ids, p.weights, *leaves[1:]).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves, materialize_grads=True)
    for leaf, value in zip(leaves, second, strict=True):
        assert value.shape == leaf.shape
        assert (value == 0).all()
