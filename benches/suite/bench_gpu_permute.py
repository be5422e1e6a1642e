"""benches/cards/gpu_permute.py: its lines on the CPU, and with a GPU the whole program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gpu_permute
import tables
from moekern.bench.ceiling import Copy
from moekern.bench.shapes import SHAPES
from moekern.bench.timing import CpuClock


def bench_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.bench.ceiling.SCANNED", 2 << 20)
    rows = gpu_permute.Rows(SHAPES["tiny"], torch.bfloat16, "cpu")
    rows.check()
    figures = gpu_permute.measure(rows.lines([], peers=True), "tiny", CpuClock(), Copy("cpu"), 1)
    names = [f"{who}{verb}" for who in ("", "reference: ", "torch: ") for verb in gpu_permute.VERBS]
    assert [figure.what for figure in figures] == names
    assert all(figure.share for figure in figures)
    assert len(capsys.readouterr().out.splitlines()) == len(names)


def bench_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gpu_permute.Rows(SHAPES["tiny"], torch.float32, "cpu")
    monkeypatch.setattr(gpu_permute.reference, "permute", lambda x, plan, top_k: rows.rows)
    with pytest.raises(gpu_permute.WrongError, match=r"permute: off by .*, allowed 1.0e-04"):
        rows.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def bench_gpu_permute(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    arguments = ["--tokens", "60,64", "--hidden", "130", "--shares", "1,2", "--rounds", "1", "--dtype", dtype]
    gpu_permute.main(["--shapes", "tiny", "--json", str(path), *arguments])
    assert len(json.loads(path.read_text())["figures"]) == 2 * 14
    assert "| tiny, T = 60, H = 130" in tables.page(path)
