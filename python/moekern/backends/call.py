"""The arguments of the experts in autograd, operators and backends: the same order everywhere.

``experts_forward(x, scores, plan, weights, form, save)`` and
``experts_backward(dout, x, pre, scores, plan, weights, form, needs)``. The gradients are in the order
``x, scores, *weights``, and so is `needs`, one bool for each. A torch operator takes lists of tensors but no such
tuples: it has `plan` and `weights` as lists, and the fields of `form` one by one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moekern.backends.activations import ACTIVATIONS


class Weights(NamedTuple):
    """The experts' parameters, contiguous and in one dtype.

    Attributes:
        w_gate_up: ``[E, 2I, H]``; ``[E, I, H]`` for an activation without gate; last two swapped if transposed.
        w_down: ``[E, H, I]``; last two swapped if transposed.
        b_gate_up: ``[E, 2I]`` (``[E, I]`` without gate) or None.
        b_down: ``[E, H]`` or None.

    Further tensors of the experts become fields after these: the scales of packed weights, the factors of low-rank
    adapters. Operators and autograd pass the fields on without a list of their own.
    """

    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None = None
    b_down: Tensor | None = None


class Form(NamedTuple):
    """The formula and the layout: all arguments of a call that are not tensors. It is hashable, for use in keys.

    Attributes:
        activation: A name of :data:`moekern.backends.activations.ACTIVATIONS`.
        transposed: The weights are ``[E, H, 2I]`` and ``[E, I, H]``.
        interleaved: Gate and up features alternate.
        top_k: K.
    """

    activation: str
    transposed: bool
    interleaved: bool
    top_k: int


class PlanTensors(NamedTuple):
    """The tensors of a :class:`moekern.Plan`, which adds methods for users.

    Attributes:
        order: int32 ``[S]``, row -> slot.
        inverse: int32 ``[S]``, slot -> row.
        offsets: int32 ``[E + 1]``, the first row of each expert, and the end of the last one's rows.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def sizes_of(weights: Weights, form: Form) -> tuple[int, int, int, int]:
    """E, H, I, and the features of the pre-activation, 2I or I."""
    experts, hidden, inter = weights.w_down.shape
    if form.transposed:
        hidden, inter = inter, hidden
    return experts, hidden, inter, 2 * inter if ACTIVATIONS[form.activation].gated else inter
