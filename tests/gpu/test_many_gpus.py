"""Two GPUs in one process: the second while the first is current, one after the other, at once, and in one model."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moekern as mk
from moekern.layer.training import Latest
from problems import NAMES, Problem, check_against_truth, error, forbid_torch_path, gradients, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
BF16, F16 = torch.bfloat16, torch.float16
FIRST, SECOND = "cuda:0", "cuda:1"
BOTH = (FIRST, SECOND)
T, H, I, E, K = 100, 256, 136, 8, 3


@pytest.fixture(autouse=True)
def _first_is_current(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The caller's device stays current, on whichever device work runs."""
    if any(torch.cuda.get_device_capability(device) != (9, 0) for device in BOTH):
        pytest.skip("needs GPUs of compute capability 9.0")
    forbid_torch_path(monkeypatch)
    torch.cuda.set_device(FIRST)
    yield
    assert torch.cuda.current_device() == 0


def on(device: str, p: Problem) -> Problem:
    moved = {name: t.to(device) for name in (*NAMES, "ids") if (t := getattr(p, name)) is not None}
    return replace(p, **moved)


def problem(device: str, tokens: int = T, seed: int = 0, **options: Any) -> Problem:
    return make(tokens, H, I, E, K, dtype=BF16, device=device, seed=seed, **options)


def train(p: Problem) -> list[Tensor]:
    """Output and gradients of all floating inputs."""
    return list(gradients(p, torch.ones_like(p.x)).values())


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """The same bits, on any devices."""
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def in_threads(*works: Callable[[], None]) -> None:
    """Run at once; an error of any is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait(60)
            work()
        except BaseException as caught:
            errors.append(caught)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


# ------------------------------------------------------------------------------------------------------ every verb


@pytest.mark.parametrize(
    "p",
    [
        pytest.param((T, H, I, E, K, BF16, {}), id="plain"),
        pytest.param(
            (T, H, I, E, K, BF16, {"activation": "swiglu_oai", "bias": True, "transposed": True, "interleaved": True}),
            id="gpt_oss",
        ),
        pytest.param((T, H, I, E, K, F16, {"activation": "relu2"}), id="relu2"),
        pytest.param((4096, 1024, 512, 8, 4, BF16, {}), id="combine on a second stream"),
    ],
)
def test_experts_on_the_second(p: tuple[Any, ...]) -> None:
    *sizes, dtype, options = p
    first = make(*sizes, dtype=dtype, device=FIRST, **options)
    second = on(SECOND, first)
    up = torch.randn(second.x.shape, device=SECOND)
    check_against_truth(lambda q: gradients(q, up), second)
    wanted = gradients(first, up.to(FIRST))
    got = gradients(second, up)
    assert all(value.device == torch.device(SECOND) for value in got.values())
    assert_same(list(got.values()), list(wanted.values()))
    with torch.no_grad():
        wanted_out = first.run()
        for _ in range(2):  # the second call is one that is known
            assert_same([second.run()], [wanted_out])
    with torch.cuda.device(SECOND):  # the other way round
        assert_same(list(gradients(first, up.to(FIRST)).values()), list(got.values()))
        assert torch.cuda.current_device() == 1


def test_verbs_of_sorted_rows() -> None:
    results = []
    for device in BOTH:
        p = problem(device)
        offsets = (torch.arange(E + 1, dtype=torch.int32) * 12).to(device)
        planned = mk.plan(p.ids, E)
        x, up, down = (t.clone().requires_grad_() for t in (p.x, p.w_gate_up, p.w_down))
        weights = p.weights
        assert weights is not None
        outs = [
            mk.grouped_mlp(x, offsets, up, down),
            mk.grouped_mm(x, up.mT, offsets),
            mk.grouped_mm(x, up.mT.contiguous(), offsets),
            mk.grouped_mm(x, x * 2, offsets),
            mk.combine(mk.permute(x, planned), planned, weights),
            mk.route(x[:, :E].float(), K)[0],
        ]
        total = sum(out.float().square().sum() for out in outs)
        results.append([*outs, *planned[:3], *torch.autograd.grad(total, (x, up, down))])
    assert all(t.device == torch.device(SECOND) for t in results[1])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("planner", ["device", "host"])
def test_plans_on_the_second(planner: str) -> None:
    for tokens, top_k, experts in ((1, 1, 1), (33, 2, 255), (3000, 4, 1024), (32768, 8, 128)):
        ids = torch.randint(-1, experts + 2, (tokens, top_k))
        for device in (SECOND, FIRST, SECOND):
            planned = mk.plan(ids.to(device), experts, planner=planner)
            assert planned.order.device == torch.device(device)
            assert_same(list(planned[:3]), list(mk.plan(ids, experts)[:3]))


def test_host_plans_of_both_at_once() -> None:
    """More streams per device than memory is kept for, so that memory is freed while the other device reads."""

    def work(device: str) -> Callable[[], None]:
        def run() -> None:
            generator = torch.Generator().manual_seed(BOTH.index(device))
            for _ in range(20):
                with torch.cuda.stream(torch.cuda.Stream(device)):
                    for _ in range(3):
                        tokens = int(torch.randint(1, 5000, (), generator=generator))
                        ids = torch.randint(-1, 65, (tokens, 4), generator=generator)
                        planned = mk.plan(ids.to(device), 64, planner="host")
                        assert_same(list(planned[:3]), list(mk.plan(ids, 64)[:3]))

        return run

    in_threads(*map(work, (*BOTH, *BOTH)))


def test_a_plan_of_the_host_goes_to_the_second() -> None:
    p = problem(SECOND)
    for where in (SECOND, 1, torch.device(SECOND)):
        planned = mk.plan(p.ids.cpu(), E).to(where)
        assert planned.order.device == torch.device(SECOND)
        out = mk.experts(p.x, None, p.weights, p.w_gate_up, p.w_down, plan=planned)
        assert_same([out], [p.run()])
    there = mk.plan(p.ids, E)
    assert_same(list(there.to(FIRST)[:3]), list(there[:3]))


# ------------------------------------------------------------------------------------------------------- the layer


def step(moe: nn.Module, x: Tensor, coefficient: float = 0.0, accumulate: bool = False) -> list[Tensor]:
    """Output and gradients; accumulated in the parameters, as reentrant checkpoints need it, or returned."""
    x, parameters = x.detach().requires_grad_(), list(moe.parameters())
    y = moe(x)
    scale = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    loss = (y.float() * scale).sum()
    if coefficient:
        loss = loss + coefficient * mk.aux_loss(moe, z=1.0)
    if not accumulate:
        return [y.detach(), *torch.autograd.grad(loss, [x, *parameters])]
    moe.zero_grad()
    loss.backward()
    return [y.detach(), *(t.grad for t in (x, *parameters))]


ONE_NODE: list[dict[str, Any]] = [{}, {"routing": "gpt_oss", "bias": True, "router_bias": True}]


@pytest.mark.parametrize("tokens", [1, 16, 3000])
@pytest.mark.parametrize(
    "options",
    [
        *ONE_NODE,
        {"shared_intermediate_size": 2 * I, "shared_gate": True, "fuse_shared_expert": True},
        {"shared_intermediate_size": 128},
        {"routing": "deepseek_v3", "selection_bias": True, "n_group": 4, "topk_group": 2},
        {"capacity_factor": 1.0, "round_tokens_to": 16},
        {"routing": "expert_choice"},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_layer_on_the_second(options: dict[str, Any], tokens: int) -> None:
    first = mk.MoE(H, I, E, K, **options).to(FIRST, BF16)
    second = copy.deepcopy(first).to(SECOND)
    x = torch.randn(tokens, H, device=FIRST, dtype=BF16)
    wanted, got = step(first, x, 5.0), step(second, x.to(SECOND), 5.0)
    assert all(t.device == torch.device(SECOND) for t in got)
    assert_same(got, wanted)
    if "selection_bias" in options:
        mk.update_selection_bias(second)
    if options in ONE_NODE:  # as on the current device, the shortest way
        second(x.to(SECOND))
        assert isinstance(second.__dict__["_latest_routing"], Latest)
    with torch.no_grad():
        outs = [layer.eval()(t) for layer, t in ((first, x), (second, x.to(SECOND)), (second, x.to(SECOND)))]
    if "selection_bias" not in options:
        assert_same(outs[1:], [outs[0]] * 2)


def test_a_layer_moves_after_use() -> None:
    moe = mk.MoE(H, I, E, K, routing="deepseek_v3", selection_bias=True).to(FIRST, BF16)
    x = torch.randn(50, H, dtype=BF16)
    wanted = step(moe, x.to(FIRST))
    with torch.no_grad():
        inferred = moe.eval()(x.to(FIRST))
    for device in (SECOND, FIRST, SECOND):
        moe.train()
        moe.to(device)
        assert_same(step(moe, x.to(device), 1.0)[:1], wanted[:1])
        assert_same(step(moe, x.to(device)), wanted)
        mk.aux_loss(moe)
        assert moe.gate.e_score_correction_bias.device == torch.device(device)
        with torch.no_grad():
            assert_same([moe.eval()(x.to(device))], [inferred])


class Spread(nn.Module):
    """Two blocks with residuals, each on a device of its own."""

    def __init__(self, devices: tuple[str, str], reentrant: bool | None = None):
        super().__init__()
        torch.manual_seed(0)
        layers = [mk.MoE(H, I, E, K, **options) for options in ({}, {"shared_intermediate_size": 64})]
        self.blocks = nn.ModuleList(layer.to(device, BF16) for layer, device in zip(layers, devices, strict=True))
        self.devices, self.reentrant = devices, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block, device in zip(self.blocks, self.devices, strict=True):
            x = x.to(device)
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


# A leaf on one device whose first use is a copy to the other: torch says this of any model.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_model_on_both(reentrant: bool | None) -> None:
    x = torch.randn(60, H, dtype=BF16, device=FIRST)
    coefficient = 0.0 if reentrant else 1.0  # checkpoints of the old kind run a layer without gradient
    wanted = step(Spread((FIRST, FIRST), reentrant), x, coefficient, accumulate=True)
    for devices in ((FIRST, SECOND), (SECOND, FIRST)):
        model = Spread(devices, reentrant)
        for _ in range(2):
            assert_same(step(model, x, coefficient, accumulate=True), wanted)


# ------------------------------------------------------------------------------------------------------ both at once


def test_both_in_turn_and_from_threads() -> None:
    problems = {device: [problem(device, tokens, bias=True) for tokens in (16, 700)] for device in BOTH}
    layers = {device: mk.MoE(H, I, E, K).to(BF16) for device in BOTH}
    layers[SECOND].load_state_dict(layers[FIRST].state_dict())
    for device, layer in layers.items():
        layer.to(device)

    def everything(device: str) -> list[Tensor]:
        """Also without gradients, which is another path."""
        few, many = problems[device]
        with torch.no_grad():
            results = [few.run(), many.run(), layers[device](few.x)]
        return [*results, *train(few), *train(many), *step(layers[device], few.x)]

    wanted = everything(FIRST)
    for device in (*BOTH, *BOTH):
        assert_same(everything(device), wanted)

    def work(device: str, current: str) -> Callable[[], None]:
        def run() -> None:
            torch.cuda.set_device(current)
            with torch.cuda.stream(torch.cuda.Stream(device)), torch.cuda.device(current):
                results = [everything(device) for _ in range(4)]
                torch.cuda.current_stream(device).synchronize()
                assert torch.cuda.current_device() == BOTH.index(current)
            for result in results:
                assert_same(result, wanted)

        return run

    torch.cuda.synchronize(FIRST)
    torch.cuda.synchronize(SECOND)
    in_threads(*(work(device, current) for device in BOTH for current in BOTH))


def test_first_calls_of_a_size_from_threads() -> None:
    """The first thread records the programs and loads the kernels; each device has its own."""
    wanted: dict[int, list[Tensor]] = {}
    for tokens in (37, 41):
        p = problem("cpu", tokens)
        got = [[] for _ in range(4)]  # type: ignore[var-annotated]

        def work(place: int, p: Problem = p, got: list[list[Tensor]] = got) -> None:
            mine = on(BOTH[place % 2], p)
            with torch.no_grad():
                got[place] = [mine.run()]
            got[place] += train(mine)

        in_threads(*(lambda place=place, work=work: work(place) for place in range(4)))  # type: ignore[misc]
        wanted[tokens] = got[0]
        for result in got[1:]:
            assert_same(result, wanted[tokens])


@pytest.mark.filterwarnings("default")  # of torch's own
def test_data_parallel() -> None:
    """Replicas in threads, of the older kind of data parallelism, whose parameters are plain tensors."""
    model = mk.MoE(H, I, E, K, bias=True).to(FIRST, BF16)
    parallel = nn.DataParallel(model, device_ids=[0, 1])
    x = torch.randn(120, H, device=FIRST, dtype=BF16)
    wanted = step(model, x)
    for _ in range(2):
        for a, b in zip(step(parallel, x), wanted, strict=True):
            assert error(a, b) <= 2**-6
    with torch.no_grad():
        assert error(parallel.eval()(x), wanted[0]) <= 2**-6


# --------------------------------------------------------------------------------------------- capture and compilation


@pytest.mark.parametrize("grad", [False, True])
def test_a_graph_on_the_second(grad: bool) -> None:
    moe = mk.MoE(H, I, E, K).to(SECOND, BF16).train(grad)
    inputs = [torch.randn(64, H, dtype=BF16, device=SECOND) for _ in range(3)]

    def run(x: Tensor) -> list[Tensor]:
        if grad:
            return step(moe, x)
        with torch.no_grad():
            return [moe(x)]

    static = inputs[0].clone()
    with torch.cuda.device(SECOND):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            wanted = [[t.clone() for t in run(x)] for x in inputs]
            run(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            got = run(static)
    for x, expected in zip(inputs, wanted, strict=True):  # with the first device current
        with torch.cuda.device(SECOND):
            static.copy_(x)
            graph.replay()
        assert_same(got, expected)


def test_compiled_on_the_second() -> None:
    torch.compiler.reset()
    moe = mk.MoE(H, I, E, K).to(SECOND, BF16)
    x = torch.randn(50, H, dtype=BF16, device=SECOND)
    wanted = step(moe, x)
    for a, b in zip(step(torch.compile(moe, fullgraph=True), x), wanted, strict=True):
        assert a.device == torch.device(SECOND)
        assert error(a, b) <= 2**-6


# ----------------------------------------------------------------------------------------------------- mixed devices


def allocations() -> list[int]:
    return [torch.cuda.memory_stats(device)["allocation.all.allocated"] for device in BOTH]


def test_mixed_devices_are_named_before_any_work() -> None:
    """Also after good calls, whose signatures are known; every launch would need memory for its result."""
    p, other = problem(SECOND, bias=True), problem(FIRST, bias=True)
    offsets = (torch.arange(E + 1, dtype=torch.int32) * 12).to(SECOND)
    planned, planned_there = mk.plan(other.ids, E), mk.plan(p.ids, E)
    moe = mk.MoE(H, I, E, K).to(SECOND, BF16)
    wanted, layer_wanted = train(p), step(moe, p.x)
    argument = {"ids": "topk_ids", "weights": "topk_weights"}
    calls: list[tuple[str, Callable[[], object]]] = [
        *((argument.get(n, n), lambda n=n: replace(p, **{n: getattr(other, n)}).run()) for n in (*NAMES[1:], "ids")),
        ("w_gate_up", lambda: replace(p, x=other.x).run()),
        ("plan", lambda: mk.experts(p.x, None, p.weights, p.w_gate_up, p.w_down, plan=planned)),
        ("plan", lambda: mk.permute(p.x, planned)),
        ("offsets", lambda: mk.grouped_mlp(p.x, offsets.to(FIRST), p.w_gate_up, p.w_down)),
        ("w_down", lambda: mk.grouped_mlp(p.x, offsets, p.w_gate_up, other.w_down)),
        ("b", lambda: mk.grouped_mm(p.x, other.w_gate_up.mT, offsets)),
        ("weights", lambda: mk.combine(mk.permute(p.x, planned_there), planned_there, other.weights)),
        ("selection_bias", lambda: mk.route(p.x[:, :E], K, selection_bias=other.x[0, :E])),
        ("x", lambda: moe(other.x)),
    ]
    for mode in (True, False):
        moe.train(mode)
        for name, call in calls:
            before = allocations()
            with (
                torch.set_grad_enabled(mode),
                pytest.raises(ValueError, match=rf"^{name}.*: got.* device cuda:[01], exp"),
            ):
                call()
            if name not in ("offsets", "weights"):  # these calls make their own arguments here
                assert allocations() == before, name
    assert_same(train(p), wanted)
    assert_same(step(moe.train(), p.x), layer_wanted)
    with pytest.raises(RuntimeError, match=r"cuda:0|device"):
        p.run(x=p.x.clone().requires_grad_()).backward(torch.ones_like(other.x))
    assert_same(train(p), wanted)


# -------------------------------------------------------------------------------------------------- a process's first

PROGRAM = """
import threading
import torch
import moekern as mk

def used(device):
    return torch._C._cuda_hasPrimaryContext(device)

def train(device):
    torch.manual_seed(0)
    moe = mk.MoE(256, 136, 8, 3, dtype=torch.bfloat16).to(device)
    x = torch.ones(50, 256, dtype=torch.bfloat16).cumsum(0).div(50).to(device).requires_grad_()
    y = moe(x)
    y.sum().backward()
    planned = mk.plan(torch.arange(60).view(20, 3).to(device) % 8, 8, planner="host")
    with torch.no_grad():
        return [moe.eval()(x), x.grad, planned.order]

plain = torch.nn.Linear(256, 256, dtype=torch.bfloat16).to("cuda:1")
plain(torch.ones(50, 256, dtype=torch.bfloat16).to("cuda:1")).sum().backward()
torch.ones(9).pin_memory()
before = used(0)
second = [t.cpu() for t in train("cuda:1")]
assert used(0) == before, "a context on cuda:0 that torch alone does not make"
results = []
thread = threading.Thread(target=lambda: results.extend(t.cpu() for t in train("cuda:0")))
thread.start()
thread.join()
again = [t.cpu() for t in train("cuda:0")]  # this thread has only used the other one
for a, b, c in zip(second, results, again, strict=True):
    assert torch.equal(a, b) and torch.equal(a, c)
print("all right", before)
"""


def test_a_process_that_begins_with_the_second() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("all right")
