"""Records of `moekern bench` are read as they were written; the error for an unreadable one names the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekern.bench import record as records
from moekern.bench.record import Machine, Record, Row

MACHINE = Machine("Some CPU", 2, "avx2", None, None, "2.15.0", None, "3.11.9", "0.1.0", "abc", copy_gbps=12.5)
ROW = Row(
    "small", 64, 256, 128, 8, 2, "bf16", "uniform", "cpu", records.FORWARD, records.MOEKERN, records.OK,
    seconds=0.00123456789, low=0.001, high=0.002, runs=5, flops=1e9, bytes=2e6, share=0.9, error=1e-3,
)  # fmt: skip
RECORD = Record("2030-01-02T03:04:05+00:00", "moekern bench --shape small", MACHINE, [ROW])


def test_round_trip(tmp_path: Path) -> None:
    records.save(RECORD, tmp_path / "a.json")
    read = records.load(tmp_path / "a.json")
    assert read.rows[0].seconds == 0.00123457
    read.rows[0].seconds = ROW.seconds
    assert read == RECORD
    assert read.rows[0].tflops == pytest.approx(1e9 / 0.00123456789 / 1e12)
    assert read.rows[0].gbps == pytest.approx(2e6 / 0.00123456789 / 1e9)
    assert read.rows[0].case == ROW.case


def test_fields_of_later_programs_are_dropped(tmp_path: Path) -> None:
    records.save(RECORD, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    content["weather"] = content["machine"]["weather"] = content["rows"][0]["weather"] = "fair"
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert records.load(tmp_path / "a.json").machine == MACHINE


def broken(**changes: Any) -> str:
    content = {"version": 1, "made": "", "command": "", "machine": vars(MACHINE), "rows": [vars(ROW)], **changes}
    return json.dumps({key: value for key, value in content.items() if value is not None})


BAD = {
    "no JSON": ("{", "not JSON"),
    "another file": ("[1, 2]", "not a record of moekern bench"),
    "another version": (broken(version=2), "version 2, expected 1"),
    "no machine": (broken(machine=None), "machine: got NoneType, expected an object"),
    "rows no list": (broken(rows={}), "rows: got dict, expected a list"),
    "row without shape": (broken(rows=[{"tokens": 3}]), r"rows\[0\]: the field shape is missing"),
    "seconds a text": (broken(rows=[{**vars(ROW), "seconds": "3"}]), r"seconds: got '3', expected float or null"),
    "tokens no integer": (broken(rows=[{**vars(ROW), "tokens": 2.5}]), r"tokens: got 2.5, expected int"),
    "unknown status": (broken(rows=[{**vars(ROW), "status": "fine"}]), "status: got 'fine', expected one of ok, wrong"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_records_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        records.load(path)
    assert str(path) in str(caught.value)
