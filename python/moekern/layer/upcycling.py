"""Experts from a dense MLP (sparse upcycling): the neurons of each expert, and the factors of its tensors.

The functions take and return tensors, one matrix at a time: converting a checkpoint needs no more memory than that.
For a layer see :meth:`moekern.MoE.from_dense`.

With granularity G, replica r of shard g is expert ``e = r * G + g``. The G shards of a replica are neighbours and their
router rows are equal, so a top-k of a multiple of G takes whole replicas: of equal logits the lowest index wins. Each
shard of a replica has the weight 1/G, hence the factor G on ``down_proj``: the shards add up to the dense MLP.

    parts = split(11008, num_experts=16, top_k=4, granularity=4)
    gate = shard(dense_gate, parts, expert=5, dim=0)                          # [n, H] of [I, H]; up likewise
    down = scaled(shard(dense_down, parts, expert=5, dim=1), parts.scale)     # [H, n] of [H, I]
    router = router_rows(16, hidden_size, granularity=4)

Sources: Komatsuzaki et al. 2022 (copies), He et al. 2024 (fine-grained, arXiv:2410.07524), Nakamura et al. 2025 (drop,
arXiv:2502.19261).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekern.verbs import checks

ROUTER_STD = 0.02
KINDS = ("copy", "noise", "drop")
_MULTIPLE = 8  # of a shard's width: the kernels' fast paths and other runtimes need it

Shared = int | Literal["whole"] | None


@dataclass(frozen=True)
class Split:
    """The division of a dense MLP's neurons over experts, and the factors that keep its function.

    Attributes:
        width: I, of the dense MLP.
        num_experts: E.
        granularity: G, shards per replica.
        expert_width: n, neurons per expert; those past the dense MLP's are zeros.
        shared_width: Neurons of the shared expert, 0 for none. They are the first ones.
        routed_start: The first neuron that the routed experts share.
        scale: The factor of a routed expert's ``down_proj``, for router weights that sum to one: G, or G/2 if the whole
            dense MLP is shared; 0 if only the shared expert may count.
        shared_scale: The factor of the shared expert's output: 1 or 1/2, through ``down_proj`` or a gate.
    """

    width: int
    num_experts: int
    granularity: int
    expert_width: int
    shared_width: int
    routed_start: int
    scale: float
    shared_scale: float

    @property
    def replicas(self) -> int:
        """R, the number of experts that hold the same neurons."""
        return self.num_experts // self.granularity

    @property
    def padding(self) -> int:
        """The number of a replica's neurons that are zeros."""
        return self.granularity * self.expert_width - (self.width - self.routed_start)

    def neurons(self, expert: int) -> tuple[int, int]:
        """Start and end of an expert's neurons in the dense MLP, at most ``expert_width`` of them."""
        start = self.routed_start + expert % self.granularity * self.expert_width
        return min(start, self.width), min(start + self.expert_width, self.width)


def split(
    width: int,
    num_experts: int,
    top_k: int,
    granularity: int = 1,
    shared: Shared = None,
    expert_width: int | None = None,
    sums_to_one: bool = True,
) -> Split:
    """Divide a dense MLP's neurons over experts.

    Args:
        width: I, the neurons of the dense MLP.
        num_experts: E, a multiple of granularity.
        top_k: K, a multiple of granularity, at most E.
        granularity: G, the number of shards of the dense MLP.
        shared: None; a number of neurons below I, which the shared expert gets first; or ``"whole"``, a shared expert
            that is the dense MLP.
        expert_width: n; None for the smallest multiple of 8 with ``G * n >= I``, and for all routed neurons if G is 1.
        sums_to_one: Whether a token's router weights sum to one. If not, the whole dense MLP must be shared, and the
            routed experts start with an output of zero.

    Raises:
        TypeError, ValueError: An argument is of the wrong kind or out of range.
    """
    checks.is_int("width", width, 1)
    checks.is_int("num_experts", num_experts, 1)
    checks.is_int("top_k", top_k, 1, num_experts, f"num_experts is {num_experts}")
    checks.is_int("granularity", granularity, 1)
    for name, value in (("num_experts", num_experts), ("top_k", top_k)):
        if value % granularity:
            raise ValueError(
                f"{name}: got {value}, expected a multiple of granularity, {granularity}: a replica's shards are "
                "chosen together"
            )
    if isinstance(shared, str) or shared is None:
        if shared not in (None, "whole"):
            raise ValueError(f"shared: got {shared!r}, expected None, a number of neurons or 'whole'")
    else:
        checks.is_int("shared", shared, 1, width - 1, f"the dense MLP has {width} neurons; 'whole' shares all of them")
    if not sums_to_one and shared != "whole":
        raise ValueError(
            f"shared: got {shared!r}, expected 'whole' where a token's router weights do not sum to one: the routed "
            "experts start with nothing to add"
        )
    cut = shared if isinstance(shared, int) else 0
    least = -(-(width - cut) // granularity)
    if expert_width is None:
        expert_width = least if granularity == 1 else -(-least // _MULTIPLE) * _MULTIPLE
    else:
        checks.is_int("expert_width", expert_width, least, None, f"{granularity} shards hold {width - cut} neurons")
    whole = shared == "whole"
    scale = float(granularity) if not whole else granularity / 2 if sums_to_one else 0.0
    return Split(
        width=width,
        num_experts=num_experts,
        granularity=granularity,
        expert_width=expert_width,
        shared_width=width if whole else cut,
        routed_start=cut,
        scale=scale,
        shared_scale=0.5 if whole and sums_to_one else 1.0,
    )


def shard(weight: Tensor, parts: Split, expert: int, dim: int, order: Tensor | None = None) -> Tensor:
    """An expert's neurons of one dense tensor, padded with zeros; a view if nothing is padded or permuted.

    Args:
        weight: With the dense MLP's neurons along ``dim``: gate and up ``[I, H]`` and their biases ``[I]`` along 0,
            down ``[H, I]`` along 1.
        parts: See :func:`split`.
        expert: Its index, below E.
        dim: The neurons' dimension.
        order: int64 ``[I - routed_start]``, a permutation of the routed neurons, the same for all shards of a replica
            and all its tensors; None for the order of the dense MLP.

    Returns:
        As ``weight``, with ``expert_width`` along dim.
    """
    start, end = parts.neurons(expert)
    if order is None:
        part = weight.narrow(dim, start, end - start)
    else:
        mine = order[start - parts.routed_start : end - parts.routed_start] + parts.routed_start
        part = weight.index_select(dim, mine.to(weight.device))
    return _padded(part, parts.expert_width, dim)


def shared_part(weight: Tensor, parts: Split, dim: int) -> Tensor:
    """The shared expert's neurons of one dense tensor, a view; multiply down's by ``shared_scale`` unless a gate does.

    A gate of zeros, as Qwen2-MoE's starts, multiplies by 1/2 itself: down's factor is then ``2 * shared_scale``.
    """
    return weight.narrow(dim, 0, parts.shared_width)


def scaled(weight: Tensor, factor: float) -> Tensor:
    """``weight * factor``, in float32 (float64 for float64) with one rounding; by 1 the tensor itself."""
    return weight if factor == 1 else (_wide(weight) * factor).to(weight.dtype)


def rounds(factor: float, dtype: torch.dtype) -> bool:
    """Whether multiplying by the factor costs a rounding in half precision, about 2**-9 relative in bfloat16."""
    return dtype.itemsize < 4 and factor != 0 and math.frexp(factor)[0] != 0.5


def router_rows(
    num_experts: int,
    hidden_size: int,
    granularity: int = 1,
    std: float = ROUTER_STD,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A router's weight ``[E, H]`` on the CPU: E / G rows of N(0, std), each repeated G times.

    Drawn in float32 for every dtype, so that equal seeds give equal rows up to rounding.
    """
    checks.is_int("granularity", granularity, 1)
    checks.is_int("num_experts", num_experts, 1)
    if num_experts % granularity:
        raise ValueError(f"num_experts: got {num_experts}, expected a multiple of granularity, {granularity}")
    checks.is_number("router_std", std, low=0)
    rows = torch.randn(num_experts // granularity, hidden_size, generator=generator, device="cpu", dtype=torch.float32)
    return (rows * std).to(dtype or torch.get_default_dtype()).repeat_interleave(granularity, dim=0)


@dataclass(frozen=True)
class Init:
    """The change to the copies: ``kind`` is copy, noise or drop, ``amount`` S or R."""

    kind: str
    amount: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether the experts stay copies."""
        return self.amount == 0


def parse_init(text: str) -> Init:
    """``"copy"``, ``"noise:S"`` with S >= 0, or ``"drop:R"`` with 0 <= R <= 1.

    Raises:
        TypeError, ValueError: It is none of these.
    """
    if not isinstance(text, str):
        raise TypeError(f"init: got {type(text).__name__}, expected 'copy', 'noise:S' or 'drop:R'")
    kind, colon, rest = text.partition(":")
    try:
        amount = float(rest) if colon else 0.0
    except ValueError:
        amount = math.nan
    if kind not in KINDS or bool(colon) == (kind == "copy") or not 0 <= amount < math.inf:
        raise ValueError(
            f"init: got {text!r}, expected 'copy', 'noise:S' (S standard deviations) or 'drop:R' (R in 0…1)"
        )
    if kind == "drop" and amount > 1:
        raise ValueError(f"init: got {text!r}, expected a share of the neurons, R in 0…1")
    return Init(kind, amount)


def generator_for(seed: int, *key: int | str) -> torch.Generator:
    """A generator for each key (a layer, an expert, a matrix), so that the order of computation does not matter."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def dropped_neurons(expert_width: int, ratio: float, generator: torch.Generator) -> Tensor:
    """int64 ``[int(ratio * n)]``: the neurons of an expert that are drawn again, the same in gate, up and down."""
    return torch.randperm(expert_width, generator=generator, device="cpu")[: int(ratio * expert_width)]


def redrawn(weight: Tensor, neurons: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """A copy of an expert's matrix with some neurons drawn again from N(mean, std) of their joint old values.

    Args:
        weight: ``[n, H]`` (dim 0) or ``[H, n]`` (dim 1), before :func:`scaled`.
        neurons: See :func:`dropped_neurons`.
        dim: The neurons' dimension.
        generator: On the CPU.
    """
    if not len(neurons):
        return weight.clone()
    chosen = neurons.to(weight.device)
    old = _wide(weight.index_select(dim, chosen))
    std, mean = torch.std_mean(old, correction=0)
    new = _normal(old, generator) * std + mean
    return weight.index_copy(dim, chosen, new.to(weight.dtype))


def noised(weight: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """``weight + strength * std(weight) * N(0, 1)``, in float32 (float64 for float64) with one rounding."""
    wide = _wide(weight)
    return (wide + _normal(wide, generator) * (strength * wide.std(correction=0))).to(weight.dtype)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) drawn on the CPU in float32, so that equal seeds give equal experts on every device."""
    return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float32).to(like)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _padded(part: Tensor, width: int, dim: int) -> Tensor:
    missing = width - part.shape[dim]
    if not missing:
        return part
    shape = list(part.shape)
    shape[dim] = missing
    return torch.cat((part, part.new_zeros(shape)), dim)
