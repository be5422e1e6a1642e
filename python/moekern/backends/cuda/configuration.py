"""The choice of kernels for a call: a pure function of shapes, dtype and GPU, whose result can be printed.

Nothing is tuned at run time. Nothing depends on the routing, which the host never reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_EXPERTS = 1024  # in the planner and the tile table each expert has one thread of a block

# With fewer rows per expert on average, four stages and consumers' stores beat three stages and whole-tile stores.
FEW_ROWS = 600
# With fewer rows, the up projection's form for few rows is faster even if it saves the pre-activation.
FEW_ROWS_SAVED = 450
# Between these means most experts fit a tile of 288 rows, and many have more than the 256 or 272 rows of the other
# forms, which then need two tiles.
ONE_TILE = (240, 288)


@dataclass(frozen=True)
class Configuration:
    """The choice for one verb on one device; `reason` says why the torch path was chosen, and is empty otherwise."""

    path: str  # "hopper" or "torch"
    few_rows: bool = False  # few rows per expert on average: the up projection's form for that, in inference
    few_saved: bool = False  # so few that the up projection takes this form in training too
    one_tile: bool = False  # most experts fit a tile of 288 rows: the forms of the other GEMMs on tokens for that
    stages: int = 3  # of the down projection's pipeline
    store_rows: int = 256  # rows of one of its stores
    wgrad_stages: int = 3  # of the weight gradients' pipeline
    combine_beside: bool = True  # the backward's combine may overlap the weight gradient (backward.py)
    reason: str = ""

    def __str__(self) -> str:
        if self.path == "torch":
            return f"torch ({self.reason})"
        up = "the consumers' epilogue" if self.few_rows else "an epilogue warpgroup"
        up += " unless it saves" if self.few_rows and not self.few_saved else ""
        down = "tiles of 288 rows" if self.one_tile else f"{self.stages} stages, stores of {self.store_rows} rows"
        return f"hopper: up with {up}; down with {down}; weight gradients with {self.wgrad_stages} stages"


def choose(
    dtype: torch.dtype,
    capability: tuple[int, int],
    slots: int,
    experts: int,
    hidden: int,
    inter: int,
    aligned: bool = True,
) -> Configuration:
    """Choose the kernels for a call.

    Args:
        dtype: Of the activations and weights.
        capability: Compute capability of the GPU.
        slots, experts: S and E; their ratio decides between many and few rows per expert.
        hidden, inter: H and I (for grouped_mm: the two matrix dimensions).
        aligned: Whether all tensors start at multiples of 16 bytes.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return Configuration("torch", reason=f"the Hopper kernels compute in bfloat16 and float16, not {dtype}")
    if capability != (9, 0):
        found = ".".join(map(str, capability))
        return Configuration("torch", reason=f"kernels exist for compute capability 9.0 (Hopper), this GPU has {found}")
    if hidden % 8 or inter % 8:
        return Configuration(
            "torch", reason=f"the Hopper kernels need multiples of 8, not sizes of {hidden} and {inter}"
        )
    if experts > MOST_EXPERTS:
        return Configuration("torch", reason=f"the Hopper kernels serve up to {MOST_EXPERTS} experts, not {experts}")
    if not aligned:
        return Configuration("torch", reason="the Hopper kernels need tensors that start at multiples of 16 bytes")
    if slots < FEW_ROWS * experts:
        one_tile = ONE_TILE[0] * experts <= slots <= ONE_TILE[1] * experts
        return Configuration(
            "hopper", few_rows=True, few_saved=slots < FEW_ROWS_SAVED * experts, one_tile=one_tile,
            stages=4, store_rows=128, wgrad_stages=4,
        )  # fmt: skip
    return Configuration("hopper")
