"""What the blocks of a verb's kernels share: tile tables, experts by rows, ticket counters (plan.cu's `tiles`).

An expert's rows are split evenly over as few tiles as can be. A kernel takes tiles of up to 256, 272, or 288 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.backends.cuda.kernels.planner import PLAN
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.kernel import launch

COUNTERS = 8


def tile_heights() -> list[int]:
    """The most rows of a tile, of each table: 256, 272, 288."""
    stated = constants(PLAN)
    return [stated["LOWEST_TILES"] + i * stated["TILES_STEP"] for i in range(stated["TABLES"])]


class Tables:
    """The tile tables of a verb, its experts by rows, and its ticket counters, all in one small piece of memory."""

    @staticmethod
    def size(rows: int, experts: int) -> int:
        """Bytes it needs."""
        return len(tile_heights()) * 16 * Tables.entries(rows, experts) + 4 * experts + 4 * COUNTERS

    @staticmethod
    def entries(rows: int, experts: int) -> int:
        """Entries of a table, 16 bytes each: the number of tiles, and every tile."""
        return 1 + rows // tile_heights()[0] + min(experts, rows)

    def __init__(self, offsets: Tensor, rows: int, memory: Tensor | None = None, ordered: bool = True):
        """Launch the kernel that fills it from the plan's offsets; the experts' order is for the weight gradients."""
        device, experts = offsets.get_device(), offsets.shape[0] - 1
        if memory is None:
            memory = torch.empty(self.size(rows, experts), dtype=torch.uint8, device=offsets.device)
        self.memory = memory
        first, size = memory.data_ptr(), 16 * self.entries(rows, experts)
        self._tables = {height: first + i * size for i, height in enumerate(tile_heights())}
        self.expert_order = first + len(self._tables) * size
        self._next_counter = self.expert_order + 4 * experts
        params = {
            "offsets": offsets, "table": tuple(self._tables.values()), "expert_order": self.expert_order,
            "counters": self._next_counter, "experts": experts, "counter_count": COUNTERS,
        }  # fmt: skip
        launch(PLAN, "tiles", device, params, blocks=len(self._tables) + ordered)

    def table(self, tile_rows: int) -> int:
        """The address of the table of tiles of up to so many rows: one of :func:`tile_heights`."""
        return self._tables[tile_rows]

    def counter(self) -> int:
        """The address of a counter that no other kernel of the verb uses."""
        self._next_counter += 4
        return self._next_counter - 4
