"""A layer's training as one node of the graph, on a stand-in for the backend's program: torch computes, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.backends import cpu, reference
from moekern.backends.call import Form, PlanTensors, Weights
from moekern.layer import training
from moekern.routing import router

H, I, E, K = 32, 16, 6, 2


class Layout:
    """As :class:`moekern.backends.cuda.passes.training.Kept`."""

    def __init__(self, tokens: int):
        self.slots = tokens * K
        self.offsets = 4 * self.slots

    def chosen(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        ids, scores = kept[: 2 * self.slots].view(2, -1, K)
        return ids, scores.view(torch.float32)

    def plan(self, kept: Tensor) -> PlanTensors:
        order, inverse = kept[2 * self.slots : 4 * self.slots].view(2, -1)
        return PlanTensors(order, inverse, kept[4 * self.slots :])


class Program:
    """As :class:`moekern.backends.cuda.passes.training.Layer`."""

    def __init__(
        self, x: Tensor, weight: Tensor, weights: Weights, form: Form, method: tuple[str, bool, float]
    ):  # fmt: skip
        self.form, self.method = form, method
        self.kept = Layout(x.shape[0])
        self.calls = 0

    def accepts(self, x: Tensor, weight: Tensor, weights: Weights) -> bool:
        return True

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.calls += 1
        rows = x.reshape(-1, H)
        logits = rows @ weight.T + (0 if bias is None else bias)
        formula, norm, scale = self.method
        scores, ids = mk.route(logits, K, method=formula, norm_topk_prob=norm, routed_scaling_factor=scale)
        plan = reference.plan(ids, E)
        out, pre = reference.experts_forward(rows, scores, plan, weights, self.form, True)
        parts = (ids.int().view(-1), scores.view(torch.int32).view(-1), *plan)
        return out.view(x.shape), logits, torch.cat(parts), pre

    def backward(
        self, dout: Any, dlogits: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> list[Tensor | None]:  # fmt: skip
        weights, logits, kept, pre, needs = rest
        ids, scores = self.kept.chosen(kept)
        grads: list[Tensor | None] = [None] * 7
        total = torch.zeros_like(logits) if dlogits is None else dlogits
        if dout is not None:
            wanted = [needs[0], True, *needs[3:]]
            plan = self.kept.plan(kept)
            found = reference.experts_backward(
                dout.reshape(-1, H), x.view(-1, H), pre, scores, plan, weights, self.form, wanted
            )
            grads = [g if n else None for g, n in zip([found[0], None, None, *found[2:]], needs, strict=True)]
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                weighed = router.weights_of(leaf, ids.long(), *self.method)
            total = total + torch.autograd.grad(weighed, leaf, found[1])[0]
        if needs[0]:
            through = total @ weight
            grads[0] = (through if grads[0] is None else grads[0] + through).view(x.shape)
        grads[1] = total.T @ x.view(-1, H) if needs[1] else None
        grads[2] = total.sum(0) if needs[2] else None
        return grads


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    made: list[Program] = []

    def prepare(*arguments: Any) -> Program:
        made.append(Program(*arguments))
        return made[-1]

    monkeypatch.setattr(cpu, "prepare_training", prepare, raising=False)
    monkeypatch.setattr(training, "_accepted", training.direct.Accepted())
    return made


def step(moe: mk.MoE, x: Tensor, coefficient: float = 0.0) -> list[Tensor]:
    """Output, the router's decisions, gradients."""
    x = x.detach().requires_grad_()
    y = moe(x)
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    if coefficient:
        loss = loss + coefficient * mk.aux_loss(moe, balance=1.0, z=1.0)
    routing = moe.latest_routing
    assert routing is not None
    grads = torch.autograd.grad(loss, [x, *moe.parameters()])
    return [y.detach(), routing.logits.detach(), routing.tokens_per_expert, routing.topk_ids, *grads]


def long_way(monkeypatch: pytest.MonkeyPatch, moe: mk.MoE, *args: Any) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr("moekern.layer.moe.train", lambda layer, x: None)
        return step(moe, *args)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "routing": "topk_softmax", "router_bias": True}, {"routing": "olmoe", "norm_topk_prob": False},
     {"routing": "sigmoid_topk", "routed_scaling_factor": 2.5}, {"routing": "llama4", "activation": "gelu"}],
    ids=str,
)  # fmt: skip
def test_both_ways(
    programs: list[Program], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], coefficient: float
) -> None:
    moe = mk.MoE(H, I, E, K, **options)
    for shape in ((7, H), (2, 5, H), (H,)):
        x = torch.randn(shape)
        wanted = long_way(monkeypatch, moe, x, coefficient)
        got = step(moe, x, coefficient)
        assert programs[-1].calls == 1
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
        step(moe, x, coefficient)
        assert programs[-1].calls == 2
    assert len(programs) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"selection_bias": True},
        {"capacity_factor": 1.0},
        {"router_jitter_noise": 0.1},
        {"round_tokens_to": 4, "rounding": "down"},
        {"scale_input": True},
        {"n_group": 3, "topk_group": 2},
        {"shared_intermediate_size": 8},
        {"shared_intermediate_size": 2 * I, "fuse_shared_expert": True},
        {"routing": "expert_choice"},
    ],
    ids=str,
)
def test_other_layers_take_the_long_way(programs: list[Program], options: dict[str, Any]) -> None:
    moe = mk.MoE(H, I, E, K, **options)
    moe(torch.randn(7, H, requires_grad=True)).sum().backward()
    assert not programs


def test_who_must_see_the_parts_does(programs: list[Program], monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = mk.MoE(H, I, E, K), torch.randn(7, H)
    out = moe(x)
    assert len(programs) == 1
    assert programs[0].calls == 1
    handle = moe.gate.register_forward_hook(lambda module, args, logits: -logits)
    assert not torch.allclose(moe(x), out)
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda module, args, result: None)
    moe(x)
    everywhere.remove()
    with torch.no_grad():
        moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moe(x)
    with torch.profiler.profile():
        moe(x)
    for parameter in moe.parameters():
        parameter.requires_grad_(False)
    moe(x)
    assert programs[0].calls == 1
    moe.gate.weight.requires_grad_(True)
    torch.testing.assert_close(moe(x), out)
    assert programs[0].calls == 2


def test_gradients_that_are_not_wanted(programs: list[Program]) -> None:
    moe, x = mk.MoE(H, I, E, K), torch.randn(7, H)
    everything = dict(zip(("x", *dict(moe.named_parameters())), step(moe, x, 0.5)[4:], strict=True))
    for name, parameter in moe.named_parameters():
        moe.requires_grad_(False)
        parameter.requires_grad_(True)
        moe.zero_grad()
        y = moe(x)
        loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
        if name == "gate.weight":
            loss = loss + 0.5 * mk.aux_loss(moe, balance=1.0, z=1.0)
        loss.backward()
        torch.testing.assert_close(parameter.grad, everything[name])
    moe.requires_grad_(True)
    (grad,) = torch.autograd.grad(moe.train()(x).sum() * 0 + mk.aux_loss(moe, z=1.0), moe.gate.weight)
    assert grad.abs().sum() > 0
    moe(x)
    routing = moe.latest_routing
    assert routing is not None
    (alone,) = torch.autograd.grad(routing.logits.square().sum(), moe.gate.weight)  # the output is not used
    torch.testing.assert_close(alone, 2 * (x @ moe.gate.weight.T).T @ x)


def test_second_derivatives(programs: list[Program], monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = mk.MoE(H, I, E, K, bias=True, router_bias=True), torch.randn(5, H)

    def second() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        loss = moe(leaf).square().sum() + mk.aux_loss(moe, z=1.0)
        first = torch.autograd.grad(loss, [leaf, *moe.parameters()], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [leaf, *moe.parameters()]))

    got = second()
    assert programs[0].calls == 1
    monkeypatch.setattr("moekern.layer.moe.train", lambda layer, x: None)
    for a, b in zip(got, second(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_observed_backward_pass_runs_operators(programs: list[Program]) -> None:
    moe, x = mk.MoE(H, I, E, K), torch.randn(7, H)
    wanted = step(moe, x)
    leaf = x.clone().requires_grad_()
    y = moe(leaf)
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    with torch.profiler.profile() as profile:
        grads = torch.autograd.grad(loss, [leaf, *moe.parameters()])
    assert "moekern::experts_backward" in {event.key for event in profile.key_averages()}
    for a, b in zip(grads, wanted[4:], strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing(programs: list[Program]) -> None:
    moe, x = mk.MoE(H, I, E, K), torch.randn(7, H)
    wanted = step(moe, x)
    for reentrant in (False, True):
        leaf = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(moe, leaf, use_reentrant=reentrant)
        moe.zero_grad()
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        for a, b in zip([leaf.grad, *(p.grad for p in moe.parameters())], wanted[4:], strict=True):
            torch.testing.assert_close(a, b)
