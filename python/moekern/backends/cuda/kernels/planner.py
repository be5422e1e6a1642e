"""The planner: parameters and launches of plan.cu's `plan_count` and `plan_scatter`."""

from __future__ import annotations

from torch import Tensor

from moekern.backends.codes import ID_TYPE
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import MOST_EXPERTS
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.kernel import launch

PLAN = KernelSource("plan.cu")
ONE_BLOCK_SLOTS = 4096  # up to here one launch of one block
MOST_CHUNKS = 128


def _chunks(slots: int) -> tuple[int, int]:
    if slots <= ONE_BLOCK_SLOTS:
        return 1, slots
    size = max(2048, -(-slots // MOST_CHUNKS))
    size = -(-size // 1024) * 1024
    return -(-slots // size), size


def plan_counts(slots: int, experts: int) -> int:
    """int32 words the planner needs to work in."""
    chunks, _ = _chunks(slots)
    return chunks * (experts + 1) if chunks > 1 else 0


def plan(topk_ids: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, counts: Tensor) -> None:
    """Fill a plan, see :func:`moekern.backends.reference.plan`; `counts` has :func:`plan_counts` words."""
    device, slots, experts = topk_ids.get_device(), topk_ids.numel(), offsets.shape[0] - 1
    buckets = experts + 1
    chunks, size = _chunks(slots)
    warps = constants(PLAN)["WARPS"]

    def scratch(buckets: int) -> int:
        return 4 * (2 * buckets + warps + warps * buckets)

    params = {
        "ids": topk_ids, "counts": counts, "order": order, "inverse": inverse, "offsets": offsets, "slots": slots,
        "experts": experts, "chunks": chunks, "chunk_slots": size, "id_type": ID_TYPE[topk_ids.dtype],
    }  # fmt: skip
    if chunks > 1:
        launch(PLAN, "plan_count", device, params, blocks=chunks, shared=4 * buckets)
    launch(
        PLAN, "plan_scatter", device, params, blocks=chunks, shared=scratch(buckets),
        most_shared=scratch(MOST_EXPERTS + 1),
    )  # fmt: skip
