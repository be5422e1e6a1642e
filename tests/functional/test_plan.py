"""The planner against the reference: the same integers, always."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moekern as mk
from moekern import _core
from moekern.backends import reference
from moekern.functional.plan import Plan, plan
from moekern.verbs import checks, ops
from problems import make


def parts(p: Plan) -> tuple[Tensor, Tensor, Tensor]:
    return p.order, p.inverse, p.offsets


def assert_matches_reference(ids: Tensor, num_experts: int) -> None:
    got = plan(ids, num_experts)
    assert (got.num_experts, got.top_k) == (num_experts, ids.shape[1])
    for name, ours, theirs in zip(Plan._fields, parts(got), reference.plan(ids, num_experts), strict=False):
        assert ours.dtype == torch.int32
        assert torch.equal(ours, theirs), name


@given(
    experts=st.integers(1, 70),
    tokens=st.integers(0, 40),
    top_k=st.integers(0, 9),
    dtype=st.sampled_from(checks.INTEGER),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_matches_the_reference(experts: int, tokens: int, top_k: int, dtype: torch.dtype, seed: int) -> None:
    low = 0 if dtype in (torch.uint8, torch.uint16) else -2  # with sentinels of both kinds
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, experts + 2, (tokens, top_k), generator=generator)
    assert_matches_reference(ids.to(dtype), experts)


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50), experts=st.integers(1, 2000))
@settings(deadline=None)
def test_any_integer_is_an_expert_or_a_sentinel(ids: list[int], experts: int) -> None:
    assert_matches_reference(torch.tensor(ids, dtype=torch.int64).reshape(-1, 1), experts)


@pytest.mark.parametrize("experts", [1, 8, 128, 1024, 3000])
def test_every_row_is_written(experts: int, poisoned: None) -> None:
    assert_matches_reference(torch.randint(-1, experts + 1, (700, 8)), experts)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_the_same_bits_for_any_number_of_threads(num_threads: int) -> None:
    ids = torch.randint(-1, 129, (1 << 15, 8))
    expected = reference.plan(ids, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(parts(plan(ids, 128)), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_one_expert_takes_all() -> None:
    ids = torch.full((5000, 4), 3)
    assert_matches_reference(ids, 64)
    stats = plan(ids, 64).stats()
    assert stats == (20000, 312.5, 0.0, 63)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 0)])
def test_no_slots(shape: tuple[int, int]) -> None:
    p = plan(torch.empty(shape, dtype=torch.int64), 4)
    assert p.order.shape == p.inverse.shape == (0,)
    assert p.offsets.tolist() == [0] * 5
    assert p.stats() == (0, 0.0, 0.0, 4)
    assert p.tiles(16).shape == (0, 3)


def test_strided_and_misaligned_ids() -> None:
    ids = torch.randint(0, 8, (33, 12))
    assert_matches_reference(ids[::2, 1::3], 8)
    assert_matches_reference(ids.T, 8)
    assert_matches_reference(torch.zeros(1, 1, dtype=torch.int32).expand(9, 4), 8)
    buffer = bytearray(4 * 24 + 1)
    buffer[1:] = torch.randint(0, 8, (24,), dtype=torch.int32).numpy().tobytes()
    misaligned = torch.frombuffer(buffer, dtype=torch.int32, offset=1).reshape(6, 4)
    assert misaligned.data_ptr() % 4 != 0
    assert_matches_reference(misaligned, 8)


@pytest.mark.parametrize("planner", ["auto", "device", "host"])
def test_planners_agree(planner: str, device: str) -> None:
    ids = torch.randint(-1, 9, (100, 4))
    expected = plan(ids, 8)
    got = plan(ids.to(device), 8, planner=planner)
    assert got.order.device.type == device
    assert all(torch.equal(a.cpu(), b) for a, b in zip(parts(got), parts(expected), strict=True))
    strided = plan(ids.T.to(device), 8, planner=planner)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(parts(strided), parts(plan(ids.T, 8)), strict=True))
    with mk.backend("reference"):
        again = plan(ids.to(device), 8, planner=planner)
    assert all(torch.equal(a, b) for a, b in zip(parts(got), parts(again), strict=True))


@pytest.mark.parametrize("planner", [None, 1, ["host"], "gpu"])
def test_unknown_planners(planner: object) -> None:
    ids = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=r"^planner: got .* expected one of auto, device, host"):
        plan(ids, 8, planner=planner)  # type: ignore[arg-type]


def test_a_plan_of_the_host_serves_another_device(device: str) -> None:
    p = make(20, 32, 24, 5, 2, device=device)
    planned = plan(p.ids.cpu(), 5).to(device)
    assert (planned.num_experts, planned.top_k, planned.order.device) == (5, 2, p.x.device)
    for _ in range(2):
        out = mk.experts(p.x, None, p.weights, p.w_gate_up, p.w_down, plan=planned)
        assert torch.equal(out, p.run())
    assert planned.to("cpu").order.is_cpu


def test_operator_and_direct_call_agree() -> None:
    ids = torch.randint(-1, 9, (100, 4))
    direct = plan(ids, 8)
    for backend in ("cpu", "reference"):
        assert all(torch.equal(a, b) for a, b in zip(ops.plan(ids, 8, backend), parts(direct), strict=True))
    with mk.backend("reference"):
        assert all(torch.equal(a, b) for a, b in zip(parts(plan(ids, 8)), parts(direct), strict=True))


def test_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.moekern.plan.default, (torch.randint(-1, 9, (10, 4)), 8, "cpu"))


def test_traces_and_runs_on_meta() -> None:
    ids = torch.randint(-1, 9, (10, 4))
    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (10, 7):
        expected = parts(plan(ids[:tokens], 8))
        assert all(torch.equal(a, b) for a, b in zip(parts(compiled(ids[:tokens], 8)), expected, strict=True))
    meta = plan(torch.empty(10, 4, dtype=torch.int64, device="meta"), 8)
    assert [t.shape for t in parts(meta)] == [(40,), (40,), (9,)]
    with torch._subclasses.FakeTensorMode():
        fake = plan(torch.empty(10, 4, dtype=torch.int64), 8)
    assert isinstance(fake.order, torch._subclasses.FakeTensor)


def test_statistics() -> None:
    p = plan(torch.tensor([[0, 1], [1, 2], [1, -1]]), 4)
    assert p.counts.tolist() == [1, 3, 1, 0]
    stats = p.stats()
    assert (stats.max_load, stats.mean_load, stats.empty_experts) == (3, 1.25, 1)
    shares = torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64)
    assert stats.entropy == pytest.approx(-(shares * shares.log()).sum().item())


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    height=st.integers(1, 130),
    longest_first=st.booleans(),
)
@settings(deadline=None)
def test_tiles_cover_the_rows_evenly(counts: list[int], height: int, longest_first: bool) -> None:
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).reshape(-1, 1)
    table = plan(ids, len(counts)).tiles(height, longest_first=longest_first)
    assert table.dtype == torch.int32
    tiles = table.tolist()
    if longest_first:
        assert tiles == sorted(tiles, key=lambda t: (-t[2], t[1]))
        tiles.sort(key=lambda t: t[1])
    expected, first = [], 0
    for expert, count in enumerate(counts):
        pieces = -(-count // height)
        for piece in range(pieces):
            rows = count // pieces + (piece < count % pieces)
            expected.append([expert, first, rows])
            first += rows
    assert tiles == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0, 1]], 4), TypeError, "topk_ids: got list"),
        ((None, 4), TypeError, "topk_ids: got NoneType"),
        ((torch.zeros(2, 2), 4), TypeError, "topk_ids: got dtype float32"),
        ((torch.zeros(2, 2, dtype=torch.bool), 4), TypeError, "topk_ids: got dtype bool"),
        ((torch.zeros(4, dtype=torch.int64), 4), ValueError, "topk_ids: got shape"),
        ((torch.zeros(2, 2, dtype=torch.int64).to_sparse(), 4), TypeError, "topk_ids: got layout"),
        ((torch.zeros(2, 2, dtype=torch.int64), 0), ValueError, "num_experts: got 0"),
        ((torch.zeros(2, 2, dtype=torch.int64), -3), ValueError, "num_experts: got -3"),
        ((torch.zeros(2, 2, dtype=torch.int64), 2**31), ValueError, "num_experts: got 2147483648"),
        ((torch.zeros(2, 2, dtype=torch.int64), 4.0), TypeError, "num_experts: got float"),
        ((torch.zeros(2, 2, dtype=torch.int64), True), TypeError, "num_experts: got bool"),
        (
            (torch.empty(2**16, 2**15, dtype=torch.uint8, device="meta"), 4),
            ValueError,
            "topk_ids: got 2147483648 slots",
        ),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("height", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (None, TypeError), (2**31, ValueError)]
)
def test_bad_tile_heights(height: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="height: got"):
        plan(torch.zeros(2, 2, dtype=torch.int64), 4).tiles(height)  # type: ignore[arg-type]


def test_many_python_threads_at_once() -> None:
    problems = [torch.randint(-1, 65, (1 << 14, 4)) for _ in range(6)]
    expected = [reference.plan(ids, 64) for ids in problems]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            got = parts(plan(problems[i], 64))
            wrong.extend(i for a, b in zip(got, expected[i], strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Replan:
    """Plan and compare without torch's own kernels: its thread pool, unlike moekern's, does not survive a fork."""

    def __init__(self) -> None:
        self.ids = (torch.arange(1 << 17).reshape(-1, 8) * 7) % 64
        self.expected = self.plan()
        assert all(
            torch.equal(a, b) for a, b in zip(parts(plan(self.ids, 64)), reference.plan(self.ids, 64), strict=True)
        )

    def plan(self) -> list[bytes]:
        out = [torch.empty(n, dtype=torch.int32) for n in (1 << 17, 1 << 17, 65)]
        _core.plan(self.ids.data_ptr(), 3, 1 << 17, 64, *(t.data_ptr() for t in out), 4)
        return [t.numpy().tobytes() for t in out]

    def is_correct(self) -> bool:
        return all(self.plan() == self.expected for _ in range(5))

    def exit_with_result(self) -> None:
        sys.exit(0 if self.is_correct() else 1)


# Newer Pythons warn about forking a process with threads; the test shows that it works with moekern's.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
class TestFork:
    def test_child_plans_after_the_pool_was_used(self) -> None:
        replan = Replan()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # ends a child that hangs
            os._exit(0 if replan.is_correct() else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert replan.is_correct()

    def test_multiprocessing(self) -> None:
        replan = Replan()
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=replan.exit_with_result, daemon=True) for _ in range(3)]
        for child in children:
            child.start()
        assert replan.is_correct()
        for child in children:
            child.join(60)
            assert child.exitcode == 0


def test_backends_get_contiguous_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read ids by address. A router that sorts passes a slice of the sorted experts."""
    right, seen = ops.plan, []

    def watched(ids: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(ids.is_contiguous())
        return right(ids, num_experts, backend)

    monkeypatch.setattr(ops, "plan", watched)
    monkeypatch.setattr("moekern.verbs.direct.undisturbed", lambda: False)
    ids = torch.rand(50, 16).argsort(dim=1)[:, :2]
    assert not ids.is_contiguous()
    for backend in ("reference", "cpu"):
        with mk.backend(backend):
            assert_matches_reference(ids, 16)
    assert seen == [True, True]
