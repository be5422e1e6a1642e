"""The plan of ids on the GPU, made by Rust on the host: one synchronisation, then everything on its way again.

The ids come over in the narrowest type, Rust's threads rank them as they arrive, and what goes back is two bytes a slot
and a small table, of which a kernel makes the plan (cuda/host_plan.cu, rust/core/src/plan/ranks.rs). Both kernels work
on pinned memory in place. Rust launches them, and calls back for the outputs while the ids are on their way.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cache, lru_cache

import torch
from torch import Tensor

from moekern import _core
from moekern.backends.call import PlanTensors
from moekern.backends.codes import ID_TYPE
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.launch.device import on_device, stream_of
from moekern.backends.cuda.launch.kernel import handle

MOST_STREAMS = 16  # whose memory is kept
_must_not_wait = getattr(torch._C, "_cuda_get_sync_debug_mode", torch.cuda.get_sync_debug_mode)
_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)


class _Staging:
    """Pinned memory of one stream, used by one plan after the other.

    A plan writes to it only when the ids are there, hence when the stream is done with the kernels of the plan before.
    """

    def __init__(self, marks: int, size: int):
        """Memory for plans up to these sizes."""
        self.sizes = marks, size
        self.marks = torch.zeros(marks, dtype=torch.int32, pin_memory=True, device="cpu")
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu")
        self.marks_at, self.memory_at = self.marks.data_ptr(), self.memory.data_ptr()
        self.plans = 0

    def next_epoch(self) -> int:
        """What the marks of the next plan become: different from that of the plan before it."""
        self.plans = self.plans % 0x7FFFFFFF + 1
        return self.plans


class _Device:
    """The memory of a device's streams. Its lock is held while a plan waits: devices do not wait for each other."""

    def __init__(self) -> None:
        """Start without any."""
        self.lock = threading.Lock()
        self.staging: OrderedDict[int, _Staging] = OrderedDict()


_devices: dict[int, _Device] = {}
_memory_of = lru_cache(maxsize=256)(_core.cuda_plan_memory)


@cache
def _kernels(device: int) -> tuple[int, int]:
    source = KernelSource("host_plan.cu")
    return handle(source, "narrow_ids", device), handle(source, "spread_plan", device)


def _memory(staging: OrderedDict[int, _Staging], device: int, stream: int, slots: int, num_experts: int) -> _Staging:
    """The stream's memory, grown to the sizes; memory that is given up is in nobody's use any more."""
    marks, size = _memory_of(slots, num_experts)
    found = staging.get(stream)
    if found is not None and found.sizes[0] >= marks and found.sizes[1] >= size:
        staging.move_to_end(stream)
        return found
    if found is not None:
        torch.cuda.current_stream(device).synchronize()
    elif len(staging) >= MOST_STREAMS:
        torch.cuda.synchronize(device)
        staging.clear()
    # Sizes grow in powers of two; a multiple of 16 bytes holds every array.
    staging[stream] = _Staging(1 << marks.bit_length(), max(1 << (size - 1).bit_length(), 1 << 14))
    return staging[stream]


def plan(topk_ids: Tensor, num_experts: int) -> PlanTensors:
    """Order, inverse and offsets on the device of the ids, which are contiguous and not empty."""
    device, slots = topk_ids.get_device(), topk_ids.numel()
    made: list[Tensor] = []

    def allocate() -> tuple[int, int, int]:
        order = topk_ids.new_empty(slots, dtype=torch.int32)
        inverse, offsets = order.new_empty(slots), order.new_empty(num_experts + 1)
        made.extend((order, inverse, offsets))
        return order.data_ptr(), inverse.data_ptr(), offsets.data_ptr()

    with on_device(device):  # whose stream is asked
        if _is_capturing():
            raise RuntimeError(
                "planner: got 'host' while a CUDA graph is being captured, where nothing can wait for the device; "
                "expected 'device', or a plan made before the capture"
            )
        if _must_not_wait():  # torch says so, where it is to be said
            torch.cuda.current_stream(device).synchronize()
        owner = _devices.get(device) or _devices.setdefault(device, _Device())
        with owner.lock:
            stream = stream_of(device)
            staging = _memory(owner.staging, device, stream, slots, num_experts)
            _core.cuda_plan(
                *_kernels(device), device, stream, staging.marks_at, staging.next_epoch(), staging.memory_at,
                topk_ids.data_ptr(), ID_TYPE[topk_ids.dtype], slots, num_experts, torch.get_num_threads(),
                allocate,
            )  # fmt: skip
    return PlanTensors(*made)
