"""The selection bias under recomputation in every combination, and the steps of wrapped optimisers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moekern as mk

H, I, E, K = 32, 16, 8, 2


def layer() -> mk.MoE:
    return mk.MoE(H, I, E, K, routing="deepseek_v3", selection_bias=True)


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module, **how: Any) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, **self.how)


def compiled(module: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager")


AGAIN = {"use_reentrant": False}
SELECTIVE = {**AGAIN, "context_fn": partial(create_selective_checkpoint_contexts, mk.sac_policy())}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda moe: Recomputed(moe, **AGAIN),
        lambda moe: Recomputed(moe, use_reentrant=True),
        lambda moe: Recomputed(moe, **SELECTIVE),
        lambda moe: Recomputed(Recomputed(moe, **AGAIN), **AGAIN),
        lambda moe: Recomputed(Recomputed(moe, use_reentrant=True), use_reentrant=True),
        lambda moe: Recomputed(compiled(moe), **AGAIN),
        lambda moe: Recomputed(compiled(moe), use_reentrant=True),
        lambda moe: Recomputed(compiled(moe), **SELECTIVE),
        lambda moe: compiled(Recomputed(moe, **AGAIN)),
        lambda moe: compiled(Recomputed(Recomputed(moe, **AGAIN), **AGAIN)),
        compiled,
    ],
    ids=["again", "reentrant", "selective", "nested", "nested reentrant", "of compiled", "reentrant of compiled",
         "selective of compiled", "compiled", "nested compiled", "compiled alone"],
)  # fmt: skip
def test_a_recomputation_counts_once(device: str, wrap: Any) -> None:
    moe = layer().to(device)
    model = wrap(moe)
    for passes in (1, 2):
        x = torch.randn(20, H, device=device, requires_grad=True)
        model(x).square().mean().backward()
        assert int(moe.gate.tokens_since_update.sum()) == passes * 20 * K


class Wrapper(torch.optim.Optimizer):
    """An optimiser by class only, like accelerate's and torch's PostLocalSGDOptimizer."""

    def __init__(self, name: str, inner: Any) -> None:
        self.name = name
        self.__dict__[name] = inner

    def step(self, closure: Any = None) -> None:
        self.__dict__[self.name].step()


class NoOptimizer:
    """Like DeepSpeed's and Megatron's: not an optimiser by class."""

    def __init__(self, inner: Any) -> None:
        self.optimizer = inner

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: inner,
        *(partial(Wrapper, name) for name in ("optimizer", "optim", "_optimizer")),
        NoOptimizer,
        lambda inner: Wrapper("optimizer", NoOptimizer(inner)),
    ],
)
def test_the_hook_sees_the_steps_of_a_wrapped_optimiser(wrap: Any) -> None:
    moe = layer()
    optimizer = wrap(torch.optim.SGD(moe.parameters(), lr=0.1))
    handle = mk.bias_update_hook(optimizer, moe, rate=0.1)
    moe(torch.randn(51, H)).sum().backward()
    optimizer.step()
    bias = moe.gate.e_score_correction_bias.clone()
    assert float(bias.abs().max()) == pytest.approx(0.1)
    handle.remove()
    moe(torch.randn(51, H)).sum().backward()
    optimizer.step()
    assert torch.equal(moe.gate.e_score_correction_bias, bias)


def test_the_hook_works_after_prepare() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    moe = layer()
    model, optimizer = accelerator.prepare(moe, torch.optim.SGD(moe.parameters(), lr=0.1))
    mk.bias_update_hook(optimizer, model, rate=0.1)
    for expected in (0.0, 0.1):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(51, H)).sum())
            optimizer.step()
            optimizer.zero_grad()
        assert float(moe.gate.e_score_correction_bias.abs().max()) == pytest.approx(expected)


def test_what_holds_no_optimiser_is_refused_by_name() -> None:
    moe = layer()
    sgd = torch.optim.SGD(moe.parameters(), lr=0.1)
    itself = Wrapper("optimizer", None)
    itself.__dict__["optimizer"] = itself
    for wrong in (torch.optim.lr_scheduler.StepLR(sgd, 1), Wrapper("other", sgd), itself, NoOptimizer(None), moe, None):
        with pytest.raises(
            TypeError, match=rf"optimizer: got {type(wrong).__name__}.*\.optimizer`; pass the wrapped optimizer"
        ):
            mk.bias_update_hook(wrong, moe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_start_with_mean_zero_in_half_precision(dtype: torch.dtype) -> None:
    moe = mk.MoE(256, 128, 16, K, dtype=dtype, bias=True)
    for weight in (moe.experts.gate_up_proj.detach(), moe.experts.down_proj.detach()):
        bound = weight.shape[-1] ** -0.5
        assert abs(float(weight.double().mean())) < 4 * bound * (3 * weight.numel()) ** -0.5
        assert float(weight.abs().max()) <= bound * (1 + torch.finfo(dtype).eps)
