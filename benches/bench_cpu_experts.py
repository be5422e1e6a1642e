"""The table of benches/cpu_experts.py is made once, small, so that the program cannot rot."""

from __future__ import annotations

import pytest

from cpu_experts import main


def bench_cpu_experts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--experts", "8", "--tokens", "1", "--dtypes", "fp32", "--rounds", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| forward |", "| forward+"))]
    assert len(rows) == 2
    assert all(float(row.split("|")[9].strip(" *")) > 0 for row in rows)
