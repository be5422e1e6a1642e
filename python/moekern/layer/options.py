"""All options of a layer as one frozen object, which checks itself and says which options exclude each other.

A part that serves only some layers names the options that it reads; every other option must have its default. So such a
part refuses a new option until it is served. The options that it reads are also the key of its caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moekern.backends.activations import ACTIVATIONS
from moekern.routing import capacity, router
from moekern.routing.rounding import MODES as ROUNDINGS
from moekern.verbs import checks

EXPERT_CHOICE = "expert_choice"
ROUTINGS = (*router.METHODS, EXPERT_CHOICE)

# Options that must have their defaults, with a reason where it is not obvious.
_NOT_WITH_EXPERT_CHOICE = (
    "norm_topk_prob", "n_group", "selection_bias", "scale_input", "capacity_factor", "round_tokens_to"
)  # fmt: skip
_NOT_WITH_FUSED = {"bias": "a shared expert has none", "scale_input": "a shared expert's input is not scaled"}
_NOT_WITH_COPIES = ("scale_input", "capacity_factor", "round_tokens_to")
_SUM_TO_ONE = ("softmax_topk", "topk_softmax", "sigmoid_topk")  # formulas with weights that sum to one

# The options that one program for router, plan and experts reads (inference.py, training.py).
_READ_BY_A_PROGRAM = (
    "hidden_size", "intermediate_size", "num_experts", "top_k", "activation", "bias", "router_bias", "routing",
    "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor", "drop_by", "rounding",
)  # fmt: skip
_READ_IN_TRAINING_ONLY = ("router_jitter_noise", "round_tokens_to")


@dataclass(frozen=True)
class Options:
    """The arguments of :class:`moekern.MoE`, except device and dtype; see there.

    Attributes:
        capacity_ratio: ``capacity_factor`` as a fraction of integers, or None. It is computed here, because compiled
            code makes a float symbolic once it has seen two values of it.
        inference_key, training_key: The options that one program for router, plan and experts reads; None if
            another option has no default value.

    Raises:
        TypeError, ValueError: An option is of the wrong kind or out of range, or two exclude each other.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str = "swiglu"
    bias: bool = False
    router_bias: bool = False
    routing: str = "softmax_topk"
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    selection_bias: bool = False
    router_jitter_noise: float = 0.0
    scale_input: bool = False
    capacity_factor: float | None = None
    drop_by: str = "score"
    round_tokens_to: int = 1
    rounding: str = "nearest"
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    fuse_shared_expert: bool = False
    capacity_ratio: tuple[int, int] | None = field(init=False, repr=False, compare=False)
    inference_key: tuple[Any, ...] | None = field(init=False, repr=False, compare=False)
    training_key: tuple[Any, ...] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_each()
        self._check_together()
        derived: dict[str, Any] = {
            "capacity_ratio": self._capacity_ratio(),
            "inference_key": self._key(_READ_BY_A_PROGRAM, ignoring=_READ_IN_TRAINING_ONLY),
            "training_key": self._key(_READ_BY_A_PROGRAM),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # sets an attribute of a frozen object

    def _capacity_ratio(self) -> tuple[int, int] | None:
        factor = self.capacity_factor
        return None if factor is None else capacity.ratio(min(factor, self.num_experts))  # a larger one limits nothing

    def _key(self, read: tuple[str, ...], ignoring: tuple[str, ...] = ()) -> tuple[Any, ...] | None:
        """The values of the options that are read; None if any other option does not have its default."""
        others = [each.name for each in fields(self) if each.init and each.name not in (*read, *ignoring)]
        if self.is_grouped or self.is_expert_choice or self.first_changed(others):
            return None
        return tuple(getattr(self, name) for name in read)

    def _check_each(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts"):
            checks.is_int(name, getattr(self, name), 1)
        checks.is_int("top_k", self.top_k, 1, self.num_experts, f"num_experts is {self.num_experts}")
        checks.one_of("activation", self.activation, tuple(ACTIVATIONS))
        checks.one_of("routing", self.routing, ROUTINGS)
        for each in fields(self):
            if each.type == "bool":
                checks.is_bool(each.name, getattr(self, each.name))
        router.check_options(
            self.top_k, self.num_experts, "softmax_topk" if self.is_expert_choice else self.routing,
            self.norm_topk_prob, self.n_group, self.topk_group, self.routed_scaling_factor,
        )  # fmt: skip
        checks.is_number("router_jitter_noise", self.router_jitter_noise, low=0)
        if self.capacity_factor is not None:
            checks.is_number("capacity_factor", self.capacity_factor, above=0)
        checks.one_of("drop_by", self.drop_by, capacity.ORDERS)
        checks.is_int("round_tokens_to", self.round_tokens_to, 1)
        checks.one_of("rounding", self.rounding, ROUNDINGS)

    def _check_together(self) -> None:
        if self.round_tokens_to > 1 and self.rounding != "down" and self.n_group > 1:
            raise ValueError(
                f"rounding: got {self.rounding!r}, expected 'down' with n_group {self.n_group}: others add experts"
            )
        if self.is_expert_choice and (name := self.first_changed(_NOT_WITH_EXPERT_CHOICE)) is not None:
            raise ValueError(f"{name}: not accepted with routing 'expert_choice', where experts choose the tokens")
        if self.shared_intermediate_size is not None:
            checks.is_int("shared_intermediate_size", self.shared_intermediate_size, 1)
        elif self.shared_gate:
            raise ValueError("shared_gate: got True, expected False without shared_intermediate_size")
        if self.fuse_shared_expert:
            self._check_fused()

    def _check_fused(self) -> None:
        width = self.shared_intermediate_size
        if width is None:
            raise ValueError("fuse_shared_expert: got True, expected False without shared_intermediate_size")
        if width % self.intermediate_size:
            raise ValueError(
                f"shared_intermediate_size: got {width}, expected a multiple of intermediate_size, "
                f"{self.intermediate_size}, with fuse_shared_expert"
            )
        name = self.first_changed(_NOT_WITH_FUSED) or ("routing" if self.is_expert_choice else None)
        if name is not None:
            raise ValueError(
                f"{name}: got {getattr(self, name)!r}, not accepted with fuse_shared_expert: "
                + _NOT_WITH_FUSED.get(name, "tokens do not choose, and each passes the shared expert")
            )

    def first_changed(self, names: Iterable[str]) -> str | None:
        """The first of these options that does not have its default, or None."""
        defaults = {each.name: each.default for each in fields(self)}
        return next((name for name in names if getattr(self, name) != defaults[name]), None)

    @property
    def is_expert_choice(self) -> bool:
        """Whether experts choose tokens."""
        return self.routing == EXPERT_CHOICE

    @property
    def is_grouped(self) -> bool:
        """Whether only experts of the best groups can be chosen."""
        return self.topk_group is not None and self.topk_group < self.n_group

    @property
    def num_fused_experts(self) -> int:
        """The number of experts whose sum is the fused shared expert; 0 if there is none."""
        width = self.shared_intermediate_size
        return width // self.intermediate_size if self.fuse_shared_expert and width is not None else 0


DEFAULTS: dict[str, Any] = {e.name: e.default for e in fields(Options) if e.init}


def obstacle_to_copies(given: Mapping[str, Any]) -> str | None:
    """An option under which a token's weights do not sum to one, so that copies do not average to the original.

    Args:
        given: Arguments of a future layer, not checked.

    Returns:
        The beginning of an error message, or None.
    """
    if given.get("norm_topk_prob", True) is not True:
        return "norm_topk_prob: got False, expected True"
    if router.METHODS.get(given.get("routing", DEFAULTS["routing"]), "") not in _SUM_TO_ONE:
        return f"routing: got {given['routing']!r}, expected one whose weights sum to one"
    for name in _NOT_WITH_COPIES:
        if given.get(name, DEFAULTS[name]) != DEFAULTS[name]:
            return f"{name}: got {given[name]!r}, expected {DEFAULTS[name]!r}"
    return None


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless a layer's parameters can have this dtype; None stands for torch's default."""
    if dtype is not None and dtype not in checks.FLOATING:
        raise TypeError(f"dtype: got {dtype}, expected one of float32, bfloat16, float16, float64")
