"""The values, other than addresses, that a pass's launches depend on: the key of a recorded program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekern.backends.call import Form, Weights, sizes_of
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.launch.program import Placeholder


class Sizes(NamedTuple):
    """Device, dtype, sizes and form of one call, and the configuration chosen for it."""

    device: int
    dtype: torch.dtype
    tokens: int
    hidden: int
    columns: int  # features of the pre-activation
    inter: int
    experts: int
    form: Form
    has_scores: bool
    has_up_bias: bool
    has_down_bias: bool
    configuration: Configuration

    @classmethod
    def of(cls, x: Tensor, has_scores: bool, weights: Weights, form: Form, configuration: Configuration) -> Sizes:
        """The sizes of a call with tokens ``[T, H]``."""
        experts, hidden, inter, columns = sizes_of(weights, form)
        biases = weights.b_gate_up is not None, weights.b_down is not None
        return cls(
            x.get_device(), x.dtype, x.shape[0], hidden, columns, inter, experts, form, has_scores, *biases,
            configuration,
        )  # fmt: skip

    @property
    def slots(self) -> int:
        """S."""
        return self.tokens * self.form.top_k

    def place(self, place: int, shape: tuple[int, ...], dtype: torch.dtype | None = None, offset: int = 0) -> Any:
        """A stand-in for the tensor at a place of a replay's list, by default in the dtype of the weights."""
        return Placeholder(place, shape, dtype or self.dtype, self.device, offset)

    def weights(self, places: Sequence[int]) -> Weights:
        """Stand-ins for the weights at these places, whether or not the call has biases."""
        up, down = (self.columns, self.hidden), (self.hidden, self.inter)
        if self.form.transposed:
            up, down = up[::-1], down[::-1]
        shapes = (self.experts, *up), (self.experts, *down), (self.experts, self.columns), (self.experts, self.hidden)
        return Weights(*(self.place(place, shape) for place, shape in zip(places, shapes, strict=True)))

    def given(self, weights: Weights) -> Weights:
        """The same with None for biases that the call does not have."""
        return weights._replace(
            b_gate_up=weights.b_gate_up if self.has_up_bias else None,
            b_down=weights.b_down if self.has_down_bias else None,
        )
