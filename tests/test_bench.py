"""`moekern bench` from the command line to the record, on problems so small that they cost a second."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import made_up_records
from moekern import cli
from moekern.bench import cases, ceiling, decode, facts, limits, peers, record, report, routing, runner, shapes, timing
from moekern.bench.peers import Layer, Peer, base
from moekern.bench.problem import ALLOWED, Problem, Results, relative_error
from moekern.bench.record import BOTH, CEILING, DECODE, FAILED, FORWARD, OK, SKIPPED, VERBS, WRONG, Row

Call = Callable[..., tuple[int, str, str]]
TINY = shapes.SHAPES["tiny"]


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two rounds, little memory and one thread, which waits for no other: what is tested is not the figures."""
    monkeypatch.setattr(ceiling, "SCANNED", 2 << 20)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs `moekern bench` in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEKERN_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/somewhere/moekern", "bench", *arguments])
        try:
            code = cli.main(["bench", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class Broken(Peer):
    """Forgets the router's weights."""

    name, about = "broken", "a wrong implementation"

    def build(self, problem: Problem) -> Layer:
        ours = peers.OURS.build(problem)
        return replace(ours, forward=lambda x, scores, *weights: ours.forward(x, scores * 0 + 1, *weights))


class Raising(Peer):
    name, about = "raising", "an implementation that cannot be built"

    def build(self, problem: Problem) -> Layer:
        raise ImportError("its\nlibrary is older than this one needs")


class Absent(Peer):
    name, about = "absent", "an implementation that is not installed"

    def missing(self, problem: Problem) -> str | None:
        return "absent is not installed"

    def build(self, problem: Problem) -> Layer:
        raise AssertionError


class Sleeping(Peer):
    name, about = "sleeping", "an implementation that tunes for minutes"

    def build(self, problem: Problem) -> Layer:
        time.sleep(100)
        raise AssertionError


def measure(*implementations: Peer, **options: object) -> dict[tuple[str, str], Row]:
    """One case; rows by verb and implementation."""
    chosen = {"shapes": (TINY,), "peers": implementations, "device": "cpu", "dtypes": ("fp32",), "seconds": 0.01}
    rows = [row for each in runner.Session(cases.Options(**{**chosen, **options})).run() for row in each]
    return {(row.verb, row.implementation): row for row in rows}


def test_end_to_end(call: Call, tmp_path: Path) -> None:
    """Table and record say the same, and the record can be read again."""
    code, out, err = call("--shape", "tiny,tiny-decode", "--dtype", "bf16", "--json", "new.json", "--threads", "1")
    assert (code, err) == (0, "")
    read = record.load(tmp_path / "new.json")
    assert read.command == "moekern bench --shape tiny,tiny-decode --dtype bf16 --json new.json --threads 1"
    assert read.machine.cpu_threads == 1
    assert read.machine.gpu is None
    assert read.machine.copy_gbps is not None
    assert read.machine.copy_gbps > 0
    verbs = {row.shape: {r.verb for r in read.rows if r.shape == row.shape} for row in read.rows}
    assert verbs == {"tiny": {FORWARD, BOTH}, "tiny-decode": {DECODE}}
    for row in read.rows:
        if row.implementation in (CEILING, "moekern", "dense", "grouped_mm"):
            assert row.status == OK, row
            assert row.seconds is not None
            assert row.low is not None
            assert row.high is not None
            assert 0 < row.low <= row.seconds <= row.high
            assert row.share is not None
            assert row.share > 0
            assert row.flops > 0
            assert row.bytes > 0
            assert row.runs >= 1
        if row.implementation == "moekern":
            assert row.error is not None
            assert 0 < row.error < ALLOWED[torch.bfloat16]
    assert "forward+backward, tiny: 48 tokens, hidden 128, intermediate 64, 2 of 8 experts, bf16" in out
    assert out.count("✓") >= 7


def test_saved_bytes_are_those_of_the_design() -> None:
    """x and the pre-activation, 2 T H + 4 T K I bytes in bf16, beside router weights and plan."""
    row = measure(dtypes=("bf16",))[BOTH, "moekern"]
    design = 2 * TINY.tokens * TINY.hidden + 4 * TINY.slots * TINY.intermediate
    plan = 4 * TINY.slots + 2 * 4 * TINY.slots + 4 * (TINY.experts + 1)
    assert row.saved_bytes == design + plan


def test_wrong_is_wrong_and_not_fast(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "broken", Broken())
    code, out, _ = call("--shape", "tiny", "--peers", "broken", "--dtype", "fp32", "--verbs", "forward")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("broken"))
    assert "WRONG" in line
    assert "✓" not in line
    assert line.split().count("-") == 2
    assert "wrong: broken: off by" in out


def test_what_cannot_run_has_a_reason() -> None:
    rows = measure(Broken(), Raising(), Absent(), peers.PEERS["scattermoe"], peers.PEERS["llama.cpp"])
    assert {row.status for (_, name), row in rows.items() if name in ("moekern", CEILING)} == {OK}
    for verb in (FORWARD, BOTH):
        wrong, raising, absent = rows[verb, "broken"], rows[verb, "raising"], rows[verb, "absent"]
        assert (wrong.status, raising.status, absent.status) == (WRONG, FAILED, SKIPPED)
        assert wrong.error is not None
        assert wrong.error > ALLOWED[torch.float32]
        assert raising.reason == "ImportError: its library is older than this one needs"
        assert absent.reason == "absent is not installed"
        assert (rows[verb, "scattermoe"].status, rows[verb, "scattermoe"].reason) == (SKIPPED, "runs on cuda only")
    assert rows[BOTH, "llama.cpp"].reason == "has no backward pass"


def test_a_long_set_up_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SET_UP_SECONDS", 0.2)
    rows = measure(Sleeping())
    assert rows[FORWARD, "sleeping"].reason == "its set-up took longer than 0 s"
    assert rows[BOTH, "sleeping"].reason == "its set-up took longer than 0 s for tiny"
    assert rows[BOTH, "moekern"].status == OK


def test_a_named_peer_may_take_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    limits_given: dict[str, float] = {}

    @contextmanager
    def time_limit(seconds: float) -> Iterator[None]:
        limits_given[session.preparing] = seconds
        yield

    monkeypatch.setattr(runner, "time_limit", time_limit)
    named = frozenset(["dense"])
    peers_here = (peers.PEERS["dense"], peers.PEERS["grouped_mm"])
    session = runner.Session(cases.Options((TINY,), peers_here, "cpu", verbs=(FORWARD,), minutes=30, named=named))
    assert list(session.run())
    assert 1700 < limits_given["dense"] < 1800
    assert 0 < limits_given["grouped_mm"] <= 60


def test_time_limit_leaves_nothing_behind() -> None:
    with limits.time_limit(100):
        pass
    with pytest.raises(limits.TookTooLongError), limits.time_limit(0.01):
        time.sleep(10)


def test_after_the_time_limit_rows_are_skipped() -> None:
    rows = measure(minutes=1e-9)
    assert {row.status for row in rows.values()} == {SKIPPED}
    assert all("(--minutes)" in row.reason for row in rows.values())
    assert set(rows) == {(verb, name) for verb in (FORWARD, BOTH) for name in (CEILING, "moekern")}


def test_a_case_that_fails_costs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """For lack of memory, say; what follows is measured."""
    real = runner.ceiling_of

    def fail(problem: Problem, verb: str, *rest: object) -> object:
        if verb == FORWARD:
            raise MemoryError("no room")
        return real(problem, verb, *rest)

    monkeypatch.setattr(runner, "ceiling_of", fail)
    rows = measure()
    assert {(row.status, row.reason) for (verb, _), row in rows.items() if verb == FORWARD} == {
        (FAILED, "MemoryError: no room")
    }
    assert {row.status for (verb, _), row in rows.items() if verb == BOTH} == {OK}


def test_sweeps() -> None:
    """Each varies one size, keeps the name, and holds the shape's own size."""
    shape = shapes.SHAPES["olmoe-1b-7b"]
    assert [s.tokens for s in cases.sweep_of(shape, "tokens")] == [512, 2048, 8192, 32768]
    assert [s.experts for s in cases.sweep_of(shape, "experts")] == [16, 32, 64, 128]
    assert [s.top_k for s in cases.sweep_of(shape, "top_k")] == [1, 2, 4, 8, 16]
    assert {s.name for s in cases.sweep_of(shape, "top_k")} == {"olmoe-1b-7b"}
    assert [s.experts for s in cases.sweep_of(TINY, "experts")] == [2, 4, 8, 16]
    assert [s.top_k for s in cases.sweep_of(shape, "top_k", coarse=True)] == [1, 4, 16]
    assert [s.tokens for s in cases.sweep_of(replace(TINY, tokens=2), "tokens", coarse=True)] == [2]
    session = runner.Session(cases.Options(
        (), (peers.PEERS["grouped_mm"], peers.PEERS["dense"]), "cpu", ("fp32",), sweeps=("top_k",), swept=(TINY,),
        verbs=(FORWARD,), seconds=0.01,
    ))  # fmt: skip
    rows = [row for each in session.run() for row in each]
    assert [(row.top_k, row.implementation, row.sweep) for row in rows] == [
        (k, name, "top_k") for k in (1, 2, 4, 8) for name in (CEILING, "moekern", "grouped_mm")
    ]


@pytest.mark.parametrize("name", ["dense", "transformers", "grouped_mm"])
@pytest.mark.parametrize("way", routing.ROUTINGS)
def test_peers_that_are_here_are_right(name: str, way: str) -> None:
    problem = Problem(TINY, torch.float32, "cpu", way)
    peer = peers.PEERS[name]
    if reason := peer.missing(problem):
        pytest.skip(reason)
    layer = peer.build(problem)
    for backward in (False, True):
        error = base.results_of(layer, problem, backward).error_against(base.wanted_of(layer, problem, backward))
        assert error < 1e-5
    assert base.saved_bytes(layer, problem) > 0


@pytest.mark.parametrize("way", routing.ROUTINGS)
def test_the_reference_is_moekern_in_float64(way: str) -> None:
    problem = Problem(TINY, torch.float32, "cpu", way)
    leaves = [t.double().requires_grad_() for t in (problem.x, problem.scores, problem.w_gate_up, problem.w_down)]
    import moekern as mk

    out = mk.experts(leaves[0], problem.ids, *leaves[1:])
    gradients = torch.autograd.grad(out, leaves, problem.dout.double())
    wanted = Results(out.detach().float(), tuple(g.float() for g in gradients))
    assert problem.reference(True).error_against(wanted) < 1e-5
    assert problem.reference(False).gradients == ()


def test_routings() -> None:
    counts = {}
    for way in routing.ROUTINGS:
        ids = routing.choose(way, 4000, 16, 2, torch.Generator().manual_seed(1))
        assert ids.shape == (4000, 2)
        assert ids.dtype == torch.int64
        assert int(ids.min()) >= 0
        assert bool((ids[:, 0] != ids[:, 1]).all())
        counts[way] = ids.flatten().bincount(minlength=16).sort(descending=True).values
    assert counts["uniform"][0] < 1.2 * counts["uniform"][-1]
    assert counts["hot"][0] == 4000
    assert counts["hot"][1] < 1.5 * counts["hot"][-1]
    assert (counts["empty"] > 0).sum() == 8
    assert 1.5 < counts["zipf"][0] / counts["zipf"][1] < 2.1
    assert routing.choose("empty", 5, 4, 4, torch.Generator()).sort().values.tolist() == [[0, 1, 2, 3]] * 5
    with pytest.raises(ValueError, match="got 'even', expected one of uniform, zipf"):
        routing.choose("even", 1, 2, 1, torch.Generator())


def test_costs() -> None:
    problem = Problem(shapes.parse_thiek("4,32,16,8,2"), torch.bfloat16, "cpu", "empty")
    assert (problem.flops(FORWARD), problem.flops(BOTH)) == (6 * 8 * 32 * 16, 18 * 8 * 32 * 16)
    active = problem.active
    assert active <= 4
    forward = 2 * 4 * 32 + active * 3 * 32 * 16
    assert problem.bytes(FORWARD) == 2 * forward + 8 * 12
    assert problem.bytes(DECODE) == problem.bytes(FORWARD)
    both = forward + 2 * 2 * 8 * 16 + 3 * 4 * 32 + (active + 8) * 3 * 32 * 16
    assert problem.bytes(BOTH) == 2 * both + 8 * 12


def test_experts_of_a_problem_differ() -> None:
    """Or a peer that takes the wrong expert would be right."""
    problem = Problem(TINY, torch.float32, "cpu")
    for w in (problem.w_gate_up, problem.w_down):
        for a in range(8):
            assert not any(torch.equal(w[a], w[b]) for b in range(a))


def test_decode_reads_other_experts_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(shapes.SHAPES["tiny-decode"], torch.float32, "cpu")
    several = decode.problems(problem, 0)
    assert several[0] is problem
    assert len(several) == decode.MOST_SETS
    assert len({tuple(p.ids.flatten().tolist()) for p in several}) > 4
    assert {p.w_gate_up.data_ptr() for p in several} == {problem.w_gate_up.data_ptr()}
    monkeypatch.setattr(decode, "STREAMED", 1)
    assert len(decode.problems(problem, 0)) == 2
    work, repeats, remark = decode.work([peers.OURS.build(each) for each in several], several)
    assert (repeats, remark) == (len(several), "")
    assert work().error_against(several[-1].reference(False)) < 1e-5


def test_what_is_timed_in_decode_is_checked() -> None:
    """The pass over the first experts may be right and the last of those that are timed wrong."""
    first: list[Layer] = []

    class Stale(Peer):
        name, about = "stale", "an implementation that keeps what it saw first"

        def build(self, problem: Problem) -> Layer:
            first.append(peers.OURS.build(problem))
            return first[0]

    row = measure(Stale(), shapes=(shapes.SHAPES["tiny-decode"],))[DECODE, "stale"]
    assert row.status == WRONG
    assert row.error is not None
    assert row.error > 0.1


def test_what_is_slow_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SLOW_SECONDS", 1e-9)
    row = measure(peers.PEERS["dense"], verbs=(FORWARD,))[FORWARD, "dense"]
    assert (row.status, row.runs, row.reason) == (OK, 1, "timed once, while it was checked")
    assert row.seconds == row.low == row.high
    assert row.share is not None


def test_relative_error() -> None:
    assert relative_error(torch.ones(2, 2, 2) * 1.5, torch.ones(2, 2, 2)) == pytest.approx(0.5)
    assert relative_error(torch.full((3,), float("nan")), torch.ones(3)) == float("inf")
    assert relative_error(torch.ones(3), torch.ones(4)) == float("inf")
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


def test_figures_of_pairs() -> None:
    """The share is the median of ratios, so that a slow minute, which slows both, does not count."""
    pairs = timing.Pairs(own=[1.0, 2.0, 4.0], base=[0.5, 1.0, 2.2])
    assert pairs.share == 0.5
    assert pairs.quartiles == (1.5, 2.0, 3.0)
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_slow_work_runs_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_ROUNDS", 40)

    class Fake:
        """A clock on which work takes the seconds that it returns."""

        def __call__(self, work: Callable[[], object]) -> Callable[[], float]:
            seconds = work()
            return lambda: seconds

        def wait(self) -> None:
            pass

    runs = {"quick": (lambda: 0.002, 2), "slow": (lambda: 0.4, 1), "very slow": (lambda: 9.0, 1)}
    pairs = timing.in_turns(runs, lambda clock: clock(lambda: 1.0), Fake(), 1.0)
    assert {name: len(each.own) for name, each in pairs.items()} == {"quick": 40, "slow": 3, "very slow": 1}
    assert pairs["quick"].own[0] == 0.001
    assert pairs["slow"].share == 2.5
    ceilings = {name: lambda clock, at=at: clock(lambda: at) for name, at in (("quick", 0.004), ("slow", 0.2))}
    pairs = timing.in_turns({name: runs[name] for name in ceilings}, ceilings, Fake(), 0.0, rounds=5)
    assert {name: (len(each.own), each.share) for name, each in pairs.items()} == {"quick": (5, 4.0), "slow": (5, 0.5)}


def test_report_and_comparison(call: Call, tmp_path: Path) -> None:
    """The second run takes shapes, dtype, routing and peers from the first one's record."""
    code, out, err = call(
        "--thiek", "16,64,32,4,2", "--dtype", "fp32", "--routing", "zipf", "--peers", "dense", "--json", "old.json",
        "--report", "page.html", "--sweep", "top_k",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "report: page.html" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "16x64x32x4x2" in page
    read = record.load(tmp_path / "old.json")
    assert {row.sweep for row in read.rows} == {None, "top_k"}
    slower = [replace(row, **{t: getattr(row, t) * f for t in ("seconds", "low", "high")}) for row in read.rows
              for f in [1e3 if row.implementation == "moekern" else 1]]  # fmt: skip
    record.save(replace(read, rows=slower), tmp_path / "slow.json")
    code, out, err = call("--compare", "slow.json", "--json", "new.json")
    assert (code, err) == (0, "")
    assert "against slow.json, of 20" in out
    assert "faster" in out
    again = record.load(tmp_path / "new.json").rows
    assert [row.case for row in again] == [row.case for row in read.rows if row.sweep is None]
    assert {row.implementation for row in again} == {CEILING, "moekern", "dense"}


def test_a_regression_is_an_exit_code(call: Call, tmp_path: Path) -> None:
    call("--shape", "tiny", "--dtype", "fp32", "--peers", "none", "--verbs", "forward", "--json", "old.json")
    read = record.load(tmp_path / "old.json")
    for row in read.rows:
        if row.implementation == "moekern":
            row.seconds, row.low, row.high = 1e-9, 1e-9, 1e-9
    record.save(read, tmp_path / "old.json")
    code, out, _ = call("--compare", "old.json", "--verbs", "forward", "--json", "new.json")
    assert code == 1
    assert "1 regressed" in out
    assert call("--from", "new.json", "--compare", "old.json")[0] == 1


def test_figures_of_a_file(call: Call, tmp_path: Path) -> None:
    """`--from` measures nothing: table, page and comparison are of the file."""
    made = made_up_records.record()
    record.save(made, tmp_path / "a.json")
    code, out, err = call("--from", "a.json", "--report", "a.html", "--compare", "a.json")
    assert (code, err) == (0, "")
    assert "forward, mixtral-8x7b" in out
    assert "0 regressed, 0 faster" in out
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == report.render(record.load(tmp_path / "a.json"))


BAD = {
    "no record": (["--compare", "none.json"], "No such file or directory: none.json"),
    "unknown shape": (["--shape", "olmo"], "--shape: got 'olmo', expected all or one of qwen3-30b-a3b, olmoe-1b-7b"),
    "four sizes": (["--thiek", "1,2,3,4"], "--thiek: got '1,2,3,4', expected five whole numbers of at least 1: tokens"),
    "size zero": (["--thiek", "0,2,3,4,5"], "--thiek: got '0,2,3,4,5'"),
    "no number": (["--thiek", "a,2,3,4,5"], "--thiek: got 'a,2,3,4,5'"),
    "more than all experts": (["--thiek", "8,8,8,2,3"], "--thiek: got 3 experts a token, expected at most the 2"),
    "unknown peer": (["--peers", "dense,sonic"], "--peers: got 'sonic', expected usual, all, none or of dense, transf"),
    "unknown routing": (["--routing", "even"], "--routing: got 'even', expected of uniform, zipf, hot, empty"),
    "unknown dtype": (["--dtype", "fp8"], "--dtype: got 'fp8', expected of bf16, fp16, fp32"),
    "unknown verb": (["--verbs", "backward"], "--verbs: got 'backward', expected of forward, both, decode"),
    "unknown sweep": (["--sweep", "hidden"], "--sweep: got 'hidden', expected of tokens, experts, top_k"),
    "unknown device": (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    "no threads": (["--threads", "0"], "argument --threads: got '0', expected a whole number from 1"),
    "no time": (["--minutes", "0"], "argument --minutes: got '0', expected a number above 0"),
    "nothing to measure": (["--from", "a.json", "--shape", "tiny"], "--from: measures nothing, but --shape says what"),
    "nothing to show": (["--from", "none.json"], "No such file or directory: none.json"),
    "no folder": (["--json", "nowhere/a.json"], "--json: got nowhere/a.json, but the folder nowhere does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_no_gpu(call: Call) -> None:
    code, _, err = call("--device", "cuda")
    assert code == 2
    assert "--device: got 'cuda', but torch finds no usable GPU here; moekern doctor says why" in err


def test_help_names_shapes_and_peers(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for name in (*shapes.SHAPES, *peers.PEERS, *routing.ROUTINGS):
        assert name in out


def test_names() -> None:
    assert {name for group in (shapes.ALL, shapes.USUAL, shapes.QUICK) for n in group.values() for name in n} <= set(
        shapes.SHAPES
    )
    assert [s.name for s in shapes.chosen(["all"], "cpu")] == shapes.ALL["cpu"]
    assert [s.name for s in shapes.chosen(["tiny", "tiny"], "cpu")] == ["tiny"]
    assert all(shapes.parse_thiek(s.thiek).slots == s.slots for s in shapes.SHAPES.values())
    assert {peer.name for peer in peers.chosen(["usual"], "cpu")} == {
        "dense",
        "transformers",
        "grouped_mm",
        "llama.cpp",
    }
    assert "sonicmoe" not in {peer.name for peer in peers.chosen(["usual"], "cuda")}
    assert "sonicmoe" in {peer.name for peer in peers.chosen(["all"], "cuda")}
    assert peers.chosen(["none"], "cuda") == []


def test_commit_is_that_of_tracked_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv(facts.COMMIT_VARIABLE, raising=False)
    assert facts.commit(tmp_path / "file") == ""
    monkeypatch.setenv(facts.COMMIT_VARIABLE, "abc")
    assert facts.commit(tmp_path / "file") == "abc"
    assert facts.machine_of("cpu").python.startswith("3.")


def test_record_of_a_case_holds_all_verbs() -> None:
    rows = measure(verbs=tuple(VERBS))
    assert {verb for verb, _ in rows} == set(VERBS)
    assert json.dumps([record.rounded(vars(row)) for row in rows.values()])
