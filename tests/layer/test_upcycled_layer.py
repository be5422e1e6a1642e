"""mk.MoE.from_dense with shards, shared experts and other initialisations, against the dense module."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

import moekern as mk
from moekern.backends.activations import ACTIVATIONS
from problems import error

H, I = 24, 40


class Dense(nn.Module):
    """A gated or plain MLP, with biases on request."""

    def __init__(
        self, width: int = I, activation: str = "swiglu", up_bias: bool = False, down_bias: bool = False
    ) -> None:
        super().__init__()
        self.function = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(H, width, bias=up_bias) if self.function.gated else None
        self.up_proj = nn.Linear(H, width, bias=up_bias)
        self.down_proj = nn.Linear(width, H, bias=down_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        a = self.function.forward(self.gate_proj(x), up) if self.gate_proj else self.function.forward(up, None)
        return self.down_proj(a)


def rows(device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 23, H, device=device, dtype=dtype)


def with_router_of_order_one(moe: mk.MoE) -> mk.MoE:
    """Router weights so large that replicas' weights differ; the function must not depend on them."""
    with torch.no_grad():
        moe.gate.weight.mul_(20)
    return moe


@pytest.mark.parametrize(
    ("activation", "up_bias", "down_bias"),
    [("swiglu", False, False), ("gelu", True, True), ("geglu", True, False), ("relu2", False, True)],
)
@pytest.mark.parametrize("width", [40, 37, 5])
@pytest.mark.parametrize(("granularity", "replicas", "groups"), [(1, 4, 2), (2, 3, 1), (3, 2, 2), (4, 2, 1), (8, 2, 1)])
def test_shards_compute_the_dense_function(
    device: str,
    activation: str,
    up_bias: bool,
    down_bias: bool,
    width: int,
    granularity: int,
    replicas: int,
    groups: int,
) -> None:
    dense = Dense(width, activation, up_bias, down_bias).to(device, torch.float64)
    moe = with_router_of_order_one(
        mk.MoE.from_dense(
            dense, granularity * replicas, granularity * groups, granularity=granularity, activation=activation
        )
    )
    x = rows(device)
    assert error(moe(x), dense(x)) < 1e-12
    assert error(moe.eval()(x), dense(x)) < 1e-12
    if granularity > 1:
        assert moe.intermediate_size % 8 == 0
        assert granularity * moe.intermediate_size >= width
    else:
        assert moe.intermediate_size == width


@pytest.mark.parametrize("routing", ["softmax_topk", "topk_softmax", "sigmoid_topk", "deepseek_v3", "mixtral"])
def test_a_replica_is_chosen_whole(routing: str) -> None:
    dense = Dense().double()
    moe = with_router_of_order_one(mk.MoE.from_dense(dense, 12, 6, granularity=3, activation="swiglu", routing=routing))
    x = rows()
    x[0, :3] = 0  # all logits are equal
    out = moe.train()(x)
    assert error(out, dense(x)) < 1e-12
    counts = torch.zeros(115, 4).scatter_add_(1, moe.latest_routing.topk_ids.long() // 3, torch.ones(115, 6))
    assert set(counts.unique().tolist()) == {0, 3}
    assert torch.equal(moe.gate.weight, moe.gate.weight[::3].repeat_interleave(3, 0))


@pytest.mark.parametrize("shared", [1, 8, 39, "whole"])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("granularity", [1, 2, 3])
@pytest.mark.parametrize(("activation", "down_bias"), [("swiglu", True), ("gelu", False)])
def test_shared_experts_keep_the_function(
    device: str, shared: int | str, gate: bool, granularity: int, activation: str, down_bias: bool
) -> None:
    dense = Dense(I, activation, down_bias=down_bias).to(device, torch.float64)
    moe = mk.MoE.from_dense(
        dense, 3 * granularity, granularity, granularity=granularity, shared=shared, shared_gate=gate,
        activation=activation,
    )  # fmt: skip
    x = rows(device)
    assert error(with_router_of_order_one(moe)(x), dense(x)) < 1e-12
    width = I if shared == "whole" else shared
    assert moe.shared_expert.up_proj.weight.shape == (width, H)
    assert torch.equal(moe.shared_expert.up_proj.weight, dense.up_proj.weight[:width])
    if gate:
        assert not moe.shared_expert_gate.weight.any()
    routed = with_router_of_order_one(moe).experts.down_proj
    with torch.no_grad():
        routed.zero_()
    assert error(moe(x), dense(x)) > 1e-3  # the routed experts count


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("shared", "width"), [("whole", 8), ("whole", 40), (16, 8)])
def test_fused_shared_experts_keep_the_function(shared: int | str, width: int, gate: bool) -> None:
    dense = Dense().double()
    granularity = -(-(I if shared == "whole" else I - 16) // width)
    options = {"granularity": granularity, "shared": shared, "shared_gate": gate, "expert_width": width}
    moe = mk.MoE.from_dense(
        dense, 2 * granularity, granularity, activation="swiglu", fuse_shared_expert=True, **options
    )
    x = rows()
    assert moe.shared_expert is None
    assert moe.num_fused_experts == (5 if shared == "whole" else 2) * 8 // width
    assert error(moe(x), dense(x)) < 1e-12
    separate = mk.MoE.from_dense(dense, 2 * granularity, granularity, activation="swiglu", **options)
    separate.load_state_dict(moe.state_dict())
    assert error(separate(x), dense(x)) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"norm_topk_prob": False},
        {"norm_topk_prob": False, "shared_gate": True},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"routing": "llama4", "scale_input": True},
        {"routing": "expert_choice"},
        {"capacity_factor": 0.5},
        {"round_tokens_to": 4, "rounding": "down"},
        {"norm_topk_prob": False, "fuse_shared_expert": True},
    ],
    ids=lambda o: "-".join(o),
)
def test_where_weights_do_not_sum_to_one_the_shared_expert_is_all(options: dict[str, object]) -> None:
    dense = Dense().double()
    moe = mk.MoE.from_dense(dense, 4, 2, shared="whole", activation="swiglu", **options)
    x = rows()
    assert not moe.experts.down_proj[:4].any()
    assert moe.experts.gate_up_proj.any()
    assert error(with_router_of_order_one(moe)(x), dense(x)) < 1e-12
    with pytest.raises(ValueError, match=r"the copies must average to the dense output .shared='whole' starts from it"):
        mk.MoE.from_dense(dense, 4, 2, activation="swiglu", **{**options, "shared_gate": False})


@pytest.mark.parametrize(("granularity", "factor"), [(4, 4.0), (3, 3.0), (2, 2.5)])
@pytest.mark.parametrize("down_bias", [False, True])
def test_the_routers_factor_may_carry_the_scale(granularity: int, factor: float, down_bias: bool) -> None:
    dense = Dense(48, down_bias=down_bias).double()
    moe = mk.MoE.from_dense(
        dense, 2 * granularity, granularity, granularity=granularity, activation="swiglu", routed_scaling_factor=factor
    )
    x = rows()
    assert error(moe(x), dense(x)) < 1e-12
    if factor == granularity:
        n = moe.intermediate_size
        assert torch.equal(moe.experts.down_proj[1], dense.down_proj.weight[:, n : 2 * n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_where_it_rounds(dtype: torch.dtype) -> None:
    dense = Dense(48).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe = mk.MoE.from_dense(dense, 8, 4, granularity=4, activation="swiglu")
        exact = mk.MoE.from_dense(dense, 6, 3, granularity=3, activation="swiglu", routed_scaling_factor=3.0)
        mk.MoE.from_dense(dense, 8, 4, granularity=4, shared="whole", activation="swiglu")
    assert moe.experts.gate_up_proj.dtype == dtype
    assert torch.equal(moe.experts.down_proj[5], 4 * dense.down_proj.weight[:, 16:32])
    assert torch.equal(exact.experts.down_proj[4], dense.down_proj.weight[:, 16:32])
    with pytest.warns(UserWarning, match="multiplying down_proj by 3 rounds it, by up to .*; routed_scaling_factor=3 "):
        rounded = mk.MoE.from_dense(dense, 6, 3, granularity=3, activation="swiglu")
    assert torch.equal(rounded.experts.down_proj[1], (3 * dense.down_proj.weight[:, 16:32].double()).to(dtype))
    x = rows(dtype=dtype)
    for layer in (moe, exact, rounded):
        assert error(layer(x), dense.double()(x.double())) < 8 * torch.finfo(dtype).eps
        dense.to(dtype)


def test_another_dtype_and_device_round_once() -> None:
    dense = Dense(48)
    moe = mk.MoE.from_dense(dense, 6, 3, granularity=2 + 1, activation="swiglu", dtype=torch.float64)
    assert torch.equal(moe.experts.down_proj[1], 3 * dense.down_proj.weight.double()[:, 16:32])
    assert mk.MoE.from_dense(dense, 6, 3, granularity=3, activation="swiglu", device="meta").gate.weight.is_meta


def test_dropped_neurons() -> None:
    dense = Dense(48).double()
    with pytest.warns(UserWarning, match=r"init='drop:0.5' does not keep .* change by [\d.]+ relative on random rows"):
        moe = mk.MoE.from_dense(dense, 6, 2, granularity=2, init="drop:0.5", activation="swiglu")
    n = moe.intermediate_size
    chosen = []
    for e in range(6):
        s = slice(e % 2 * n, (e % 2 + 1) * n)
        gate, up = moe.experts.gate_up_proj[e].chunk(2)
        kept = [
            (gate == dense.gate_proj.weight[s]).all(1),
            (up == dense.up_proj.weight[s]).all(1),
            (moe.experts.down_proj[e] == 2 * dense.down_proj.weight[:, s]).all(0),
        ]
        assert all(torch.equal(k, kept[0]) for k in kept)  # the same neurons in all three
        assert (~kept[0]).sum() == n // 2
        chosen.append(tuple(kept[0].tolist()))
    assert len(set(chosen)) == 6
    new = torch.stack([moe.experts.down_proj[e] for e in range(6)])
    assert new.std().item() == pytest.approx(2 * dense.down_proj.weight.std().item(), rel=0.05)
    assert 0.1 < error(moe(rows()), dense(rows())) < 3


def test_noise_and_its_seed() -> None:
    dense = Dense(48).double()

    def upcycle(seed: int, init: str) -> mk.MoE:
        torch.manual_seed(seed)
        with pytest.warns(UserWarning, match="does not keep"):
            return mk.MoE.from_dense(dense, 4, 2, init=init, activation="swiglu")

    small, again, other = upcycle(1, "noise:0.01"), upcycle(1, "noise:0.01"), upcycle(2, "noise:0.01")
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, again.state_dict()[name]), name
        assert not torch.equal(parameter, other.state_dict()[name]), name
    x = rows()
    changes = [error(upcycle(1, f"noise:{s}")(x), dense(x)) for s in (0.01, 0.1, 1)]
    assert changes[0] < 0.05 < changes[1] < changes[2]
    distance = small.experts.down_proj - dense.down_proj.weight
    assert distance.std().item() == pytest.approx(0.01 * dense.down_proj.weight.std().item(), rel=0.05)
    for a, b in itertools.combinations(range(4), 2):
        assert not torch.equal(small.experts.gate_up_proj[a], small.experts.gate_up_proj[b])


def test_the_measured_change_is_what_it_is() -> None:
    dense = Dense(48, "gelu", up_bias=True, down_bias=True)
    with pytest.warns(UserWarning, match="does not keep") as told:
        moe = mk.MoE.from_dense(dense, 4, 2, init="drop:0.25", activation="gelu")
    said = float(str(told[0].message).split("change by ")[1].split()[0])
    x = torch.randn(4000, H) * 3**0.5  # nn.Linear's weights have the variance 1 / 3H
    assert said == pytest.approx(error(moe(x), dense(x)), rel=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = mk.MoE.from_dense(dense, 4, 2, init="drop:0", activation="gelu")
    assert error(exact(x), dense(x)) < 1e-6


def test_the_router_starts_as_asked() -> None:
    dense = Dense()
    moe = mk.MoE.from_dense(dense, 400, 2, activation="swiglu", router_bias=True)
    assert moe.gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not moe.gate.bias.any()
    assert mk.MoE.from_dense(dense, 400, 2, activation="swiglu", router_std=0.1).gate.weight.std() > 0.09


def test_qwens_shape_in_one_line() -> None:
    """Qwen1.5-MoE's proportions, an eighth as wide: 688 neurons as 4 shards of 176."""
    dense = Dense(688).double()
    moe = mk.MoE.from_dense(
        dense, 60, 4, granularity=4, expert_width=176, shared="whole", shared_gate=True, activation="swiglu"
    )
    assert moe.experts.gate_up_proj.shape == (60, 352, H)
    assert not moe.experts.down_proj[3, :, 160:].any()
    x = rows()
    assert error(moe(x), dense(x)) < 1e-12


BAD = [
    ({"granularity": 3}, ValueError, "num_experts: got 8, expected a multiple of granularity, 3"),
    ({"granularity": 4}, ValueError, "top_k: got 2, expected a multiple of granularity, 4"),
    ({"granularity": 2.0}, TypeError, "granularity: got float, expected an int"),
    ({"shared": 40}, ValueError, "shared: got 40, expected 1 to 39"),
    ({"shared": "all"}, ValueError, "shared: got 'all', expected None, a number of neurons or 'whole'"),
    ({"init": "zero"}, ValueError, "init: got 'zero', expected 'copy', 'noise:S'"),
    ({"init": 0.5}, TypeError, "init: got float"),
    ({"expert_width": 39}, ValueError, "expert_width: got 39, expected at least 40"),
    ({"router_std": -1.0}, ValueError, "router_std: got -1.0"),
    ({"router_std": "wide"}, TypeError, "router_std: got str"),
    ({"shared_intermediate_size": 8}, ValueError, "shared_intermediate_size: got 8, expected shared="),
    ({"shared_gate": True}, ValueError, "shared_gate: got True, expected False without"),
    ({"routed_scaling_factor": 0.0}, ValueError, "routed_scaling_factor: got 0.0, expected a finite number above 0"),
    ({"granularity": 2, "n_group": 8, "topk_group": 4}, ValueError, "n_group: got 8, whose groups of 1 experts cut"),
    ({"norm_topk_prob": False, "shared": 8}, ValueError, "norm_topk_prob: got False, expected True: the copies must"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=[m[:30] for _, _, m in BAD])
def test_bad_input_is_named(options: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        mk.MoE.from_dense(Dense(), 8, 2, activation="swiglu", **options)


def test_biases_that_nothing_can_hold_are_named() -> None:
    with pytest.raises(ValueError, match="shared: got a dense MLP with biases on its first projections"):
        mk.MoE.from_dense(Dense(up_bias=True), 4, 2, activation="swiglu", shared=8)
    with pytest.raises(ValueError, match="shared: got a dense MLP with a bias on its output"):
        mk.MoE.from_dense(Dense(down_bias=True), 4, 2, activation="swiglu", shared="whole", norm_topk_prob=False)


def test_groups_of_the_router_hold_whole_replicas() -> None:
    dense = Dense().double()
    moe = mk.MoE.from_dense(
        dense, 16, 4, granularity=2, activation="swiglu", routing="sigmoid_topk", n_group=4, topk_group=2
    )
    x = rows()
    assert error(with_router_of_order_one(moe)(x), dense(x)) < 1e-12
