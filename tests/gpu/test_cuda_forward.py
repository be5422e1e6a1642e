"""The Hopper kernels of the forward pass, each alone: ragged tiles, odd sizes, guard rows, the planner's bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.activations import ACTIVATIONS, split
from moekern.backends import reference
from problems import error

pytestmark = pytest.mark.gpu

RAGGED_COUNTS = (0, 1, 5, 7, 8, 9, 31, 32, 33, 63, 65, 100, 127, 129, 200, 255, 256, 257, 300, 513, 0, 5)
GUARD = 64
# A sum in fp32 of products of 16-bit numbers is off by the rounding of the result alone: 2^-9 / sqrt(3) in bfloat16.
ROUNDING = {torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def guarded(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A NaN-filled matrix with rows of NaN before and after it, and the part in between."""
    whole = torch.full((rows + 2 * GUARD, columns), float("nan"), dtype=dtype, device="cuda")
    return whole, whole[GUARD : GUARD + rows]


def assert_guards(*wholes: Tensor) -> None:
    for whole in wholes:
        assert whole[:GUARD].isnan().all()
        assert whole[-GUARD:].isnan().all()


def plan_of_counts(counts: tuple[int, ...], sentinels: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A plan for tokens of one slot each with these rows an expert, in random token order, then sentinels."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat((ids, torch.full((sentinels,), -1)))[torch.randperm(len(ids) + sentinels)]
    return reference.plan(ids.reshape(-1, 1).cuda(), len(counts))


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def assert_rows_close(got: Tensor, wanted: Tensor, offsets: Tensor, allowed: float) -> None:
    """In the whole and in each expert: a single wrong 8x8 block must not drown in the others."""
    assert error(got, wanted) <= allowed
    few = torch.finfo(got.dtype).eps / 2  # what the error of a handful of elements can reach
    for i, j in itertools.pairwise(offsets.tolist()):
        if j > i:
            assert error(got[i:j], wanted[i:j]) <= (1.25 * allowed if (j - i) * got.shape[1] >= 512 else few)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        (1, 1, 1),
        (5, 3, 7),
        (16, 8, 128),
        (1000, 8, 64),
        (1025, 8, 60),
        (3000, 4, 1024),
        (32768, 8, 128),
        (70001, 6, 200),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_plan_has_the_reference_planners_bits(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    from moekern.backends.cuda import forward

    low, high = (0, min(experts, 256)) if dtype == torch.uint8 else (-3, experts + 3)
    ids = torch.randint(low, high, (tokens, top_k), device="cuda").to(dtype)
    for got, wanted in zip(forward.plan(ids, experts), reference.plan(ids, experts), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("hidden", [8, 256, 456, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine(dtype: torch.dtype, hidden: int, top_k: int) -> None:
    from moekern.backends.cuda import kernels

    tokens, experts = 301, 9
    ids = torch.randint(-1, experts, (tokens, top_k), device="cuda")
    _, inverse, offsets = reference.plan(ids, experts)
    rows, scores = normal(tokens * top_k, hidden, dtype=dtype), torch.rand(tokens, top_k, device="cuda")
    rows[offsets[-1] :] = float("nan")
    real = (ids >= 0).unsqueeze(-1)
    by_slot = torch.where(real, rows[inverse.long()].reshape(tokens, top_k, hidden).float(), 0)
    for s in (scores, None):
        whole, out = guarded(tokens, hidden, dtype)
        kernels.combine(rows, s, inverse, offsets, out, top_k)
        assert_guards(whole)
        wanted = (by_slot * (1 if s is None else s.unsqueeze(-1))).sum(1)
        assert error(out, wanted) <= ROUNDING[dtype]


@pytest.mark.parametrize(("inner", "features"), [(512, 512), (456, 1936), (64, 128), (1408, 456), (8, 8)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("stages", "store_rows"), [(3, 256), (4, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_mm_on_ragged_rows(
    dtype: torch.dtype, stages: int, store_rows: int, transposed: bool, inner: int, features: int
) -> None:
    from moekern.backends.cuda import kernels

    experts, rows = len(RAGGED_COUNTS), sum(RAGGED_COUNTS)
    _, _, offsets = plan_of_counts(RAGGED_COUNTS)
    a = normal(rows, inner, dtype=dtype)
    w = normal(experts, *((inner, features) if transposed else (features, inner)), dtype=dtype, scale=inner**-0.5)
    bias = normal(experts, features, dtype=dtype)
    plain = reference.grouped_mm(a.float(), w.float(), offsets, "nn" if transposed else "nt")
    for b in (None, bias):
        results = []
        for _ in range(2):
            whole, out = guarded(rows, features, dtype)
            kernels.grouped_mm(a, w, b, out, kernels.Tables(offsets, rows), transposed, stages, store_rows)
            assert_guards(whole)
            results.append(out)
        wanted = plain if b is None else plain + reference._bias_rows(b.float(), offsets, rows)
        assert_rows_close(results[0], wanted, offsets, ROUNDING[dtype])
        assert torch.equal(*results)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "inter"), [(512, 512), (456, 968), (2880, 136), (72, 8)])
@pytest.mark.parametrize(
    ("activation", "dtype", "bias"),
    [
        ("swiglu", torch.bfloat16, False),
        ("swiglu", torch.float16, True),
        ("swiglu_oai", torch.bfloat16, True),
        ("relu2", torch.bfloat16, False),
        ("gelu", torch.float16, True),
    ],
)
def test_up_on_ragged_rows(
    activation: str, dtype: torch.dtype, bias: bool, hidden: int, inter: int, transposed: bool, interleaved: bool
) -> None:
    from moekern.backends.cuda import kernels

    act = ACTIVATIONS[activation]
    experts, rows, sentinels = len(RAGGED_COUNTS), sum(RAGGED_COUNTS), 40
    order, _, offsets = plan_of_counts(RAGGED_COUNTS, sentinels)
    columns = inter * (2 if act.gated else 1)
    x = normal(rows + sentinels, hidden, dtype=dtype)
    x[order[rows:].long()] = float("nan")  # nobody may look at a sentinel's token
    w = normal(
        experts, *((hidden, columns) if transposed else (columns, hidden)), dtype=dtype, scale=1.5 * hidden**-0.5
    )
    b = normal(experts, columns, dtype=dtype) if bias else None
    gathered = x[order[:rows].long()].float()
    wanted = reference.grouped_mm(gathered, w.float(), offsets, "nn" if transposed else "nt")
    if b is not None:
        wanted = wanted + reference._bias_rows(b.float(), offsets, rows)
    results = []
    for save in (True, False, True):
        whole_a, activated = guarded(rows, inter, dtype)
        whole_p, pre = guarded(rows, columns, dtype)
        tables = kernels.Tables(offsets, rows)
        kernels.up(
            x, order, w, b, activated, pre if save else None, tables, 1, activation, transposed, interleaved, False
        )  # fmt: skip
        assert_guards(whole_a, whole_p)
        results.append(activated)
        if save:
            assert_rows_close(pre, wanted, offsets, ROUNDING[dtype])
            exact = act.forward(*split(pre.float(), act, interleaved))
            assert_rows_close(activated, exact, offsets, ROUNDING[dtype])
        else:
            assert pre.isnan().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "inter"), [(512, 512), (456, 968), (72, 8)])
@pytest.mark.parametrize(
    ("activation", "dtype", "bias"), [("swiglu", torch.bfloat16, False), ("geglu", torch.float16, True)]
)
def test_up_for_few_rows(
    activation: str, dtype: torch.dtype, bias: bool, hidden: int, inter: int, transposed: bool
) -> None:
    from moekern.backends.cuda import kernels

    act, experts, rows = ACTIVATIONS[activation], len(RAGGED_COUNTS), sum(RAGGED_COUNTS)
    order, _, offsets = plan_of_counts(RAGGED_COUNTS)
    x = normal(rows, hidden, dtype=dtype)
    shape = (hidden, 2 * inter) if transposed else (2 * inter, hidden)
    w = normal(experts, *shape, dtype=dtype, scale=1.5 * hidden**-0.5)
    b = normal(experts, 2 * inter, dtype=dtype) if bias else None
    pre = reference.grouped_mm(x[order.long()].float(), w.float(), offsets, "nn" if transposed else "nt")
    if b is not None:
        pre = pre + reference._bias_rows(b.float(), offsets, rows)
    results = []
    for _ in range(2):
        whole, activated = guarded(rows, inter, dtype)
        tables = kernels.Tables(offsets, rows)
        kernels.up(x, order, w, b, activated, None, tables, 1, activation, transposed, False, True)
        assert_guards(whole)
        results.append(activated)
    assert_rows_close(results[0], act.forward(*split(pre, act, False)), offsets, ROUNDING[dtype])
    assert torch.equal(*results)


def test_plan_of_a_slice_of_sorted_experts() -> None:
    ids = torch.rand(1024, 16, device="cuda").argsort(dim=1)[:, :2]
    planned = mk.plan(ids, 16)
    for got, wanted in zip((planned.order, planned.inverse, planned.offsets), reference.plan(ids, 16), strict=True):
        assert torch.equal(got, wanted)
