"""The plan of ids on the GPU, made by Rust on the host: one synchronisation, then everything on its way again.

The ids come over in the narrowest type, meanwhile Rust's threads wake, they sort, and of the plan half goes back: a
kernel makes the other half of it. Both kernels work on pinned memory in place (cuda/host_plan.cu).
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from moekern import _core
from moekern.backends.cuda import kernels
from moekern.backends.cuda.forward import on_device
from moekern.backends.cuda.program import launch

THREADS = 256  # of a block
MOST_STREAMS = 16  # whose memory is kept
_ID_TYPE = {1: 0, 2: 1, 4: 2}  # bytes of an id on the host -> u8, u16, i32


def id_bytes(num_experts: int) -> int:
    """Bytes of the narrowest id that can name every expert, and none."""
    return 1 if num_experts < 1 << 8 else 2 if num_experts < 1 << 16 else 4


class _Staging:
    """Pinned memory of one stream, used by one plan after the other.

    Every plan waits for its stream before it writes what the kernel of the plan before it reads.
    """

    def __init__(self, slots: int, num_experts: int):
        """Memory for plans up to these sizes."""
        self.slots, self.num_experts = slots, num_experts
        self.ids = torch.empty(4 * slots, dtype=torch.uint8, pin_memory=True, device="cpu")
        self.inverse = torch.empty(slots, dtype=torch.int32, pin_memory=True, device="cpu")
        self.offsets = torch.empty(num_experts + 1, dtype=torch.int32, pin_memory=True, device="cpu")


_staging: OrderedDict[tuple[int, int], _Staging] = OrderedDict()
_lock = threading.Lock()


def _memory(device: int, stream: torch.cuda.Stream, slots: int, num_experts: int) -> _Staging:
    """The stream's memory, grown to the sizes; memory that is given up is in nobody's use any more."""
    key = (device, stream.cuda_stream)
    found = _staging.get(key)
    if found is not None and found.slots >= slots and found.num_experts >= num_experts:
        _staging.move_to_end(key)
        return found
    if found is not None:
        stream.synchronize()
    elif len(_staging) >= MOST_STREAMS:
        torch.cuda.synchronize(device)
        _staging.clear()
    # Sizes grow in powers of two; a multiple of 16 bytes holds every array.
    _staging[key] = _Staging(max(1 << (slots - 1).bit_length(), 1024), max(1 << num_experts.bit_length(), 256))
    return _staging[key]


def plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, inverse and offsets on the device of the ids, which are contiguous and not empty."""
    device, slots = topk_ids.get_device(), topk_ids.numel()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "planner: got 'host' while a CUDA graph is being captured, where nothing can wait for the device; "
            "expected 'device', or a plan made before the capture"
        )
    order = torch.empty(slots, dtype=torch.int32, device=topk_ids.device)
    inverse, offsets = torch.empty_like(order), order.new_empty(num_experts + 1)
    width = id_bytes(num_experts)
    stream = torch.cuda.current_stream(device)
    with _lock, on_device(device):
        memory = _memory(device, stream, slots, num_experts)
        params = struct.pack(
            "<2Q4i", topk_ids.data_ptr(), memory.ids.data_ptr(), slots, num_experts,
            kernels.ID_TYPE[topk_ids.dtype], width,
        )  # fmt: skip
        narrow = kernels._function(device, "host_plan.cu", "narrow_ids", 0, ())
        spread = kernels._function(device, "host_plan.cu", "spread_plan", 0, ())
        launch(narrow, device, -(-slots * width // (16 * THREADS)), THREADS, 0, [], params)
        threads = torch.get_num_threads()
        _core.wake_planner(slots, threads)
        stream.synchronize()
        _core.half_plan(
            memory.ids.data_ptr(), _ID_TYPE[width], slots, num_experts, memory.inverse.data_ptr(),
            memory.offsets.data_ptr(), threads,
        )  # fmt: skip
        params = struct.pack(
            "<5Q2i", memory.inverse.data_ptr(), memory.offsets.data_ptr(), order.data_ptr(), inverse.data_ptr(),
            offsets.data_ptr(), slots, num_experts,
        )  # fmt: skip
        launch(spread, device, -(-slots // (4 * THREADS)), THREADS, 0, [], params)
    return order, inverse, offsets
