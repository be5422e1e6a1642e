"""Bad input raises a named error before any work: the argument, the value got, the values accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moekern as mk

T, H, I, E, K = 5, 16, 8, 4, 2


def arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(T, H),
        "topk_ids": torch.randint(0, E, (T, K)),
        "topk_weights": torch.rand(T, K),
        "w_gate_up": torch.randn(E, 2 * I, H),
        "w_down": torch.randn(E, H, I),
        "b_gate_up": torch.randn(E, 2 * I),
        "b_down": torch.randn(E, H),
    }


BAD_EXPERTS: list[tuple[str, Any, type[Exception], str]] = [
    # argument, value, error, and what the message must say besides the argument's name
    ("x", None, TypeError, "got NoneType"),
    ("x", [[1.0] * H] * T, TypeError, "got list"),
    ("x", np.zeros((T, H), np.float32), TypeError, "got ndarray"),
    ("x", torch.randn(2, T, H), ValueError, r"\[tokens, hidden\]"),
    ("x", torch.randn(H), ValueError, r"\[tokens, hidden\]"),
    ("x", torch.ones(T, H, dtype=torch.int64), TypeError, "int64"),
    ("x", torch.ones(T, H, dtype=torch.complex64), TypeError, "complex64"),
    ("x", torch.ones(T, H, dtype=torch.bool), TypeError, "bool"),
    ("x", torch.randn(T, H).to_sparse(), TypeError, "sparse"),
    ("x", torch.randn(T, H, dtype=torch.bfloat16), TypeError, "w_gate_up: got dtype torch.float32"),
    ("x", torch.randn(T, H + 1), ValueError, "w_gate_up"),
    ("x", torch.randn(T + 1, H), ValueError, "topk_ids"),
    ("x", torch.randn(T, 0), ValueError, "w_gate_up"),
    ("topk_ids", None, TypeError, "got NoneType"),
    ("topk_ids", [[0, 1]] * T, TypeError, "got list"),
    ("topk_ids", torch.rand(T, K), TypeError, "float32"),
    ("topk_ids", torch.ones(T, K, dtype=torch.bool), TypeError, "bool"),
    ("topk_ids", torch.zeros(T * K, dtype=torch.int64), ValueError, "top_k"),
    ("topk_ids", torch.zeros(T + 1, K, dtype=torch.int64), ValueError, "one row of ids a token"),
    ("topk_ids", torch.zeros(T, 0, dtype=torch.int64), ValueError, "at least one expert"),
    ("topk_ids", torch.zeros(T, K, dtype=torch.int64, device="meta"), ValueError, "device"),
    ("topk_weights", [1.0], TypeError, "got list"),
    ("topk_weights", torch.ones(T, K, dtype=torch.int64), TypeError, "int64"),
    ("topk_weights", torch.rand(T, K + 1), ValueError, "tokens, top_k"),
    ("topk_weights", torch.rand(T, K, device="meta"), ValueError, "device"),
    ("w_gate_up", None, TypeError, "got NoneType"),
    ("w_gate_up", torch.randn(2 * I, H), ValueError, "experts"),
    ("w_gate_up", torch.randn(E, 2 * I, H + 1), ValueError, "hidden as in x"),
    ("w_gate_up", torch.randn(E, 2 * I + 1, H), ValueError, "even"),
    ("w_gate_up", torch.randn(0, 2 * I, H), ValueError, "w_down"),
    ("w_gate_up", torch.randn(E, 2 * I, H, dtype=torch.float64), TypeError, "dtype"),
    ("w_gate_up", torch.randn(E, 2 * I, H, device="meta"), ValueError, "device"),
    ("w_down", torch.randn(E, I, H), ValueError, "match"),
    ("w_down", torch.randn(E + 1, H, I), ValueError, "match"),
    ("w_down", torch.randn(E, H, I).half(), TypeError, "dtype"),
    ("b_gate_up", torch.randn(E, I), ValueError, "match"),
    ("b_gate_up", torch.randn(E, 2 * I).double(), TypeError, "dtype"),
    ("b_down", torch.randn(H), ValueError, "match"),
    ("b_down", (1.0,), TypeError, "got tuple"),
    ("activation", "swish", ValueError, "swiglu"),
    ("activation", None, TypeError, "got NoneType"),
    ("transposed", 1, TypeError, "got int"),
    ("interleaved", "yes", TypeError, "got str"),
    ("plan", "no plan", TypeError, "got str"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_EXPERTS)
def test_experts(name: str, value: Any, error: type[Exception], message: str) -> None:
    given = {**arguments(), name: value}
    positional = [given.pop(n) for n in ("x", "topk_ids", "topk_weights", "w_gate_up", "w_down")]
    with pytest.raises(error, match=message) as caught:
        mk.experts(*positional, **given)
    text = str(caught.value)
    assert name in text or "expected" in text
    assert "\n" not in text


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def call_grouped_mlp(**changed: Any) -> torch.Tensor:
    given = {
        "x_sorted": torch.randn(6, H),
        "offsets": offsets(0, 2, 2, 5, 6),
        "w_gate_up": torch.randn(E, 2 * I, H),
        "w_down": torch.randn(E, H, I),
        **changed,
    }
    return mk.grouped_mlp(**given)


def call_grouped_mm(**changed: Any) -> torch.Tensor:
    given = {"a": torch.randn(6, H), "b": torch.randn(E, H, I), "offsets": offsets(0, 2, 2, 5, 6), **changed}
    return mk.grouped_mm(**given)


def call_round_tokens(**changed: Any) -> mk.Rounded:
    given = {
        "scores": torch.rand(T, E),
        "topk_ids": torch.zeros(T, K).long(),
        "topk_weights": torch.rand(T, K),
        "multiple": 2,
        **changed,
    }
    return mk.round_tokens(**given)


def fused_layer(width: int, **options: Any) -> mk.MoE:
    return mk.MoE(H, I, E, K, shared_intermediate_size=width, **{"fuse_shared_expert": True, **options})


def aux_loss_after_a_pass(mask: Any) -> torch.Tensor:
    moe = mk.MoE(H, I, E, K)
    moe(torch.randn(T, H))
    return mk.aux_loss(moe, mask)


BAD_OTHERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: call_grouped_mlp(x_sorted=None), TypeError, "x_sorted: got NoneType"),
    (lambda: call_grouped_mlp(x_sorted=torch.randn(6)), ValueError, "x_sorted: got shape"),
    (lambda: call_grouped_mlp(offsets=[0, 1]), TypeError, "offsets: got list"),
    (lambda: call_grouped_mlp(offsets=torch.rand(5)), TypeError, "offsets: got dtype float32"),
    (lambda: call_grouped_mlp(offsets=offsets(0, 6)), ValueError, r"offsets: got shape \(2,\), expected \[5\]"),
    (lambda: call_grouped_mlp(activation="none"), ValueError, "activation: got 'none'"),
    (lambda: call_grouped_mlp(interleaved=True, activation="relu"), ValueError, "interleaved: got True"),
    (lambda: call_grouped_mm(a=np.zeros((6, H))), TypeError, "a: got ndarray"),
    (lambda: call_grouped_mm(a=torch.randn(6, H, 1)), ValueError, "a: got shape"),
    (lambda: call_grouped_mm(b=torch.randn(E, I, H)), ValueError, "b: got shape"),
    (lambda: call_grouped_mm(b=torch.randn(5, I)), ValueError, "b: got shape"),
    (lambda: call_grouped_mm(b=torch.randn(E, H, I).double()), TypeError, "b: got dtype"),
    (lambda: call_grouped_mm(b=torch.randn(6, I), offsets=offsets(0)), ValueError, "at least"),
    (lambda: mk.plan(torch.rand(T, K), E), TypeError, "topk_ids: got dtype float32"),
    (lambda: mk.plan(None, E), TypeError, "topk_ids: got NoneType"),
    (lambda: mk.plan(torch.zeros(T, dtype=torch.int64), E), ValueError, "topk_ids: got shape"),
    (lambda: mk.plan(torch.zeros(T, K, dtype=torch.int64), 0), ValueError, "num_experts: got 0"),
    (lambda: mk.plan(torch.zeros(T, K, dtype=torch.int64), 2.0), TypeError, "num_experts: got float"),
    (lambda: mk.plan(torch.zeros(T, K, dtype=torch.int64), True), TypeError, "num_experts: got bool"),
    (lambda: mk.route([1.0], 1), TypeError, "logits: got list"),
    (lambda: mk.route(torch.zeros(T, E, dtype=torch.int64), 1), TypeError, "logits: got dtype int64"),
    (lambda: mk.route(torch.randn(T, E), 0), ValueError, "top_k: got 0"),
    (lambda: mk.route(torch.randn(T, E), E + 1), ValueError, f"top_k: got {E + 1}, expected 1 to {E}"),
    (lambda: mk.route(torch.randn(T, E), 1.5), TypeError, "top_k: got float"),
    (lambda: mk.route(torch.randn(T, E), 1, method="best"), ValueError, "method: got 'best'"),
    (lambda: mk.route(torch.randn(T, E), 1, norm_topk_prob=None), TypeError, "norm_topk_prob: got NoneType"),
    (lambda: mk.route(torch.randn(T, E), 1, selection_bias=[0.0] * E), TypeError, "selection_bias: got list"),
    (
        lambda: mk.route(torch.randn(T, E), 1, selection_bias=torch.zeros(E + 1)),
        ValueError,
        "selection_bias: got shape",
    ),
    (lambda: mk.route(torch.randn(T, E), 1, n_group=3), ValueError, "n_group: got 3, expected a divisor of the 4"),
    (lambda: mk.route(torch.randn(T, E), 1, n_group=2, topk_group=3), ValueError, "topk_group: got 3, expected 1 to 2"),
    (lambda: mk.route(torch.randn(T, E), 3, n_group=2, topk_group=1), ValueError, "topk_group: got 1 groups of 2"),
    (lambda: mk.route(torch.randn(T, E), 1, routed_scaling_factor=0), ValueError, "routed_scaling_factor: got 0"),
    (lambda: mk.route(torch.randn(T, E), 1, routed_scaling_factor="2"), TypeError, "routed_scaling_factor: got str"),
    (lambda: mk.expert_choice(torch.randn(T), 1), ValueError, "logits: got shape"),
    (lambda: mk.expert_choice(torch.randn(T, E), T + 1), ValueError, f"capacity: got {T + 1}, expected 0 to {T}"),
    (lambda: mk.limit_tokens(torch.rand(T, K), None, E), TypeError, "topk_ids: got dtype float32"),
    (lambda: mk.limit_tokens(torch.zeros(T, K).long(), None, E), TypeError, "topk_weights: got NoneType"),
    (lambda: mk.limit_tokens(torch.zeros(T, K).long(), torch.rand(T), E), ValueError, "topk_weights: got shape"),
    (lambda: mk.limit_tokens(torch.zeros(T, K).long(), None, E, by="age"), ValueError, "by: got 'age'"),
    (lambda: mk.limit_tokens(torch.zeros(T, K).long(), None, E, capacity=-1), ValueError, "capacity: got -1"),
    (lambda: mk.limit_tokens(torch.zeros(T, K).long(), None, E, multiple=0), ValueError, "multiple: got 0"),
    (lambda: call_round_tokens(scores=[1.0]), TypeError, "scores: got list"),
    (lambda: call_round_tokens(scores=torch.rand(T + 1, E)), ValueError, "scores: got shape"),
    (lambda: call_round_tokens(scores=torch.ones(T, E).long()), TypeError, "scores: got dtype int64"),
    (lambda: call_round_tokens(topk_ids=torch.rand(T, K)), TypeError, "topk_ids: got dtype float32"),
    (lambda: call_round_tokens(topk_weights=torch.rand(T, K + 1)), ValueError, "topk_weights: got shape"),
    (lambda: call_round_tokens(topk_weights=torch.rand(T, K, device="meta")), ValueError, "topk_weights: got device"),
    (lambda: call_round_tokens(multiple=0), ValueError, "multiple: got 0"),
    (lambda: call_round_tokens(multiple=2.0), TypeError, "multiple: got float"),
    (lambda: call_round_tokens(mode="even"), ValueError, "mode: got 'even', expected one of down, nearest, up"),
    (lambda: call_round_tokens(capacity=-1), ValueError, "capacity: got -1"),
    (lambda: call_round_tokens(by="age"), ValueError, "by: got 'age'"),
    (lambda: call_round_tokens().extend(torch.randn(T + 1, H), torch.rand(T, K)), ValueError, "x: got shape"),
    (lambda: call_round_tokens().extend(torch.randn(T, H), torch.rand(T)), ValueError, "topk_weights: got shape"),
    (lambda: call_round_tokens(mode="up").fold(torch.randn(T, H)), ValueError, "y: got shape"),
    (lambda: call_round_tokens().fold(None), TypeError, "y: got NoneType"),
    (lambda: mk.MoE(H, I, E, K, rounding="even"), ValueError, "rounding: got 'even'"),
    (
        lambda: mk.MoE(H, I, E, K, round_tokens_to=2, n_group=2, topk_group=1),
        ValueError,
        "rounding: got 'nearest', expected 'down' with n_group 2",
    ),
    (lambda: mk.MoE(0, I, E, K), ValueError, "hidden_size: got 0"),
    (lambda: mk.MoE(H, -1, E, K), ValueError, "intermediate_size: got -1"),
    (lambda: mk.MoE(H, I, 0, K), ValueError, "num_experts: got 0"),
    (lambda: mk.MoE(H, I, E, E + 1), ValueError, f"top_k: got {E + 1}, expected 1 to {E}"),
    (lambda: mk.MoE(H, I, E, 0), ValueError, "top_k: got 0"),
    (lambda: mk.MoE(H, I, "4", K), TypeError, "num_experts: got str"),
    (lambda: mk.MoE(H, I, E, K, activation="tanh"), ValueError, "activation: got 'tanh'"),
    (lambda: mk.MoE(H, I, E, K, routing="random"), ValueError, "routing: got 'random'"),
    (lambda: mk.MoE(H, I, E, K, bias="yes"), TypeError, "bias: got str"),
    (lambda: mk.MoE(H, I, E, K, dtype=torch.int8), TypeError, "dtype: got torch.int8"),
    (lambda: mk.MoE(H, I, E, K, capacity_factor=-1.0), ValueError, "capacity_factor: got -1.0"),
    (lambda: mk.MoE(H, I, E, K, capacity_factor=float("nan")), ValueError, "capacity_factor: got nan"),
    (lambda: mk.MoE(H, I, E, K, drop_by="weight"), ValueError, "drop_by: got 'weight'"),
    (lambda: mk.MoE(H, I, E, K, round_tokens_to=1.5), TypeError, "round_tokens_to: got float"),
    (lambda: mk.MoE(H, I, E, K, router_jitter_noise=-0.1), ValueError, "router_jitter_noise: got -0.1"),
    (lambda: mk.MoE(H, I, E, K, n_group=3), ValueError, "n_group: got 3"),
    (lambda: mk.MoE(H, I, E, K, selection_bias=1), TypeError, "selection_bias: got int"),
    (lambda: mk.MoE(H, I, E, K, shared_intermediate_size=0), ValueError, "shared_intermediate_size: got 0"),
    (lambda: mk.MoE(H, I, E, K, shared_gate=True), ValueError, "shared_gate: got True"),
    (lambda: mk.MoE(H, I, E, K, fuse_shared_expert=True), ValueError, "fuse_shared_expert: got True, expected False"),
    (lambda: fused_layer(I, fuse_shared_expert=1), TypeError, "fuse_shared_expert: got int"),
    (
        lambda: fused_layer(I + 4),
        ValueError,
        f"shared_intermediate_size: got {I + 4}, expected a multiple of intermediate_size, {I}",
    ),
    (lambda: fused_layer(I - 4, device="nowhere"), ValueError, "shared_intermediate_size: got 4"),  # allocates nothing
    (lambda: fused_layer(I, bias=True), ValueError, "bias: got True, not accepted with fuse_shared_expert"),
    (lambda: fused_layer(I, scale_input=True), ValueError, "scale_input: got True, not accepted with"),
    (lambda: fused_layer(I, routing="expert_choice"), ValueError, "routing: got 'expert_choice', not accepted with"),
    (
        lambda: mk.MoE(H, I, E, K, routing="expert_choice", capacity_factor=1.0),
        ValueError,
        "capacity_factor: not accepted with routing 'expert_choice'",
    ),
    (lambda: mk.MoE(H, I, E, K)([1.0]), TypeError, "x: got list"),
    (lambda: mk.MoE(H, I, E, K)(torch.randn(3, H + 1)), ValueError, rf"x: got shape \(3, {H + 1}\)"),
    (lambda: mk.MoE(H, I, E, K)(torch.tensor(1.0)), ValueError, "x: got shape"),
    (lambda: mk.MoE(H, I, E, K)(torch.randn(3, H).double()), TypeError, "x: got dtype torch.float64"),
    (lambda: mk.MoE(H, I, E, K)(torch.randn(3, H, device="meta")), ValueError, "x: got device meta"),
    (lambda: mk.MoE.from_dense("mlp", E, K), TypeError, "dense_mlp: got str"),
    (lambda: mk.MoE.from_dense(torch.nn.Linear(H, H), E, K), ValueError, "dense_mlp: Linear has none"),
    (
        lambda: mk.MoE.from_dense(torch.nn.Sequential(torch.nn.Linear(H, H)), E, K),
        ValueError,
        "nn.Sequential of Linear",
    ),
    (
        lambda: mk.MoE.from_dense(torch.nn.Sequential(torch.nn.Linear(H, I)), E, K, routing="llama4"),
        ValueError,
        "routing: got 'llama4', expected one whose weights sum to one",
    ),
    (lambda: mk.MoE.from_dense("mlp", E, K, capacity_factor=1.0), ValueError, "capacity_factor: got 1.0"),
    (lambda: mk.aux_loss("model"), TypeError, "model: got str"),
    (lambda: mk.aux_loss(mk.MoE(H, I, E, K), z=-1), ValueError, "z: got -1"),
    (lambda: aux_loss_after_a_pass(torch.ones(T + 1)), ValueError, rf"attention_mask: got shape \({T + 1},\)"),
    (lambda: aux_loss_after_a_pass([1] * T), TypeError, "attention_mask: got list"),
    (lambda: mk.aux_loss(mk.MoE(H, I, E, K), balance="1"), TypeError, "balance: got str"),
    (lambda: mk.aux_loss(mk.MoE(H, I, E, K), group=3), TypeError, "group: got int"),
    (lambda: mk.load_balancing_loss(torch.randn(T, E), [1] * E), TypeError, "tokens_per_expert: got list"),
    (lambda: mk.load_balancing_loss(torch.ones(T, E).long(), torch.ones(E)), TypeError, "logits: got dtype int64"),
    (
        lambda: mk.load_balancing_loss(torch.randn(T, E), torch.ones(E, device="meta")),
        ValueError,
        "tokens_per_expert: got device meta",
    ),
    (lambda: mk.load_balancing_loss(torch.randn(T, E), torch.ones(E), group="dp"), TypeError, "group: got str"),
    (lambda: mk.z_loss(torch.ones(T, E).long()), TypeError, "logits: got dtype int64"),
    (lambda: mk.z_loss(torch.randn(T)), ValueError, "logits: got shape"),
    (lambda: mk.z_loss(torch.randn(T, E), mask=torch.ones(E)), ValueError, "mask: got shape"),
    (lambda: mk.sequence_balancing_loss(torch.randn(T, E), torch.ones(T, K)), ValueError, "logits: got shape"),
    (
        lambda: mk.sequence_balancing_loss(torch.randn(1, T, E), torch.rand(1, T, K)),
        TypeError,
        "topk_ids: got dtype float32",
    ),
    (
        lambda: mk.sequence_balancing_loss(torch.randn(1, T, E), torch.ones(1, T, K).long(), mask=torch.ones(T)),
        ValueError,
        "mask: got shape",
    ),
    (lambda: mk.update_selection_bias(None), TypeError, "model: got NoneType"),
    (lambda: mk.update_selection_bias(mk.MoE(H, I, E, K, selection_bias=True), group=1), TypeError, "group: got int"),
    (
        lambda: mk.bias_update_hook(torch.optim.SGD([torch.ones(1)]), mk.MoE(H, I, E, K)),
        ValueError,
        "no moekern.MoE layer with selection_bias",
    ),
    (lambda: mk.expert_choice(None, 1), TypeError, "logits: got NoneType"),
    (lambda: mk.expert_choice(torch.randn(T, E), 1.0), TypeError, "capacity: got float"),
    (lambda: mk.update_selection_bias(mk.MoE(H, I, E, K)), ValueError, "no moekern.MoE layer with selection_bias"),
    (lambda: mk.update_selection_bias(mk.MoE(H, I, E, K), rate="fast"), TypeError, "rate: got str"),
    (lambda: mk.sac_policy(save_experts="yes"), TypeError, "save_experts: got str"),
    (lambda: mk.bias_update_hook("adam", mk.MoE(H, I, E, K)), TypeError, "optimizer: got str"),
    (lambda: mk.aux_loss(torch.nn.Linear(2, 2)), ValueError, "model: got a Linear without any"),
    (lambda: mk.aux_loss(mk.MoE(H, I, E, K)), ValueError, "has not run a forward pass"),
    (lambda: mk.load_balancing_loss(torch.randn(T, E), torch.zeros(1)), ValueError, "tokens_per_expert: got shape"),
    (
        lambda: mk.backend("tpu").__enter__(),
        ValueError,
        "backend: got 'tpu', expected one of auto, cpu",
    ),
    (lambda: mk.backend(None).__enter__(), TypeError, "backend: got NoneType"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_OTHERS)
def test_other_functions(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_does_not_serve_the_device() -> None:
    with (
        mk.backend("cuda"),
        pytest.raises(ValueError, match="backend: 'cuda' was asked for, but the tensors are on 'cpu'"),
    ):
        mk.plan(torch.zeros(T, K, dtype=torch.int64), E)


def test_plan_of_other_tokens_or_experts() -> None:
    given = arguments()
    del given["topk_ids"]
    weights = [given.pop(n) for n in ("x", "topk_weights", "w_gate_up", "w_down")]
    for ids, experts, message in (
        (torch.zeros(T, K, dtype=torch.int64), E + 1, "plan: got a plan for 5 experts, expected 4"),
        (torch.zeros(T + 2, K, dtype=torch.int64), E, "plan: got a plan for 7 tokens, expected 5"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.experts(weights[0], None, weights[1], weights[2], weights[3], plan=mk.plan(ids, experts), **given)


def test_the_environment_names_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.verbs.backend._default", "gpu")
    with pytest.raises(ValueError, match="environment variable MOEKERN_BACKEND: got 'gpu'"):
        mk.plan(torch.zeros(T, K, dtype=torch.int64), E)
