"""Selective activation checkpointing: the tensors that a layer keeps when its forward pass will run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

from moekern.verbs import checks, ops


def sac_policy(*, save_experts: bool = False) -> Callable[..., CheckpointPolicy]:
    """A policy for torch's selective activation checkpointing that never routes twice.

    The choice of experts and the plan are kept: integers, a few bytes per slot. The recomputation then sends every
    token to the same experts as the first pass, even if its logits differ in the last bit::

        context_fn = partial(create_selective_checkpoint_contexts, mk.sac_policy())
        y = checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)

    Args:
        save_experts: Keep the experts' output and pre-activation too, ``2 * T * (H + 2 * K * I)`` bytes in bfloat16, so
            that the experts run once and the rest of the block is recomputed.

    Returns:
        A function for ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.

    Raises:
        TypeError: ``save_experts`` is not a bool.
    """
    checks.is_bool("save_experts", save_experts)
    kept = {ops.plan, ops.plan_on_host, torch.ops.aten.sort.stable, torch.ops.aten.topk.default}
    if save_experts:
        kept.add(ops.experts_forward)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
