"""Training stacks around the layer: data parallelism, DTensor, checkpointing, scalers, optimisers, files."""

from __future__ import annotations

import faulthandler
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moekern as mk
from moekern.backends import cpu, cuda, reference
from problems import error, forbid_torch_path

H, I, E, K = 32, 16, 6, 2
AHEAD_OF_TIME = 200  # seconds, most of which a C++ compiler takes


def model_of(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(H, H), mk.MoE(H, I, E, K, **options))  # type: ignore[arg-type]


@pytest.mark.gpu
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
    """Forward, loss, backward and bias update never wait, with any routing."""
    model = model_of(**options).to("cuda", torch.bfloat16)
    x = torch.randn(200, H, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(200, dtype=torch.int64, device="cuda")

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
    # Under a mode, as checkpointing's are: the layer then runs operator by operator in both.
    with create_selective_checkpoint_contexts(mk.sac_policy(save_experts=save_experts))[0]:
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


def ahead_of_time(_: int, device: str, folder: Path, plain: bool) -> None:
    faulthandler.enable()  # a crash says where
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    module = (nn.Linear(H, H) if plain else mk.MoE(H, I, E, K)).to(device, dtype).eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    example = torch.randn(6, H, device=device, dtype=dtype)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: tokens},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{type(module).__name__}.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for n in (6, 11):
        x = torch.randn(n, H, device=device, dtype=dtype)
        with torch.no_grad():
            assert error(loaded(x), module(x)) < (1e-6 if dtype == torch.float32 else 2**-7)


def what_ended(device: str, folder: Path, plain: bool) -> Exception | None:
    """The crash or the timeout of a process that compiles, loads and runs; a wrong result raises."""
    process = spawn(ahead_of_time, (device, folder, plain), join=False)
    try:
        if process.join(timeout=AHEAD_OF_TIME):
            return None
    except ProcessExitedException as crash:
        return crash
    process.processes[0].kill()
    return TimeoutError(f"no end within {AHEAD_OF_TIME} s")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_ahead_of_time_compilation(device: str, tmp_path: Path) -> None:
    """Exported with a free number of tokens, compiled by AOTInductor, loaded again, all in a process of its own.

    torch 2.11 with CUDA 13 crashes loading it on a GPU, and one of an nn.Linear as well: a crash counts if that works.
    """
    if (ended := what_ended(device, tmp_path, plain=False)) is None:
        return
    if (also := what_ended(device, tmp_path, plain=True)) is None:
        raise ended
    pytest.skip(f"torch {torch.__version__} here does as much to a package of nn.Linear: {ended}; {also}")
