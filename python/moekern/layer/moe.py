"""The layer: a router and its experts, called like the dense MLP it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekern.layer import fused_shared
from moekern.layer.attributes import LayerAttributes
from moekern.layer.choice import expert_choice, token_choice
from moekern.layer.inference import infer
from moekern.layer.options import DEFAULTS, Options, check_dtype
from moekern.layer.parameters import Experts, Router, SharedExpert, is_ordinary
from moekern.layer.record import Routing
from moekern.layer.training import Latest, train
from moekern.verbs import checks, masks


class MoE(LayerAttributes):
    """A Mixture-of-Experts MLP in place of a dense one.

    Args:
        hidden_size: H, the width of the model.
        intermediate_size: I, the width of one expert.
        num_experts: E.
        top_k: K, experts a token, at most E.
        activation: See :func:`moekern.experts`.
        bias: Biases on both projections of the experts.
        router_bias: A bias on the router.
        routing: A method of :func:`moekern.route`, or ``"expert_choice"``: each expert takes its best tokens, so many
            that a token has ``top_k`` experts on average, see :func:`moekern.expert_choice`.
        norm_topk_prob, n_group, topk_group, routed_scaling_factor: See :func:`moekern.route`.
        selection_bias: Keep a bias for choosing, ``gate.e_score_correction_bias``, which
            :func:`moekern.update_selection_bias` moves.
        router_jitter_noise: In training, multiply the layer's input by uniform noise within one plus or minus this, as
            Mixtral does.
        scale_input: Apply the router's weights to the experts' input, not their output (Llama 4).
        capacity_factor: An expert takes at most so many times its even share of the slots, ``T * K / E``, rounded up
            without error (1.1 is eleven tenths); None for no limit. See :func:`moekern.limit_tokens` for this and the
            next one.
        drop_by: ``"score"`` or ``"position"``.
        round_tokens_to: Every expert takes a multiple of so many tokens in training.
        rounding: ``"nearest"``, ``"down"`` or ``"up"``, see :func:`moekern.round_tokens`.
        shared_intermediate_size: Width of a dense MLP that every token passes beside its experts, None for none. Its
            weights are ``shared_expert.gate_proj``, ``.up_proj`` and ``.down_proj``.
        shared_gate: Scale that MLP's output by the sigmoid of a linear map of the token, ``shared_expert_gate``
            (Qwen2-MoE).
        fuse_shared_expert: Keep that MLP's weights behind those of the routed experts, ``n = shared_intermediate_size /
            intermediate_size`` more experts that every token chooses, and compute all at once. A little faster in most
            cases, but the parameters are then ``[E + n, …]``, and this is what optimisers, LoRA and sharding see. State
            dicts keep the names and shapes of a layer that is not fused, and are interchangeable with its. Losses,
            capacity and rounding are about the routed experts only.
        device, dtype: Of the parameters.

    The state dict has the names and layouts of transformers' MoE blocks: ``gate.weight``, ``experts.gate_up_proj``,
    ``experts.down_proj``.

    Raises:
        TypeError, ValueError: A size is not a positive integer, ``top_k`` exceeds ``num_experts``, a name is unknown;
            ``fuse_shared_expert`` with a width that is no multiple of ``intermediate_size``, ``bias``, ``scale_input``
            or expert choice.
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
        n_group: int = 1,
        topk_group: int | None = None,
        routed_scaling_factor: float = 1.0,
        selection_bias: bool = False,
        router_jitter_noise: float = 0.0,
        scale_input: bool = False,
        capacity_factor: float | None = None,
        drop_by: str = "score",
        round_tokens_to: int = 1,
        rounding: str = "nearest",
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        fuse_shared_expert: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options = options = Options(
            hidden_size,
            intermediate_size,
            num_experts,
            top_k,
            activation,
            bias,
            router_bias,
            routing,
            norm_topk_prob,
            n_group,
            topk_group,
            routed_scaling_factor,
            selection_bias,
            router_jitter_noise,
            scale_input,
            capacity_factor,
            drop_by,
            round_tokens_to,
            rounding,
            shared_intermediate_size,
            shared_gate,
            fuse_shared_expert,
        )
        check_dtype(dtype)
        self.gate = Router(hidden_size, num_experts, router_bias, device, dtype, selection_bias)
        self.num_fused_experts = options.num_fused_experts
        self.num_apart_experts = 0
        if fuse_shared_expert:
            self.register_state_dict_post_hook(fused_shared.write_apart)
            self.register_load_state_dict_pre_hook(fused_shared.read_apart)
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts, activation, bias, device, dtype, self.num_fused_experts
        )
        self.shared_expert: SharedExpert | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if shared_intermediate_size is not None and not fuse_shared_expert:
            self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, activation, device, dtype)
        if shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype)
        self._latest_routing: Routing | Latest | None = None
        self._token_mask: Tensor | None = None

    @classmethod
    def from_dense(
        cls,
        dense_mlp: nn.Module,
        num_experts: int,
        top_k: int,
        *,
        granularity: int = 1,
        shared: int | Literal["whole"] | None = None,
        init: str = "copy",
        expert_width: int | None = None,
        router_std: float = 0.02,
        activation: str | None = None,
        **options: Any,
    ) -> MoE:
        """A layer that computes the same function as a dense MLP at the start, made of its neurons (upcycling).

        With the defaults every expert is a copy. The router's weights of a token sum to one, so the copies' outputs
        average to the dense output whatever the router chooses. With ``granularity`` G an expert holds every G-th part
        of the neurons; G neighbours are one replica, have equal router rows, are chosen together, and add up to the
        dense MLP because their ``down_proj`` is G times its own. See upcycling.py and docs/upcycling.md.

        What the names say is compared with what the module computes: a few random rows go through its forward, in
        evaluation mode (dropout is left out), in float64 where it can compute so, hooks included. Its flags, buffers,
        attributes and gradients and the state of the random numbers stay. Weights without values (the meta device) are
        taken by their names; the module must then name its activation, or ``activation`` must.

        Args:
            dense_mlp: A module with ``gate_proj``, ``up_proj``, ``down_proj`` (Llama, Qwen, Mistral); or ``w1``,
                ``w3``, ``w2``; or two linear layers ``up_proj``/``down_proj``, ``fc1``/``fc2`` or ``c_fc``/``c_proj``
                (GPT-2's Conv1D too); or an ``nn.Sequential`` of linear, activation, linear.
            num_experts: E, a multiple of granularity.
            top_k: K, a multiple of granularity.
            granularity: G, parts that the dense MLP is cut into.
            shared: None; so many of its first neurons, which a shared expert gets before the rest is cut; or
                ``"whole"``: the shared expert is the dense MLP and counts one half, the routed ones the other. With
                options under which a token's weights do not sum to one (``norm_topk_prob=False``), only ``"whole"``
                keeps the function: the shared expert counts fully, the routed ones' ``down_proj`` is zero.
            init: ``"copy"``; ``"noise:S"``, S standard deviations of each matrix on top; ``"drop:R"``, a share R of
                each expert's neurons drawn anew, N(mean, std) of what they were (Drop-Upcycling). The last two do not
                keep the function, and warn by how much it changes.
            expert_width: n, the experts' width, padded with zeros; None for the least multiple of 8 (with granularity
                1, for the dense MLP's).
            router_std: The router starts as N(0, router_std).
            activation: Its activation, if it cannot be read off the module.
            **options: More arguments of the class, such as ``router_bias``, ``shared_gate`` (which starts at one half)
                or ``fuse_shared_expert``. A ``routed_scaling_factor`` of G leaves ``down_proj`` as it is.

        Raises:
            TypeError, ValueError: The module's projections or activation are not recognised; their weights cannot be
                read (adapters that are not merged, parametrisations, quantised, sharded or offloaded weights); the
                forward computes something else, or takes more than hidden states ``[..., H]``; a number is not as
                above, or an option would change the function.
        """
        from moekern.layer.dense_layer import build

        return build(
            cls, dense_mlp, num_experts, top_k, granularity, shared, init, expert_width, router_std, activation, options
        )

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for part in (self.gate, self.experts, self.shared_expert, self.shared_expert_gate):
            if part is not None:
                part.reset_parameters()

    def train(self, mode: bool = True) -> MoE:
        """As any module's; fuses a shared expert that was loaded apart."""
        if self.num_apart_experts:
            fused_shared.put_together(self, without_values=False)
        return super().train(mode)

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """As any module's; the same as with :meth:`train`, so that no optimiser holds parameters that are replaced."""
        if self.num_apart_experts:
            fused_shared.put_together(self, without_values=False, partly_loaded=False)
        yield from super().named_modules(*args, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        if self.num_apart_experts:
            fused_shared.put_together(self)
        return super()._apply(fn, recurse)

    @property
    def latest_routing(self) -> Routing | None:
        """What the router decided in the latest forward pass in training mode; None before that."""
        latest = self._latest_routing
        if isinstance(latest, Latest):
            mask, (counts, ids) = latest.mask, latest.counts_and_ids()
            if mask is not None:
                counts = masks.counts(ids, mask, self.num_experts)
            latest = self._latest_routing = Routing(latest.logits, counts, ids, latest.shape, mask)
        return latest

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            x: ``[..., H]``, any leading dimensions.
            mask: ``[...]`` bool or integer, False or zero for padding: it counts in no loss and not for the selection
                bias, and takes no place where places are limited (``capacity_factor``, ``round_tokens_to``, expert
                choice), so that real tokens get what they would get alone; its output is then that of the shared
                expert. Where places are not limited the output is the same as without a mask. None: every token is
                real, or what :func:`moekern.set_token_mask` said.

        Returns:
            ``[..., H]``.

        Raises:
            TypeError, ValueError: ``x`` is not a dense floating tensor with H features, on the layer's device and in
                its dtype (or under autocast), or ``mask`` is not as above.
        """
        if mask is None and self.training:
            mask = self.__dict__.get("_token_mask")
        if mask is not None:
            mask = masks.of_input(mask, x)
        if not self.training:
            inferred = infer(self, x)
            if inferred is not None:
                return inferred
        else:
            trained = train(self, x)
            if trained is not None:
                trained[1].mask = mask
                self.__dict__["_latest_routing"] = trained[1]  # a module's own way of setting takes longer
                return trained[0]
        self._check_input(x)
        tokens = x.reshape(-1, self.hidden_size)
        if self.training and self.router_jitter_noise > 0:
            tokens = _jittered(tokens, self.router_jitter_noise)
        run_routed = expert_choice if self.options.is_expert_choice else token_choice
        out = run_routed(self, tokens, self.gate(tokens), tuple(x.shape[:-1]), mask)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            out = out + shared
        return out.reshape(x.shape)

    def _check_input(self, x: Tensor) -> None:
        """Device and dtype as far as they can be known: hooks may yet move or cast what a module has."""
        checks.is_tensor("x", x)
        checks.has_dtype("x", x, checks.FLOATING)
        if x.ndim < 1 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {self.hidden_size}] (hidden_size)")
        if is_ordinary(self.gate, Router):
            checks.same_device("x", x, "the layer's router", self.gate.weight)
        if is_ordinary(self.experts, Experts):
            weight = self.experts.gate_up_proj
            checks.same_device("x", x, "the layer's parameters", weight)
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"x: got dtype {x.dtype}, expected {weight.dtype}, the dtype of the layer's experts")
        elif self.num_fused_experts:
            fused_shared.join_offloaded(self)

    def extra_repr(self) -> str:
        """How tokens are routed; the sizes are shown by the experts."""
        text = f"top_k={self.top_k}, routing={self.routing!r}, norm_topk_prob={self.norm_topk_prob}"
        changed = (f", {name}={getattr(self, name)}" for name in _SHOWN if getattr(self, name) != DEFAULTS[name])
        return text + "".join(changed)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the latest routing and its mask: they belong to a batch that they do not."""
        return {**self.__dict__, "_latest_routing": None, "_token_mask": None}


# What the representation tells where it is not the default.
_SHOWN = (
    "n_group", "topk_group", "routed_scaling_factor", "router_jitter_noise", "scale_input", "capacity_factor",
    "round_tokens_to", "rounding",
)  # fmt: skip


def _jittered(tokens: Tensor, amount: float) -> Tensor:
    """The tokens times uniform noise within one plus or minus `amount`.

    Drawn wide and rounded once: half precision has few numbers next to one, and none of them above 1 + amount.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    noise = torch.empty_like(tokens, dtype=wide).uniform_(1 - amount, 1 + amount)
    return (tokens * noise).to(tokens.dtype)
