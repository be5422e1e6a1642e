"""Checks that a dense MLP's forward is the formula of its projections and an activation.

Names are a guess; outputs decide. A few random rows pass through the module and through the formula, in float64 on
copies of the weights: half precision or TF32 would hide the difference between two kinds of GELU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekern.backends.activations import ACTIVATIONS
from moekern.verbs import checks, direct

ROWS = 8
# Root mean squares of the first pre-activation: at 1 the curves of activations differ, at 16 clamps act.
SCALES = (1.0, 16.0)
# Relative, in float64: above a module's own float32 steps (1e-6), below the difference of erf and tanh in GELU (2e-4).
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Linear:
    """One projection of the module: its name there, ``weight`` ``[out, in]``, ``bias`` ``[out]`` or None.

    ``is_transposed``: the module keeps ``[in, out]``, as transformers' Conv1D does.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    is_transposed: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def has_values(weight: Tensor) -> bool:
    """Whether the tensor holds numbers; on the meta device and in a FakeTensorMode it does not."""
    if type(weight) in direct.PLAIN:
        return not weight.is_meta
    from torch._subclasses.fake_tensor import FakeTensor

    return not (weight.is_meta or isinstance(weight, FakeTensor))


def compare(module: nn.Module, linears: list[Linear], activation: str) -> None:
    """Raise ValueError unless the module's forward is ``down(activation(projections(x)))``."""
    probe = _Probe(module, linears)
    difference = probe.difference(activation)
    if difference <= probe.tolerance:
        return
    other = probe.fitting()
    helps = (
        f"activation={other!r} computes the same"
        if other is not None
        else "pass the activation= it uses, merge LoRA adapters, or give a module whose forward is the projections "
        "and the activation alone (no scaling, norm, residual or hook)"
    )
    raise ValueError(
        f"dense_mlp: {type(module).__name__}'s forward is not its projections with activation "
        f"{activation!r}: on random rows the outputs differ by {difference:.1g} relative; {helps}"
    )


def fitting(module: nn.Module, linears: list[Linear]) -> str | None:
    """The activation with which the formula equals the module's forward, or None."""
    return _Probe(module, linears).fitting()


class _Probe:
    """Random rows ``[2, ROWS, H]``, one block per scale, and the module's output for them."""

    def __init__(self, module: nn.Module, linears: list[Linear]) -> None:
        kind, down = type(module).__name__, linears[-1].weight
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        generator = torch.Generator("cpu").manual_seed(0)
        z = torch.randn(len(SCALES), ROWS, len(down), generator=generator, dtype=torch.float64, device="cpu")
        z = z.to(down.dtype).to(down.device)
        names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self.linears = [_filled(p, names, generator) for p in linears]
        filled = {
            f"{p.name}.weight": p.weight.T if p.is_transposed else p.weight
            for p, old in zip(self.linears, linears, strict=True)
            if p is not old
        }
        # If the module cannot compute in float64 (its own kernels, another device), its own dtype is used.
        accuracy = {torch.float64: TOLERANCE}
        accuracy.setdefault(down.dtype, max(4 * torch.finfo(down.dtype).eps, 2e-3))
        failure: Exception | None = None
        for dtype, tolerance in accuracy.items():
            try:
                self.rows = self._scaled(z.to(dtype))
                self.out = _run(module, self.rows, filled)
            except Exception as error:  # a foreign forward may raise anything
                failure = error
                continue
            self.tolerance = tolerance
            return
        raise ValueError(
            f"dense_mlp: {kind}'s forward could not be run on {list(z.shape)} hidden states to compare it with the "
            f"experts ({type(failure).__name__}: {failure}); expected one that takes hidden states [..., H] alone and "
            "returns as many: wrap the projections and the activation in such a module"
        ) from failure

    def _scaled(self, z: Tensor) -> Tensor:
        """The rows at which the first projection, without its bias, gives the root mean squares of SCALES."""
        with _plainly(z.device):
            pre = F.linear(z, self.linears[0].weight.to(z.dtype)).double()
        rms = max(pre.square().mean().sqrt().item(), 1e-30)
        return torch.stack([block * (scale / rms) for block, scale in zip(z, SCALES, strict=True)])

    def difference(self, activation: str) -> float:
        """The largest relative difference of any scale; infinite where one side is not finite."""
        *ups, down = self.linears
        with _plainly(self.rows.device):
            pre = [up(self.rows) for up in ups]
            ours = down(ACTIVATIONS[activation].forward(pre[0], pre[1] if len(pre) == 2 else None))
        worst = 0.0
        for mine, theirs in zip(ours.double(), self.out.double(), strict=True):
            distance, size = ((t.square().sum().sqrt()).item() for t in (mine - theirs, mine))
            if distance != 0:  # NaN too
                worst = max(worst, distance / size if size > 0 and math.isfinite(distance) else math.inf)
        return worst

    def fitting(self) -> str | None:
        """The activation nearest to the module's outputs, if it is within the tolerance."""
        gated = len(self.linears) == 3
        differences = {name: self.difference(name) for name, a in ACTIVATIONS.items() if a.gated == gated}
        nearest = min(differences, key=differences.__getitem__)
        return nearest if differences[nearest] <= self.tolerance else None


def _filled(linear: Linear, names: set[str], generator: torch.Generator) -> Linear:
    """A projection of zeros, as down_proj often starts, hides the others: random numbers replace it."""
    if f"{linear.name}.weight" not in names or linear.weight.any():
        return linear
    out, inputs = linear.weight.shape
    drawn = torch.randn(out, inputs, generator=generator, device="cpu") / math.sqrt(inputs)
    return replace(linear, weight=drawn.to(linear.weight))


def _run(module: nn.Module, rows: Tensor, filled: dict[str, Tensor]) -> Tensor:
    """The module's output for rows ``[2, ROWS, H]``, in their dtype; the module stays as it was."""

    def ready(tensor: Tensor) -> Tensor:
        return tensor.detach().to(rows.dtype) if tensor.dtype in checks.FLOATING else tensor.detach()

    tensors: dict[str, Any] = {name: ready(p) for name, p in module.named_parameters()}
    # Copies, since a forward may write to its input.
    tensors |= {name: ready(b.clone()) for name, b in module.named_buffers()}
    tensors |= {name: ready(t) for name, t in filled.items()}
    with _plainly(rows.device), _evaluating(module):
        try:
            out = torch.func.functional_call(module, tensors, (rows.clone(),))
        except Exception as first:
            try:  # one that takes [T, H] alone
                out = torch.func.functional_call(module, tensors, (rows.flatten(0, 1),))
            except Exception:
                raise first from None
            if isinstance(out, Tensor) and out.numel() == rows.numel():
                out = out.view_as(rows)
    if not isinstance(out, Tensor) or out.shape != rows.shape or out.dtype != rows.dtype:
        got = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"it returned {got} for {rows.dtype} {list(rows.shape)}")
    return out


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and compilation; random numbers drawn inside do not change the generators."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        others = [] if device.type == "cpu" else [device]
        kind = "cuda" if device.type == "cpu" else device.type
        stack.enter_context(torch.random.fork_rng(others, device_type=kind))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; attributes that a forward changes, such as counters, are restored.

    Only the flags are set: the module's own method `train` may do more, such as merge adapters.
    """
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    for m, _ in before:
        m.training = False
    try:
        yield
    finally:
        for m, attributes in before:
            for name in m.__dict__.keys() - attributes.keys():
                del m.__dict__[name]
            m.__dict__.update(attributes)
