"""Padding, marked by a mask, counts nowhere; real tokens get the same output as without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moekern as mk
from problems import error

H, I, E, K = 32, 16, 8, 2
B, N, REAL = 8, 50, 5
LIMITED: list[dict[str, Any]] = [
    {"capacity_factor": 1.0},
    {"capacity_factor": 0.7, "drop_by": "position"},
    {"round_tokens_to": 4},
    {"round_tokens_to": 4, "rounding": "up", "capacity_factor": 1.5},
    {"round_tokens_to": 4, "rounding": "down"},
    {"routing": "expert_choice"},
]
UNLIMITED: list[dict[str, Any]] = [
    {},
    {"routing": "deepseek_v3", "selection_bias": True},
    {"shared_intermediate_size": 16, "fuse_shared_expert": True},
    {"shared_intermediate_size": 16, "shared_gate": True},
]


def padded(device: str) -> tuple[Tensor, Tensor]:
    """Nine tenths of the batch are one padding token."""
    x = torch.randn(B, N, H, device=device)
    x[:, REAL:] = 3 * torch.randn(H, device=device)
    return x, (torch.arange(N, device=device) < REAL).expand(B, N)


@pytest.mark.parametrize("given", ["bool", "int", "set", "compiled", "recomputed"])
def test_the_selection_bias_takes_the_step_of_the_real_tokens(device: str, given: str) -> None:
    moe = mk.MoE(H, I, E, K, routing="deepseek_v3", selection_bias=True, device=device)
    x, mask = padded(device)
    if given == "set":
        mk.set_token_mask(moe, mask)
        moe(x)
    elif given == "compiled":
        torch._dynamo.reset()
        torch.compile(moe, backend="aot_eager", fullgraph=True)(x, mask=mask)
    elif given == "recomputed":
        checkpoint(moe, x.clone().requires_grad_(), mask, use_reentrant=False).sum().backward()
    else:
        moe(x, mask if given == "bool" else mask.long())
    ids = moe.latest_routing.topk_ids.view(B, N, K)[:, :REAL]
    real = torch.bincount(ids.reshape(-1), minlength=E)
    assert torch.equal(moe.latest_routing.tokens_per_expert.long(), real)
    assert torch.equal(moe.gate.tokens_since_update, real)
    mk.update_selection_bias(moe, 0.125)
    expected = 0.125 * torch.sign(real.float().mean() - real)
    assert torch.equal(moe.gate.e_score_correction_bias, expected)


@pytest.mark.parametrize("options", [*LIMITED, *UNLIMITED], ids=str)
def test_real_tokens_get_what_they_would_get_alone(device: str, options: dict[str, Any]) -> None:
    """Output, gradients, losses and counts; the padding is NaN if it must not be read."""
    moe = mk.MoE(H, I, E, K, device=device, **options)
    x, mask = padded(device)
    alone, masked = copy.deepcopy(moe), copy.deepcopy(moe)
    coefficients = {"balance": 0.5, "z": 0.1, "sequence": 0.0 if options.get("routing") == "expert_choice" else 0.2}
    results = []
    for layer, inputs, real in ((alone, x[:, :REAL].clone(), None), (masked, x.clone(), mask)):
        inputs.requires_grad_()
        out = layer(inputs, real)
        loss = mk.aux_loss(layer, **coefficients)
        (out[:, :REAL].square().mean() + loss).backward()
        assert torch.isfinite(out).all()
        results.append(
            [out[:, :REAL], loss, layer.latest_routing.tokens_per_expert, inputs.grad[:, :REAL]]
            + [p.grad for p in layer.parameters()]
        )
        if real is not None:
            assert not inputs.grad[:, REAL:].any()
    for got, expected in zip(results[1], results[0], strict=True):
        assert error(got, expected) < 1e-5
    with torch.no_grad():
        assert error(masked.eval()(x, mask)[:, :REAL], alone.eval()(x[:, :REAL])) < 1e-5


@pytest.mark.parametrize("options", UNLIMITED, ids=str)
def test_a_mask_changes_no_output_where_places_are_not_limited(device: str, options: dict[str, Any]) -> None:
    moe = mk.MoE(H, I, E, K, device=device, **options)
    x, mask = padded(device)
    assert torch.equal(moe(x, mask), moe(x))
    assert torch.equal(moe.eval()(x, mask), moe(x))


@pytest.mark.parametrize("options", [*LIMITED, *UNLIMITED], ids=str)
@pytest.mark.parametrize("tokens", [0, 7])
def test_no_real_token_gives_zero_losses_and_finite_gradients(
    device: str, options: dict[str, Any], tokens: int
) -> None:
    moe = mk.MoE(H, I, E, K, device=device, **options)
    out = moe(torch.randn(2, tokens, H, device=device), torch.zeros(2, tokens, dtype=torch.bool, device=device))
    sequence = 0.0 if options.get("routing") == "expert_choice" else 1.0
    loss = mk.aux_loss(moe, balance=1.0, z=1.0, sequence=sequence)
    assert float(loss.detach()) == 0
    assert not moe.latest_routing.tokens_per_expert.any()
    (out.sum() + loss).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in moe.parameters())


def test_padding_that_is_nan_reaches_no_loss(device: str) -> None:
    logits = torch.randn(2, 6, E, device=device)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], device=device)
    ids = mk.route(logits.flatten(0, 1), K)[1].unflatten(0, (2, 6))
    spoilt = torch.where(mask.unsqueeze(2) > 0, logits, float("nan")).requires_grad_()
    clean = logits.clone().requires_grad_()
    losses = []
    for given in (spoilt, clean):
        flat, real = given.flatten(0, 1), mask.flatten()
        counts = torch.bincount(ids.flatten(0, 1)[real > 0].flatten(), minlength=E)
        loss = mk.load_balancing_loss(flat, counts, mask=real) + mk.z_loss(flat, mask=real)
        losses.append(loss + mk.sequence_balancing_loss(given, ids, mask=mask))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert torch.equal(spoilt.grad, clean.grad)


def test_a_sequence_without_tokens_is_no_part_of_the_mean(device: str) -> None:
    logits = torch.randn(3, 6, E, device=device)
    ids = mk.route(logits.flatten(0, 1), K)[1].unflatten(0, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.int64, device=device)
    mask[1] = 0
    both = torch.tensor([0, 2], device=device)
    expected = mk.sequence_balancing_loss(logits[both], ids[both])
    assert error(mk.sequence_balancing_loss(logits, ids, mask=mask), expected) < 1e-6
    assert float(mk.sequence_balancing_loss(logits[:0], ids[:0])) == 0


def test_masks_of_another_order_shape_or_kind_are_refused(device: str) -> None:
    moe = mk.MoE(H, I, E, K, device=device)
    x = torch.randn(3, 4, H, device=device)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    moe(x)
    for wrong in (mask.mT, mask.reshape(2, 6), mask[:, :3], mask.unsqueeze(0).expand(2, 3, 4)):
        for call in (moe, moe.eval(), moe.train()):
            with pytest.raises(ValueError, match=r"mask: got shape .*expected \[3, 4\]"):
                call(x, wrong)
        with pytest.raises(ValueError, match=r"attention_mask: got shape .*expected \(3, 4\)"):
            mk.aux_loss(moe, wrong)
    for kind in (mask.float(), mask.tolist(), "left"):
        with pytest.raises(TypeError, match="mask: got"):
            moe(x, kind)
        with pytest.raises(TypeError, match="mask: got"):
            mk.set_token_mask(moe, kind)
    additive = torch.where(mask, 0.0, float("-inf"))
    losses = {
        "attention_mask": lambda wrong: mk.aux_loss(moe, wrong),
        "mask": lambda wrong: mk.z_loss(torch.zeros(3, E, device=device), mask=wrong[:, 0]),
    }
    for name, loss in losses.items():
        for wrong in (additive, mask.float(), mask.bfloat16()):
            with pytest.raises(TypeError, match=rf"^{name}: got torch.*expected bool or integers.* pass {name} == 0"):
                loss(wrong)
        with pytest.raises(TypeError, match=f"^{name}: got dtype complex64, expected bool"):
            loss(mask.to(torch.complex64))
    for right in (mask, mask.reshape(-1), mask.reshape(3, 1, 4), mask.long(), mask.to(torch.uint8)):
        assert error(mk.aux_loss(moe, right), mk.aux_loss(moe)) < 1e-6
    moe(x.reshape(12, H))
    assert error(mk.aux_loss(moe, mask), mk.aux_loss(moe)) < 1e-6


def test_both_masks_count(device: str) -> None:
    moe = mk.MoE(H, I, E, K, device=device)
    x = torch.randn(3, 6, H, device=device)
    first = torch.ones(3, 6, dtype=torch.bool, device=device)
    second = first.clone()
    first[:, 4:] = False
    second[0] = False
    moe(x, first & second)
    expected = mk.aux_loss(moe, z=0.1, sequence=0.1)
    moe(x, first)
    assert error(mk.aux_loss(moe, second, z=0.1, sequence=0.1), expected) < 1e-6
    moe(x)
    assert error(mk.aux_loss(moe, first & second, z=0.1, sequence=0.1), expected) < 1e-6


def test_a_mask_that_was_set_holds_in_training_until_it_is_ended(device: str) -> None:
    model = nn.Sequential(*(mk.MoE(H, I, E, K, device=device) for _ in range(2)))
    x, mask = padded(device)
    mk.set_token_mask(model, mask)
    for _ in range(2):
        model(x)
        assert all(int(moe.latest_routing.tokens_per_expert.sum()) == B * REAL * K for moe in model)
    assert all(moe._token_mask is None for moe in copy.deepcopy(model))
    with pytest.raises(ValueError, match="mask: got shape"):
        model(x[:, 1:])
    model.eval()(x[:, 1:])
    mk.set_token_mask(model.train(), None)
    model(x)
    assert all(int(moe.latest_routing.tokens_per_expert.sum()) == B * N * K for moe in model)


@pytest.mark.parametrize(
    ("factor", "tokens", "expected"),
    [(1.1, 40, 11), (0.7, 40, 7), (4 / 3, 12, 4), (1.25, 64, 20), (1e-9, 8, 1), (1e300, 8, 16)],
)
def test_capacity_is_rounded_in_integers(factor: float, tokens: int, expected: int) -> None:
    from moekern.routing.capacity import capacity_of

    assert capacity_of(factor, tokens, K, E) == expected
    assert int(capacity_of(factor, torch.tensor(tokens), K, E)) == expected
    assert capacity_of(factor, 0, K, E) == 0
