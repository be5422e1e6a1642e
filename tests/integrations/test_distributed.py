"""The layer on two ranks, on the host with gloo and on two GPUs with NCCL: data, fully sharded and expert parallel."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import moekern as mk
from problems import error, forbid_torch_path

H, I, E, K = 32, 16, 6, 2
RANKS = 2
SECONDS = 90  # limits the cost of a hang

# Of this rank's process.
device, dtype, rounding = torch.device("cpu"), torch.float32, 1e-5


def model_of(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(H, H), mk.MoE(H, I, E, K, **options)).to(device, dtype)


def normal(*shape: int, seed: int) -> Tensor:
    """The same numbers on every rank and device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def batch(rank: int) -> Tensor:
    """One token per rank: most experts get none."""
    return normal(1, H, seed=rank)


def train_on_whole_batch(model: nn.Module) -> list[Tensor | None]:
    for rank in range(RANKS):
        (model(batch(rank)).square().mean() / RANKS).backward()
    return [p.grad for p in model.parameters()]


def ddp(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(model_of())
    for _ in range(2):  # the second pass would complain of parameters that had no gradient
        model.zero_grad()
        model(batch(rank)).square().mean().backward()
    for p, expected in zip(model.parameters(), train_on_whole_batch(model_of()), strict=True):
        assert error(p.grad, expected) < rounding


def fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model[1])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(batch(rank)).square().mean().backward()
    for p, expected in zip(model.parameters(), train_on_whole_batch(model_of()), strict=True):
        assert error(p.grad.full_tensor(), expected) < rounding
    before = model[1].experts.down_proj.full_tensor().clone()
    optimizer.step()
    assert not torch.equal(model[1].experts.down_proj.full_tensor(), before)
    model(batch(rank))


def dtensor(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh(device.type, (RANKS,))
    plain, moe = (mk.MoE(H, I, E, K, bias=True, router_bias=True).to(device, dtype) for _ in range(2))
    moe.load_state_dict(plain.state_dict())
    for module in (moe.gate, moe.experts):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
    x = normal(7, H, seed=5)
    for module in (plain, moe):
        module(x).square().sum().backward()
    for p, expected in zip(moe.parameters(), plain.parameters(), strict=True):
        assert error(p.grad.to_local(), expected.grad) < rounding
    for name, dimension in (("gate_up_proj", 0), ("gate_up_proj", 1), ("down_proj", 2)):
        split = mk.MoE(H, I, E, K).to(device, dtype)
        weight = distribute_tensor(getattr(split.experts, name).detach(), mesh, [Shard(dimension)])
        setattr(split.experts, name, nn.Parameter(weight))
        with pytest.raises(ValueError, match=rf"experts.{name}: got a DTensor placed as S.*{dimension}.*replicated"):
            split(x)


def fused_shared_expert(rank: int) -> None:
    """Sharded, its state dict has the joined weights; a layer that is not sharded reads them and takes them apart."""
    from torch.distributed.fsdp import fully_shard

    options = {"shared_intermediate_size": 2 * I, "shared_gate": True, "fuse_shared_expert": True}
    plain, sharded = model_of(**options), model_of(**options)
    fully_shard(sharded[1])
    fully_shard(sharded)
    wanted = train_on_whole_batch(plain)
    sharded(batch(rank)).square().mean().backward()
    for p, expected in zip(sharded.parameters(), wanted, strict=True):
        assert error(p.grad.full_tensor(), expected) < rounding
    parallel = nn.parallel.DistributedDataParallel(model_of(**options))
    parallel(batch(rank)).square().mean().backward()
    for p, expected in zip(parallel.parameters(), wanted, strict=True):
        assert error(p.grad, expected) < rounding
    gathered = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
    assert gathered["1.experts.down_proj"].shape == (E + 2, H, I)
    before = plain.state_dict()
    nn.init.zeros_(plain[1].experts.down_proj)
    plain.load_state_dict(gathered)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(RuntimeError, match="whose fused weights are DTensors: load before sharding"):
        sharded.load_state_dict(before)
    sharded[1].reset_parameters()
    down = sharded[1].experts.down_proj.full_tensor().abs().amax((1, 2))
    assert down[:E].min() > I**-0.5 * 0.9
    assert down[E:].max() < (2 * I) ** -0.5 * 1.01  # rounded to the layer's dtype


def balance_over_ranks(rank: int) -> None:
    """The mean over ranks of the grouped loss, and its gradient, are those of the whole batch on one rank."""
    options = {"routing": "deepseek_v3", "selection_bias": True}
    x = normal(RANKS, 20, H, seed=9)
    alone, shared = model_of(**options), model_of(**options)
    alone(x)
    whole = mk.aux_loss(alone)
    whole.backward()
    shared(x[rank])
    part = mk.aux_loss(shared, group=dist.group.WORLD)
    part.backward()
    gradient = shared[1].gate.weight.grad
    mean = part.detach().clone()
    for tensor in (gradient, mean):
        dist.all_reduce(tensor)
        tensor /= RANKS
    assert error(mean, whole) < rounding
    assert error(gradient, alone[1].gate.weight.grad) < rounding
    mk.update_selection_bias(alone)
    mk.update_selection_bias(shared, group=dist.group.WORLD)
    assert torch.equal(shared[1].gate.e_score_correction_bias, alone[1].gate.e_score_correction_bias)


class Exchange(torch.autograd.Function):
    """Send the first rows to rank 0, the next ones to rank 1 and so on; gradients return."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.splits = sent, received
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.splits
        return Exchange.apply(gradient, received, sent), None, None


def balance_with_uneven_padding(rank: int) -> None:
    """The same where one rank has three real tokens and the other eleven: every token weighs the same."""
    options = {"routing": "deepseek_v3", "selection_bias": True}
    x = normal(RANKS * 2, 8, H, seed=21)
    lengths = torch.tensor([1, 2, 8, 3], device=device)
    mask = torch.arange(8, device=device) < lengths.unsqueeze(1)
    whole, shared = model_of(**options)[1], model_of(**options)[1]
    whole(x, mask)
    expected = mk.aux_loss(whole)
    mine = slice(2 * rank, 2 * rank + 2)
    shared(x[mine], mask[mine])
    part = mk.aux_loss(shared, group=dist.group.WORLD)
    expected.backward()
    part.backward()
    for own, of_all in ((part.detach(), expected.detach()), (shared.gate.weight.grad, whole.gate.weight.grad)):
        mean = own.clone()
        dist.all_reduce(mean)
        assert error(mean / RANKS, of_all) < rounding
    mk.update_selection_bias(shared, group=dist.group.WORLD)
    mk.update_selection_bias(whole)
    assert torch.equal(shared.gate.e_score_correction_bias, whole.gate.e_score_correction_bias)


def replicated_selection_bias(rank: int) -> None:
    """A module spread by distribute_module, which makes buffers DTensors too: the bias is used, and moves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_module

    options = {"routing": "deepseek_v3", "selection_bias": True}
    plain, spread = model_of(**options)[1], model_of(**options)[1]
    distribute_module(spread, init_device_mesh(device.type, (RANKS,)))
    assert isinstance(spread.gate.e_score_correction_bias, DTensor)
    x = normal(9, H, seed=22)
    for _ in range(2):
        assert error(spread(x), plain(x)) < rounding
        for moe in (spread, plain):
            mk.update_selection_bias(moe, 0.1)
        bias = spread.gate.e_score_correction_bias.to_local()
        assert torch.equal(bias, plain.gate.e_score_correction_bias)
        assert bias.any()


def experts_of_all_ranks(x: Tensor, ids: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """As :func:`moekern.experts`, with each rank holding its share of the experts: w_up, w_down are this rank's."""
    own = w_up.shape[0]
    plan = mk.plan(ids, own * RANKS)
    counts = plan.counts.view(RANKS, own)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts)
    sent, received = counts.sum(1).tolist(), theirs.sum(1).tolist()
    arrived = Exchange.apply(mk.permute(x, plan), sent, received)
    # Each rank's rows are sorted by expert; the experts need those of all ranks together.
    experts = torch.arange(own, device=x.device).repeat(RANKS).repeat_interleave(theirs.flatten())
    local = mk.plan(experts.unsqueeze(1), own)
    y = mk.grouped_mlp(mk.permute(arrived, local), local.offsets, w_up, w_down)
    return mk.combine(Exchange.apply(mk.combine(y, local), received, sent), plan, weights)


def expert_parallel(rank: int) -> None:
    """Output and gradients of experts spread over ranks are those of one process with all tokens and experts."""
    tokens, own = 50, E // RANKS
    whole = [normal(RANKS * tokens, H, seed=1), torch.rand(RANKS * tokens, K, device=device)]
    dist.broadcast(whole[1], 0)
    weights = [normal(E, 2 * I, H, seed=2) * H**-0.5, normal(E, H, I, seed=3) * I**-0.5]
    logits = torch.randn(RANKS * tokens, E, generator=torch.Generator().manual_seed(4))
    ids = logits.argsort(1)[:, :K].to(device)
    ids[: tokens // 2] = ids[: tokens // 2] % own  # the first rank's tokens stay there for the most part
    up = normal(RANKS * tokens, H, seed=6)

    leaves = [t.clone().requires_grad_() for t in (*whole, *weights)]
    out = mk.experts(leaves[0], ids, leaves[1], *leaves[2:])
    wanted = [out, *torch.autograd.grad(out, leaves, up)]

    mine, held = slice(rank * tokens, (rank + 1) * tokens), slice(rank * own, (rank + 1) * own)
    parts = [t[mine].clone().requires_grad_() for t in whole] + [t[held].clone().requires_grad_() for t in weights]
    out = experts_of_all_ranks(parts[0], ids[mine], parts[1], *parts[2:])
    got = [out, *torch.autograd.grad(out, parts, up[mine])]
    for value, expected, part in zip(got, wanted, (mine, mine, mine, held, held), strict=True):
        assert error(value, expected[part]) < rounding


CHECKS = (
    ddp,
    fsdp2,
    dtensor,
    fused_shared_expert,
    balance_over_ranks,
    balance_with_uneven_padding,
    replicated_selection_bias,
    expert_parallel,
)


def worker(rank: int, folder: Path, kind: str) -> None:
    """One rank; writes its progress to a file, and its error too."""
    global device, dtype, rounding
    log = folder / f"rank{rank}"
    log.write_text("setting up")
    options: dict[str, Any] = {}
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    try:
        if kind == "cuda":
            device, dtype, rounding = torch.device("cuda", rank), torch.bfloat16, 2**-6
            torch.cuda.set_device(device)
            options["device_id"] = device
            if torch.cuda.get_device_capability() == (9, 0):
                forbid_torch_path(patch)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder / 'store'}", rank=rank,
            world_size=RANKS, timeout=timedelta(seconds=SECONDS), **options,
        )  # fmt: skip
        for check in CHECKS:
            log.write_text(f"in {check.__name__}")
            check(rank)
            if kind == "cuda":
                assert torch.cuda.current_device() == rank
        log.write_text("ending")
        gc.collect()  # wrapped models are cycles that hold the group; its threads abort a process that ends with them
        dist.destroy_process_group()
    except BaseException:
        log.write_text(f"{log.read_text()}:\n{traceback.format_exc()}")
        os._exit(1)  # without waiting for the other rank


NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")


@pytest.mark.parametrize(
    "kind", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_TWO])]
)
def test_two_ranks(kind: str, tmp_path: Path) -> None:
    """DistributedDataParallel with unused experts, fully_shard, DTensor, balance over a group, experts apart."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=worker, args=(rank, tmp_path, kind), daemon=True) for rank in range(RANKS)]
    for rank, process in enumerate(ranks):
        (tmp_path / f"rank{rank}").write_text("not begun")
        process.start()
    deadline = time.monotonic() + SECONDS
    while any(process.exitcode is None for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    said = "\n".join(f"rank {rank}, {codes[rank]}: {(tmp_path / f'rank{rank}').read_text()}" for rank in range(RANKS))
    assert codes == [0, 0], said
