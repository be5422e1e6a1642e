"""Mixture-of-Experts layers for PyTorch at the speed of the hardware.

The public names::

    mlp = mk.MoE(hidden_size=2048, intermediate_size=1024, num_experts=64, top_k=8)
    mlp = mk.MoE.from_dense(dense_mlp, num_experts=8, top_k=2)
    weights, ids = mk.route(logits, top_k=8)
    y = mk.experts(x, ids, weights, w_gate_up, w_down)
    plan = mk.plan(ids, num_experts=64)
    y_sorted = mk.grouped_mlp(x_sorted, plan.offsets, w_gate_up, w_down)
"""

from importlib.metadata import PackageNotFoundError, version

from moekern.functional.experts import experts, grouped_mlp, grouped_mm
from moekern.functional.permute import combine, permute
from moekern.functional.plan import Plan, PlanStats, plan
from moekern.layer.balance import (
    aux_loss,
    bias_update_hook,
    set_token_mask,
    update_selection_bias,
)
from moekern.layer.moe import MoE
from moekern.routing.capacity import limit_tokens
from moekern.routing.expert_choice import expert_choice
from moekern.routing.losses import load_balancing_loss, sequence_balancing_loss, z_loss
from moekern.routing.rounding import Rounded, round_tokens
from moekern.routing.router import route
from moekern.verbs import flops
from moekern.verbs.backend import backend
from moekern.verbs.checkpointing import sac_policy

flops.register()

try:
    __version__ = version("moekern")
except PackageNotFoundError:  # the sources on PYTHONPATH, not installed
    __version__ = "0+unknown"

__all__ = [
    "MoE",
    "Plan",
    "PlanStats",
    "Rounded",
    "__version__",
    "aux_loss",
    "backend",
    "bias_update_hook",
    "combine",
    "expert_choice",
    "experts",
    "grouped_mlp",
    "grouped_mm",
    "limit_tokens",
    "load_balancing_loss",
    "permute",
    "plan",
    "round_tokens",
    "route",
    "sac_policy",
    "sequence_balancing_loss",
    "set_token_mask",
    "update_selection_bias",
    "z_loss",
]
