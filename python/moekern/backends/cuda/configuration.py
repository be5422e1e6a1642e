"""The choice of kernels for a call: a pure function of shapes, dtype and GPU, whose result can be printed.

Nothing is tuned at run time. Nothing depends on the routing, which the host never reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_EXPERTS = 1024  # in the planner and the tile table each expert has one thread of a block

# With fewer rows per expert on average, four stages and half-tile stores beat three stages and whole-tile stores,
# and the consumers' epilogue in the up projection beats that of a warpgroup of its own.
FEW_ROWS = 600
# With fewer rows the consumers' epilogue is faster even if it saves the pre-activation.
FEW_ROWS_SAVING = 450
# Between these means most experts fit a tile of 288 rows, and many have more than the 256 or 272 rows of the other
# forms, which then need two tiles.
ROWS_OF_TILES_288 = (240, 288)


@dataclass(frozen=True)
class Configuration:
    """The choice for one verb on one device; `reason` says why the torch path was chosen, and is empty otherwise."""

    path: str  # "hopper" or "torch"
    up_by_consumers: bool = False  # the up projection's consumers run its epilogue, where it saves no pre-activation …
    saving_up_by_consumers: bool = False  # … and where it does
    tiles_288: bool = False  # most experts fit a tile of 288 rows: the GEMMs on tokens have tiles of up to so many
    stages: int = 3  # of the down projection's pipeline
    store_rows: int = 256  # rows of one of its stores
    wgrad_stages: int = 3  # of the weight gradients' pipeline
    combine_beside: bool = True  # the backward's combine may overlap the weight gradient (backward.py)
    reason: str = ""

    @property
    def split_tile_rows(self) -> int:
        """The most rows of a tile in the kernels whose blocks split its rows: up.cu and dh.cu."""
        return 288 if self.tiles_288 else 272

    def __str__(self) -> str:
        if self.path == "torch":
            return f"torch ({self.reason})"
        up = "the consumers' epilogue" if self.up_by_consumers else "an epilogue warpgroup"
        up += " unless it saves" if self.up_by_consumers and not self.saving_up_by_consumers else ""
        down = "tiles of 288 rows" if self.tiles_288 else f"{self.stages} stages, stores of {self.store_rows} rows"
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
        tiles_288 = ROWS_OF_TILES_288[0] * experts <= slots <= ROWS_OF_TILES_288[1] * experts
        return Configuration(
            "hopper", up_by_consumers=True, saving_up_by_consumers=slots < FEW_ROWS_SAVING * experts,
            tiles_288=tiles_288, stages=4, store_rows=128, wgrad_stages=4,
        )  # fmt: skip
    return Configuration("hopper")
