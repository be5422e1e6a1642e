"""Blocks of transformers models that do not use its experts interface, rewritten around :func:`moekern.experts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moekern import functional, router
from moekern.dense import known_activation


def _activation(module: nn.Module) -> str:
    names = ("act_fn", "activation_fn", "activation")
    function = next((found for name in names if (found := getattr(module, name, None)) is not None), None)
    name = known_activation(function, gated=True)
    if name is None:
        raise ValueError(f"model: the experts' activation {type(function).__name__} is not one that moekern has")
    return name


class Llama4Block(nn.Module):
    """``Llama4TextMoe``: the sigmoid of the chosen logits scales the experts' input; a shared expert runs beside.

    The submodules are those of the original, their transposed weights are used as they are.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.activation = _activation(original.experts)
        self.top_k, self.hidden_dim, self.num_experts = original.top_k, original.hidden_dim, original.num_experts
        self.experts = original.experts
        self.router = original.router
        self.shared_expert = original.shared_expert
        self.train(original.training)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Output ``[T, H]`` and router logits ``[T, E]``."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = nn.functional.linear(x, self.router.weight)
        weights, ids = router.route(logits, self.top_k, method="llama4")
        scaled = (x.unsqueeze(1) * weights.to(x.dtype).unsqueeze(2)).flatten(0, 1)
        routed = functional.experts(
            scaled, ids.reshape(-1, 1), None, self.experts.gate_up_proj, self.experts.down_proj,
            activation=self.activation, transposed=True,
        )  # fmt: skip
        return self.shared_expert(x) + routed.unflatten(0, (-1, self.top_k)).sum(1), logits


class GraniteBlock(nn.Module):
    """``GraniteMoeMoE`` of the releases in which it has experts of its own: softmax over the K largest logits.

    The submodules are those of the original; its weights lie as moekern reads them.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.activation_name = _activation(original)
        self.input_size, self.hidden_size = original.input_size, original.hidden_size
        self.activation = original.activation
        self.input_linear = original.input_linear
        self.output_linear = original.output_linear
        self.router = original.router
        self.train(original.training)

    def forward(self, layer_input: Tensor) -> Tensor:
        """``[B, N, H]`` to the same."""
        x = layer_input.reshape(-1, self.input_size)
        weights, ids = router.route(self.router.layer(x), self.router.top_k, method="granitemoe")
        out = functional.experts(
            x, ids, weights, self.input_linear.weight, self.output_linear.weight, activation=self.activation_name
        )
        return out.reshape(layer_input.shape)


class DbrxBlock(nn.Module):
    """``DbrxFFN``: softmax, top-k, and the weights divided by their p-norm.

    Its three matrices ``[E * I, H]`` become ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``. State
    dicts are read and written with the original names and shapes.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        mlp = original.experts.mlp
        self.activation = _activation(mlp)
        self.top_k = original.top_k
        self.norm = original.moe_normalize_expert_weights
        self.router = original.router
        experts = mlp.moe_num_experts
        gate, up, down = (w.detach().unflatten(0, (experts, -1)) for w in (mlp.w1, mlp.v1, mlp.w2))
        trained = mlp.w1.requires_grad
        self.gate_up_proj = nn.Parameter(torch.cat((gate, up), dim=1), requires_grad=trained)
        self.down_proj = nn.Parameter(down.mT.contiguous(), requires_grad=trained)
        self.register_state_dict_post_hook(_write_dbrx)
        self.register_load_state_dict_pre_hook(_read_dbrx)
        self.train(original.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[B, N, H]`` to the same."""
        logits = self.router(hidden_states)
        weights, ids = router.route(logits, self.top_k, method="dbrx", norm_topk_prob=False)
        if self.norm is not None:
            weights = weights / torch.linalg.vector_norm(weights, ord=self.norm, dim=-1, keepdim=True)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = functional.experts(x, ids, weights, self.gate_up_proj, self.down_proj, activation=self.activation)
        return out.reshape(hidden_states.shape)


_DBRX_NAMES = ("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2")


def _write_dbrx(block: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    gate_up, down = state.pop(prefix + "gate_up_proj"), state.pop(prefix + "down_proj")
    gate, up = gate_up.chunk(2, dim=1)
    for name, value in zip(_DBRX_NAMES, (gate, up, down.mT), strict=True):
        state[prefix + name] = value.flatten(0, 1).contiguous()


def _read_dbrx(block: DbrxBlock, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not all(prefix + name in state for name in _DBRX_NAMES):
        return
    experts = block.down_proj.shape[0]
    gate, up, down = (state.pop(prefix + name).unflatten(0, (experts, -1)) for name in _DBRX_NAMES)
    state[prefix + "gate_up_proj"] = torch.cat((gate, up), dim=1)
    state[prefix + "down_proj"] = down.mT.contiguous()


def block_for(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    """What takes this module's place, or None if it is not a block known here."""
    found = _BLOCKS.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if found is GraniteBlock and not hasattr(module, "input_linear"):
        return None  # a newer release, whose experts use the interface
    return found


def has_blocks_of_its_own(model_class: type) -> bool:
    """Whether the model's file holds a block known here."""
    return any(name.startswith(model_class.__module__ + ".") for name in _BLOCKS)


_BLOCKS: dict[str, Callable[[Any], nn.Module]] = {
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe": Llama4Block,
    "transformers.models.dbrx.modeling_dbrx.DbrxFFN": DbrxBlock,
    "transformers.models.granitemoe.modeling_granitemoe.GraniteMoeMoE": GraniteBlock,
    "transformers.models.granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedMoE": GraniteBlock,
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMoE": GraniteBlock,
}
