"""Losses on the router and DeepSeek's bias update: against transformers, their formulas, and under checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moekern as mk
from problems import error

H, I, E, K = 32, 16, 6, 2


def layer(**options: object) -> mk.MoE:
    return mk.MoE(H, I, E, K, **options)  # type: ignore[arg-type]


def counts_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.bincount(ids.flatten().cpu(), minlength=E).to(ids.device)


def test_masked_loss_is_that_of_transformers(device: str) -> None:
    """Value and gradient, with padding."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    moe = layer().to(device)
    mask = torch.ones(3, 10, dtype=torch.int64, device=device)
    mask[0, 6:] = 0
    mask[2, :9] = 0
    x = torch.randn(3, 10, H, device=device)
    moe(x)
    for given in (mask, mask.bool(), None):
        ours = mk.aux_loss(moe, given)
        theirs = load_balancing_loss_func((moe.gate(x.reshape(-1, H)),), E, K, None if given is None else mask)
        assert error(ours, theirs) < 1e-5
        (gradient,) = torch.autograd.grad(ours, moe.gate.weight, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs, moe.gate.weight)
        assert error(gradient, expected) < 1e-5


def test_padding_does_not_matter(device: str) -> None:
    moe = layer().to(device)
    x = torch.randn(2, 8, H, device=device)
    mask = torch.ones(2, 8, dtype=torch.int64, device=device)
    mask[:, 5:] = 0
    coefficients = {"balance": 0.5, "z": 0.1, "sequence": 0.2}
    losses = []
    for fill in (0.0, 7.0):
        moe(torch.where(mask.unsqueeze(-1) > 0, x, fill))
        losses.append(mk.aux_loss(moe, mask, **coefficients))
    moe(x[:, :5])
    losses.append(mk.aux_loss(moe, **coefficients))
    for loss in losses[1:]:
        assert error(loss, losses[0]) < 1e-5


def test_z_loss(device: str) -> None:
    logits = torch.randn(30, E, dtype=torch.float32, device=device, requires_grad=True)
    expected = torch.logsumexp(logits, 1).square().mean()
    assert error(mk.z_loss(logits), expected) < 1e-6
    mask = torch.arange(30, device=device) < 12
    assert error(mk.z_loss(logits, mask=mask), mk.z_loss(logits[:12])) < 1e-6
    mk.z_loss(logits).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("method", ["deepseek_v3", "softmax_topk"])
def test_sequence_loss_is_the_papers(device: str, method: str) -> None:
    """Equations 17 to 20 of DeepSeek-V3, written out for each sequence."""
    logits = torch.randn(3, 11, E, device=device)
    _, ids = mk.route(logits, K, method=method)
    total = 0.0
    for b in range(3):
        scores = logits[b].sigmoid() if method == "deepseek_v3" else logits[b].softmax(-1)
        share = scores / scores.sum(1, keepdim=True)
        frequency = counts_of(ids[b]) * E / (K * 11)
        total += float((frequency * share.mean(0)).sum())
    assert float(mk.sequence_balancing_loss(logits, ids, method=method)) == pytest.approx(total / 3, rel=1e-5)
    even = mk.sequence_balancing_loss(torch.zeros(1, E, E), torch.arange(E).expand(2, E).T.unsqueeze(0))
    assert float(even) == pytest.approx(1, rel=1e-6)


def test_sentinels_are_not_counted(device: str) -> None:
    logits = torch.randn(2, 9, E, device=device)
    ids = mk.route(logits, K)[1]
    mask = torch.ones(2, 9, dtype=torch.int64, device=device)
    mask[:, 6:] = 0
    dropped = torch.where(mask.unsqueeze(2) > 0, ids, torch.tensor([-1, E], device=device))
    expected = mk.sequence_balancing_loss(logits, ids, mask=mask)
    assert error(mk.sequence_balancing_loss(logits, dropped, mask=mask), expected) < 1e-6
    assert error(mk.sequence_balancing_loss(logits, dropped), mk.sequence_balancing_loss(logits, ids)) > 1e-3


def test_losses_of_all_layers_are_summed(device: str) -> None:
    model = nn.Sequential(layer(routing="deepseek_v3"), layer(), nn.Linear(H, H)).to(device)
    x = torch.randn(2, 9, H, device=device)
    model(x)
    parts = torch.zeros((), device=device)
    hidden = x
    for moe in model[:2]:
        logits = moe.gate(hidden)
        _, ids = mk.route(logits, K, method=moe.routing)
        flat = logits.reshape(-1, E)
        parts = parts + 0.3 * mk.load_balancing_loss(flat, counts_of(ids)) + 0.2 * mk.z_loss(flat)
        parts = parts + 0.1 * mk.sequence_balancing_loss(logits, ids, method=moe.routing)
        hidden = moe(hidden)
    model(x)
    total = mk.aux_loss(model, balance=0.3, z=0.2, sequence=0.1)
    assert error(total, parts) < 1e-5
    total.backward()
    assert all(moe.gate.weight.grad.abs().sum() > 0 for moe in model[:2])


class Checkpointed(nn.Module):
    def __init__(self, moe: mk.MoE, reentrant: bool) -> None:
        super().__init__()
        self.moe, self.reentrant = moe, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.moe, x, use_reentrant=self.reentrant)


def test_a_recomputation_does_not_count_twice(place: tuple[str, torch.dtype]) -> None:
    """Gradients of the loss and counts for the bias update equal those of a run without checkpointing."""
    device, dtype = place
    x = torch.randn(5, 7, H, device=device, dtype=dtype)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        moe = layer(routing="deepseek_v3", selection_bias=True, router_jitter_noise=0.1).to(device, dtype)
        model = Checkpointed(moe, reentrant=False) if recompute else moe
        for _ in range(2):  # gradient accumulation
            loss = model(x.clone().requires_grad_()).square().mean() + 0.1 * mk.aux_loss(model, z=0.1)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in moe.parameters()), moe.gate.tokens_since_update.clone()])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    assert int(results[1][-1].sum()) == 2 * 35 * K


def test_a_loss_without_gradient_is_refused() -> None:
    model = Checkpointed(layer(), reentrant=True)
    model(torch.randn(4, H, requires_grad=True))
    with pytest.raises(ValueError, match=r"layer 'moe' ran without gradient.*use_reentrant=False"):
        mk.aux_loss(model)
    with torch.no_grad():
        assert float(mk.aux_loss(model)) > 0


def test_bias_update(place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    moe = layer(routing="deepseek_v3", selection_bias=True).to(device, dtype)
    x = torch.randn(50, H, device=device, dtype=dtype)
    moe(x)
    moe(x)
    moe.eval()(x)  # does not count
    counts = 2 * counts_of(mk.route(moe.gate(x), K, method="deepseek_v3")[1]).float()
    assert torch.equal(moe.gate.tokens_since_update.float(), counts)
    mk.update_selection_bias(moe, rate=0.01)
    assert torch.allclose(moe.gate.e_score_correction_bias, 0.01 * torch.sign(counts.mean() - counts))
    assert not moe.gate.tokens_since_update.any()


def test_bias_update_evens_the_load(place: tuple[str, torch.dtype]) -> None:
    """A router that starts lopsided: the busiest expert's share falls to nearly an even one."""
    device, dtype = place
    moe = layer(routing="deepseek_v3", selection_bias=True).to(device, dtype)
    x = torch.randn(400, H, device=device, dtype=dtype) + 1
    moe(x)
    before = moe.latest_routing.tokens_per_expert.max()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    handle = mk.bias_update_hook(optimizer, moe, rate=0.01)
    for _ in range(60):
        moe(x)
        optimizer.step()
    after = moe.latest_routing.tokens_per_expert
    assert int(before) > 1.5 * 400 * K / E
    assert int(after.max()) < 1.2 * 400 * K / E
    handle.remove()
    moe(x)
    optimizer.step()
    assert moe.gate.tokens_since_update.any()


def test_selection_bias_keeps_float32_and_moves_with_the_layer(device: str) -> None:
    moe = layer(routing="deepseek_v3", selection_bias=True).to(device)
    moe.gate.e_score_correction_bias += 0.1001
    expected = moe.gate.e_score_correction_bias.clone()
    moe = moe.to(torch.bfloat16)
    assert moe.gate.weight.dtype == torch.bfloat16
    assert torch.equal(moe.gate.e_score_correction_bias, expected)
    assert moe(torch.randn(4, H, dtype=torch.bfloat16, device=device)).dtype == torch.bfloat16
    other = layer(routing="deepseek_v3", selection_bias=True).to(device)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.gate.e_score_correction_bias, expected)
    assert moe.to("meta").gate.e_score_correction_bias.device.type == "meta"
