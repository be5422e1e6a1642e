"""The tensor functions of upcycling, combined by hand: mk.experts with their results against the dense MLP."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.backends.activations import ACTIVATIONS
from moekern.layer import upcycling
from moekern.layer.upcycling import (
    dropped_neurons,
    generator_for,
    noised,
    parse_init,
    redrawn,
    rounds,
    router_rows,
    scaled,
    shard,
    shared_part,
    split,
)
from problems import error

H = 12


class Dense:
    """A dense MLP in float64 with all its biases."""

    def __init__(self, width: int, activation: str) -> None:
        self.activation, self.gated = activation, ACTIVATIONS[activation].gated
        self.ups = [torch.randn(width, H, dtype=torch.float64) / H**0.5 for _ in range(1 + self.gated)]
        self.up_biases = [torch.randn(width, dtype=torch.float64) for _ in self.ups]
        self.down = torch.randn(H, width, dtype=torch.float64) / width**0.5
        self.bias = torch.randn(H, dtype=torch.float64)

    def __call__(self, x: Tensor, start: int = 0, end: int | None = None, bias: bool = True) -> Tensor:
        pre = [x @ w[start:end].T + b[start:end] for w, b in zip(self.ups, self.up_biases, strict=True)]
        out = ACTIVATIONS[self.activation].forward(pre[0], pre[1] if self.gated else None) @ self.down[:, start:end].T
        return out + self.bias if bias else out


def routed(dense: Dense, parts: upcycling.Split, x: Tensor, top_k: int, orders: list[Tensor | None]) -> Tensor:
    """The routed experts' output, by the library's own routing and experts."""
    G, E = parts.granularity, parts.num_experts
    ids = range(E)
    gate_up = torch.stack([torch.cat([shard(w, parts, e, 0, orders[e // G]) for w in dense.ups]) for e in ids])
    b_up = torch.stack([torch.cat([shard(b, parts, e, 0, orders[e // G]) for b in dense.up_biases]) for e in ids])
    down = torch.stack([scaled(shard(dense.down, parts, e, 1, orders[e // G]), parts.scale) for e in ids])
    assert gate_up.shape == (E, len(dense.ups) * parts.expert_width, H)
    assert down.shape == (E, H, parts.expert_width)
    rows = router_rows(E, H, G, std=1.0, dtype=torch.float64)
    weights, chosen = mk.route(x @ rows.T, top_k)
    return mk.experts(x, chosen, weights, gate_up, down, b_up, dense.bias.expand(E, H), activation=dense.activation)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    ("width", "granularity", "replicas", "groups"),
    [
        (16, 1, 4, 2),
        (16, 2, 3, 1),
        (37, 2, 2, 2),
        (40, 3, 4, 3),
        (64, 4, 2, 1),
        (5, 4, 3, 2),
        (75, 8, 2, 1),
        (9, 8, 1, 1),
    ],
)
def test_replicas_of_shards_keep_the_function(
    activation: str, permuted: bool, width: int, granularity: int, replicas: int, groups: int
) -> None:
    dense, x = Dense(width, activation), torch.randn(50, H, dtype=torch.float64)
    parts = split(width, granularity * replicas, granularity * groups, granularity)
    assert parts.replicas == replicas
    assert parts.scale == granularity
    orders = [torch.randperm(width) if permuted else None for _ in range(replicas)]
    assert error(routed(dense, parts, x, granularity * groups, orders), dense(x)) < 1e-12


@pytest.mark.parametrize("shared", [1, 8, 30])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_shared_part_leaves_first(shared: int, permuted: bool) -> None:
    dense, x = Dense(37, "swiglu"), torch.randn(40, H, dtype=torch.float64)
    parts = split(37, 6, 2, 2, shared=shared)
    assert (parts.shared_width, parts.shared_scale, parts.scale) == (shared, 1, 2)
    orders = [torch.randperm(37 - shared) if permuted else None for _ in range(3)]
    assert torch.equal(shared_part(dense.down, parts, 1), dense.down[:, :shared])
    assert torch.equal(shared_part(dense.ups[0], parts, 0), dense.ups[0][:shared])
    out = routed(dense, parts, x, 2, orders) + dense(x, 0, shared, bias=False)
    assert error(out, dense(x)) < 1e-12


@pytest.mark.parametrize("granularity", [1, 2, 3, 4])
def test_the_whole_shared_counts_half(granularity: int) -> None:
    dense, x = Dense(24, "geglu"), torch.randn(40, H, dtype=torch.float64)
    parts = split(24, 2 * granularity, granularity, granularity, shared="whole")
    assert (parts.shared_width, parts.shared_scale, parts.scale) == (24, 0.5, granularity / 2)
    assert shared_part(dense.down, parts, 1).data_ptr() == dense.down.data_ptr()
    out = routed(dense, parts, x, granularity, [None, None]) + 0.5 * dense(x, bias=False)
    assert error(out, dense(x)) < 1e-12


def test_weights_that_do_not_sum_to_one_leave_the_shared_expert_alone() -> None:
    parts = split(24, 4, 2, 2, shared="whole", sums_to_one=False)
    assert (parts.shared_scale, parts.scale) == (1, 0)
    down = torch.randn(H, 24)
    assert not scaled(shard(down, parts, 1, 1), parts.scale).any()


def test_the_shape_of_qwen_moe() -> None:
    """5504 neurons as 4 shards of 1408, 128 of them zeros, 60 experts, 4 per token."""
    parts = split(5504, 60, 4, 4, shared="whole", expert_width=1408)
    assert (parts.replicas, parts.expert_width, parts.padding, parts.scale) == (15, 1408, 128, 2)
    assert [parts.neurons(e) for e in range(4)] == [(0, 1408), (1408, 2816), (2816, 4224), (4224, 5504)]
    assert parts.neurons(59) == (4224, 5504)
    rows = torch.arange(5504.0).unsqueeze(1)
    last = shard(rows, parts, 7, 0)
    assert last.shape == (1408, 1)
    assert torch.equal(last[:1280], rows[4224:])
    assert not last[1280:].any()


def test_widths() -> None:
    assert split(37, 4, 4, 4).expert_width == 16  # ceil(37 / 4) = 10, rounded up
    assert split(37, 4, 2, 1).expert_width == 37  # not cut, so not padded
    assert split(37, 4, 4, 4, expert_width=10).expert_width == 10
    parts = split(9, 4, 4, 4)
    assert [parts.neurons(e) for e in range(4)] == [(0, 8), (8, 9), (9, 9), (9, 9)]
    assert [shard(torch.ones(9, 2), parts, e, 0).sum() for e in range(4)] == [16, 2, 0, 0]


def test_what_is_not_multiplied_or_cut_is_not_copied() -> None:
    weight = torch.randn(H, 16, dtype=torch.bfloat16)
    parts = split(16, 4, 2, 2)
    assert scaled(weight, 1) is weight
    assert shard(weight, parts, 1, 1).data_ptr() == weight[:, 8:].data_ptr()


def test_scaling_rounds_once() -> None:
    weight = torch.randn(1000, dtype=torch.bfloat16)
    assert torch.equal(scaled(weight, 3.0), (weight.double() * 3).to(torch.bfloat16))
    assert torch.equal(scaled(weight, 4.0), weight * 4)
    wide = torch.randn(1000, dtype=torch.float64)
    assert torch.equal(scaled(wide, 1.5), wide * 1.5)
    assert [rounds(s, torch.bfloat16) for s in (1, 2, 0.5, 4, 3, 1.5, 6, 0)] == [False] * 4 + [True] * 3 + [False]
    assert not rounds(3, torch.float32)


def test_router_rows_repeat_and_whole_replicas_win() -> None:
    rows = router_rows(12, 400, 3, generator=torch.Generator().manual_seed(5))
    again = router_rows(12, 400, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(rows.double(), again)
    assert rows.std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(rows.view(4, 3, 400), rows.view(4, 3, 400)[:, :1].expand(4, 3, 400))
    assert len(rows.unique(dim=0)) == 4
    logits = torch.randn(200, 400) @ rows.T
    logits[::2] = logits[::2].bfloat16().float().mul(8).round() / 8  # replicas of equal logits too
    for method in ("softmax_topk", "topk_softmax", "sigmoid_topk"):
        _, ids = mk.route(logits, 6, method=method)
        counts = torch.zeros(200, 4).scatter_add_(1, ids.long() // 3, torch.ones(200, 6))
        assert set(counts.unique().tolist()) == {0, 3}
    assert (logits[::2].view(100, 4, 3)[:, :, 0].sort().values.diff() == 0).any()  # there were such


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropped_neurons_are_drawn_like_the_others(dim: int, dtype: torch.dtype) -> None:
    n, ratio = 401, 0.5
    weight = (torch.randn((n, 300) if dim == 0 else (300, n), dtype=torch.float64) * 0.3 + 0.2).to(dtype)
    neurons = dropped_neurons(n, ratio, generator_for(0, "layer", 3))
    assert len(neurons) == len(set(neurons.tolist())) == 200
    new = redrawn(weight, neurons, dim, generator_for(0, "layer", 3, "gate"))
    is_new = torch.zeros(n, dtype=torch.bool)
    is_new[neurons] = True
    moved = new.movedim(dim, 0)
    assert torch.equal(moved[~is_new], weight.movedim(dim, 0)[~is_new])
    assert (moved[is_new] != weight.movedim(dim, 0)[is_new]).float().mean() > 0.9
    assert moved[is_new].double().std() == pytest.approx(0.3, rel=0.02)
    assert moved[is_new].double().mean() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(new, redrawn(weight, neurons, dim, generator_for(0, "layer", 3, "gate")))
    assert torch.equal(redrawn(weight, neurons[:0], dim, generator_for(0)), weight)


def test_noise_has_the_scale_of_the_matrix() -> None:
    weight = torch.randn(300, 200) * 0.1
    new = noised(weight, 0.5, generator_for(1, 2))
    assert (new - weight).std() == pytest.approx(0.05, rel=0.02)
    assert torch.equal(new, noised(weight, 0.5, generator_for(1, 2)))
    assert not torch.equal(new, noised(weight, 0.5, generator_for(1, 3)))
    assert noised(weight.bfloat16(), 0.5, generator_for(1, 2)).dtype == torch.bfloat16


def test_a_matrix_of_one_number_stays_finite() -> None:
    one = torch.full((1, 1), 2.0)
    assert redrawn(one, torch.tensor([0]), 0, generator_for(0)) == 2
    assert noised(one, 1.0, generator_for(0)) == 2


def test_generators_differ_by_key_only() -> None:
    def draw(seed: int, *key: int | str) -> float:
        return torch.rand((), generator=generator_for(seed, *key)).item()

    assert draw(0, 1, "up") == draw(0, 1, "up")
    assert len({draw(s, e, name) for s in range(3) for e in (1, 11) for name in ("up", "down", "1up")}) == 18


def test_inits() -> None:
    assert (parse_init("copy").kind, parse_init("copy").is_exact) == ("copy", True)
    assert (parse_init("noise:0.1").kind, parse_init("noise:0.1").amount) == ("noise", 0.1)
    assert (parse_init("drop:0.5").kind, parse_init("drop:0.5").amount) == ("drop", 0.5)
    assert parse_init("drop:0").is_exact
    assert not parse_init("drop:1").is_exact


@pytest.mark.parametrize(
    "text", ["", "drop", "noise", "drop:", "drop:1.5", "drop:-0.1", "noise:inf", "noise:nan", "copy:1", "zero"]
)
def test_bad_inits_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"init: got '{text}', expected"):
        parse_init(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 6}, "num_experts: got 6, expected a multiple of granularity, 4"),
        ({"top_k": 2}, "top_k: got 2, expected a multiple of granularity, 4: a replica's shards are chosen together"),
        ({"top_k": 9}, "top_k: got 9, expected 1 to 8"),
        ({"granularity": 0}, "granularity: got 0, expected at least 1"),
        ({"shared": 32}, "shared: got 32, expected 1 to 31 .the dense MLP has 32 neurons"),
        ({"shared": 0}, "shared: got 0, expected 1 to 31"),
        ({"shared": "half"}, "shared: got 'half', expected None, a number of neurons or 'whole'"),
        ({"expert_width": 7}, "expert_width: got 7, expected at least 8 .4 shards hold 32 neurons"),
        ({"shared": 8, "expert_width": 5}, "expert_width: got 5, expected at least 6 .4 shards hold 24 neurons"),
        ({"sums_to_one": False}, "shared: got None, expected 'whole' where a token's router weights do not sum to one"),
        ({"shared": 8, "sums_to_one": False}, "shared: got 8, expected 'whole'"),
    ],
)
def test_bad_splits_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(**{"width": 32, "num_experts": 8, "top_k": 4, "granularity": 4, **options})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="shared: got float, expected an int"):
        split(32, 8, 4, 4, shared=0.5)  # type: ignore[arg-type]


def test_bad_router_rows_are_named() -> None:
    with pytest.raises(ValueError, match="num_experts: got 5, expected a multiple of granularity, 2"):
        router_rows(5, H, 2)
    with pytest.raises(ValueError, match="router_std: got -1, expected a finite number of at least 0"):
        router_rows(4, H, 2, std=-1)
    assert not router_rows(4, H, 2, std=0).any()
