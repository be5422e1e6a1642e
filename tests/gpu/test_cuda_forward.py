"""The Hopper kernels of the forward pass, each alone: ragged tiles, odd sizes, guard rows, the planner's bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.backends import reference
from moekern.backends.activations import ACTIVATIONS, split
from moekern.backends.call import Form, Weights
from problems import error
from ragged import COUNTS, ROUNDING, assert_guards, assert_rows_close, guarded, normal, plan_of_counts

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


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
    from moekern.backends.cuda.passes import forward

    low, high = (0, min(experts, 256)) if dtype == torch.uint8 else (-3, experts + 3)
    ids = torch.randint(low, high, (tokens, top_k), device="cuda").to(dtype)
    for got, wanted in zip(forward.plan(ids, experts), reference.plan(ids, experts), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("hidden", [8, 256, 456, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine(dtype: torch.dtype, hidden: int, top_k: int) -> None:
    from moekern.backends.cuda.kernels import combine

    tokens, experts = 301, 9
    ids = torch.randint(-1, experts, (tokens, top_k), device="cuda")
    _, inverse, offsets = reference.plan(ids, experts)
    rows, scores = normal(tokens * top_k, hidden, dtype=dtype), torch.rand(tokens, top_k, device="cuda")
    rows[offsets[-1] :] = float("nan")
    real = (ids >= 0).unsqueeze(-1)
    by_slot = torch.where(real, rows[inverse.long()].reshape(tokens, top_k, hidden).float(), 0)
    for s in (scores, None):
        whole, out = guarded(tokens, hidden, dtype=dtype)
        combine.combine(rows, s, inverse, offsets, out, top_k)
        assert_guards(whole)
        wanted = (by_slot * (1 if s is None else s.unsqueeze(-1))).sum(1)
        assert error(out, wanted) <= ROUNDING[dtype]


@pytest.mark.parametrize(("inner", "features"), [(512, 512), (456, 1936), (64, 128), (1408, 456), (8, 8)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("stages", "store_rows"), [(3, 256), (4, 128), (0, 0)], ids=["3-256", "4-128", "288"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_mm_on_ragged_rows(
    dtype: torch.dtype, stages: int, store_rows: int, transposed: bool, inner: int, features: int
) -> None:
    from moekern.backends.cuda.kernels import grouped
    from moekern.backends.cuda.kernels.tables import Tables

    experts, rows = len(COUNTS), sum(COUNTS)
    _, _, offsets = plan_of_counts(COUNTS)
    a = normal(rows, inner, dtype=dtype)
    w = normal(experts, *((inner, features) if transposed else (features, inner)), dtype=dtype, scale=inner**-0.5)
    bias = normal(experts, features, dtype=dtype)
    plain = reference.grouped_mm(a.float(), w.float(), offsets, "nn" if transposed else "nt")
    for b in (None, bias):
        results = []
        for _ in range(2):
            whole, out = guarded(rows, features, dtype=dtype)
            tables = Tables(offsets, rows)
            if stages:
                grouped.grouped_mm(a, w, b, out, tables, transposed, stages, store_rows)
            else:
                grouped.grouped_288(a, w, b, out, tables, transposed)
            assert_guards(whole)
            results.append(out)
        wanted = plain if b is None else plain + reference.bias_rows(b.float(), offsets, rows)
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
    from moekern.backends.cuda.kernels import up
    from moekern.backends.cuda.kernels.tables import Tables

    act = ACTIVATIONS[activation]
    experts, rows, sentinels = len(COUNTS), sum(COUNTS), 40
    order, _, offsets = plan_of_counts(COUNTS, sentinels)
    columns = inter * (2 if act.gated else 1)
    x = normal(rows + sentinels, hidden, dtype=dtype)
    x[order[rows:].long()] = float("nan")  # a sentinel's token must not be read
    w = normal(
        experts, *((hidden, columns) if transposed else (columns, hidden)), dtype=dtype, scale=1.5 * hidden**-0.5
    )
    b = normal(experts, columns, dtype=dtype) if bias else None
    gathered = x[order[:rows].long()].float()
    wanted = reference.grouped_mm(gathered, w.float(), offsets, "nn" if transposed else "nt")
    if b is not None:
        wanted = wanted + reference.bias_rows(b.float(), offsets, rows)
    results = []
    for save, tile_rows in ((True, 272), (False, 272), (True, 288)):
        whole_a, activated = guarded(rows, inter, dtype=dtype)
        whole_p, pre = guarded(rows, columns, dtype=dtype)
        tables = Tables(offsets, rows)
        up.up(
            x, order, w, b, activated, pre if save else None, tables, 1, activation, transposed, interleaved, False,
            tile_rows,
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
def test_up_by_consumers(
    activation: str, dtype: torch.dtype, bias: bool, hidden: int, inter: int, transposed: bool
) -> None:
    from moekern.backends.cuda.kernels import up
    from moekern.backends.cuda.kernels.tables import Tables

    act, experts, rows = ACTIVATIONS[activation], len(COUNTS), sum(COUNTS)
    order, _, offsets = plan_of_counts(COUNTS)
    x = normal(rows, hidden, dtype=dtype)
    shape = (hidden, 2 * inter) if transposed else (2 * inter, hidden)
    w = normal(experts, *shape, dtype=dtype, scale=1.5 * hidden**-0.5)
    b = normal(experts, 2 * inter, dtype=dtype) if bias else None
    pre = reference.grouped_mm(x[order.long()].float(), w.float(), offsets, "nn" if transposed else "nt")
    if b is not None:
        pre = pre + reference.bias_rows(b.float(), offsets, rows)
    results = []
    for save in (False, True, False, True):
        whole, activated = guarded(rows, inter, dtype=dtype)
        whole_p, saved = guarded(rows, 2 * inter, dtype=dtype)
        tables, kept = Tables(offsets, rows), saved if save else None
        up.up(x, order, w, b, activated, kept, tables, 1, activation, transposed, False, True, 288)
        assert_guards(whole, whole_p)
        results.append((activated, saved))
        if save:
            assert_rows_close(saved, pre, offsets, ROUNDING[dtype])
        else:
            assert saved.isnan().all()
    assert_rows_close(results[0][0], act.forward(*split(pre, act, False)), offsets, ROUNDING[dtype])
    assert all(torch.equal(activated, results[0][0]) for activated, _ in results)
    assert torch.equal(results[1][1], results[3][1])


def test_plan_of_a_slice_of_sorted_experts() -> None:
    ids = torch.rand(1024, 16, device="cuda").argsort(dim=1)[:, :2]
    planned = mk.plan(ids, 16)
    for got, wanted in zip((planned.order, planned.inverse, planned.offsets), reference.plan(ids, 16), strict=True):
        assert torch.equal(got, wanted)


def _even(rows: int, most: int) -> int:
    """Rows of an expert's tiles: as few as can be, of one size in multiples of 16."""
    tiles = max(-(-rows // most), 1)
    return max(min(-(-rows // tiles // 16) * 16, most), 16)


@pytest.mark.parametrize("experts", [1, 5, 128, 1024])
@pytest.mark.parametrize("mean", [0, 3, 256, 300])
def test_tables_hold_every_row_once(mean: int, experts: int) -> None:
    from moekern.backends.cuda.kernels import tables
    from moekern.backends.cuda.kernels.tables import Tables

    torch.manual_seed(mean + experts)
    rows = (torch.rand(experts) * 2 * mean).int()
    rows[experts // 2] *= 9  # one with more than a band of eight tiles
    offsets = torch.cat((torch.zeros(1, dtype=torch.int32), rows.cumsum(0).int()))
    total = int(offsets[-1])
    memory = torch.full((Tables.size(total, experts),), 255, dtype=torch.uint8, device="cuda")
    Tables(offsets.cuda(), total, memory)
    words = memory.view(torch.int32).cpu()
    entries = Tables.entries(total, experts)
    for i, most in enumerate((256, 272, 288)):
        table = words[4 * entries * i :][: 4 * entries].view(-1, 4).tolist()
        expected = []
        sizes = {e: _even(int(r), most) for e, r in enumerate(rows)}
        for e in range(experts):
            first, size, count = int(offsets[e]), sizes[e], -(-int(rows[e]) // sizes[e])
            for tile in range(count):
                band = min(8, count - tile // 8 * 8)
                height = min(size, int(rows[e]) - tile * size)
                expected.append([e, first + tile * size, height, tile % 8 | band << 16])
        assert table[0] == [len(expected), 0, 0, 0]
        assert table[1 : 1 + len(expected)] == expected
    by_rows = words[12 * entries :][:experts].tolist()
    assert by_rows == sorted(range(experts), key=lambda e: (-int(rows[e]), e))
    assert words[12 * entries + experts :].tolist() == [0] * tables.COUNTERS


def layer(tokens: int, hidden: int, inter: int, experts: int, top_k: int) -> tuple[Tensor, ...]:
    """x, ids, scores, weights of a bfloat16 layer."""
    dtype = torch.bfloat16
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    ids[0, 0] = -1
    return (
        normal(tokens, hidden, dtype=dtype),
        ids,
        torch.rand(tokens, top_k, device="cuda"),
        normal(experts, 2 * inter, hidden, dtype=dtype, scale=hidden**-0.5),
        normal(experts, hidden, inter, dtype=dtype, scale=inter**-0.5),
    )


def run(x: Tensor, ids: Tensor, scores: Tensor, w_gate_up: Tensor, w_down: Tensor, save: bool = True) -> list[Tensor]:
    """Planner and forward verb."""
    from moekern.backends import cuda

    plan = cuda.plan(ids, w_gate_up.shape[0])
    form = Form("swiglu", False, False, ids.shape[1])
    return [*plan, *cuda.experts_forward(x, scores, plan, Weights(w_gate_up, w_down), form, save)]


def test_forward_never_synchronises() -> None:
    inputs = layer(300, 256, 136, 8, 3)
    run(*inputs)
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [16, 1500])  # the planner in one launch, and in two
def test_forward_in_a_cuda_graph(tokens: int) -> None:
    """Replayed with other values and another routing."""
    inputs, other = layer(tokens, 256, 136, 16, 4), layer(tokens, 256, 136, 16, 4)
    wanted = run(*other)
    run(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(*inputs)
    for mine, theirs in zip(inputs, other, strict=True):
        mine.copy_(theirs)
    graph.replay()
    real = int(wanted[2][-1])
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(a[:real], b[:real]) if i == 4 else torch.equal(a, b)


def test_forward_on_two_streams_at_once() -> None:
    problems = [layer(2000, 512, 256, 16, 4) for _ in range(2)]
    wanted = [run(*problem, save=False)[3] for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[Tensor]] = [[], []]
    for _ in range(4):
        for stream, problem, kept in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(run(*problem, save=False)[3])
    torch.cuda.synchronize()
    for kept, right in zip(results, wanted, strict=True):
        assert all(torch.equal(out, right) for out in kept)


def test_first_use_inside_a_capture_is_an_error() -> None:
    from moekern.backends.cuda.kernels import combine
    from moekern.backends.cuda.launch import kernel

    kernel._loaded.cache_clear()
    with pytest.raises(RuntimeError, match="graph is being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernel._loaded(combine.combine_variant(torch.bfloat16, 3), "combine", 0, 0, None)


def test_more_than_2_31_elements() -> None:
    """Pre-activation of 2.4e9 elements: rows beyond 2^31 against the same tokens computed alone."""
    tokens, hidden, inter, experts, top_k = 65536, 64, 2304, 4, 8
    x, _, scores, w_gate_up, w_down = layer(tokens, hidden, inter, experts, 1)
    ids = torch.randint(0, experts, (tokens, top_k), device="cuda")
    scores = torch.rand(tokens, top_k, device="cuda")
    _, inverse, _, out, pre = run(x, ids, scores, w_gate_up, w_down)
    assert pre.numel() > 1 << 31
    # As few that the forms for few rows are chosen, but not the up projection's, which activates unrounded sums.
    some = torch.cat((torch.arange(128), torch.arange(tokens - 128, tokens))).cuda()
    _, few_inverse, _, few_out, few_pre = run(x[some], ids[some], scores[some], w_gate_up, w_down)
    assert torch.equal(out[some], few_out)
    rows = inverse.reshape(tokens, top_k)[some].reshape(-1).long()
    assert torch.equal(pre[rows], few_pre[few_inverse.long()])


@pytest.mark.parametrize("kind", ["nt", "nn"])
@pytest.mark.parametrize("sentinels", [0, 40])
@pytest.mark.usefixtures("poisoned")
def test_grouped_products_end_with_zeros(kind: str, sentinels: int) -> None:
    from moekern.backends import cuda

    _, _, offsets = plan_of_counts(COUNTS, sentinels)
    a = normal(sum(COUNTS) + sentinels, 136, dtype=torch.bfloat16)
    b = normal(len(COUNTS), *((72, 136) if kind == "nt" else (136, 72)), dtype=torch.bfloat16)
    got, wanted = cuda.grouped_mm(a, b, offsets, kind), reference.grouped_mm(a.float(), b.float(), offsets, kind)
    assert error(got, wanted) <= ROUNDING[torch.bfloat16]
    assert (got[int(offsets[-1]) :] == 0).all()


def test_torch_path_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other GPUs, in bfloat16 without a synchronisation."""
    from moekern.backends.cuda import torch_path

    x, ids, scores, w_gate_up, w_down = layer(300, 256, 136, 8, 3)
    plan = torch_path.plan(ids, 8)
    monkeypatch.setattr(reference, "grouped_mm", None)  # the loop over experts
    form = Form("swiglu", False, False, 3)
    out, _ = torch_path.experts_forward(x, scores, plan, Weights(w_gate_up, w_down), form, False)
    assert error(out, run(x, ids, scores, w_gate_up, w_down)[3]) <= 8e-3
