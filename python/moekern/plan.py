"""The plan: which row of the sorted tokens belongs to which expert."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moekern import checks, dispatch, ops


class Plan(NamedTuple):
    """Slots sorted by expert. slot = flat index ``t * top_k + k``; row = position after sorting.

    Attributes:
        order: int32 ``[S]``, row -> slot.
        inverse: int32 ``[S]``, slot -> row.
        offsets: int32 ``[E + 1]``; rows of expert e are ``offsets[e]:offsets[e + 1]``, sentinels come after the last.
        num_experts: E.
        top_k: K.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    num_experts: int
    top_k: int

    @property
    def counts(self) -> Tensor:
        """Rows of each expert, int32 ``[E]``."""
        return self.offsets[1:] - self.offsets[:-1]


def plan(topk_ids: Tensor, num_experts: int) -> Plan:
    """Sort the slots by expert, keeping slot order within an expert."""
    checks.topk_ids("topk_ids", topk_ids)
    checks.is_int("num_experts", num_experts, 1)
    order, inverse, offsets = ops.plan(topk_ids, num_experts, dispatch.resolve(topk_ids.device.type))
    return Plan(order, inverse, offsets, num_experts, topk_ids.shape[1])
