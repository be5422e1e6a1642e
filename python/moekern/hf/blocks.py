"""Blocks of transformers models that do not use its experts interface, computed by :func:`moekern.experts`.

A block is changed in place: the module gets a class of moekern's, and keeps its parameters, submodules, hooks and
wrappers. Router, experts and shared expert are called as transformers calls them, because peft, accelerate, FSDP and
recorders of outputs hook onto these calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from moekern.functional.experts import experts
from moekern.layer.dense import known_activation
from moekern.layer.parameters import is_ordinary, local
from moekern.routing import router


def _activation(module: nn.Module) -> str:
    names = ("act_fn", "activation_fn", "activation")
    function = next((found for name in names if (found := getattr(module, name, None)) is not None), None)
    name = known_activation(function, gated=True)
    if name is None:
        raise ValueError(f"model: the experts' activation {type(function).__name__} is unknown to moekern")
    return name


class Llama4Experts(nn.Module):
    """``Llama4TextExperts`` on the chosen rows only: the original multiplies every token by every expert."""

    @staticmethod
    def check(original: nn.Module) -> None:
        """Raises ValueError if moekern cannot run it."""
        _has_no_own_forward(original)
        _activation(original)

    @staticmethod
    def take(original: nn.Module) -> None:
        """Change the module in place."""
        _become(original, Llama4Experts)

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> Tensor:
        """``[T, H]`` through the experts ``[T, K]``; weights of None are ones."""
        up, down = local(self.gate_up_proj), local(self.down_proj)
        activation = _activation(self)
        return experts(hidden_states, top_k_index, top_k_weights, up, down, activation=activation, transposed=True)


class Llama4Block(nn.Module):
    """``Llama4TextMoe``: the sigmoid of the chosen logits scales the experts' input; a shared expert is added."""

    @staticmethod
    def check(original: Any) -> None:
        """Raises ValueError if moekern cannot run it."""
        _has_no_own_forward(original)
        found = list(_experts_in(original))
        if not found:
            raise ValueError(
                f"model: the experts of {type(original).__name__} are {type(original.experts).__name__}, "
                "expected Llama4TextExperts, by itself or within wrappers"
            )
        for module in found:
            Llama4Experts.check(module)

    @staticmethod
    def take(original: Any) -> None:
        """Change the module and its experts in place."""
        for module in list(_experts_in(original)):
            Llama4Experts.take(module)
        _become(original, Llama4Block)

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Output ``[T, H]`` and router logits ``[T, E]``."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self._route(x)
        weights, ids = scores.topk(self.top_k, dim=-1)  # the scores of all other experts are zero
        scaled = (x.unsqueeze(1) * weights.to(x.dtype).unsqueeze(2)).flatten(0, 1)
        routed = self.experts(scaled, ids.reshape(-1, 1))
        return self.shared_expert(x) + routed.unflatten(0, (-1, self.top_k)).sum(1), logits

    def _route(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.router(x)
        except AttributeError as error:
            if not type(self.router).__module__.startswith("peft."):
                raise
            raise TypeError(
                "router: peft cannot wrap Llama 4's router as a linear module, with or without moekern, because it "
                "returns two tensors; leave it out (exclude_modules=['router']) or adapt its matrix "
                "(target_parameters=['router.weight'])"
            ) from error


def _experts_in(block: Any) -> Iterator[nn.Module]:
    """The experts, also within wrappers; there are several if peft keeps the original next to the trained copy."""
    return (module for module in block.experts.modules() if _known_class(module, _EXPERTS) is not None)


class GraniteBlock(nn.Module):
    """``GraniteMoeMoE`` of the releases in which it has its own experts: softmax over the K largest logits.

    Its weights have a layout that moekern reads. Router and projections are read and not called; so if anything hooks
    onto their calls, or wraps them, the block runs as transformers wrote it.
    """

    @staticmethod
    def check(original: nn.Module) -> None:
        """Raises ValueError if moekern cannot run it."""
        _has_no_own_forward(original)
        _activation(original)

    @staticmethod
    def take(original: Any) -> None:
        """Change the module in place."""
        original._transformers_class = _known_class(original, _BLOCKS)
        _become(original, GraniteBlock)

    def forward(self: Any, layer_input: Tensor) -> Tensor:
        """``[B, N, H]`` to the same."""
        own = self._transformers_class
        parts = (self.router, self.input_linear, self.output_linear)
        if not all(is_ordinary(part, type(part)) and type(part).__module__ == own.__module__ for part in parts):
            return own.forward(self, layer_input)
        x = layer_input.reshape(-1, self.input_size)
        weights, ids = router.route(self.router.layer(x), self.router.top_k, method="granitemoe")
        out = experts(
            x, ids, weights, self.input_linear.weight, self.output_linear.weight, activation=_activation(self)
        )
        return out.reshape(layer_input.shape)


class DbrxExperts(nn.Module):
    """``DbrxExperts``, with its three matrices ``[E * I, H]`` as two.

    They become ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``. State dicts are read and written with
    the original names and shapes.
    """

    @staticmethod
    def check(original: Any) -> None:
        """Raises ValueError if moekern cannot run it, or if something hooks onto the matrices, which would be lost."""
        _has_no_own_forward(original)
        mlp = original.mlp
        wrong = "wrapped" if _known_class(mlp, (_DBRX_MATRICES,)) is not type(mlp) else None
        if any((mlp._forward_hooks, mlp._forward_pre_hooks, mlp._backward_hooks, mlp._backward_pre_hooks)):
            wrong = "hooked onto"
        if any(p.is_meta for p in mlp.parameters()) and hasattr(mlp, "_hf_hook"):
            wrong = "offloaded"
        if wrong is not None:
            raise ValueError(
                f"model: DBRX's matrices are {wrong} ({type(mlp).__name__}), and moekern rewrites them as two: "
                "call replace before anything wraps, hooks onto or offloads them"
            )
        _activation(mlp)

    @staticmethod
    def take(original: Any) -> None:
        """Change the module in place, with new parameters."""
        mlp, experts = original.mlp, original.num_experts
        del original.mlp
        gate, up, down = (w.detach().unflatten(0, (experts, -1)) for w in (mlp.w1, mlp.v1, mlp.w2))
        trained = mlp.w1.requires_grad or mlp.v1.requires_grad
        original.gate_up_proj = nn.Parameter(torch.cat((gate, up), dim=1), requires_grad=trained)
        original.down_proj = nn.Parameter(down.mT.contiguous(), requires_grad=mlp.w2.requires_grad)
        original.act_fn = mlp.activation_fn
        original.register_state_dict_post_hook(_write_dbrx)
        original.register_load_state_dict_pre_hook(_read_dbrx)
        _become(original, DbrxExperts)

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[..., H]`` to the same, through the experts ``[T, K]``."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        up, down = local(self.gate_up_proj), local(self.down_proj)
        return experts(x, top_k_index, top_k_weights, up, down, activation=_activation(self)).reshape(
            hidden_states.shape
        )


_DBRX_NAMES = ("mlp.w1", "mlp.v1", "mlp.w2")


def _write_dbrx(experts: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    joined = [prefix + "gate_up_proj", prefix + "down_proj"]
    if not all(name in state for name in joined):
        return  # pruned or parametrized: the names differ from transformers'
    gate_up, down = (state.pop(name) for name in joined)
    gate, up = gate_up.chunk(2, dim=1)
    for name, value in zip(_DBRX_NAMES, (gate, up, down.mT), strict=True):
        state[prefix + name] = value.flatten(0, 1).contiguous()


def _read_dbrx(experts: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not all(prefix + name in state for name in _DBRX_NAMES):
        return
    gate, up, down = (state.pop(prefix + name).unflatten(0, (experts.num_experts, -1)) for name in _DBRX_NAMES)
    state[prefix + "gate_up_proj"] = torch.cat((gate, up), dim=1)
    state[prefix + "down_proj"] = down.mT.contiguous()


def _has_no_own_forward(module: nn.Module) -> None:
    """Raise if something replaced the module's forward; accelerate may, since it keeps the original."""
    forward: Any = vars(module).get("forward")
    if forward is not None and not _is_of_its_class(forward, module) and "_old_forward" not in vars(module):
        raise ValueError(
            f"model: a {type(module).__name__} has a forward of its own, which moekern would have to remove: "
            "call replace first, then change the module"
        )


def _is_of_its_class(forward: Any, module: nn.Module) -> bool:
    """transformers 5.0 leaves the class's own forward on an instance after recording its outputs."""
    return getattr(forward, "__func__", None) is type(module).forward


def _become(module: Any, ours: Any) -> None:
    """Give a module our class, in place."""
    original = _known_class(module, (*_BLOCKS, *_EXPERTS))
    assert original is not None
    if _is_of_its_class(vars(module).get("forward"), module):
        del module.forward
    module.__class__ = _on_ours(type(module), original, ours)
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(ours.forward, module)


def _on_ours(kind: Any, original: Any, ours: Any) -> Any:
    """Our class; if FSDP or a parametrization derived a class from the original, the same derived from ours."""
    if kind is original:
        return ours
    if not issubclass(kind, original):
        return kind
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(_on_ours(base, original, ours) for base in kind.__bases__), own)


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _known_class(module: nn.Module, names: Any) -> Any:
    """The one of the module's classes whose name is given, unless a class derived from it has another forward."""
    found: Any = next((kind for kind in type(module).__mro__ if _qualified_name(kind) in names), None)
    forward: Any = type(module).forward
    return found if found is not None and forward is found.forward else None


def block_for(module: nn.Module) -> Any:
    """The class whose ``check`` and ``take`` serve this module, or None if it is not a block known here."""
    known = _known_class(module, _BLOCKS)
    found = None if known is None else _BLOCKS[_qualified_name(known)]
    if found is GraniteBlock and not hasattr(module, "input_linear"):
        return None  # a newer release, whose experts use the interface
    return found


def has_blocks_of_its_own(model_class: type) -> bool:
    """Whether the model's file holds a block known here."""
    return any(name.startswith(model_class.__module__ + ".") for name in _BLOCKS)


_DBRX_MATRICES = "transformers.models.dbrx.modeling_dbrx.DbrxExpertGLU"
_EXPERTS = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)
_BLOCKS: dict[str, type[nn.Module]] = {
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe": Llama4Block,
    "transformers.models.dbrx.modeling_dbrx.DbrxExperts": DbrxExperts,
    "transformers.models.granitemoe.modeling_granitemoe.GraniteMoeMoE": GraniteBlock,
    "transformers.models.granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedMoE": GraniteBlock,
    "transformers.models.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMoE": GraniteBlock,
}
