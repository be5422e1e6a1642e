"""The plan: which row of the sorted tokens belongs to which expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekern import _core
from moekern.backends.call import PlanTensors
from moekern.backends.codes import ID_TYPE
from moekern.verbs import checks, direct, ops
from moekern.verbs.backend import resolve


class PlanStats(NamedTuple):
    """The balance of a plan's load over the experts. A load is a number of slots; sentinels belong to no expert.

    Attributes:
        max_load: The largest load.
        mean_load: The mean load.
        entropy: Of the distribution of slots over experts, in nats: ``log(E)`` if all loads are equal, 0 if one expert
            has every slot.
        empty_experts: The number of experts without slots.
    """

    max_load: int
    mean_load: float
    entropy: float
    empty_experts: int


class Plan(NamedTuple):
    """Slots sorted by expert. slot = flat index ``t * top_k + k``; row = position after sorting.

    Attributes:
        order: int32 ``[S]``, row -> slot.
        inverse: int32 ``[S]``, slot -> row.
        offsets: int32 ``[E + 1]``; rows of expert e are ``offsets[e]:offsets[e + 1]``, sentinels come after the last.
        num_experts: E.
        top_k: K.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    num_experts: int
    top_k: int

    @property
    def counts(self) -> Tensor:
        """Rows of each expert, int32 ``[E]``."""
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device | str | int) -> Plan:
        """Copy the plan to another device. From the host to a GPU the copy is asynchronous; nothing waits.

        Args:
            device: As ``torch.Tensor.to`` takes it.
        """
        target = torch.empty(0, device=device).device  # with an index
        parts = (self.order, self.inverse, self.offsets)
        if target.type == "cuda" and self.order.is_cpu:
            order, inverse, offsets = (t.pin_memory().to(target, non_blocking=True) for t in parts)
        else:
            order, inverse, offsets = (t.to(target) for t in parts)
        return self._replace(order=order, inverse=inverse, offsets=offsets)

    def stats(self) -> PlanStats:
        """Load statistics. Copies the offsets to the host, so it waits for the device."""
        offsets = self.offsets.cpu()
        return PlanStats(*_core.plan_stats(offsets.data_ptr(), self.num_experts))

    def tiles(self, height: int, *, longest_first: bool = False) -> Tensor:
        """Cut each expert's rows into as few tiles as possible, evenly. Waits for the device.

        Args:
            height: The most rows of a tile, at least 1.
            longest_first: Order by decreasing number of rows instead of by expert, which balances threads that take one
                tile after the other.

        Returns:
            int32 ``[tiles, 3]`` on the host: expert, first row, number of rows (at least 1; the tiles of an expert
            differ by one at most).

        Raises:
            TypeError, ValueError: ``height`` is not an int or less than 1; ``longest_first`` is not a bool.
        """
        checks.is_int("height", height, 1, 2**31 - 1)
        checks.is_bool("longest_first", longest_first)
        offsets = self.offsets.cpu()
        slots = self.order.shape[0]
        capacity = slots // height + min(self.num_experts, slots)
        table = torch.empty(capacity, 3, dtype=torch.int32, device="cpu")
        count = _core.tiles(
            offsets.data_ptr(), self.num_experts, height, longest_first, table.data_ptr(), capacity
        )  # fmt: skip
        return table[:count]


def tensors_of(plan: Plan) -> PlanTensors:
    """The tensors of the plan, as the verbs take them."""
    return PlanTensors(plan.order, plan.inverse, plan.offsets)


PLANNERS = ("auto", "device", "host")


def plan(topk_ids: Tensor, num_experts: int, *, planner: str = "auto") -> Plan:
    """Sort the slots by expert, keeping slot order within an expert (a stable counting sort).

    Args:
        topk_ids: ``[T, K]`` int64, int32, uint8 or uint16; the chosen experts of every token. Ids outside
            ``0 .. num_experts - 1``, negative ones too, are sentinels: their slots sort last, in slot order.
        num_experts: E, at least 1.
        planner: Where to sort; the result is bitwise the same. ``"device"``: on the device of the ids. ``"host"``: by
            Rust on the host, also for ids on a GPU; this waits for the device once, so a CUDA graph cannot capture it.
            ``"auto"``, the default, is ``"device"``, which never waits for a GPU.

    Returns:
        A :class:`Plan` on the device of ``topk_ids``. Its shapes depend on shapes alone; nothing waits for a device
        unless ``planner`` is ``"host"``. On the host the result is bitwise the same for any number of threads; at most
        ``torch.get_num_threads()`` are used.

        If the host knows the routing in advance (replayed, or computed there), plan once from ids on the host and copy
        the plan to the GPU by :meth:`Plan.to`, for any number of calls of :func:`moekern.experts`.

    Raises:
        TypeError: ``topk_ids`` is not a dense integer tensor, or ``num_experts`` not an int.
        ValueError: ``topk_ids`` is not two-dimensional or has 2**31 slots or more; ``num_experts`` is less than 1;
            ``planner`` is unknown.
        RuntimeError: ``planner`` is ``"host"`` while a CUDA graph is being captured.
    """
    if type(topk_ids) is Tensor and type(num_experts) is int and direct.undisturbed():
        planned = _plan_eagerly(topk_ids, num_experts, planner)
        if planned is not None:
            return planned
    checks.topk_ids("topk_ids", topk_ids)
    checks.is_int("num_experts", num_experts, 1, _MOST_EXPERTS)
    checks.one_of("planner", planner, PLANNERS)
    # Kernels read ids by address, but a router's choice can be a slice of the sorted experts.
    ids = topk_ids.contiguous()
    if planner == "host" and ids.is_cuda:
        order, inverse, offsets = ops.plan_on_host(ids, num_experts)
    else:
        order, inverse, offsets = ops.plan(ids, num_experts, resolve(ids.device.type))
    return Plan(order, inverse, offsets, num_experts, topk_ids.shape[1])


# Below: the path without the dispatcher. For a few slots an operator costs three times the work: 12 us against 4.

_MOST_EXPERTS = 2**31 - 3  # offsets are counted in int32 too
_MANY_SLOTS = 1 << 14  # from here on the cost of the backend's own function no longer counts
_empty_int32 = torch.empty(0, dtype=torch.int32, device="cpu").new_empty  # half the cost of torch.empty
_get_num_threads = torch.get_num_threads


def _plan_eagerly(topk_ids: Tensor, num_experts: int, planner: str) -> Plan | None:
    """The plan; None if an argument is wrong, or needs the path with checks."""
    id_type = ID_TYPE.get(topk_ids.dtype)
    if type(planner) is not str or planner not in PLANNERS:
        return None
    if id_type is None or topk_ids.ndim != 2 or not 0 < num_experts < _MOST_EXPERTS:
        return None
    if not (topk_ids.is_cuda or topk_ids.is_cpu) or topk_ids.layout != torch.strided:
        return None
    topk_ids = topk_ids.contiguous()  # a router's choice is a slice of the sorted experts
    slots = topk_ids.numel()
    address = topk_ids.data_ptr()
    if slots >= 2**31 or address % topk_ids.element_size():
        return None
    if topk_ids.is_cuda and (planner == "host" or resolve("cuda") == "cuda"):
        module = ops.backend_module("cuda")
        order, inverse, offsets = (module.plan_on_host if planner == "host" else module.plan)(topk_ids, num_experts)
        return Plan(order, inverse, offsets, num_experts, topk_ids.shape[1])
    if not topk_ids.is_cpu or resolve("cpu") != "cpu":
        return None
    if slots >= _MANY_SLOTS:
        order, inverse, offsets = ops.backend_module("cpu").plan(topk_ids, num_experts)
        return Plan(order, inverse, offsets, num_experts, topk_ids.shape[1])
    order, inverse, offsets = _empty_int32(slots), _empty_int32(slots), _empty_int32(num_experts + 1)
    _core.plan(
        address, id_type, slots, num_experts,
        order.data_ptr(), inverse.data_ptr(), offsets.data_ptr(), _get_num_threads(),
    )  # fmt: skip
    return Plan(order, inverse, offsets, num_experts, topk_ids.shape[1])
