"""The counts of torch's FlopCounterMode, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import moekern as mk

T, H, I, E, K = 13, 12, 7, 5, 2
UP, DOWN = 2 * T * K * H * 2 * I, 2 * T * K * H * I  # FLOPs of one product over all slots
ROUTER, SHARED = 2 * T * H * E, 3 * 2 * T * H * I


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def problem(transposed: bool = False, gated: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    up = (2 if gated else 1) * I
    w_gate_up = torch.randn(E, up, H, generator=generator)
    w_down = torch.randn(E, H, I, generator=generator)
    return {
        "x": torch.randn(T, H, generator=generator),
        "scores": torch.rand(T, K, generator=generator),
        "w_gate_up": w_gate_up.mT.contiguous() if transposed else w_gate_up,
        "w_down": w_down.mT.contiguous() if transposed else w_down,
        "b_gate_up": torch.randn(E, up, generator=generator),
        "b_down": torch.randn(E, H, generator=generator),
    }


def ids() -> Tensor:
    return torch.arange(T * K).reshape(T, K) % E


def run(p: dict[str, Tensor], **options: Any) -> Tensor:
    return mk.experts(
        p["x"], ids(), p["scores"], p["w_gate_up"], p["w_down"], b_gate_up=p["b_gate_up"], b_down=p["b_down"], **options
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("transposed", [False, True])
def test_forward(transposed: bool, backend: str) -> None:
    p = problem(transposed)
    with mk.backend(backend):
        run(p, transposed=transposed)  # accepted once: later calls would take the fast path
        assert counted(lambda: run(p, transposed=transposed)) == UP + DOWN


def test_without_gate() -> None:
    p = problem(gated=False)
    p["x"].requires_grad_()
    assert counted(lambda: run(p, activation="relu")) == 2 * DOWN
    assert counted(lambda: run(p, activation="relu").sum().backward()) == 4 * DOWN


# The inputs with gradients, and the products of the backward pass: through the down projection, its weight, x, the up
# projection's weight.
FROZEN = [
    (("x",), DOWN + UP),
    (("scores",), DOWN),
    (("w_gate_up",), DOWN + UP),
    (("w_down",), DOWN),
    (("b_gate_up",), DOWN),
    (("b_down",), 0),
    (("x", "w_gate_up"), DOWN + 2 * UP),
    (("x", "scores", "w_gate_up", "w_down", "b_gate_up", "b_down"), 2 * DOWN + 2 * UP),
]


@pytest.mark.parametrize(("wanted", "backward"), FROZEN, ids=str)
def test_backward_of_what_is_not_frozen(wanted: tuple[str, ...], backward: int) -> None:
    p = problem()
    for name in wanted:
        p[name].requires_grad_()
    for _ in range(2):
        assert counted(lambda: run(p).sum().backward()) == UP + DOWN + backward


def test_a_backward_pass_alone() -> None:
    """The forward pass took the fast path; the backward pass under the mode does not."""
    p = problem()
    p["x"].requires_grad_()
    out = run(p).sum()
    assert counted(out.backward) == DOWN + UP


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("kind", ["nt", "nn", "tn"])
def test_grouped_mm(kind: str, tokens: int) -> None:
    offsets = torch.tensor([0, 0, tokens, tokens], dtype=torch.int32)
    a = torch.randn(tokens, H, requires_grad=True)
    shape = {"nt": (3, I, H), "nn": (3, H, I), "tn": (tokens, I)}[kind]
    b = torch.randn(*shape, requires_grad=True)

    def run() -> Tensor:
        return mk.grouped_mm(a, b.mT if kind == "nt" else b, offsets)

    assert counted(run) == 2 * tokens * H * I
    assert counted(lambda: run().sum().backward()) == 3 * 2 * tokens * H * I


def layer() -> mk.MoE:
    return mk.MoE(H, I, E, K, shared_intermediate_size=I)


FORWARD = UP + DOWN + ROUTER + SHARED


@pytest.mark.parametrize("frozen", [False, True])
def test_layer(frozen: bool) -> None:
    module = layer().requires_grad_(not frozen)
    x = torch.randn(T, H, requires_grad=True)
    for _ in range(2):
        assert counted(lambda: module(x)) == FORWARD
        assert counted(lambda: module(x).sum().backward()) == (2 if frozen else 3) * FORWARD
    with torch.no_grad():
        assert counted(lambda: module.eval()(x.detach())) == FORWARD


def test_checkpointed() -> None:
    """The second forward pass counts too; it ends before its last product, whose output is not needed."""
    module, x = layer(), torch.randn(T, H, requires_grad=True)
    assert counted(lambda: checkpoint(module, x, use_reentrant=False).sum().backward()) == 4 * FORWARD - SHARED // 3


def test_compiled() -> None:
    """A mode entered outside makes torch run the layer eagerly and ignore the compiled code."""
    torch.compiler.reset()
    module, x = layer(), torch.randn(T, H, requires_grad=True)
    module.compile(backend="aot_eager")
    module(x).sum().backward()
    assert counted(lambda: module(x).sum().backward()) == 3 * FORWARD


def test_traced() -> None:
    """In a traced graph the operators are what counts, in both passes."""
    module = layer().eval()
    graph = make_fx(lambda x: torch.autograd.grad(module(x).sum(), x)[0])(torch.randn(T, H, requires_grad=True))
    assert counted(lambda: graph(torch.randn(T, H))) >= 2 * (UP + DOWN)


def test_slots_without_an_expert_count() -> None:
    """Their number depends on values, which a count by shapes cannot read."""
    p = problem()
    none = torch.full((T, K), -1)
    assert counted(lambda: mk.experts(p["x"], none, None, p["w_gate_up"], p["w_down"])) == UP + DOWN
