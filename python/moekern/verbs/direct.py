"""The short way of an eager call: around the argument checks if a call like it has passed them, around the dispatcher.

For a handful of tokens the checks, the dispatcher and a Function in the form that torch.func needs cost several times
the launches. So a call's signature, which is everything the checks read, is remembered once it has been accepted; and
while nothing observes or transforms the call (see :func:`undisturbed`) the backend's function is called itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from moekern.backends.call import Weights
from moekern.verbs.backend import in_eager_call

PLAIN = frozenset((Tensor, torch.nn.Parameter))  # no subclass: those see operators
MOST_SIGNATURES = 1024

_is_compiling = torch.compiler.is_compiling
# Private to torch, but there is no public way to ask; without them every call takes the long way.
_c: Any = torch._C
_dispatch_modes = getattr(_c, "_len_torch_dispatch_stack", None)
_function_modes = getattr(_c, "_is_torch_function_mode_enabled", None)
_functorch_level = getattr(getattr(_c, "_functorch", None), "peek_interpreter_stack", None)
_tracing_state = getattr(_c, "_get_tracing_state", None)
_autocast = getattr(_c, "_is_any_autocast_enabled", None)
_vmap_mode = _c._parse_dispatch_key("VmapMode")
_can_ask = None not in (_dispatch_modes, _function_modes, _functorch_level, _tracing_state, _autocast)


def undisturbed() -> bool:
    """Whether nothing would see an operator that is gone around: no compiler, trace, mode, transform or profiler."""
    return (
        not _is_compiling()
        and _can_ask
        and _dispatch_modes() == 0  # type: ignore[misc]
        and not _function_modes()  # type: ignore[misc]
        and _functorch_level() is None  # type: ignore[misc]
        and _tracing_state() is None  # type: ignore[misc]
        and getattr(forward_ad, "_current_level", -1) < 0
        and not getattr(profiler, "_is_profiler_enabled", True)
    )


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is under way.

    What wraps a tensor then may hide that a gradient is wanted of it.
    """
    return not _is_compiling() and (
        _functorch_level is None or _functorch_level() is not None or getattr(forward_ad, "_current_level", -1) >= 0
    )


def batched_gradients() -> bool:
    """Whether a backward pass runs on batches of gradients: ``is_grads_batched``, ``jacobian(vectorize=True)``.

    That is an older ``vmap`` than that of torch.func, in which the graph of a Function is lost.
    """
    return not _is_compiling() and _c._dispatch_tls_local_include_set().has(_vmap_mode)  # type: ignore[no-any-return]


def refuse_batched_graph(verb: str) -> None:
    """Raises NotImplementedError where the second derivatives of batched gradients would come out as zero."""
    if torch.is_grad_enabled() and batched_gradients():
        raise NotImplementedError(
            f"moekern.{verb}: got batches of gradients with create_graph=True (is_grads_batched or vectorize=True), "
            "whose graph torch would lose; use torch.func (vjp with vmap, jacrev, hessian), which is differentiable"
        )


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors whose memory holds their values."""
    return all(t is None or (type(t) in PLAIN and not t.is_neg()) for t in tensors)


def signature(
    x: Tensor,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    weights: Weights,
    activation: str,
    transposed: object,
    interleaved: object,
    plan: Any,
) -> tuple[Any, ...] | None:
    """Everything that the checks of :func:`moekern.experts` read, or None for a call that has to take the long way.

    Written out, without loops: this runs on every call. Arguments of wrong kinds lack an attribute or have no hash.
    """
    if not undisturbed() or _autocast():  # type: ignore[misc]
        return None
    if type(transposed) is not bool or type(interleaved) is not bool:  # 1 == True has the same hash
        return None
    w_gate_up, w_down, b_gate_up, b_down = weights
    try:
        if not (
            type(x) in PLAIN and type(w_gate_up) in PLAIN and type(w_down) in PLAIN
            and x.is_contiguous() and w_gate_up.is_contiguous() and w_down.is_contiguous()
        ) or x.is_neg() or w_gate_up.is_neg() or w_down.is_neg():  # fmt: skip
            return None
        x.data_ptr(), w_gate_up.data_ptr(), w_down.data_ptr()  # what a transform left behind and wraps no memory raises
        if plan is None:
            if type(topk_ids) not in PLAIN:
                return None
            routing: Any = (topk_ids.shape, topk_ids.dtype, topk_ids.device)  # type: ignore[union-attr]
            topk_ids.data_ptr()  # type: ignore[union-attr]
        else:
            routing = (
                type(plan),
                plan.num_experts,
                plan.top_k,
                *_kind(plan.order),
                *_kind(plan.inverse),
                *_kind(plan.offsets),
            )
        return (
            x.shape, x.dtype, x.device, w_gate_up.shape, w_gate_up.dtype, w_gate_up.device,
            w_down.shape, w_down.dtype, w_down.device, routing,
            None if topk_weights is None else _kind(topk_weights),
            None if b_gate_up is None else _kind(b_gate_up),
            None if b_down is None else _kind(b_down),
            activation, transposed, interleaved, in_eager_call(),
        )  # fmt: skip
    except (AttributeError, TypeError, RuntimeError):
        return None


def _kind(t: Tensor) -> tuple[Any, ...]:
    if type(t) not in PLAIN or not t.is_contiguous() or t.is_neg():
        raise TypeError
    t.data_ptr()
    return t.shape, t.dtype, t.device


class Accepted:
    """What accepted calls are remembered as, by signature; as many as are worth keeping."""

    def __init__(self, most: int = MOST_SIGNATURES):
        """Start with none."""
        self._calls: dict[tuple[Any, ...], Any] = {}
        self._most = most

    def get(self, key: tuple[Any, ...] | None) -> Any:
        """What was remembered under the signature, or None."""
        try:
            return None if key is None else self._calls.get(key)
        except TypeError:  # an argument without hash
            return None

    def remember(self, key: tuple[Any, ...], call: Any) -> None:
        """Remember an accepted call; all are forgotten when there are too many, such as one for every token count."""
        if len(self._calls) >= self._most:
            self._calls.clear()
        self._calls[key] = call
