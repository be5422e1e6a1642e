"""torch's own machinery around the layer: compile, export, functorch, autocast, checkpointing, opcheck, threads."""

from __future__ import annotations

import os
import shutil
import sysconfig
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moekern as mk
from moekern.verbs import ops
from problems import NAMES, error, gradients, make

H, I, E, K = 32, 24, 5, 2


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.fixture
def compiler(device: str) -> str:
    """Inductor's CPU code needs a C++ compiler and Python's headers, which `make test` does not require."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    cpu_code = shutil.which(os.environ.get("CXX", "g++")) and headers.exists()
    return "inductor" if device == "cuda" or cpu_code else "aot_eager"


def step(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    (y.square().sum() + 0.01 * mk.aux_loss(model)).backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: str, compiler: str, dynamic: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(H, H), mk.MoE(H, I, E, K, bias=True)).to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=compiler)
    for tokens in (7, 12, 1) if dynamic else (7,):
        x = torch.randn(3, tokens, H, device=device)
        for value, expected in zip(step(compiled, x), step(model, x), strict=True):
            assert error(value, expected) < 1e-5
    model.eval()
    with torch.no_grad():
        assert error(compiled(x), model(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {
            "routing": "deepseek_v3",
            "selection_bias": True,
            "n_group": 2,
            "topk_group": 1,
            "shared_intermediate_size": 8,
        },
        {"capacity_factor": 1.0, "round_tokens_to": 2},
        {"shared_intermediate_size": 2 * I, "shared_gate": True, "fuse_shared_expert": True, "selection_bias": True},
        {"round_tokens_to": 8, "rounding": "up"},
        {"routing": "llama4", "scale_input": True},
        {"routing": "expert_choice"},
    ],
)
def test_routing_options_compile_fullgraph(device: str, compiler: str, options: dict[str, object]) -> None:
    model = torch.nn.Sequential(mk.MoE(H, I, 4, K, **options)).to(device)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = torch.randn(3, 400, H, device=device)
    for value, expected in zip(step(compiled, x), step(model, x), strict=True):
        assert error(value, expected) < 1e-5
    if "selection_bias" in options:
        assert int(model[0].gate.tokens_since_update.sum()) == 2 * 1200 * K


@pytest.mark.slow
def test_functions_compile_fullgraph(device: str, compiler: str) -> None:
    p = make(20, H, I, E, K, device=device, bias=True)

    square = torch.randn(E, H, H, device=device) / H**0.5

    def f(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = mk.route(logits, K)
        plan = mk.plan(ids, E)
        y = mk.experts(x, None, weights, p.w_gate_up, p.w_down, plan=plan)
        offsets = plan.offsets // K  # any offsets within the rows will do
        return y + mk.grouped_mlp(x, offsets, p.w_gate_up, p.w_down) + mk.grouped_mm(x, square, offsets)

    logits = torch.randn(20, E, device=device)
    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    assert error(compiled(p.x, logits), f(p.x, logits)) < 1e-6


@pytest.mark.slow
def test_export(device: str) -> None:
    moe = mk.MoE(H, I, E, K).to(device).eval()
    x = torch.randn(6, H, device=device)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: tokens},))
    for n in (6, 11):
        x = torch.randn(n, H, device=device)
        assert torch.equal(program.module()(x), moe(x))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    p = make(9, 16, 8, 4, 2, bias=True)
    plan = mk.plan(p.ids, 4)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    form = ("swiglu", False, False, 2)
    call = (plan[:3], (p.w_gate_up, p.w_down, p.b_gate_up, p.b_down), *form)
    _, pre = ops.experts_forward(p.x, p.weights, *call, True, backend)
    dout = torch.randn_like(p.x)
    for needs in ([True] * 6, [True, False] * 3):
        torch.library.opcheck(
            ops.experts_backward, (dout, p.x, pre, p.weights, *call, needs, backend), test_utils=tests
        )
    for save in (False, True):
        torch.library.opcheck(ops.experts_forward, (p.x, p.weights, *call, save, backend), test_utils=tests)
    torch.library.opcheck(ops.plan, (p.ids, 4, backend), test_utils=tests)
    for a, b, kind in (
        (p.x, p.w_gate_up, "nt"),
        (p.x, p.w_gate_up.mT.contiguous(), "nn"),
        (p.x, torch.randn(9, 3), "tn"),
    ):
        torch.library.opcheck(ops.grouped_mm, (a, b, plan.offsets // 2, kind, backend), test_utils=tests)


def test_functional_gradients(device: str) -> None:
    p = make(9, 16, 8, 4, 2, device=device)

    def loss(x: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
        return p.run(x=x, w_down=w_down).square().sum()

    by_func = torch.func.grad(loss, argnums=(0, 1))(p.x, p.w_down)
    x, w_down = p.x.clone().requires_grad_(), p.w_down.clone().requires_grad_()
    by_autograd = torch.autograd.grad(loss(x, w_down), (x, w_down))
    for value, expected in zip(by_func, by_autograd, strict=True):
        assert error(value, expected) < 1e-6


def test_second_derivatives(device: str) -> None:
    """Hessian-vector products agree with float64 on every backend, through autograd and through torch.func."""
    p = make(9, 16, 8, 4, 2, device=device, bias=True)
    v = torch.randn_like(p.x)

    def hvp(q: object, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (g,) = torch.autograd.grad(q.run(x=x, w_gate_up=w).square().sum(), x, create_graph=True)
        return torch.autograd.grad((g * v.to(g)).sum(), (x, w))

    ours = hvp(p, p.x.clone().requires_grad_(), p.w_gate_up.clone().requires_grad_())
    q = p.cast(torch.float64)
    with mk.backend("reference"):
        truth = hvp(q, q.x.clone().requires_grad_(), q.w_gate_up.clone().requires_grad_())
    for value, expected in zip(ours, truth, strict=True):
        assert error(value, expected) < 1e-5

    def gradient_square(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: p.run(x=x).square().sum())(x).square().sum()

    twice = torch.func.grad(gradient_square)(p.x)
    x = p.x.clone().requires_grad_()
    (g,) = torch.autograd.grad(p.run(x=x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), x)
    assert error(twice, expected) < 1e-5


def test_checkpointing_gives_the_same_bits(device: str) -> None:
    moe = mk.MoE(H, I, E, K).to(device)
    x = torch.randn(20, H, device=device, requires_grad=True)
    dout = torch.randn_like(x)
    plain = torch.autograd.grad(moe(x), (x, *moe.parameters()), dout)
    again = torch.autograd.grad(checkpoint(moe, x, use_reentrant=False), (x, *moe.parameters()), dout)
    for value, expected in zip(again, plain, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    p = make(30, H, I, E, K, device=device, bias=True)
    leaves = {n: t.clone().requires_grad_() for n, t in zip(NAMES, p.floating, strict=True)}
    with torch.autocast(device, dtype=dtype):
        out = p.run(**leaves)
        assert out.dtype == dtype
        assert mk.grouped_mm(p.x, p.w_gate_up.mT, torch.arange(E + 1, device=device)).dtype == dtype
    dout = torch.randn_like(out)
    cast = p.cast(dtype)
    expected = gradients(cast, dout)
    assert torch.equal(out, expected["out"])
    for name, value in zip(NAMES, torch.autograd.grad(out, list(leaves.values()), dout), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].float()), name


def test_saved_for_backward_is_what_the_design_says(device: str) -> None:
    p = make(40, H, I, E, K, dtype=torch.bfloat16, device=device)
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        p.run(x=p.x.clone().requires_grad_(), w_down=p.w_down.clone().requires_grad_())
    weights = sum(t.numel() * 2 for t in (p.w_gate_up, p.w_down))
    plan = 4 * (2 * 40 * K + E + 1)
    assert sum(saved.values()) == weights + 2 * 40 * H + 4 * 40 * K * I + 4 * 40 * K + plan


def test_inference_saves_nothing(device: str) -> None:
    p = make(10, H, I, E, K, device=device)
    with torch.no_grad():
        x = p.x.clone().requires_grad_()
        assert not p.run(x=x).requires_grad
    assert p.run().grad_fn is None


def test_many_threads_at_once() -> None:
    p = make(100, H, I, E, K, bias=True)
    dout = torch.randn_like(p.x)
    expected = gradients(p, dout)
    failures: list[str] = []

    def work() -> None:
        for _ in range(20):
            for name, value in gradients(p, dout).items():
                if not torch.equal(value, expected[name]):
                    failures.append(name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_the_number_of_threads_does_not_change_the_output() -> None:
    p = make(100, H, I, E, K, bias=True)
    before = torch.get_num_threads()
    outputs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outputs.append(p.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(o, outputs[0]) for o in outputs)


def test_backend_context_restores_on_error() -> None:
    p = make(4, H, I, E, K)
    with pytest.raises(RuntimeError, match="inside"), mk.backend("reference"):
        raise RuntimeError("inside")
    assert torch.equal(p.run(), p.run())
    from moekern.verbs import backend as dispatch

    assert dispatch.resolve("cpu") in ("cpu", "reference")


def test_the_default_device_does_not_matter() -> None:
    p = make(20, H, I, E, K, bias=True)
    dout = torch.randn_like(p.x)
    expected = gradients(p, dout)
    torch.set_default_device("meta")
    try:
        ours = gradients(p, dout)
        assert mk.plan(p.ids, E).tiles(8).device.type == "cpu"
    finally:
        torch.set_default_device(None)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name
