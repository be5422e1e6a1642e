"""FLOPs of the operators for ``torch.utils.flop_counter.FlopCounterMode``: two per multiplication and addition.

Matrix products are counted, as torch counts its own, from shapes alone. An operator does not read how many slots are
sentinels (dropped, or another rank's experts), so each of the T * K slots counts as a row. Activations, biases and sums
over a token's experts are not counted, as in torch's counter. Work that activation checkpointing repeats is counted
again. Second derivatives and tangents are grouped products and count as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from moekern.verbs import ops

Shape = Sequence[int]


def _products(plan: Sequence[Shape], weights: Sequence[Shape | None], transposed: bool) -> tuple[int, int]:
    """FLOPs of the up and of the down projection over all slots."""
    (slots,), (w_gate_up, w_down) = plan[0], weights[:2]
    assert w_gate_up is not None
    assert w_down is not None
    hidden, up = (w_gate_up[1], w_gate_up[2]) if transposed else (w_gate_up[2], w_gate_up[1])
    inter = w_down[1 if transposed else 2]
    return 2 * slots * hidden * up, 2 * slots * hidden * inter


def experts_forward(
    x: Shape, scores: Shape | None, plan: Sequence[Shape], weights: Sequence[Shape | None], activation: str,
    transposed: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The up and the down projection."""
    return sum(_products(plan, weights, transposed))


def experts_backward(
    dout: Shape, x: Shape, pre: Shape, scores: Shape | None, plan: Sequence[Shape], weights: Sequence[Shape | None],
    activation: str, transposed: bool, interleaved: bool, top_k: int, needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The products for the requested gradients; `needs` is in the order x, scores, both weights, both biases."""
    up, down = _products(plan, weights, transposed)
    wants_x, wants_scores, wants_up, wants_down, wants_up_bias, _wants_down_bias = needs
    through_down = wants_x or wants_scores or wants_up or wants_up_bias
    return up * (wants_x + wants_up) + down * (through_down + wants_down)


def grouped_mm(a: Shape, b: Shape, offsets: Shape, kind: str, *_: Any, **__: Any) -> int:
    """Every row of `a` times one matrix; for "tn", times its row of `b`."""
    rows, inner = a
    return 2 * rows * inner * b[1 if kind in ("nt", "tn") else 2]


def register() -> None:
    """Register the formulas with torch."""
    for operator, formula in (
        (ops.experts_forward, experts_forward),
        (ops.experts_backward, experts_backward),
        (ops.grouped_mm, grouped_mm),
    ):
        register_flop_formula(operator.overloadpacket)(formula)
