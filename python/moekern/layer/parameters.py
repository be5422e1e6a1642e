"""The parameters of a layer, as modules with the names of transformers' MoE blocks: router, experts, shared expert."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.call import Weights
from moekern.backends.observers import forward_mode
from moekern.functional.experts import experts, grouped_mlp
from moekern.functional.plan import Plan
from moekern.verbs import direct, ops
from moekern.verbs.autograd import Sliced
from moekern.verbs.backend import current

_HALF = (torch.bfloat16, torch.float16)


def _uniform(*parameters: Tensor | None, inputs: int) -> None:
    """Values as nn.Linear's initial ones: uniform within one over the square root of the inputs.

    Drawn in float32 and rounded once: a draw in half precision has few possible values, whose mean is not zero.
    """
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        for parameter in parameters:
            if parameter is None:
                continue
            if parameter.dtype not in _HALF or parameter.is_meta:
                parameter.uniform_(-bound, bound)
                continue
            # One expert at a time, to save float32 memory; a DTensor cannot be filled in part.
            for part in parameter if parameter.ndim == 3 and type(parameter) in direct.PLAIN else (parameter,):
                part.copy_(torch.empty_like(part, dtype=torch.float32).uniform_(-bound, bound))


def local(weight: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiably; any other tensor as it is."""
    if type(weight) in direct.PLAIN:  # a failing hasattr is slower
        return weight
    return weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[no-any-return]


def whole(weight: Tensor, name: str) -> Tensor:
    """A replicated DTensor as this rank's tensor, differentiably; any other tensor as it is.

    Raises:
        ValueError: It is sharded: the layer would compute with a part as if it were the whole.
    """
    if type(weight) in direct.PLAIN or not hasattr(weight, "to_local"):
        return weight
    mine = local(weight)
    placements: Any = getattr(weight, "placements", ())
    if mine.shape != weight.shape or any(p.is_partial() for p in placements):
        raise ValueError(
            f"{name}: got a DTensor placed as {', '.join(map(str, placements))}, this rank's part of which has shape "
            f"{tuple(mine.shape)}; expected a replicated one, {tuple(weight.shape)}: fully_shard gathers weights, "
            "moekern.grouped_mlp computes experts that are split over ranks"
        )
    return mine


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32, of half-precision CUDA tensors that nothing observes."""
    return ops.backend_module("cuda").logits(x, weight)  # type: ignore[no-any-return]


class _WideLinear(Sliced):
    """``x @ weight.T`` in float32, of half-precision CUDA tensors: exact products, without a float32 copy of x."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight.mT, out_dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dout = dout.to(x.dtype)
        return dout @ weight if ctx.needs_input_grad[0] else None, dout.mT @ x if ctx.needs_input_grad[1] else None


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32, differentiable any number of times, from operators that can be observed."""
    if x.is_cuda and x.dtype in _HALF and not forward_mode():
        return _WideLinear.apply(x, weight)  # type: ignore[no-any-return]
    return nn.functional.linear(x.float(), weight.float())


class _EagerWideLinear(torch.autograd.Function):
    """The same without ``setup_context``, which costs 40 us per call and only torch.func needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _wide_product(x, weight)

    backward = staticmethod(_WideLinear.backward)


class Router(nn.Module):
    """The linear map from tokens to expert logits.

    ``weight`` is ``[E, H]``, ``bias`` ``[E]`` or None. With ``selection_bias`` there is a float32 buffer
    ``e_score_correction_bias`` ``[E]``, added to the scores for choosing only. It stays float32 if the module is cast:
    its steps are below the resolution of half precision.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
        selection_bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.e_score_correction_bias: Tensor | None
        self._tokens_since_update: Tensor | None = None
        buffer = torch.zeros(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", buffer)
        if selection_bias:
            self._tokens_since_update = torch.zeros(num_experts, device=device, dtype=torch.int64)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small uniform weights, as nn.Linear's, so that the first routing is nearly random."""
        _uniform(self.weight, inputs=self.weight.shape[1])
        with torch.no_grad():
            for tensor in (self.bias, self.e_score_correction_bias, self.tokens_since_update):
                if tensor is not None:
                    tensor.zero_()

    @property
    def tokens_since_update(self) -> Tensor | None:
        """Tokens that each expert got in training since the latest update of the selection bias, int64 ``[E]``.

        On the device of that bias; after the meta device it starts from zero. It is no buffer, because
        DistributedDataParallel would overwrite it with that of rank 0.
        """
        counts, bias = self._tokens_since_update, self._buffers.get("e_score_correction_bias")
        if counts is not None and bias is not None and counts.device != bias.device:
            counts = torch.zeros_like(counts, device=bias.device) if counts.is_meta else counts.to(bias.device)
            self._tokens_since_update = counts
        return counts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        correction, counts = self._buffers.get("e_score_correction_bias"), self.tokens_since_update
        super()._apply(fn, recurse)
        if correction is not None:
            moved = self._buffers["e_score_correction_bias"]
            assert moved is not None
            if moved.dtype != torch.float32:
                self._buffers["e_score_correction_bias"] = (
                    torch.empty_like(moved, dtype=torch.float32) if correction.is_meta else correction.to(moved.device)
                )
        if counts is not None:
            there = fn(counts)  # after `to_empty`, unwritten memory
            with torch.no_grad():
                self._tokens_since_update = there.zero_() if counts.is_meta else there.copy_(counts)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.keep_bias_wide()  # load_state_dict(assign=True) keeps the dtype of the checkpoint

    def keep_bias_wide(self) -> None:
        """Make the selection bias float32 again after another tensor replaced it."""
        bias = self._buffers.get("e_score_correction_bias")
        if bias is not None and bias.dtype != torch.float32:
            self._buffers["e_score_correction_bias"] = bias.to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[T, E]`` of tokens ``[T, H]``, computed in float32 under autocast too (float64 for float64)."""
        weight, own_bias = whole(self.weight, "gate.weight"), self.bias
        bias = None if own_bias is None else whole(own_bias, "gate.bias")
        if x.is_cuda and x.dtype in _HALF and weight.dtype == x.dtype and not torch.compiler.is_compiling():
            differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
            directly = direct.undisturbed() and direct.plain(x, weight) and current() in ("auto", "cuda")
            if not directly:
                logits = wide_linear(x, weight)
            else:
                logits = (_EagerWideLinear.apply if differentiable else _wide_product)(x, weight)
            return logits if bias is None else logits + bias.float()
        wide = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them."""
        biased = ", selection_bias=True" if self.e_score_correction_bias is not None else ""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}{biased}"


class Experts(nn.Module):
    """The experts' weights, in the layout and under the names of Hugging Face transformers.

    ``gate_up_proj`` ``[E, 2I, H]`` (gate rows, then up rows; ``[E, I, H]`` without gate), ``down_proj`` ``[E, H, I]``,
    ``gate_up_proj_bias`` ``[E, 2I]`` and ``down_proj_bias`` ``[E, H]`` or None. With `fused` experts, which together
    are a shared expert, all have E + fused instead of E.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        activation: str,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
        fused: int = 0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fused = fused
        num_experts += fused
        width = intermediate_size * (2 if ACTIVATIONS[activation].gated else 1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(num_experts, width, hidden_size)
        self.down_proj = parameter(num_experts, hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(num_experts, width) if bias else None
        self.down_proj_bias = parameter(num_experts, hidden_size) if bias else None
        self.reset_parameters()
        self._get_ready()

    def _get_ready(self) -> None:
        """A layer on a GPU imports the modules that its first call needs."""
        weight = self.gate_up_proj
        if type(weight) in direct.PLAIN and weight.is_cuda and current() in ("auto", "cuda"):
            ops.backend_module("cuda").get_ready(weight.get_device())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self._get_ready()
        return self

    def reset_parameters(self) -> None:
        """Initialise each expert as a pair of nn.Linear, the fused ones as one shared expert of their total width."""
        _uniform(self.gate_up_proj, self.gate_up_proj_bias, inputs=self.gate_up_proj.shape[2])
        _uniform(self.down_proj, self.down_proj_bias, inputs=self.down_proj.shape[2])
        if self.fused:
            with torch.no_grad():
                down = self.down_proj
                routed, fused = down.new_ones(len(down) - self.fused, 1, 1), down.new_ones(self.fused, 1, 1)
                down.mul_(torch.cat((routed, fused * self.fused**-0.5)))  # a DTensor cannot be filled in part

    @property
    def projections(self) -> Weights:
        """The weights and biases."""
        b_up, b_down = self.gate_up_proj_bias, self.down_proj_bias
        return Weights(
            whole(self.gate_up_proj, "experts.gate_up_proj"),
            whole(self.down_proj, "experts.down_proj"),
            None if b_up is None else whole(b_up, "experts.gate_up_proj_bias"),
            None if b_down is None else whole(b_down, "experts.down_proj_bias"),
        )

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        plan: Plan | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Run tokens through their chosen experts; the layer calls this as a module, so that hooks and wrappers act.

        Args:
            x: ``[T, H]``.
            topk_ids, topk_weights, plan: See :func:`moekern.experts`.
            offsets: ``[E + 1]``; instead of these, for rows that are sorted by expert: see :func:`moekern.grouped_mlp`.

        Returns:
            ``[T, H]``.
        """
        if offsets is not None:
            return grouped_mlp(x, offsets, *self.projections, activation=self.activation)
        return experts(x, topk_ids, topk_weights, *self.projections, activation=self.activation, plan=plan)

    def extra_repr(self) -> str:
        """Sizes and activation."""
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        fused = f", fused={self.fused}" if self.fused else ""
        return (
            f"num_experts={num_experts - self.fused}{fused}, hidden_size={hidden_size}, "
            f"intermediate_size={intermediate_size}, "
            f"activation={self.activation!r}, bias={self.down_proj_bias is not None}"
        )


_any_global_hook = getattr(
    torch.nn.modules.module, "_has_any_global_hook", lambda: True
)  # private: no public way to ask


def is_ordinary(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs its class's forward and nothing else.

    It is not another module or a wrapper of one, its forward is not replaced, and it has no hooks, which pruning, old
    weight norms, offloading and sharding use; a parametrization changes the class.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            or _any_global_hook()
        )
    )  # fmt: skip


def inner(module: nn.Module, kind: type[nn.Module]) -> Any:
    """The module of this kind within wrappers that keep the wrapped module as ``base_layer``, as peft's do."""
    while not isinstance(module, kind) and "base_layer" in module._modules:
        module = module._modules["base_layer"]  # type: ignore[assignment]
    return module


class SharedExpert(nn.Module):
    """The dense MLP for every token: ``gate_proj``, ``up_proj``, ``down_proj`` (without a gate: the last two)."""

    def __init__(
        self, hidden_size: int, size: int, activation: str, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.gate_proj = linear(hidden_size, size) if self.activation.gated else None
        self.up_proj = linear(hidden_size, size)
        self.down_proj = linear(size, hidden_size)

    def reset_parameters(self) -> None:
        """Initialise as nn.Linear does."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if projection is not None:
                projection.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, H]``."""
        up = self.up_proj(x)
        a = (
            self.activation.forward(up, None)
            if self.gate_proj is None
            else self.activation.forward(self.gate_proj(x), up)
        )
        return self.down_proj(a)  # type: ignore[no-any-return]
