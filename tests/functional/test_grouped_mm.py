"""Rows that are already sorted: mk.grouped_mm and mk.grouped_mlp."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import moekern as mk
from problems import error, forbid_torch_path, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def offsets_of(counts: list[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).to(dtype)


def rows_matrix(a: Tensor, b: Tensor, counts: list[int]) -> Tensor:
    parts = a.double()[: sum(counts)].split(counts)
    products = [part @ matrix for part, matrix in zip(parts, b.double(), strict=True)]
    return torch.cat([*products, torch.zeros(len(a) - sum(counts), b.shape[2], dtype=torch.float64, device=a.device)])


def rows_rows(a: Tensor, b: Tensor, counts: list[int]) -> Tensor:
    pairs = zip(a.double()[: sum(counts)].split(counts), b.double()[: sum(counts)].split(counts), strict=True)
    return torch.stack([p.T @ q for p, q in pairs])


def bound(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4, torch.float64: 1e-14}[dtype]


COUNTS = [[3, 0, 5, 1], [0, 0, 0], [64], [17, 33, 2, 0, 130, 8]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surplus", [0, 3])
@pytest.mark.usefixtures("poisoned")
def test_rows_times_matrices(device: str, counts: list[int], dtype: torch.dtype, surplus: int) -> None:
    a = torch.randn(sum(counts) + surplus, 40, device=device).to(dtype)
    a[sum(counts) :] = float("nan")  # rows past the end are not read
    b = (torch.randn(len(counts), 40, 24, device=device) / 40**0.5).to(dtype)
    offsets = offsets_of(counts, device)
    truth = rows_matrix(a, b, counts)
    plain = mk.grouped_mm(a, b, offsets)
    transposed = mk.grouped_mm(a, b.mT.contiguous().mT, offsets)
    for value in (plain, transposed):
        assert value.dtype == dtype
        assert error(value, truth) <= bound(dtype)
        assert torch.equal(value[sum(counts) :], torch.zeros_like(value[sum(counts) :]))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_rows_times_rows(device: str, counts: list[int], dtype: torch.dtype) -> None:
    rows = sum(counts) + 2
    a = torch.randn(rows, 24, device=device).to(dtype)
    b = torch.randn(rows, 40, device=device).to(dtype)
    a[sum(counts) :] = b[sum(counts) :] = float("nan")
    value = mk.grouped_mm(a, b, offsets_of(counts, device, torch.int64))
    assert error(value, rows_rows(a, b, counts)) <= bound(dtype)
    for e, count in enumerate(counts):
        assert count > 0 or not value[e].any()


@pytest.mark.parametrize("form", ["matrix", "transposed", "rows"])
def test_gradients_of_grouped_mm(device: str, form: str) -> None:
    counts = [5, 0, 9]
    a = torch.randn(16, 12, device=device, requires_grad=True)
    b = torch.randn((16, 10) if form == "rows" else (3, 12, 10), device=device, requires_grad=True)
    used = b.mT.contiguous().mT if form == "transposed" else b
    out = mk.grouped_mm(a, used, offsets_of(counts, device))
    truth = rows_rows(a, b, counts) if form == "rows" else rows_matrix(a, b, counts)
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, (a, b), dout)
    expected = torch.autograd.grad(truth, (a, b), dout.double())
    for value, wanted in zip(ours, expected, strict=True):
        assert error(value, wanted) < 1e-5


@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=8), k=st.integers(1, 40), n=st.integers(1, 40))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("poisoned")
def test_any_sizes(device: str, counts: list[int], k: int, n: int) -> None:
    rows, offsets = sum(counts), offsets_of(counts, device)
    a, b = torch.randn(rows, k, device=device), torch.randn(len(counts), k, n, device=device)
    c = torch.randn(rows, n, device=device)
    for other, product in ((b, rows_matrix), (c, rows_rows)):
        # Relative to the terms, not to their sum: one or two elements may cancel, for plain torch too.
        difference = mk.grouped_mm(a, other, offsets) - product(a, other, counts)
        assert difference.norm() <= 3e-7 * product(a.abs(), other.abs(), counts).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_grouped_mlp_is_the_experts_without_dispatch(device: str, dtype: torch.dtype) -> None:
    p = make(40, 24, 16, 5, 1, dtype=dtype, device=device, bias=True)
    plan = mk.plan(p.ids, 5)
    rows = p.x[plan.order.long()]
    sorted_out = mk.grouped_mlp(rows, plan.offsets, p.w_gate_up, p.w_down, p.b_gate_up, p.b_down)
    expected = mk.experts(p.x, p.ids, None, p.w_gate_up, p.w_down, p.b_gate_up, p.b_down)
    assert torch.equal(sorted_out, expected[plan.order.long()])


def test_grouped_mlp_ignores_rows_past_the_end(place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    p = make(1, 24, 16, 3, 1, device=device, dtype=dtype, bias=True)
    offsets = torch.tensor([0, 4, 4, 7], device=device)
    x = torch.randn(10, 24, device=device, dtype=dtype)
    x[7:] = float("nan")
    x.requires_grad_()
    weights = [t.clone().requires_grad_() for t in (p.w_gate_up, p.w_down, p.b_gate_up, p.b_down)]
    out = mk.grouped_mlp(x, offsets, *weights)
    assert not out[7:].any()
    out.square().sum().backward()
    assert not x.grad[7:].any()
    assert all(torch.isfinite(w.grad).all() for w in weights)
    assert torch.isfinite(x.grad).all()


@pytest.mark.gpu
def test_grouped_mlp_never_synchronises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets that only the device knows, rows past the end, forward and backward."""
    if torch.cuda.get_device_capability() == (9, 0):
        forbid_torch_path(monkeypatch)
    p = make(1, 64, 48, 5, 1, device="cuda", dtype=torch.bfloat16, bias=True)
    counts = torch.tensor([40, 0, 300, 7, 90], device="cuda")
    leaves = [t.clone().requires_grad_() for t in (p.w_gate_up, p.w_down, p.b_gate_up, p.b_down)]
    x = torch.randn(512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn_like(x)

    def step() -> list[Tensor]:
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        out = mk.grouped_mlp(x, offsets, *leaves)
        return [out.detach(), *torch.autograd.grad(out, (x, *leaves), dout)]

    expected = step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert not again[0][437:].any()
    assert not again[1][437:].any()


SIZES = [(0, 5), (5, 0), (0, 0), (0, 500), (1, 0), (40, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[2, 0, 9], [64], [0, 0], [130, 1]])
@pytest.mark.parametrize(("inner", "columns"), SIZES)
@pytest.mark.usefixtures("poisoned")
def test_sizes_of_zero(device: str, dtype: torch.dtype, counts: list[int], inner: int, columns: int) -> None:
    """A sum over no rows is zero, with any old contents of the kernels' memory; in gradients too."""
    rows, experts = sum(counts), len(counts)
    offsets = offsets_of(counts, device)
    earlier = torch.full((rows, 64), 3.0, device=device, dtype=dtype)
    mk.grouped_mm(earlier, torch.ones(experts, 64, 500, device=device, dtype=dtype), offsets)
    for swapped in (False, True):
        a = torch.randn(rows, inner, device=device).to(dtype).requires_grad_()
        b = torch.randn(experts, *((columns, inner) if swapped else (inner, columns)), device=device).to(dtype)
        b.requires_grad_()
        y = mk.grouped_mm(a, b.mT if swapped else b, offsets)
        assert y.shape == (rows, columns)
        assert (y == 0).all()
        da, db = torch.autograd.grad(y, (a, b), torch.ones_like(y))
        assert da.shape == a.shape
        assert db.shape == b.shape
        assert (da == 0).all()
        assert (db == 0).all()
    left = torch.randn(rows, inner, device=device).to(dtype).requires_grad_()
    right = torch.randn(rows, columns, device=device).to(dtype).requires_grad_()
    y = mk.grouped_mm(left, right, offsets)
    assert y.shape == (experts, inner, columns)
    for gradient in torch.autograd.grad(y, (left, right), torch.ones_like(y)):
        assert (gradient == 0).all()
