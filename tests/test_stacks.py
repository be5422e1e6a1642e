"""Training stacks around the layer: data parallelism, DTensor, checkpointing, scalers, optimisers, files."""

from __future__ import annotations

import gc
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moekern as mk
from moekern.backends import cpu, cuda, reference
from problems import error, forbid_torch_path

H, I, E, K = 32, 16, 6, 2
RANKS = 2


def model_of(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(H, H), mk.MoE(H, I, E, K, **options))  # type: ignore[arg-type]


def batch(rank: int) -> torch.Tensor:
    """One token a rank: most experts get none."""
    return torch.randn(1, H, generator=torch.Generator().manual_seed(rank))


def whole_batch_gradients() -> list[torch.Tensor]:
    model = model_of()
    for rank in range(RANKS):
        (model(batch(rank)).square().mean() / RANKS).backward()
    return [p.grad for p in model.parameters()]


def ddp(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(model_of())
    for _ in range(2):  # the second pass would complain of parameters that had no gradient
        model.zero_grad()
        model(batch(rank)).square().mean().backward()
    for p, expected in zip(model.parameters(), whole_batch_gradients(), strict=True):
        assert error(p.grad, expected) < 1e-5


def fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model[1])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(batch(rank)).square().mean().backward()
    for p, expected in zip(model.parameters(), whole_batch_gradients(), strict=True):
        assert error(p.grad.full_tensor(), expected) < 1e-5
    before = model[1].experts.down_proj.full_tensor().clone()
    optimizer.step()
    assert not torch.equal(model[1].experts.down_proj.full_tensor(), before)
    model(batch(rank))


def dtensor(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    plain, moe = (mk.MoE(H, I, E, K, bias=True, router_bias=True) for _ in range(2))
    moe.load_state_dict(plain.state_dict())
    for module in (moe.gate, moe.experts):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(5))
    for module in (plain, moe):
        module(x).square().sum().backward()
    for p, expected in zip(moe.parameters(), plain.parameters(), strict=True):
        assert error(p.grad.to_local(), expected.grad) < 1e-6
    for name, dimension in (("gate_up_proj", 0), ("gate_up_proj", 1), ("down_proj", 2)):
        split = mk.MoE(H, I, E, K)
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
    for each in range(RANKS):
        (plain(batch(each)).square().mean() / RANKS).backward()
    sharded(batch(rank)).square().mean().backward()
    for p, expected in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert error(p.grad.full_tensor(), expected.grad) < 1e-5
    parallel = nn.parallel.DistributedDataParallel(model_of(**options))
    parallel(batch(rank)).square().mean().backward()
    for p, expected in zip(parallel.parameters(), plain.parameters(), strict=True):
        assert error(p.grad, expected.grad) < 1e-5
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
    assert down[E:].max() < (2 * I) ** -0.5


def balance_over_ranks(rank: int) -> None:
    """The mean over ranks of the grouped loss, and its gradient, are those of the whole batch on one rank."""
    options = {"routing": "deepseek_v3", "selection_bias": True}
    x = torch.randn(RANKS, 20, H, generator=torch.Generator().manual_seed(9))
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
    assert error(mean, whole) < 1e-5
    assert error(gradient, alone[1].gate.weight.grad) < 1e-5
    mk.update_selection_bias(alone)
    mk.update_selection_bias(shared, group=dist.group.WORLD)
    assert torch.equal(shared[1].gate.e_score_correction_bias, alone[1].gate.e_score_correction_bias)


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        for check in (ddp, fsdp2, dtensor, fused_shared_expert, balance_over_ranks):
            check(rank)
    finally:
        gc.collect()  # wrapped models are cycles that hold the group; its threads abort a process that ends with them
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel with unused experts, fully_shard, DTensor weights, balance over a group."""
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"),), nprocs=RANKS)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    "options",
    [
        {"shared_intermediate_size": 24, "shared_gate": True},
        {"shared_intermediate_size": 32, "shared_gate": True, "fuse_shared_expert": True},
        {"routing": "deepseek_v3", "selection_bias": True, "n_group": 3, "topk_group": 2},
        {"capacity_factor": 1.0},
        {"round_tokens_to": 16},
        {"routing": "expert_choice"},
        {"routing": "llama4", "scale_input": True},
    ],
    ids=str,
)
def test_a_training_step_never_synchronises(options: dict[str, object]) -> None:
    """Forward, loss, backward and bias update wait for nothing, whatever the routing."""
    model = model_of(**options).to("cuda", torch.bfloat16)
    x = torch.randn(200, H, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(200, device="cuda")

    def step() -> None:
        loss = model(x).square().mean() + 0.01 * mk.aux_loss(model, mask, z=0.1).to(torch.bfloat16)
        loss.backward()
        if "selection_bias" in options:
            mk.update_selection_bias(model)

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default::UserWarning", "default::FutureWarning")  # of torch's own, release by release
def test_fully_sharded_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank with NCCL, float32 weights that FSDP2 casts to bfloat16: the layer cast by hand gives the same."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if torch.cuda.get_device_capability() == (9, 0):
        forbid_torch_path(monkeypatch)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, by_hand = model_of().cuda(), model_of().cuda().bfloat16()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(model[1], mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        x = torch.randn(40, H, device="cuda", dtype=torch.bfloat16)
        outs = [module(x) for module in (model, by_hand)]
        assert torch.equal(*outs)
        for out in outs:
            out.square().sum().backward()
        for p, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert error(p.grad.full_tensor(), expected.grad) < 1e-6
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("save_experts", [False, True])
def test_selective_checkpointing_routes_once(
    place: tuple[str, torch.dtype], save_experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, dtype = place
    moe = mk.MoE(H, I, E, K).to(device, dtype)
    x = torch.randn(20, H, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn_like(x)
    plain = torch.autograd.grad(moe(x), (x, *moe.parameters()), dout)
    calls = dict.fromkeys(("plan", "experts_forward"), 0)
    for module in (cpu, reference, cuda):
        for name in calls:

            def counted(*args: object, _verb: object = getattr(module, name), _name: str = name) -> object:
                calls[_name] += 1
                return _verb(*args)

            monkeypatch.setattr(module, name, counted)
    context_fn = partial(create_selective_checkpoint_contexts, mk.sac_policy(save_experts=save_experts))
    out = checkpoint(moe, x, use_reentrant=False, context_fn=context_fn)
    again = torch.autograd.grad(out, (x, *moe.parameters()), dout)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert calls == {"plan": 1, "experts_forward": 1 if save_experts else 2}


def test_gradients_accumulate(place: tuple[str, torch.dtype]) -> None:
    device, dtype = place
    model = model_of().to(device, dtype)
    x = torch.randn(30, H, device=device, dtype=dtype)
    model(x).square().sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in x.split(10):
        model(part).square().sum().backward()
    for p, expected in zip(model.parameters(), whole, strict=True):
        assert error(p.grad, expected) < (1e-5 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("optimizer_name", ["AdamW", "SGD", "Adagrad"])
def test_scaler_autocast_and_fused_optimisers(device: str, optimizer_name: str) -> None:
    """A few steps in half precision lower the loss, and leave float32 weights."""
    model = model_of(shared_intermediate_size=8).to(device)
    fused = optimizer_name != "Adagrad" or device == "cpu"  # torch has no fused Adagrad for CUDA
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=0.02, fused=fused)
    scaler = torch.amp.GradScaler(device)
    x, target = torch.randn(2, 40, H, device=device).unbind()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), target)
        scaler.scale(loss + 0.01 * mk.aux_loss(model)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_scaler_skips_a_step_that_overflows(device: str) -> None:
    """Infinite gradients reach the scaler as such: weights stay, the scale falls, and the next step is taken."""
    model = model_of().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-30)
    x = torch.randn(40, H, device=device)
    before = [p.clone() for p in model.parameters()]
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(moved) if step == 1 else not any(moved)
    assert scaler.get_scale() == 2.0**10


def test_safetensors_of_a_fused_shared_expert(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    options = {"shared_intermediate_size": I, "fuse_shared_expert": True}
    moe, other = (mk.MoE(H, I, E, K, **options) for _ in range(2))  # type: ignore[arg-type]
    safetensors.save_file(moe.state_dict(), str(tmp_path / "moe.safetensors"))
    other.load_state_dict(safetensors.load_file(str(tmp_path / "moe.safetensors")))
    x = torch.randn(5, H)
    assert torch.equal(other(x), moe(x))


def test_safetensors(place: tuple[str, torch.dtype], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    options = {"routing": "deepseek_v3", "selection_bias": True, "shared_intermediate_size": 8}
    device, dtype = place
    moe, other = (mk.MoE(H, I, E, K, **options).to(device, dtype) for _ in range(2))  # type: ignore[arg-type]
    moe.gate.e_score_correction_bias.normal_()
    safetensors.save_model(moe, str(tmp_path / "moe.safetensors"))
    safetensors.load_model(other, str(tmp_path / "moe.safetensors"))
    x = torch.randn(5, H, device=device, dtype=dtype)
    assert torch.equal(other(x), moe(x))


def ahead_of_time(_: int, device: str, folder: Path) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    moe = mk.MoE(H, I, E, K).to(device, dtype).eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    example = torch.randn(6, H, device=device, dtype=dtype)
    program = torch.export.export(moe, (example,), dynamic_shapes=({0: tokens},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "moe.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for n in (6, 11):
        x = torch.randn(n, H, device=device, dtype=dtype)
        with torch.no_grad():
            assert error(loaded(x), moe(x)) < (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_ahead_of_time_compilation(device: str, tmp_path: Path) -> None:
    """Exported with a free number of tokens, compiled by AOTInductor, loaded again.

    In a process of its own: torch 2.11's loader has crashed on a GPU, which should cost this test alone.
    """
    torch.multiprocessing.spawn(ahead_of_time, (device, tmp_path), nprocs=1)
