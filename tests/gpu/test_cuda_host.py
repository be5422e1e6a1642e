"""The host around the Hopper kernels: it never waits, launches the stated number of kernels, and can plan itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import moekern as mk
from moekern.backends import reference
from problems import Problem, make

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
T, H, I, E, K = 100, 256, 136, 8, 3


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def problem(tokens: int = T, seed: int = 0, **options: object) -> Problem:
    return make(tokens, H, I, E, K, dtype=BF16, device="cuda", seed=seed, **options)  # type: ignore[arg-type]


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(p: Problem, **options: object) -> list[Tensor]:
    """Output and gradients of all floating inputs."""
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in zip(("x", "weights", "w_gate_up", "w_down", "b_gate_up", "b_down"), p.floating, strict=True)
        if t is not None
    }
    out = p.run(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))]


# ------------------------------------------------------------------------------------------------- nothing waits


Step = Callable[[], object]


def _experts() -> Step:
    p = problem(bias=True)

    def step() -> None:
        p.run()
        train(p)

    return step


def _moe() -> Step:
    options = {"routing": "deepseek_v3", "selection_bias": True, "n_group": 4, "topk_group": 2, "bias": True}
    layers = [mk.MoE(H, I, E, K, **o).to("cuda", BF16) for o in ({}, options)]  # type: ignore[arg-type]
    x = torch.randn(5, 20, H, dtype=BF16, device="cuda", requires_grad=True)

    def step() -> None:
        for moe in layers:
            (moe(x).float().square().mean() + 0.01 * mk.aux_loss(moe)).backward()
            with torch.no_grad():
                moe.eval()(x)
            moe.train()

    return step


def _grouped_mlp() -> Step:
    p = problem()
    offsets = torch.arange(0, 9, dtype=torch.int32, device="cuda") * 12
    w = p.w_gate_up.clone().requires_grad_()
    return lambda: mk.grouped_mlp(p.x, offsets, w, p.w_down).sum().backward()


def _grouped_mm() -> Step:
    p = problem()
    offsets = torch.arange(0, 9, dtype=torch.int32, device="cuda") * 12
    a, w = p.x.clone().requires_grad_(), p.w_gate_up.mT.clone().requires_grad_()
    return lambda: mk.grouped_mm(a, w, offsets).sum().backward()


def _route() -> Step:
    logits = torch.randn(T, E, device="cuda", requires_grad=True)
    bias = torch.randn(E, device="cuda")

    def step() -> None:
        mk.route(logits, K)[0].sum().backward()
        grouped = mk.route(logits, K, method="deepseek_v3", selection_bias=bias, n_group=4, topk_group=2)
        grouped[0].sum().backward()

    return step


@pytest.mark.parametrize("work", [_experts, _moe, _grouped_mlp, _grouped_mm, _route], ids=lambda f: f.__name__[1:])
def test_nothing_waits_for_the_device(work: Callable[[], Step]) -> None:
    step = work()
    step()  # kernels are loaded
    with waiting_forbidden():
        step()


def test_a_plan_of_the_host_is_reused_without_waiting() -> None:
    p = problem()
    wanted = train(p)
    ids, w = p.ids.cpu(), p.w_gate_up.clone().requires_grad_()
    mk.plan(ids, E).to("cuda")
    with waiting_forbidden():
        planned = mk.plan(ids, E).to("cuda")
        for _ in range(3):
            out = mk.experts(p.x, None, p.weights, w, p.w_down, plan=planned)
            (grad,) = torch.autograd.grad(out, w, torch.ones_like(out))
    assert torch.equal(out, wanted[0])
    assert torch.equal(grad, wanted[3])


# ----------------------------------------------------------------------------------------------- the host's planner


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        (1, 1, 1),
        (5, 3, 7),
        (1000, 8, 64),
        (33, 2, 255),
        (33, 2, 256),
        (3000, 4, 1024),
        (501, 1, 70000),
        (32768, 8, 128),
    ],
)
def test_the_host_planner_has_the_device_planners_bits(
    tokens: int, top_k: int, experts: int, dtype: torch.dtype
) -> None:
    low, high = (0, min(experts + 3, torch.iinfo(dtype).max)) if not dtype.is_signed else (-3, experts + 3)
    ids = torch.randint(low, high, (tokens, top_k), device="cuda").to(dtype)
    if dtype.is_signed:
        ids[0, 0] = torch.iinfo(dtype).min
        ids[-1, -1] = torch.iinfo(dtype).max
    planned = mk.plan(ids, experts, planner="host")
    for got, wanted in zip(planned[:3], reference.plan(ids, experts), strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(planned[:3], mk.plan(ids, experts, planner="device")[:3], strict=True):
        assert torch.equal(got, wanted)


def test_host_plans_of_many_sizes_streams_and_threads() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(30):
                tokens = int(torch.randint(1, 5000, (), generator=generator))
                ids = torch.randint(-1, 65, (tokens, 4), generator=generator)
                plans = [mk.plan(ids.cuda(), 64, planner="host") for _ in range(2)]
                wanted = mk.plan(ids, 64)
                for planned in plans:
                    same = all(torch.equal(a.cpu(), b) for a, b in zip(planned[:3], wanted[:3], strict=True))
                    wrong.extend(() if same else (tokens,))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_host_planner_waits_and_says_so() -> None:
    ids = torch.randint(0, E, (T, K), device="cuda")
    mk.plan(ids, E, planner="host")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"), waiting_forbidden():
        mk.plan(ids, E, planner="host")
    with (
        pytest.raises(RuntimeError, match="planner: got 'host' while a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        mk.plan(ids, E, planner="host")
    planned = mk.plan(ids, E, planner="host")  # the context is usable
    assert torch.equal(planned.order, mk.plan(ids, E).order)


def test_the_host_planner_compiles() -> None:
    p = problem()

    def f(x: Tensor, ids: Tensor) -> Tensor:
        planned = mk.plan(ids, E, planner="host")
        return mk.experts(x, None, p.weights, p.w_gate_up, p.w_down, plan=planned)

    torch.compiler.reset()
    assert torch.equal(torch.compile(f, fullgraph=True)(p.x, p.ids), p.run())


# --------------------------------------------------------------------------------------- graphs, streams, threads


@pytest.mark.parametrize("grad", [False, True])
def test_the_layer_in_a_cuda_graph_follows_the_routing(grad: bool) -> None:
    torch.manual_seed(0)
    moe = mk.MoE(H, I, E, K).to("cuda", BF16)
    moe.train(grad)
    inputs = [torch.randn(64, H, dtype=BF16, device="cuda") for _ in range(3)]

    def step(x: Tensor) -> list[Tensor]:
        if not grad:
            with torch.no_grad():
                return [moe(x)]
        x = x.detach().requires_grad_()
        y = moe(x)
        return [y.detach(), *torch.autograd.grad(y, (x, *moe.parameters()), torch.ones_like(y))]

    static = inputs[0].clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the layer's latest routing keeps a graph of this stream alive
        wanted = [[t.clone() for t in step(x)] for x in inputs]
        step(static)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        got = step(static)
    for x, expected in zip(inputs, wanted, strict=True):
        static.copy_(x)
        graph.replay()
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_reduce_overhead() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    moe = mk.MoE(H, I, E, K).to("cuda", BF16).eval()
    compiled = torch.compile(moe, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(48, H, dtype=BF16, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            assert (compiled(x).float() - moe(x).float()).norm() <= 1e-2 * moe(x).float().norm()


def test_backward_on_another_thread_and_stream() -> None:
    p = problem(bias=True)
    wanted = train(p)
    results: list[list[Tensor]] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.extend(train(p) for _ in range(5))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


# ------------------------------------------------------------------------------------- signals without a clock


def launches(work: Callable[[], object]) -> int:
    """Kernels that a second run of `work` starts."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        work()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    return len([e for e in kernels if "memcpy" not in e.name.lower() and "memset" not in e.name.lower()])


def allocations(work: Callable[[], object]) -> int:
    work()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    work()
    return torch.cuda.memory_stats()["allocation.all.allocated"] - before


def test_launches_and_allocations() -> None:
    """Planner 1 (2 from 4097 slots on), forward 4: tiles, up, down, combine; backward 8, with biases 10."""
    p, many = problem(), problem(2000)
    with torch.no_grad():
        assert launches(lambda: mk.plan(p.ids, E)) == 1
        assert launches(lambda: mk.plan(many.ids, E)) == 2
        assert launches(p.run) == 5
        assert launches(many.run) == 6
        assert allocations(lambda: mk.plan(p.ids, E)) == 3
        assert allocations(p.run) == 2

    def backward(p: Problem) -> Callable[[], object]:
        leaves = {n: getattr(p, n).clone().requires_grad_() for n in ("x", "weights", "w_gate_up", "w_down")}
        if p.b_down is not None:
            leaves |= {n: getattr(p, n).clone().requires_grad_() for n in ("b_gate_up", "b_down")}
        out = p.run(**leaves)
        ones = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, list(leaves.values()), ones, retain_graph=True)

    assert launches(backward(p)) == 8
    assert launches(backward(problem(bias=True))) == 10
    assert allocations(backward(p)) == 5  # four gradients, the working memory


def test_memory_of_a_training_step() -> None:
    """Saved: 2TH (the caller's x) and 4TKI bytes and indices; in the backward beyond that the gradients, 2TKH, 4TKI."""
    tokens, hidden, inter, experts, top_k = 4096, 1024, 512, 16, 8
    p = make(tokens, hidden, inter, experts, top_k, dtype=BF16, device="cuda")
    slots = tokens * top_k
    leaves = {n: getattr(p, n).clone().requires_grad_() for n in ("x", "weights", "w_gate_up", "w_down")}

    def step(measure: bool) -> None:
        before = torch.cuda.memory_allocated()
        out = p.run(**leaves)
        saved = torch.cuda.memory_allocated() - before - 2 * tokens * hidden  # less the output
        indices = 4 * (2 * slots + experts + 1) + 3 * 512
        dout = torch.ones_like(out)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
        peak = torch.cuda.max_memory_allocated() - held
        if measure:
            own = sum(g.numel() * g.element_size() for g in grads)
            assert saved <= 4 * slots * inter + indices
            assert peak <= own + 2 * slots * hidden + 4 * slots * inter + 64 * slots + (1 << 20)

    step(False)
    step(True)


def test_gradients_agree_between_planners() -> None:
    p = problem(bias=True)
    wanted = train(p)
    planned = mk.plan(p.ids, E, planner="host")
    w = p.w_gate_up.clone().requires_grad_()
    out = mk.experts(p.x, None, p.weights, w, p.w_down, p.b_gate_up, p.b_down, plan=planned)
    (grad,) = torch.autograd.grad(out, w, torch.ones_like(out))
    assert torch.equal(out, wanted[0])
    assert torch.equal(grad, wanted[3])
