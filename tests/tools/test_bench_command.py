"""`moekern bench` from the command line to the record, on problems so small that they cost a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import made_up_records
from made_up_peers import Broken
from moekern import cli
from moekern.bench import facts, peers, record, report, routing, shapes
from moekern.bench.problem import ALLOWED
from moekern.bench.record import BOTH, CEILING, DECODE, FORWARD, OK

pytestmark = pytest.mark.usefixtures("small_and_quick")
Call = Callable[..., tuple[int, str, str]]


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


def test_wrong_is_wrong_and_not_fast(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "broken", Broken())
    code, out, _ = call("--shape", "tiny", "--peers", "broken", "--dtype", "fp32", "--verbs", "forward")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("broken"))
    assert "WRONG" in line
    assert "✓" not in line
    assert line.split().count("-") == 2
    assert "wrong: broken: off by" in out


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
    "more than all experts": (["--thiek", "8,8,8,2,3"], "--thiek: got 3 experts per token, expected at most the 2"),
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
