"""Runs benches/cards/cpu_experts.py once, on a small grid, so that the program keeps working."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpu_experts import main
from moekern.bench.record import load


def bench_cpu_experts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    main(["--experts", "8", "--tokens", "1", "--dtypes", "fp32", "--rounds", "1", "--json", str(path)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| forward |", "| forward+"))]
    assert len(rows) == 2
    assert all(float(row.split("|")[9].strip(" *")) > 0 for row in rows)
    assert {row.verb for row in load(path).rows if row.implementation == "moekern"} == {"forward", "forward+backward"}
