"""Hugging Face transformers: importing this module registers ``experts_implementation="moekern"``.

    import moekern.hf
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moekern")

That is enough for the models of transformers 5 that use its experts interface. Models with a block of their own need
:func:`replace`: Llama 4, DBRX, and Granite in the releases before its experts used the interface.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from moekern.backends.activations import OAI_ALPHA, OAI_LIMIT
from moekern.backends.reference import bias_rows
from moekern.functional.experts import experts, grouped_mm
from moekern.functional.plan import plan
from moekern.hf.blocks import block_for, has_blocks_of_its_own
from moekern.layer.dense import known_activation
from moekern.layer.parameters import local
from moekern.verbs import checks

try:
    from transformers.integrations import moe as _interface
except ImportError as missing:
    raise ImportError("moekern.hf needs transformers >= 5.0: pip install 'moekern[hf]'") from missing

NAME = "moekern"
_GPT_OSS_GATE = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts._apply_gate")


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a transformers model, called with the experts module as ``self``.

    The activation runs inside the kernels if the module's gate is the default one and its activation known, or if the
    gate is that of gpt-oss. Otherwise the module's own gate runs between two grouped products.

    Args:
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``; ids from ``num_experts`` on are sentinels (expert parallelism).
        top_k_weights: ``[T, K]``.

    Returns:
        ``[T, H]`` in the dtype of hidden_states.

    Raises:
        TypeError, ValueError: The weights are not of an accepted dtype or shape (quantised ones are not).
    """
    gated, biased = getattr(self, "has_gate", True), getattr(self, "has_bias", False)
    transposed = getattr(self, "is_transposed", False)
    up_name = "gate_up_proj" if gated else "up_proj"
    w_up, w_down = local(getattr(self, up_name)), local(self.down_proj)
    b_up = local(getattr(self, f"{up_name}_bias")) if biased else None
    b_down = local(self.down_proj_bias) if biased else None
    for name, weight in ((up_name, w_up), ("down_proj", w_down)):
        checks.has_dtype(f"{type(self).__name__}.{name}", weight, checks.FLOATING)
    # transformers runs some norms in float32 before half-precision experts; autocast casts by itself.
    x = hidden_states
    if x.dtype != w_up.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(w_up.dtype)
    if top_k_weights.shape != top_k_index.shape and top_k_weights.shape[-1] == w_up.shape[0]:
        top_k_weights = top_k_weights.gather(1, top_k_index)  # some routers of transformers 5.0 give all weights
    activation, interleaved = _fused_activation(self, gated)
    if activation is not None and not getattr(self, "has_post_expert_norm", False):
        out = experts(
            x, top_k_index, top_k_weights, w_up, w_down, b_up, b_down,
            activation=activation, transposed=transposed, interleaved=interleaved,
        )  # fmt: skip
    else:
        _tell_once(
            type(self), "a norm after the experts" if activation is not None else "a gate or activation of its own"
        )
        out = _with_own_gate(self, x, top_k_index, top_k_weights, w_up, w_down, b_up, b_down, gated, transposed)
    return out.to(hidden_states.dtype)


_told: set[type] = set()


def _tell_once(experts_class: type, what: str) -> None:
    if experts_class not in _told and not torch.compiler.is_compiling():
        _told.add(experts_class)
        warnings.warn(
            f"moekern: {experts_class.__name__} has {what}, which runs in torch between two grouped products, "
            "slower than inside the kernels",
            stacklevel=3,
        )


def _fused_activation(module: Any, gated: bool) -> tuple[str | None, bool]:
    """The activation's name for the kernels, None if only the module has it; and whether gate and up rows alternate."""
    if not gated:
        return known_activation(getattr(module, "act_fn", None), gated=False), False
    gate = getattr(module, "_apply_gate", None)  # of the instance, which may replace it
    gate = getattr(gate, "__func__", gate)
    if gate is None or gate is getattr(_interface, "_default_apply_gate", None):
        # The default gate halves its input for either value of is_concatenated.
        return known_activation(getattr(module, "act_fn", None), gated=True), False
    if (getattr(gate, "__module__", None), getattr(gate, "__qualname__", None)) == _GPT_OSS_GATE:
        constants = (getattr(module, "alpha", None), getattr(module, "limit", None))
        if constants == (OAI_ALPHA, OAI_LIMIT):
            return "swiglu_oai", True
    return None, False


def _with_own_gate(
    module: Any,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    transposed: bool,
) -> Tensor:
    """Grouped products around the module's gate or activation, and its norm of every expert's output if it has one."""
    tokens, top_k = ids.shape
    chosen = plan(ids, w_up.shape[0])

    def linear(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = grouped_mm(a, weight if transposed else weight.mT, chosen.offsets)
        return out if bias is None else out + bias_rows(bias, chosen.offsets, a.shape[0]).to(out.dtype)

    pre = linear(x[(chosen.order // top_k).long()], w_up, b_up)
    y = linear(module._apply_gate(pre) if gated else module.act_fn(pre), w_down, b_down)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    real = chosen.inverse < chosen.offsets[-1]
    by_slot = torch.where(real.unsqueeze(1), y[chosen.inverse.long()], 0).reshape(tokens, top_k, y.shape[-1])
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    return (by_slot.to(wide) * weights.to(wide).unsqueeze(-1)).sum(1).to(y.dtype)


def replace(model: Any) -> list[str]:
    """Let moekern run the experts of a model, in place, with or without transformers' experts interface.

    Models with the interface are switched to it. The blocks of Llama 4, of DBRX and of Granite in
    older releases get classes of moekern's and keep their modules and hooks. DBRX's three matrices become two; the
    others keep their parameters. State dicts keep the names and shapes that transformers knows, so that
    ``save_pretrained`` and ``load_state_dict`` work as before. Call it before or after ``peft.get_peft_model``, but
    before LoRA on DBRX's matrices.

    Args:
        model: A transformers model, or any module that contains such blocks.

    Returns:
        Names of the modules that moekern now runs.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: Nothing in it can be replaced (the message names the MoE modules found, if any), or something else
            has changed a block, and moekern would undo that change.
    """
    if not issubclass(type(model), nn.Module):  # isinstance would narrow Any to a class without configuration
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    blocks = [(name, module, block) for name, module in model.named_modules() if (block := block_for(module))]
    for name, module, block in blocks:  # all checks come first: a refusal leaves the model as it was
        if not name:
            raise ValueError(f"model: got a bare {type(module).__name__}, expected a model that contains it")
        block.check(module)
    for _, module, block in blocks:
        block.take(module)
    done = [name for name, _, _ in blocks]
    interface = [name for name, module in model.named_modules() if _uses_interface(module)]
    if interface:
        if not hasattr(model, "set_experts_implementation"):
            raise ValueError(f"model: got a {type(model).__name__}, expected a transformers model with a configuration")
        model.set_experts_implementation(NAME)
        done += interface
    if not done:
        classes = {type(m).__name__ for m in model.modules()}
        similar = sorted(c for c in classes if "moe" in c.lower() or "expert" in c.lower())
        raise ValueError(
            f"model: {type(model).__name__} has no block that moekern can replace; it has "
            + (f"{', '.join(similar)}, not on transformers' experts interface and not known to moekern"
               if similar else "no MoE modules")
        )  # fmt: skip
    return done


def _uses_interface(module: nn.Module) -> bool:
    """Whether the class's forward is the one that transformers' decorator installs."""
    return getattr(type(module).forward, "__globals__", None) is vars(_interface)


def _register() -> None:
    """Register the implementation; transformers 5.0 has a fixed list of names as well as a registry."""
    from transformers import PreTrainedModel

    _interface.ExpertsInterface.register(NAME, experts_forward)
    check: Any = PreTrainedModel.get_correct_experts_implementation
    try:
        check(None, NAME)
    except ValueError:

        def accept_ours(self: Any, requested_experts: str | None) -> str:
            if requested_experts != NAME:
                return check(self, requested_experts)
            if has_blocks_of_its_own(type(self)) and not self._can_set_experts_implementation():
                raise ValueError(
                    f"{type(self).__name__} is not on the experts interface in this release of transformers: "
                    "load it without experts_implementation and call moekern.hf.replace(model)"
                )
            return NAME

        PreTrainedModel.get_correct_experts_implementation = accept_ours  # type: ignore[method-assign]


_register()
