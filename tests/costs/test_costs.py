"""The cost of each verb on the CPU, in numbers that a busy machine does not change: calls into Rust, operators, memory.

A bound that fails is a regression, or a change that is worth its cost and moves the bound. Sizes in bytes; fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import moekern as mk
from moekern import _core
from moekern.verbs import direct

T, H, I, E, K = 64, 32, 16, 8, 2
S = T * K
ROWS, WIDE, TOKENS = 4 * S * H, 4 * S * I, 4 * T * H  # [S, H], [S, I], [T, H]
PLAN = [4 * S, 4 * S, 4 * (E + 1)]
WEIGHTS = [4 * E * 2 * I * H, 4 * E * H * I]
SCORES = 4 * S
RUST = ("plan", "experts_forward", "experts_backward", "grouped_mm", "permute", "combine", "combine_backward")


@dataclass
class Inputs:
    """One layer's inputs, all of which require gradients."""

    x: Tensor = field(default_factory=lambda: torch.randn(T, H, requires_grad=True))
    ids: Tensor = field(default_factory=lambda: torch.randint(E, (T, K)))
    scores: Tensor = field(default_factory=lambda: torch.rand(T, K, requires_grad=True))
    w_gate_up: Tensor = field(default_factory=lambda: torch.randn(E, 2 * I, H, requires_grad=True))
    w_down: Tensor = field(default_factory=lambda: torch.randn(E, H, I, requires_grad=True))
    rows: Tensor = field(default_factory=lambda: torch.randn(S, H, requires_grad=True))

    def __post_init__(self) -> None:
        self.plan = mk.plan(self.ids, E)

    def experts(self) -> Tensor:
        return mk.experts(self.x, self.ids, self.scores, self.w_gate_up, self.w_down)

    def grouped_mlp(self) -> Tensor:
        return mk.grouped_mlp(self.rows, self.plan.offsets, self.w_gate_up, self.w_down)

    def grouped_mm(self) -> Tensor:
        return mk.grouped_mm(self.rows, self.w_gate_up, self.plan.offsets)

    def permute(self) -> Tensor:
        return mk.permute(self.x, self.plan)

    def combine(self) -> Tensor:
        return mk.combine(self.rows, self.plan, self.scores)


@dataclass
class Costs:
    """Names of the operators, bytes of every allocation in order, and calls into Rust by name."""

    operators: list[str]
    allocated: list[int]
    calls: dict[str, int]


@contextmanager
def counted_calls() -> Iterator[dict[str, int]]:
    """Calls of the functions that do the work, by name; only those that are called."""
    calls: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in RUST:
            patch.setattr(_core, name, counting(name, getattr(_core, name)))
        yield calls


def costs(run: Callable[[], object], *, short: bool = True) -> Costs:
    """Of the third run. `short` keeps the fast path, which a profiler would otherwise disable."""
    run(), run()
    with pytest.MonkeyPatch.context() as patch, counted_calls() as calls:
        if short:
            patch.setattr(direct, "undisturbed", lambda: True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            kept = run()
        del kept
    events = profiled.profiler.kineto_results.events()
    operators = [event.name() for event in events if event.name().startswith(("aten::", "moekern::"))]
    allocated = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return Costs(operators, allocated, calls)


def saved(run: Callable[[], Tensor], inputs: Inputs) -> int:
    """Bytes kept for the backward pass, weights not counted and each memory once."""
    kept: dict[int, int] = {}
    weights = {inputs.w_gate_up.data_ptr(), inputs.w_down.data_ptr()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


# Every allocation, results included; calls into Rust; the most operators, one or two above what torch 2.15 shows.
FORWARD = {
    "experts": ([*PLAN, TOKENS, 2 * WIDE], {"plan": 1, "experts_forward": 1}, 10),
    "grouped_mlp": ([4 * S, ROWS, 2 * WIDE], {"experts_forward": 1}, 10),
    "grouped_mm": ([2 * WIDE], {"grouped_mm": 1}, 4),
    "permute": ([ROWS], {"permute": 1}, 4),
    "combine": ([TOKENS], {"combine": 1}, 5),
}
BACKWARD = {
    "experts": ([TOKENS, SCORES, *WEIGHTS], {"experts_backward": 1}, 9),
    "grouped_mlp": ([ROWS, *WEIGHTS], {"experts_backward": 1}, 10),
    "grouped_mm": ([ROWS, WEIGHTS[0]], {"grouped_mm": 2}, 5),
    "permute": ([TOKENS], {"combine": 1}, 4),
    "combine": ([ROWS, SCORES], {"combine_backward": 1}, 8),
}
SAVED = {
    # x, the pre-activation, the router weights and the plan: no tensor of T * K * H.
    "experts": TOKENS + 2 * WIDE + SCORES + sum(PLAN),
    "grouped_mlp": ROWS + 2 * WIDE + sum(PLAN[1:]),
    "grouped_mm": ROWS + PLAN[2],
    "permute": sum(PLAN),
    "combine": ROWS + SCORES + sum(PLAN),
}


@pytest.mark.parametrize("verb", FORWARD)
def test_forward(verb: str) -> None:
    allocated, calls, operators = FORWARD[verb]
    found = costs(getattr(Inputs(), verb))
    assert sorted(found.allocated) == sorted(allocated)
    assert found.calls == calls
    assert len(found.operators) <= operators, found.operators


@pytest.mark.parametrize("verb", BACKWARD)
def test_backward(verb: str) -> None:
    allocated, calls, operators = BACKWARD[verb]
    inputs = Inputs()
    out = getattr(inputs, verb)()
    leaves = [t for t in vars(inputs).values() if isinstance(t, Tensor) and t.requires_grad]
    dout = torch.randn_like(out)
    found = costs(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True, allow_unused=True))
    assert sorted(found.allocated) == sorted(allocated)
    assert found.calls == calls
    assert len(found.operators) <= operators, found.operators


@pytest.mark.parametrize("verb", SAVED)
def test_saved(verb: str) -> None:
    inputs = Inputs()
    assert saved(getattr(inputs, verb), inputs) == SAVED[verb]


def test_inference_keeps_nothing() -> None:
    """Without gradients the pre-activation is not written; only the output remains."""
    inputs = Inputs()
    with torch.no_grad():
        found = costs(inputs.experts)
        assert saved(inputs.experts, inputs) == 0
    assert sorted(found.allocated) == sorted([*PLAN, TOKENS])
    assert found.calls == {"plan": 1, "experts_forward": 1}


def test_dispatched_calls_cost_no_more_memory() -> None:
    """Under an observer of operators the allocations are the same."""
    inputs = Inputs()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            short, long = costs(inputs.experts), costs(inputs.experts, short=False)
        assert sorted(short.allocated) == sorted(long.allocated)
        assert short.calls == long.calls
        assert long.operators.count("moekern::experts_forward") == 1
        assert "moekern::experts_forward" not in short.operators


def test_frozen_weights_are_not_differentiated() -> None:
    inputs = Inputs()
    inputs.w_gate_up.requires_grad_(False)
    inputs.w_down.requires_grad_(False)
    out = inputs.experts()
    dout = torch.randn_like(out)
    found = costs(lambda: torch.autograd.grad(out, (inputs.x, inputs.scores), dout, retain_graph=True))
    assert sorted(found.allocated) == sorted([TOKENS, SCORES])


def test_plan() -> None:
    inputs = Inputs()
    found = costs(lambda: mk.plan(inputs.ids, E))
    assert sorted(found.allocated) == sorted(PLAN)
    assert found.calls == {"plan": 1}
    assert len(found.operators) <= 6, found.operators


def test_a_planned_call_plans_not_again() -> None:
    inputs = Inputs()
    weights = inputs.w_gate_up, inputs.w_down
    found = costs(lambda: mk.experts(inputs.x, None, inputs.scores, *weights, plan=inputs.plan))
    assert found.calls == {"experts_forward": 1}
    assert sorted(found.allocated) == sorted([TOKENS, 2 * WIDE])


def test_layer() -> None:
    """The whole layer: apart from the experts' tensors, nothing is larger than the logits' sort."""
    layer = mk.MoE(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
    x = torch.randn(T, H)
    found = costs(lambda: layer(x))
    assert found.calls == {"plan": 1, "experts_forward": 1}
    others = list(found.allocated)
    for each in FORWARD["experts"][0]:
        others.remove(each)
    logits = 4 * T * E
    assert max(others) <= 2 * logits
    assert sum(others) <= 6 * logits
    assert len(found.operators) <= 50, found.operators
