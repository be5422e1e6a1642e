"""The CUDA backend: Hopper kernels where they exist, plain torch elsewhere, with one warning that says why."""

from moekern.backends.cuda.verbs import (
    combine,
    combine_backward,
    experts_backward,
    experts_forward,
    get_ready,
    grouped_mm,
    logits,
    makes_logits,
    permute,
    plan,
    plan_on_host,
    prepare_inference,
    prepare_training,
)

__all__ = [
    "combine",
    "combine_backward",
    "experts_backward",
    "experts_forward",
    "get_ready",
    "grouped_mm",
    "logits",
    "makes_logits",
    "permute",
    "plan",
    "plan_on_host",
    "prepare_inference",
    "prepare_training",
]
