"""The fast path of eager calls: an accepted call does not hide later bad input, and observers see operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import moekern as mk
from moekern.backends.call import Weights
from moekern.functional import experts as functional
from moekern.verbs import direct
from problems import Problem, make


@pytest.fixture(autouse=True)
def _nothing_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_accepted", direct.Accepted())


def arguments(device: str = "cpu", **options: Any) -> dict[str, Any]:
    p = make(9, 16, 8, 4, 2, device=device, bias=True, **options)
    return {
        "x": p.x, "topk_ids": p.ids, "topk_weights": p.weights, "w_gate_up": p.w_gate_up, "w_down": p.w_down,
        "b_gate_up": p.b_gate_up, "b_down": p.b_down, "activation": "swiglu", "transposed": False,
        "interleaved": False, "plan": None,
    }  # fmt: skip


def is_remembered(**changed: Any) -> bool:
    weights = Weights(*(changed.pop(name) for name in Weights._fields))
    return functional._accepted.get(direct.signature(weights=weights, **changed)) is not None


def spoiled(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Changes that make a good call a bad one."""
    plan = mk.plan(good["topk_ids"], 4)
    planned = {"topk_ids": None}
    return {
        "x of another dtype": {"x": good["x"].double()},
        "x of another width": {"x": good["x"][:, :8].contiguous()},
        "x on another device": {"x": good["x"].to("meta")},
        "x sparse": {"x": good["x"].to_sparse()},
        "x a list": {"x": good["x"].tolist()},
        "no ids": {"topk_ids": None},
        "ids of floats": {"topk_ids": good["topk_ids"].float()},
        "ids of another shape": {"topk_ids": good["topk_ids"][:3]},
        "no experts a token": {"topk_ids": good["topk_ids"][:, :0], "topk_weights": None},
        "weights of another shape": {"topk_weights": good["topk_weights"][:, :1].contiguous()},
        "weights of integers": {"topk_weights": good["topk_weights"].long()},
        "w_gate_up of another dtype": {"w_gate_up": good["w_gate_up"].half()},
        "w_gate_up of another number of experts": {"w_gate_up": good["w_gate_up"][:2]},
        "w_down the other way": {"w_down": good["w_down"].mT.contiguous()},
        "b_gate_up of another shape": {"b_gate_up": good["b_gate_up"][:, :3].contiguous()},
        "b_down a number": {"b_down": 1.0},
        "unknown activation": {"activation": "tanh"},
        "activation a list": {"activation": ["swiglu"]},
        "no gate to interleave": {"activation": "relu2", "interleaved": True},
        "transposed an int": {"transposed": 0},
        "interleaved a number": {"interleaved": 0.0},
        "plan a tuple": {"plan": tuple(plan), **planned},
        "plan for other experts": {"plan": mk.plan(good["topk_ids"], 5), **planned},
        "plan for other tokens": {"plan": mk.plan(good["topk_ids"][:5], 4), **planned},
        "plan of int64": {"plan": plan._replace(order=plan.order.long()), **planned},
        "plan with a short inverse": {"plan": plan._replace(inverse=plan.inverse[:3]), **planned},
        "plan with short offsets": {"plan": plan._replace(offsets=plan.offsets[:3]), **planned},
        "plan with offsets elsewhere": {"plan": plan._replace(offsets=plan.offsets.to("meta")), **planned},
        "plan with a list": {"plan": plan._replace(inverse=[0]), **planned},
    }


def test_bad_input_is_found_after_good_input(device: str) -> None:
    good = arguments(device)
    cases = spoiled(good)
    errors = {}
    for name, change in cases.items():
        with pytest.raises((TypeError, ValueError)) as raised:
            mk.experts(**{**good, **change})
        errors[name] = str(raised.value)
    out = mk.experts(**good)
    planned = mk.experts(**{**good, "topk_ids": None, "plan": mk.plan(good["topk_ids"], 4)})
    assert torch.equal(out, planned)
    assert is_remembered(**good)
    for name, change in cases.items():
        with pytest.raises((TypeError, ValueError)) as raised:
            mk.experts(**{**good, **change})
        assert str(raised.value) == errors[name]
        assert torch.equal(mk.experts(**good), out)


def test_both_ways_give_the_same_bits(device: str) -> None:
    p = make(9, 16, 8, 4, 2, device=device, bias=True)
    dout = torch.randn_like(p.x)

    def all_of(p: Problem) -> list[Tensor]:
        leaves = {n: getattr(p, n).clone().requires_grad_() for n in ("x", "weights", "w_gate_up", "w_down", "b_down")}
        out = p.run(**leaves)
        return [out.detach(), p.run(), *torch.autograd.grad(out, list(leaves.values()), dout)]

    short = all_of(p)

    class Observer(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Observer() as observer:
        long = all_of(p)
    assert "moekern.experts_forward.default" in observer.seen
    assert "moekern.experts_backward.default" in observer.seen
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)


def test_the_profiler_sees_operators() -> None:
    p = make(9, 16, 8, 4, 2)
    p.run()
    with torch.profiler.profile(acc_events=True) as profile:
        p.run()
    names = {event.key for event in profile.key_averages()}
    assert {"moekern::plan", "moekern::experts_forward"} <= names


def test_unusual_memory_takes_the_long_way() -> None:
    good = arguments()
    out = mk.experts(**good)
    assert torch.equal(mk.experts(**{**good, "x": torch._neg_view(-good["x"])}), out)
    assert torch.equal(mk.experts(**{**good, "w_down": good["w_down"].mT.contiguous().mT}), out)
    assert torch.equal(mk.experts(**{**good, "topk_ids": good["topk_ids"].mT.contiguous().mT}), out)
    assert torch.equal(mk.experts(**{**good, "topk_weights": good["topk_weights"].double()}), out)

    leftover = []

    def keep(x: Tensor) -> Tensor:
        leftover.append(x)
        return x.sum()

    torch.func.grad(keep)(good["x"])
    assert not is_remembered(**{**good, "x": leftover[0]})
    assert torch.equal(mk.experts(**{**good, "x": leftover[0]}), out)


def test_autocast_and_backends_are_part_of_the_call() -> None:
    good = arguments()
    out = mk.experts(**good)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mk.experts(**good).dtype == torch.bfloat16
    assert torch.equal(mk.experts(**good), out)
    with mk.backend("cuda"), pytest.raises(ValueError, match="backend: 'cuda' was asked for"):
        mk.experts(**good)
    with mk.backend("reference"):
        torch.testing.assert_close(mk.experts(**good), out)
        assert not is_remembered(**good)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_what_disturbs() -> None:
    assert direct.undisturbed()
    with forward_ad.dual_level():
        assert not direct.undisturbed()
    with torch.device("cpu"):
        assert not direct.undisturbed()
    seen = []
    torch.func.vmap(lambda x: seen.append(direct.undisturbed()) or x)(torch.ones(2))
    torch.jit.trace(lambda x: seen.append(direct.undisturbed()) or x + 1, torch.ones(2), check_trace=False)
    assert seen == [False, False]


def test_gradients_are_asked_for_call_by_call() -> None:
    p = make(9, 16, 8, 4, 2)
    assert not p.run().requires_grad
    x = p.x.clone().requires_grad_()
    assert p.run(x=x).requires_grad
    with torch.no_grad():
        assert not p.run(x=x).requires_grad
    with torch.inference_mode():
        assert p.run(x=x).is_inference()
    assert not p.run().requires_grad


def test_few_signatures_are_kept() -> None:
    accepted = direct.Accepted(most=3)
    for i in range(10):
        accepted.remember((i,), i)
        assert accepted.get((i,)) == i
    assert len(accepted._calls) <= 3
    assert accepted.get(None) is None
    assert accepted.get(([],)) is None
