"""The page that benches/report.py makes from a record, down to the rounding."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benches" / "report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(name: str, group: str | None, params: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
    stats = {"median": 0.00123456, "q1": 0.0012, "q3": 0.0013}
    return {
        "name": name,
        "fullname": f"benches/bench_plan.py::{name}",
        "group": group,
        "params": params,
        "extra_info": extra,
        "stats": stats,
    }


RECORD = {
    "datetime": "2030-01-02T03:04:05",
    "machine_info": {
        "cpu": "Some CPU",
        "cores": 2,
        "threads": 1,
        "cpu_isa": "avx2",
        "python": "3.11.7",
        "packages": {"moekern": "0.1.0", "torch": "2.15.0"},
        "commit": "abc+",
        "command": "python -m pytest benches",
    },
    "benchmarks": [
        case("bench_plan[8]", "plan", {"slots": 8}, ns_a_slot=2.0),
        case("bench_plan[4096]", "plan", {"slots": 4096}, ns_a_slot=1.5, against_sort="12x"),
        case("bench_alone", None, None),
    ],
}


def test_page(report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan-zen3.json").write_text(json.dumps(RECORD))
    report.main([str(tmp_path / "plan-zen3.json")])
    assert capsys.readouterr().out.strip().endswith("plan-zen3.md")
    lines = (tmp_path / "plan-zen3.md").read_text().splitlines()
    assert lines[0] == "# plan-zen3"
    assert lines[2].startswith("Some CPU, 2 cores, 1 threads, instruction set `avx2`; Python 3.11.7, moekern 0.1.0")
    assert lines[2].endswith("commit abc+; 2030-01-02.")
    assert "    python -m pytest benches" in lines
    assert "| slots | median | middle half | ns_a_slot | against_sort |" in lines
    assert "| 8 | 1.23 ms | 1.20 ms – 1.30 ms | 2.00 |  |" in lines
    assert "| 4096 | 1.23 ms | 1.20 ms – 1.30 ms | 1.50 | 12x |" in lines
    assert "## benches/bench_plan.py" in lines
    assert "| alone | 1.23 ms | 1.20 ms – 1.30 ms |" in lines


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [(2.5, "2.50 s"), (0.0123456, "12.3 ms"), (5.55e-6, "5.55 µs"), (4.2e-10, "0.420 ns"), (0.9999, "1000 ms")],
)
def test_duration(report: ModuleType, seconds: float, printed: str) -> None:
    assert report.duration(seconds) == printed


def test_no_record(report: ModuleType) -> None:
    with pytest.raises(SystemExit, match="usage"):
        report.main([])
