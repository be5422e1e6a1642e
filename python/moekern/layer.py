"""The layer: a router and its experts, called like the dense MLP it replaces."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekern import checks, functional, router
from moekern.activations import ACTIVATIONS
from moekern.plan import plan


class Routing(NamedTuple):
    """What the router decided in one forward pass.

    Attributes:
        logits: ``[T, E]`` float32, part of the autograd graph.
        tokens_per_expert: ``[E]`` int32.
    """

    logits: Tensor
    tokens_per_expert: Tensor


class Router(nn.Module):
    """The linear map from tokens to expert logits; ``weight`` is ``[E, H]``, ``bias`` ``[E]`` or None."""

    def __init__(
        self, hidden_size: int, num_experts: int, bias: bool, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small uniform weights, as nn.Linear starts with, so that the first routing is near random."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[T, E]`` in float32 of tokens ``[T, H]``."""
        return nn.functional.linear(x, self.weight, self.bias).float()

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class Experts(nn.Module):
    """The experts' weights, in the layout and under the names of Hugging Face transformers.

    ``gate_up_proj`` ``[E, 2I, H]`` (gate rows, then up rows; ``[E, I, H]`` without gate), ``down_proj`` ``[E, H, I]``,
    ``gate_up_proj_bias`` ``[E, 2I]`` and ``down_proj_bias`` ``[E, H]`` or None.
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
    ) -> None:
        super().__init__()
        self.activation = activation
        width = intermediate_size * (2 if ACTIVATIONS[activation].gated else 1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(num_experts, width, hidden_size)
        self.down_proj = parameter(num_experts, hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(num_experts, width) if bias else None
        self.down_proj_bias = parameter(num_experts, hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every expert starts as an nn.Linear pair does: uniform within one over the square root of the inputs."""
        with torch.no_grad():
            for weight, bias in (
                (self.gate_up_proj, self.gate_up_proj_bias),
                (self.down_proj, self.down_proj_bias),
            ):
                bound = 1 / math.sqrt(weight.shape[2])
                weight.uniform_(-bound, bound)
                if bias is not None:
                    bias.uniform_(-bound, bound)

    def extra_repr(self) -> str:
        """Sizes and activation."""
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        return (
            f"num_experts={num_experts}, hidden_size={hidden_size}, intermediate_size={intermediate_size}, "
            f"activation={self.activation!r}, bias={self.down_proj_bias is not None}"
        )


class MoE(nn.Module):
    """A Mixture-of-Experts MLP in place of a dense one.

    Args:
        hidden_size: H, the width of the model.
        intermediate_size: I, the width of one expert.
        num_experts: E.
        top_k: K, experts a token, at most E.
        activation: See :func:`moekern.experts`.
        bias: Biases on both projections of the experts.
        router_bias: A bias on the router.
        routing: ``"softmax_topk"`` or ``"topk_softmax"``, see :func:`moekern.route`.
        norm_topk_prob: Scale the router's weights of a token to sum to one.
        device, dtype: Of the parameters.

    The state dict has the names and layouts of transformers' MoE blocks: ``gate.weight``, ``experts.gate_up_proj``,
    ``experts.down_proj``.

    Raises:
        TypeError, ValueError: A size is not a positive integer, ``top_k`` exceeds ``num_experts``, a name is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        router_bias: bool = False,
        routing: str = "softmax_topk",
        norm_topk_prob: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
            ("num_experts", num_experts),
        ):
            checks.is_int(name, value, 1)
        checks.is_int("top_k", top_k, 1, num_experts, f"num_experts is {num_experts}")
        checks.one_of("activation", activation, tuple(ACTIVATIONS))
        checks.one_of("routing", routing, router.METHODS)
        for name, flag in (("bias", bias), ("router_bias", router_bias), ("norm_topk_prob", norm_topk_prob)):
            checks.is_bool(name, flag)
        if dtype is not None and dtype not in checks.FLOATING:
            raise TypeError(f"dtype: got {dtype}, expected one of float32, bfloat16, float16, float64")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation = activation
        self.routing = routing
        self.norm_topk_prob = norm_topk_prob
        self.gate = Router(hidden_size, num_experts, router_bias, device, dtype)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, activation, bias, device, dtype)
        self._latest_routing: Routing | None = None

    @classmethod
    def from_dense(
        cls, dense_mlp: nn.Module, num_experts: int, top_k: int, *, activation: str | None = None, **options: Any
    ) -> MoE:
        """A layer that computes the same function as a dense MLP at the start: every expert is a copy of it.

        The router's weights of a token sum to one, so the copies' outputs average to the dense output whatever the
        router chooses (sparse upcycling, Komatsuzaki et al. 2022).

        Args:
            dense_mlp: A module with ``gate_proj``, ``up_proj``, ``down_proj`` (Llama, Qwen, Mistral); or ``w1``,
                ``w3``, ``w2``; or two linear layers ``up_proj``/``down_proj``, ``fc1``/``fc2`` or ``c_fc``/``c_proj``
                (GPT-2's Conv1D too); or an ``nn.Sequential`` of linear, activation, linear.
            num_experts: E.
            top_k: K.
            activation: Its activation, if it cannot be read off the module.
            **options: More arguments of the class, such as ``router_bias``.

        Raises:
            TypeError, ValueError: The module's projections or activation are not recognised.
        """
        from moekern.dense import read_dense

        checks.is_int("num_experts", num_experts, 1)
        checks.is_int("top_k", top_k, 1, num_experts, f"num_experts is {num_experts}")
        if options.get("norm_topk_prob", True) is not True:
            raise ValueError("norm_topk_prob: got False, expected True: the copies must average to the dense output")
        dense = read_dense(dense_mlp, activation)
        layer = cls(
            dense.down.shape[0],
            dense.down.shape[1],
            num_experts,
            top_k,
            activation=dense.activation,
            bias=dense.gate_up_bias is not None or dense.down_bias is not None,
            **{"device": dense.down.device, "dtype": dense.down.dtype, **options},
        )
        with torch.no_grad():
            layer.experts.gate_up_proj.copy_(dense.gate_up)
            layer.experts.down_proj.copy_(dense.down)
            for parameter, value in (
                (layer.experts.gate_up_proj_bias, dense.gate_up_bias),
                (layer.experts.down_proj_bias, dense.down_bias),
            ):
                if parameter is not None:
                    parameter.copy_(value) if value is not None else parameter.zero_()
        layer.train(dense_mlp.training)
        return layer

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()

    @property
    def latest_routing(self) -> Routing | None:
        """What the router decided in the latest forward pass in training mode; None before that."""
        return self._latest_routing

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: ``[..., H]``, any leading dimensions.

        Returns:
            ``[..., H]``.

        Raises:
            TypeError, ValueError: ``x`` is not a dense floating tensor with H features, on the layer's device and in
                its dtype (or under autocast).
        """
        checks.is_tensor("x", x)
        checks.has_dtype("x", x, checks.FLOATING)
        if x.ndim < 1 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {self.hidden_size}] (hidden_size)")
        checks.same_device("x", x, "the layer's parameters", self.gate.weight)
        if x.dtype != self.gate.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: got dtype {x.dtype}, expected {self.gate.weight.dtype}, the dtype of the layer")
        tokens = x.reshape(-1, self.hidden_size)
        logits = self.gate(tokens)
        weights, ids = router.route(logits, self.top_k, method=self.routing, norm_topk_prob=self.norm_topk_prob)
        chosen = plan(ids, self.num_experts)
        if self.training and not torch.compiler.is_exporting():
            self._latest_routing = Routing(logits, chosen.counts)
        out = functional.experts(
            tokens,
            None,
            weights,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            self.experts.gate_up_proj_bias,
            self.experts.down_proj_bias,
            activation=self.activation,
            plan=chosen,
        )
        return out.reshape(x.shape)

    def extra_repr(self) -> str:
        """How tokens are routed; the sizes are shown by the experts."""
        return f"top_k={self.top_k}, routing={self.routing!r}, norm_topk_prob={self.norm_topk_prob}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the latest routing: it belongs to a graph that they do not."""
        return {**self.__dict__, "_latest_routing": None}
