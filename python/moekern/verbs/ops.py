"""The verbs as torch operators: static shapes, a shape function each, and dispatch to a backend.

The operators carry no autograd of their own: :mod:`moekern.verbs.autograd` wraps them, which costs half of what
``register_autograd`` does per call. Every argument has been checked above this layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from moekern.backends.call import Form, PlanTensors, Weights, sizes_of

_PLAN = "plan(Tensor topk_ids, int num_experts, str backend) -> (Tensor, Tensor, Tensor)"
_PLAN_ON_HOST = "plan_on_host(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)"
# The order of moekern.backends.call, with the fields of `form` one by one.
_FORWARD = (
    "experts_forward(Tensor x, Tensor? scores, Tensor[] plan, Tensor?[] weights, str activation, bool transposed, "
    "bool interleaved, int top_k, bool save, str backend) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "experts_backward(Tensor dout, Tensor x, Tensor pre, Tensor? scores, Tensor[] plan, Tensor?[] weights, "
    "str activation, bool transposed, bool interleaved, int top_k, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_GROUPED_MM = "grouped_mm(Tensor a, Tensor b, Tensor offsets, str kind, str backend) -> Tensor"
_PERMUTE = "permute(Tensor x, Tensor[] plan, int top_k, str backend) -> Tensor"
_COMBINE = "combine(Tensor y, Tensor? weights, Tensor[] plan, int top_k, str backend) -> Tensor"
_COMBINE_BACKWARD = (
    "combine_backward(Tensor dout, Tensor y, Tensor? weights, Tensor[] plan, int top_k, bool[] needs, str backend) "
    "-> (Tensor, Tensor)"
)

_UNLESS_RECOMPUTING = "unless_recomputing(Tensor counts) -> Tensor"

_library: Any = torch.library.Library("moekern", "DEF")  # type: ignore[no-untyped-call]
for _schema in (_PLAN, _FORWARD, _BACKWARD, _GROUPED_MM, _PERMUTE, _COMBINE, _COMBINE_BACKWARD):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
# It waits for the device, which nothing in a CUDA graph may do.
_library.define(_PLAN_ON_HOST, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
# It looks who runs it, which a CUDA graph would fix for good. It returns what to add instead of adding, because
# selective checkpointing refuses operators that write to their arguments.
_library.define(_UNLESS_RECOMPUTING, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))

_modules: dict[str, ModuleType] = {}

# Private to torch, but there is no public way to ask.
_forward_mode_enabled = getattr(torch._C, "_is_fwd_grad_enabled", lambda: True)
_below_autograd = torch._C._after_ADInplaceOrView_keyset
_OLDER_BATCH = "Batched"
_DEVICES = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def backend_module(name: str) -> ModuleType:
    """The module of a backend, imported when first needed: CUDA brings CuPy with it."""
    module = _modules.get(name)
    if module is None:
        module = _modules[name] = importlib.import_module(f"moekern.backends.{name}")
    return module


def _plan(topk_ids: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return backend_module(backend).plan(topk_ids, num_experts)  # type: ignore[no-any-return]


def _plan_on_host(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return backend_module("cuda").plan_on_host(topk_ids, num_experts)  # type: ignore[no-any-return]


def _experts_forward(
    x: Tensor, scores: Tensor | None, plan: list[Tensor], weights: list[Any], *rest: Any
) -> tuple[Tensor, Tensor]:
    *form, save, backend = rest
    return backend_module(backend).experts_forward(  # type: ignore[no-any-return]
        x, scores, PlanTensors(*plan), Weights(*weights), Form(*form), save
    )


def _experts_backward(
    dout: Tensor, x: Tensor, pre: Tensor, scores: Tensor | None, plan: list[Tensor], weights: list[Any], *rest: Any
) -> tuple[Tensor, ...]:
    *form, needs, backend = rest
    return backend_module(backend).experts_backward(  # type: ignore[no-any-return]
        dout, x, pre, scores, PlanTensors(*plan), Weights(*weights), Form(*form), needs
    )


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, kind: str, backend: str) -> Tensor:
    return backend_module(backend).grouped_mm(a, b, offsets, kind)  # type: ignore[no-any-return]


def _permute(x: Tensor, plan: list[Tensor], top_k: int, backend: str) -> Tensor:
    return backend_module(backend).permute(x, plan, top_k)  # type: ignore[no-any-return]


def _combine(y: Tensor, weights: Tensor | None, plan: list[Tensor], top_k: int, backend: str) -> Tensor:
    return backend_module(backend).combine(y, weights, plan, top_k)  # type: ignore[no-any-return]


def _combine_backward(*args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return backend_module(args[-1]).combine_backward(*args[:-1])  # type: ignore[no-any-return]


def is_recomputing() -> bool:
    """Whether this forward pass is activation checkpointing's second one: it then runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _unless_recomputing(counts: Tensor) -> Tensor:
    """The tokens of each expert; zeros in a recomputation, whose first pass has counted them."""
    return torch.zeros_like(counts) if is_recomputing() else counts.clone()


def _unless_recomputing_shape(counts: Tensor) -> Tensor:
    return torch.empty_like(counts)


def _plan_shape(topk_ids: Tensor, num_experts: int, backend: str = "") -> tuple[Tensor, Tensor, Tensor]:
    slots = topk_ids.numel()
    return (
        topk_ids.new_empty(slots, dtype=torch.int32),
        topk_ids.new_empty(slots, dtype=torch.int32),
        topk_ids.new_empty(num_experts + 1, dtype=torch.int32),
    )


def _experts_forward_shape(
    x: Tensor, scores: Tensor | None, plan: list[Tensor], weights: list[Any], *rest: Any
) -> tuple[Tensor, Tensor]:
    *form, save, _backend = rest
    features = sizes_of(Weights(*weights), Form(*form))[3]
    return x.new_empty(x.shape), x.new_empty(plan[0].shape[0], features) if save else x.new_empty(0)


def _experts_backward_shape(
    dout: Tensor, x: Tensor, pre: Tensor, scores: Tensor | None, plan: list[Tensor], weights: list[Any], *rest: Any
) -> tuple[Tensor, ...]:
    *_form, needs, _backend = rest
    return tuple(
        t.new_empty(t.shape) if wanted and t is not None else x.new_empty(0)
        for t, wanted in zip((x, scores, *weights), needs, strict=True)
    )


def _grouped_mm_shape(a: Tensor, b: Tensor, offsets: Tensor, kind: str, backend: str) -> Tensor:
    if kind == "tn":
        return a.new_empty(offsets.shape[0] - 1, a.shape[1], b.shape[1])
    return a.new_empty(a.shape[0], b.shape[1 if kind == "nt" else 2])


def _permute_shape(x: Tensor, plan: list[Tensor], top_k: int, backend: str) -> Tensor:
    return x.new_empty(plan[1].shape[0], x.shape[1])


def _combine_shape(y: Tensor, weights: Tensor | None, plan: list[Tensor], top_k: int, backend: str) -> Tensor:
    return y.new_empty(y.shape[0] // top_k, y.shape[1])


def _combine_backward_shape(
    dout: Tensor,
    y: Tensor,
    weights: Tensor | None,
    plan: list[Tensor],
    top_k: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    dy = y.new_empty(y.shape) if needs[0] else y.new_empty(0)
    return dy, weights.new_empty(weights.shape) if needs[1] and weights is not None else y.new_empty(0)


def slice_by_slice(function: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The rule of ``vmap`` for any of the verbs: one call for each slice, so the same bits as without it.

    Kernels read memory by address, hence the copies of slices that are not contiguous.
    """
    if info.batch_size == 0:
        raise ValueError("moekern: got a vmapped dimension of size 0, expected at least 1")

    def slice_of(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)) and any(d is not None for d in dim):  # of a list of tensors
            return [slice_of(*pair, i) for pair in zip(arg, dim, strict=True)]
        return arg.select(dim, i).contiguous() if isinstance(arg, Tensor) and dim is not None else arg

    results = [function(*slice_of(args, in_dims, i)) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    parts = tuple(None if part[0] is None else torch.stack(part) for part in zip(*results, strict=True))
    return parts, tuple(None if part is None else 0 for part in parts)


def _older_level(t: Tensor) -> int:
    """The innermost of the older ``vmap`` that a tensor is a batch of, 0 for none."""
    level = 0  # asked of the tensor itself: a thread of autograd's does not know how many there are
    while torch._C._dispatch_keys(t).has(_OLDER_BATCH):
        level += 1
        t = torch._remove_batch_dim(t, level, 1, 0)
    return level


def _under_the_older_vmap(operator: Callable[..., Any], *args: Any) -> Any:
    """The rule of the ``vmap`` of ``is_grads_batched`` and ``vectorize=True``: its own takes no lists of tensors."""
    level = max(_older_level(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))

    def batches(size: int) -> Any:  # a tensor that is no batch is repeated so often
        return tree_map_only(Tensor, lambda t: torch._remove_batch_dim(t, level, size, 0), args)

    size = max(leaf.shape[0] for leaf in tree_leaves(batches(1)) if isinstance(leaf, Tensor))
    in_dims = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, args)
    out, _ = slice_by_slice(operator, SimpleNamespace(batch_size=size), in_dims, *batches(size))
    return tree_map_only(Tensor, lambda t: torch._add_batch_dim(t, 0, level), out)


def _has_tangent(arg: Any) -> bool:
    if isinstance(arg, list):
        return any(map(_has_tangent, arg))
    return isinstance(arg, Tensor) and arg.is_floating_point() and forward_ad.unpack_dual(arg).tangent is not None


def register(library: Any, name: str, kernel: Callable[..., Any], shape: Callable[..., Any]) -> None:
    """Give an operator its kernel and all its rules: shapes, both kinds of ``vmap``, and no silence about tangents.

    An operator is no place for derivatives here; what differentiates goes around it. One that is reached with a
    tangent all the same, as inside torch.compile, would drop it and so give a derivative of zero: it raises.
    """
    operator = getattr(torch.ops.moekern, name).default

    def refuse_tangents(keys: Any, *args: Any) -> Any:
        if getattr(forward_ad, "_current_level", 0) >= 0 and _forward_mode_enabled() and any(map(_has_tangent, args)):
            raise NotImplementedError(
                f"moekern::{name}: got a tensor with a tangent, expected none: forward-mode differentiation works "
                "through moekern's functions and modules, outside torch.compile"
            )
        below = keys & _below_autograd
        if below.highestPriorityTypeId() in _DEVICES:  # the kernel is next: to say so to torch converts all twice more
            return kernel(*args)
        return operator.redispatch(below, *args)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    library.impl(name, refuse_tangents, "Autograd", with_keyset=True)
    library.impl(name, partial(_under_the_older_vmap, operator), "Batched")
    torch.library.register_fake(f"moekern::{name}", shape, lib=library)
    torch.library.register_vmap(f"moekern::{name}", partial(slice_by_slice, operator), lib=library)


for _name, _kernel, _shape in (
    ("plan", _plan, _plan_shape),
    ("plan_on_host", _plan_on_host, _plan_shape),
    ("experts_forward", _experts_forward, _experts_forward_shape),
    ("experts_backward", _experts_backward, _experts_backward_shape),
    ("grouped_mm", _grouped_mm, _grouped_mm_shape),
    ("permute", _permute, _permute_shape),
    ("combine", _combine, _combine_shape),
    ("combine_backward", _combine_backward, _combine_backward_shape),
    ("unless_recomputing", _unless_recomputing, _unless_recomputing_shape),
):
    register(_library, _name, _kernel, _shape)

plan = torch.ops.moekern.plan.default
plan_on_host = torch.ops.moekern.plan_on_host.default
experts_forward = torch.ops.moekern.experts_forward.default
experts_backward = torch.ops.moekern.experts_backward.default
grouped_mm = torch.ops.moekern.grouped_mm.default
permute = torch.ops.moekern.permute.default
combine = torch.ops.moekern.combine.default
combine_backward = torch.ops.moekern.combine_backward.default
unless_recomputing = torch.ops.moekern.unless_recomputing.default

__all__ = [
    "backend_module",
    "combine",
    "combine_backward",
    "experts_backward",
    "experts_forward",
    "grouped_mm",
    "is_recomputing",
    "permute",
    "plan",
    "plan_on_host",
    "register",
    "slice_by_slice",
    "unless_recomputing",
]
