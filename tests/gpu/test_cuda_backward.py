"""The Hopper kernels of the backward pass, each alone and as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import moekern as mk
from moekern.backends import reference
from moekern.backends.activations import ACTIVATIONS, join, split
from moekern.backends.call import Form, Weights
from problems import NAMES, error
from ragged import COUNTS, ROUNDING, assert_guards, assert_rows_close, guarded, normal, plan_of_counts

pytestmark = pytest.mark.gpu
BF16, F16 = torch.bfloat16, torch.float16
NAN = float("nan")


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def _rows(like: Tensor, order: Tensor, scores: Tensor | None):
    from moekern.backends.cuda.kernels import gradients

    token, score = torch.full_like(order, -1), torch.full(order.shape, NAN, device="cuda")
    return gradients.Rows(like, order, scores, 1, token, score)


# ------------------------------------------------------------------------------------------------- dH, A' and dS


def _check_dh(
    activation: str, dtype: torch.dtype, hidden: int, inter: int, transposed: bool = False, interleaved: bool = False
) -> None:
    from moekern.backends.cuda.kernels import gradients
    from moekern.backends.cuda.kernels.tables import Tables

    act = ACTIVATIONS[activation]
    experts, rows, sentinels = len(COUNTS), sum(COUNTS), 40
    order, inverse, offsets = plan_of_counts(COUNTS, sentinels)
    slots = rows + sentinels
    columns = inter * (2 if act.gated else 1)
    dout, pre = normal(slots, hidden, dtype=dtype), normal(slots, columns, dtype=dtype, scale=1.5)
    dout[order[rows:].long()] = NAN  # a sentinel must not be read
    pre[rows:] = NAN
    scores = torch.rand(slots, 1, device="cuda") + 0.1
    w = normal(experts, *((inter, hidden) if transposed else (hidden, inter)), dtype=dtype, scale=hidden**-0.5)

    gathered = dout[order[:rows].long()].float()
    da = reference.grouped_mm(gathered, w.float(), offsets, "nt" if transposed else "nn")
    g, u = split(pre[:rows].float(), act, interleaved)
    a = act.forward(g, u)
    score = scores.reshape(-1)[order[:rows].long()].unsqueeze(1)
    wanted_dh = join(*act.backward(da * score, g, u), interleaved)

    results = []
    for tile_rows in (272, 288, 288):
        whole_h, dh = guarded(slots, columns, dtype=dtype)
        whole_a, scaled = guarded(slots, inter, dtype=dtype)
        whole_s, partials = guarded(slots, -(-inter // 256), dtype=torch.float32)
        tables, values = Tables(offsets, slots), _rows(dout, order, scores)
        gradients.dh(
            dout, w, pre, values, tables, activation, transposed, interleaved, dh, scaled, partials, tile_rows
        )  # fmt: skip
        out = torch.full((slots, 1), NAN, device="cuda")
        gradients.score_gradient(partials, inverse, offsets, dout, None, 1, out)
        assert_guards(whole_h, whole_a, whole_s)
        assert all(t[rows:].isnan().all() for t in (dh, scaled, partials))
        results.append((dh[:rows], scaled[:rows], out))
    dh, scaled, ds = results[0]
    # dA crosses shared memory in 16 bits before it is multiplied: two roundings.
    worst = 1.5 if inter >= 64 else 3  # an expert of one row has a sample of 8 roundings
    assert_rows_close(dh, wanted_dh, offsets, 1.45 * ROUNDING[dtype], worst)
    assert_rows_close(scaled, a * score, offsets, ROUNDING[dtype] + 2e-5, worst)
    by_row = ds.reshape(-1)[order.long()]
    assert error(by_row[:rows], (da * a).sum(1)) <= 1.5 * ROUNDING[dtype]
    assert (by_row[rows:] == 0).all()
    for others in zip(*results, strict=True):
        assert all(torch.equal(others[0], other) for other in others)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dh_of_every_activation(activation: str) -> None:
    _check_dh(activation, BF16, 512, 512)
    _check_dh(activation, F16, 456, 264, interleaved=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_no_gradient_at_the_bound(dtype: torch.dtype, interleaved: bool) -> None:
    """gpt-oss's values of 7 itself, which are common in 16 bits, are constants, as in torch.clamp from 2.14 on."""
    gates, ups = [7.0, 1.0, 1.0, 6.96875, 7.03125, 1.0], [1.0, 7.0, -7.0, -6.96875, 1.0, 7.03125]
    x = torch.zeros(6, 8, dtype=dtype, device="cuda")
    x[:, 0], x[:, 1] = (torch.tensor(values, device="cuda") for values in (gates, ups))
    features = torch.arange(16, device="cuda")
    column = features % 2 if interleaved else features // 8  # every gate is x's first value, every up the second
    w_gate_up = torch.nn.functional.one_hot(column, 8).to(dtype).unsqueeze(0)
    w_down = torch.ones(1, 8, 8, dtype=dtype, device="cuda")
    ids = torch.zeros(6, 1, dtype=torch.int64, device="cuda")
    x.requires_grad_()
    mk.experts(
        x, ids, None, w_gate_up, w_down, activation="swiglu_oai", interleaved=interleaved
    ).sum().backward()  # fmt: skip
    assert x.grad is not None
    inside = torch.tensor([[0, 1], [1, 0], [1, 0], [1, 1], [0, 1], [1, 0]], dtype=torch.bool, device="cuda")
    assert torch.equal(x.grad[:, :2] != 0, inside)
    g, u = x.detach()[:, 0].double().clamp(max=7), x.detach()[:, 1].double().clamp(-7, 7)
    s = torch.sigmoid(1.702 * g)
    wanted = torch.stack(((u + 1) * s * (1 + 1.702 * g * (1 - s)), g * s), 1) * 64 * inside
    assert error(x.grad[:, :2], wanted) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("tokens", [7, 3000])
@pytest.mark.parametrize(
    ("activation", "interleaved"),
    [(name, way) for name, a in ACTIVATIONS.items() for way in (False, True)[: 1 + a.gated]],
)
def test_nan_is_not_hidden(activation: str, interleaved: bool, tokens: int) -> None:
    """A NaN in x reaches its token's output and the weights' gradients, and no other token, with any activation."""
    features = 64 * (2 if ACTIVATIONS[activation].gated else 1)
    x, w_gate_up = normal(tokens, 64, dtype=BF16), normal(2, features, 64, dtype=BF16, scale=0.2)
    w_down = normal(2, 64, 64, dtype=BF16, scale=0.2).requires_grad_()
    x[::5, 3] = NAN
    ids = torch.arange(tokens, device="cuda").unsqueeze(1) % 2
    wanted = x.isnan().any(1)
    with torch.no_grad():
        inferred = mk.experts(x, ids, None, w_gate_up, w_down, activation=activation, interleaved=interleaved)
    out = mk.experts(x, ids, None, w_gate_up, w_down, activation=activation, interleaved=interleaved)
    for got in (inferred, out):
        assert torch.equal(got.isnan().all(1), wanted)
        assert torch.equal(got.isnan().any(1), wanted)
    (grad,) = torch.autograd.grad(out, w_down, torch.ones_like(out))
    assert grad.isnan().all()


@pytest.mark.parametrize(("hidden", "inter"), [(448, 1936), (456, 1408), (2880, 136), (72, 8), (8, 72), (64, 2880)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("activation", "dtype", "interleaved"), [("swiglu", BF16, False), ("swiglu_oai", BF16, True), ("gelu", F16, False)]
)
def test_dh_on_odd_sizes(
    activation: str, dtype: torch.dtype, interleaved: bool, transposed: bool, hidden: int, inter: int
) -> None:
    _check_dh(activation, dtype, hidden, inter, transposed, interleaved)


# --------------------------------------------------------------------------------------------------- weight gradients


@pytest.mark.parametrize(("gather", "p_innermost"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("p_size", "q_size"), [(512, 512), (448, 1936), (456, 1408), (8, 8), (2880, 136), (136, 2880)])
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("launch_registers", [168, 160])
@pytest.mark.parametrize("stages", [3, 4])
def test_wgrad_on_ragged_rows(
    stages: int, launch_registers: int, dtype: torch.dtype, p_size: int, q_size: int, gather: bool, p_innermost: bool
) -> None:
    from moekern.backends.cuda.kernels import gradients
    from moekern.backends.cuda.kernels.tables import Tables

    experts, rows, sentinels = len(COUNTS), sum(COUNTS), 40
    order, _, offsets = plan_of_counts(COUNTS, sentinels)
    slots = rows + sentinels
    p, q = normal(slots, p_size, dtype=dtype), normal(slots, q_size, dtype=dtype)
    p[order[rows:].long() if gather else slice(rows, None)] = NAN
    q[rows:] = NAN

    def run() -> tuple[Tensor, Tensor]:
        shape = (experts, q_size, p_size) if p_innermost else (experts, p_size, q_size)
        whole, out = guarded(*shape, dtype=dtype)
        tables = Tables(offsets, slots)
        token = _rows(p, order, None).token if gather else None
        gradients.wgrad(p, q, token, offsets, tables, out, p_innermost, launch_registers, stages)
        return whole, out

    whole, out = run()
    assert_guards(whole)
    p_rows = p[order.long()] if gather else p
    wanted = reference.grouped_mm(p_rows[:rows].float(), q[:rows].float(), offsets, "tn")
    if p_innermost:
        wanted = wanted.mT
    for e, count in enumerate(COUNTS):
        if count == 0:
            assert (out[e] == 0).all()
        else:
            assert error(out[e], wanted[e]) <= 1.5 * ROUNDING[dtype]
    assert error(out, wanted) <= ROUNDING[dtype] * (1 if p_size * q_size > 1000 else 1.1)
    assert torch.equal(run()[1], out)

    # Values of an expert's rows, NaN and infinity too, must not reach other experts.
    poisoned = 12
    i, j = offsets[poisoned], offsets[poisoned + 1]
    q[i:j] = NAN
    p[order[i:j].long() if gather else slice(i, j)] = float("inf")
    _, leaked = run()
    others = [e for e in range(experts) if e != poisoned]
    assert torch.equal(leaked[others], out[others])
    assert leaked[poisoned].isnan().all()


# ------------------------------------------------------------------------------------------------------- small kernels


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("hidden", [8, 456, 2880])
def test_score_gradient_with_bias(hidden: int, top_k: int) -> None:
    from moekern.backends.cuda.kernels import gradients

    tokens, experts, columns = 201, 9, 3
    ids = torch.randint(-1, experts, (tokens, top_k), device="cuda")
    ids[ids == 4] = 5  # an expert without rows
    _, inverse, offsets = reference.plan(ids, experts)
    dout, bias = normal(tokens, hidden, dtype=BF16), normal(experts, hidden, dtype=BF16)
    partials = torch.randn(tokens * top_k, columns, device="cuda")
    partials[offsets[-1] :] = NAN
    sums = torch.where(ids >= 0, partials[inverse.long()].sum(1).reshape(tokens, top_k), 0)
    for b in (None, bias):
        whole, out = guarded(tokens, top_k, dtype=torch.float32)
        gradients.score_gradient(partials, inverse, offsets, dout, b, top_k, out)
        assert_guards(whole)
        products = torch.einsum("th,tkh->tk", dout.float(), bias[ids.clamp(min=0)].float())
        assert error(out, sums if b is None else sums + torch.where(ids >= 0, products, 0)) <= 1e-5


@pytest.mark.parametrize("features", [8, 456, 2880])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_bias_gradient(dtype: torch.dtype, gather: bool, features: int) -> None:
    from moekern.backends.cuda.kernels import gradients

    rows = sum(COUNTS)
    order, _, offsets = plan_of_counts(COUNTS, 3)
    source, scores = normal(rows + 3, features, dtype=dtype), torch.rand(rows + 3, 1, device="cuda")
    values = _rows(source, order, scores)
    whole, out = guarded(len(COUNTS), features, dtype=dtype)
    by_row = source.float()
    if gather:
        gradients.bias_gradient(source, values.token, values.score, offsets, out)
        by_row = (source.float() * scores)[order.long()]
    else:
        gradients.bias_gradient(source, None, None, offsets, out)
    assert_guards(whole)
    ones = torch.ones(rows + 3, 1, device="cuda")
    wanted = reference.grouped_mm(ones[:rows], by_row[:rows], offsets, "tn").squeeze(1)
    # With few numbers the mean does not apply: each is off by half a unit in the last place at most.
    assert error(out, wanted) <= (torch.finfo(dtype).eps / 2 if features == 8 else ROUNDING[dtype])


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
@pytest.mark.parametrize("hidden", [8, 456, 2048])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_combine_beside(dtype: torch.dtype, hidden: int, top_k: int) -> None:
    from moekern.backends.cuda.kernels import combine

    tokens, experts = 1301, 9
    ids = torch.randint(-1, experts, (tokens, top_k), device="cuda")
    _, inverse, offsets = reference.plan(ids, experts)
    rows = normal(tokens * top_k, hidden, dtype=dtype)
    rows[offsets[-1] :] = NAN
    whole, out = guarded(tokens, hidden, dtype=dtype)
    combine.combine_beside(rows, inverse, offsets, out, top_k)
    assert_guards(whole)
    serial = torch.empty_like(out)
    combine.combine(rows, None, inverse, offsets, serial, top_k)
    assert torch.equal(out, serial)


# ------------------------------------------------------------------------------------------------------ the whole verb


def _problem(
    tokens: int,
    hidden: int,
    inter: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype,
    activation: str = "swiglu",
    bias: bool = False,
    transposed: bool = False,
    interleaved: bool = False,
    ids: Tensor | None = None,
    scored: bool = True,
) -> tuple[Any, ...]:
    """Arguments of experts_backward less ``needs``."""
    columns = inter * (2 if ACTIVATIONS[activation].gated else 1)
    if ids is None:
        ids = torch.rand(tokens, experts, device="cuda").argsort(1)[:, :top_k]
    plan = reference.plan(ids, experts)
    up = (experts, hidden, columns) if transposed else (experts, columns, hidden)
    down = (experts, inter, hidden) if transposed else (experts, hidden, inter)
    x = normal(tokens, hidden, dtype=dtype)
    scores = torch.rand(tokens, top_k, device="cuda") + 0.1 if scored else None
    weights = normal(*up, dtype=dtype, scale=1.5 * hidden**-0.5), normal(*down, dtype=dtype, scale=2 * inter**-0.5)
    biases = (normal(experts, columns, dtype=dtype), normal(experts, hidden, dtype=dtype)) if bias else (None, None)
    call = plan, Weights(*weights, *biases), Form(activation, transposed, interleaved, top_k)
    _, pre = reference.experts_forward(x, scores, *call, True)
    pre[plan.offsets[-1] :] = NAN
    return normal(tokens, hidden, dtype=dtype), x, pre, scores, *call


def _kernels(arguments: tuple[Any, ...], needs: list[bool], rows: int = 2048) -> tuple[Tensor, ...]:
    """With the kernels for this number of rows per expert, at any real number."""
    from moekern.backends.cuda.configuration import choose
    from moekern.backends.cuda.passes import backward

    configuration = choose(BF16, (9, 0), rows, 1, 8, 8)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then hands out NaN
    try:
        return backward.experts_backward(*arguments, needs, configuration)
    finally:
        torch.use_deterministic_algorithms(False)


def _double(arguments: tuple[Any, ...]) -> Any:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, arguments)


def _check_backward(arguments: tuple[Any, ...]) -> None:
    needs = [True] * 6
    truth = reference.experts_backward(*_double(arguments), needs)
    plain = reference.experts_backward(*arguments, needs)
    _, x, _, scores, _, weights, _ = arguments
    present = (x, scores, *weights)
    for rows in (2048, 512, 256):  # each choice of configuration.py
        ours = _kernels(arguments, needs, rows)
        for name, like, got, exact, torchs in zip(NAMES, present, ours, truth, plain, strict=True):
            if like is None:
                assert got.numel() == 0
                continue
            allowed = max(2 * error(torchs, exact), torch.finfo(x.dtype).eps / 2)
            assert got.shape == like.shape
            assert got.dtype == like.dtype
            assert error(got, exact) <= allowed, f"{name}, {rows}: {error(got, exact):.3g}, allowed {allowed:.3g}"
        for first, second in zip(ours, _kernels(arguments, needs, rows), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("tokens", "hidden", "inter", "experts", "top_k"),
    [(1, 64, 64, 4, 2), (7, 8, 8, 3, 3), (300, 456, 1408, 60, 4), (1000, 1024, 456, 16, 8), (257, 2880, 2880, 8, 1)],
)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_backward_is_as_exact_as_torch(
    dtype: torch.dtype, tokens: int, hidden: int, inter: int, experts: int, top_k: int
) -> None:
    _check_backward(_problem(tokens, hidden, inter, experts, top_k, dtype))


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "relu2"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_of_every_layout_with_biases(interleaved: bool, transposed: bool, activation: str) -> None:
    _check_backward(_problem(333, 512, 264, 12, 4, BF16, activation, True, transposed, interleaved))


@pytest.mark.parametrize("routing", ["sentinels", "only sentinels", "one expert", "1024 experts", "no scores"])
def test_backward_of_unusual_routing(routing: str) -> None:
    experts = 1024 if routing == "1024 experts" else 8
    ids = torch.randint(0, experts, (500, 3), device="cuda")
    if routing == "sentinels":
        ids[ids == 2] = -1
        ids[ids == 5] = experts
    elif routing == "only sentinels":
        ids.fill_(-1)
    elif routing == "one expert":
        ids.fill_(6)
    arguments = _problem(500, 256, 136, experts, 3, BF16, bias=True, ids=ids, scored=routing != "no scores")
    if routing == "no scores":
        needs = [True, False, True, True, True, True]
        ours = _kernels(arguments, needs)
        truth = reference.experts_backward(*_double(arguments), needs)
        for got, exact in zip(ours, truth, strict=True):
            assert got.shape == exact.shape
            assert got.numel() == 0 or error(got, exact) <= 2e-2
    else:
        _check_backward(arguments)


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_backward_with_the_combine_beside_the_weight_gradient(top_k: int) -> None:
    from moekern.backends.cuda.passes import backward

    arguments = _problem(16384 // top_k, 1024, 512, 16, top_k, BF16)
    assert backward.combines_beside(16384, 1024, 512, top_k)
    _check_backward(arguments)


@pytest.mark.parametrize("wanted", range(6))
def test_frozen_inputs_get_nothing_and_change_nothing(wanted: int) -> None:
    arguments = _problem(200, 256, 136, 8, 3, BF16, bias=True)
    everything = _kernels(arguments, [True] * 6)
    only = _kernels(arguments, [i == wanted for i in range(6)])
    for i, (one, of_all) in enumerate(zip(only, everything, strict=True)):
        if i != wanted:
            assert one.numel() == 0
        elif i == 3:  # torch computes the scaled activation if nothing else needs it
            assert error(one, of_all) <= 3e-3
        else:
            assert torch.equal(one, of_all)


def test_backward_never_synchronises() -> None:
    arguments = _problem(200, 256, 136, 8, 3, BF16, bias=True)
    _kernels(arguments, [True] * 6)
    try:
        torch.cuda.set_sync_debug_mode("error")
        _kernels(arguments, [True] * 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [64, 4096])  # with the combine on the same and on the second stream
def test_backward_in_a_cuda_graph(tokens: int) -> None:
    """Replayed with other values and another routing."""
    from moekern.backends.cuda.configuration import Configuration
    from moekern.backends.cuda.passes import backward

    arguments = _problem(tokens, 1024, 512, 16, 4, BF16, bias=True)
    other = _problem(tokens, 1024, 512, 16, 4, BF16, bias=True)
    needs, configuration = [True] * 6, Configuration("hopper")
    wanted = [g.clone() for g in backward.experts_backward(*other, needs, configuration)]
    backward.experts_backward(*arguments, needs, configuration)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backward.experts_backward(*arguments, needs, configuration)
    for mine, theirs in zip(tree_leaves(arguments), tree_leaves(other), strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(theirs)
    graph.replay()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_backward_on_a_stream_while_another_is_captured() -> None:
    """A graph's second stream must not be that of work outside it, which CUDA would refuse or take into the graph."""
    from moekern.backends.cuda.configuration import Configuration
    from moekern.backends.cuda.passes import backward

    needs, configuration = [True] * 6, Configuration("hopper")
    inside, outside = (_problem(4096, 1024, 512, 16, 4, BF16) for _ in range(2))
    wanted = [backward.experts_backward(*t, needs, configuration) for t in (inside, outside)]
    torch.cuda.synchronize()
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        captured = backward.experts_backward(*inside, needs, configuration)
        with torch.cuda.stream(aside):
            eager = backward.experts_backward(*outside, needs, configuration)
    graph.replay()
    torch.cuda.synchronize()
    for got, right in zip((captured, eager), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


def test_backward_on_two_streams_at_once() -> None:
    from moekern.backends.cuda.configuration import Configuration
    from moekern.backends.cuda.passes import backward

    needs, configuration = [True] * 6, Configuration("hopper")
    problems = [_problem(4096, 1024, 512, 16, 4, BF16) for _ in range(2)]
    wanted = [backward.experts_backward(*p, needs, configuration) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = [[], []]
    for _ in range(3):
        for stream, p, kept in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(backward.experts_backward(*p, needs, configuration))
    torch.cuda.synchronize()
    for kept, right in zip(results, wanted, strict=True):
        for grads in kept:
            assert all(torch.equal(a, b) for a, b in zip(grads, right, strict=True))


def test_backward_memory() -> None:
    """Besides the gradients at most a row gradient, dH, and small tables."""
    tokens, hidden, inter, experts, top_k = 4096, 1024, 512, 16, 8
    arguments = _problem(tokens, hidden, inter, experts, top_k, BF16)
    _kernels(arguments, [True] * 6)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = _kernels(arguments, [True] * 6)
    peak = torch.cuda.max_memory_allocated() - before
    own = sum(g.numel() * g.element_size() for g in grads)
    slots = tokens * top_k
    assert peak <= own + 2 * slots * hidden + 4 * slots * inter + 64 * slots + (1 << 20)
