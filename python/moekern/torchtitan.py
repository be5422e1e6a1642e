"""torchtitan: an override that lets moekern compute the routed experts, forward and backward.

    torchtitan's command … --override.imports moekern.torchtitan.grouped_experts

It replaces ``torchtitan.models.common.moe.GroupedExperts``, with any dispatch of the tokens: torchtitan sorts them by
expert and counts them on the device, where the counts stay. Checkpoints keep the names and shapes of the original
class. Written for torchtitan 0.3, whose experts are SwiGLU; a configuration that names another activation is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moekern.functional.experts import grouped_mlp
from moekern.layer.dense import known_activation
from moekern.layer.parameters import local

try:
    from torchtitan.config import derive, override
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.overrides.fused_swiglu import FusedGroupedExperts, fused_grouped_experts
except ImportError as missing:
    raise ImportError("moekern.torchtitan needs torchtitan >= 0.3: pip install torchtitan") from missing


class MoekernGroupedExperts(FusedGroupedExperts):
    """Experts whose gate and up projections torchtitan keeps as one parameter, ``w13`` ``[E, I, 2, H]``.

    Read as ``[E, 2I, H]``, its gate and up rows alternate, a layout that moekern accepts: no weight is copied.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FusedGroupedExperts.Config):
        """The options of the parent class."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Run rows that are sorted by expert.

        Args:
            x_RD: ``[R, H]``; rows past the sum of the counts are ignored, and their output is zero.
            num_tokens_per_expert_E: ``[E]`` integer, on the device of x_RD.

        Returns:
            ``[R, H]`` in the dtype of x_RD, computed in bfloat16 as torchtitan does.
        """
        w_gate_up, w_down = local(self.w13).bfloat16().flatten(1, 2), local(self.w2_EDF).bfloat16()
        offsets = torch.nn.functional.pad(num_tokens_per_expert_E.cumsum(0, dtype=torch.int32), (1, 0))
        return grouped_mlp(x_RD.bfloat16(), offsets, w_gate_up, w_down, interleaved=True).type_as(x_RD)


@override(target=GroupedExperts.Config, exact=True, description="Routed experts by moekern's kernels.")
def grouped_experts(cfg: GroupedExperts.Config) -> GroupedExperts.Config:
    """A configuration of torchtitan's experts with moekern's experts instead; initialisers and shardings stay.

    Raises:
        ValueError: The configuration names an activation other than silu.
    """
    for field in fields(cfg):
        activation = getattr(cfg, field.name)
        if field.name.startswith("act") and known_activation(activation, gated=True) != "swiglu":
            raise ValueError(
                f"{field.name}: got {getattr(activation, '__name__', activation)}, but moekern.torchtitan computes "
                "SwiGLU: leave moekern.torchtitan.grouped_experts out of --override.imports"
            )
    return derive(fused_grouped_experts(cfg), MoekernGroupedExperts.Config)
