"""The HTML report of a record: every number is in it, drawings are well-formed, and nothing is loaded."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict
from html import escape

import pytest

from made_up_records import MACHINE, record, row, without_time
from moekern.bench import charts, summary
from moekern.bench.charts import Bar, Point, Roof
from moekern.bench.record import BOTH, CEILING, DECODE, FORWARD, MOEKERN, SKIPPED, Record, Row
from moekern.bench.report import render
from moekern.bench.units import duration, figure, rate, size


@pytest.fixture(scope="module")
def page() -> str:
    return render(record())


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def of_title(page: str, title: str) -> ET.Element:
    return next(svg for svg in drawings(page) if svg.get("aria-label") == title)


def texts(svg: ET.Element) -> list[str]:
    return ["".join(node.itertext()) for node in svg.iter("text")]


def test_page_needs_nothing_else(page: str) -> None:
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?:|<script(?! type=.application/json)|<link|<img|@import|url\((?!#)", page)
    assert "prefers-color-scheme:dark" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == json.loads(json.dumps(asdict(record())))


def test_every_colour_is_defined_in_light_and_dark(page: str) -> None:
    for name in set(re.findall(r"var\(--(\w+)\)", page)):
        assert len(re.findall(rf"--{name}:#", page)) == 2, name


def test_every_row_is_in_the_table(page: str) -> None:
    table = page[page.index("Every number") :]
    for each in record().rows:
        if each.seconds:
            assert f"<td>{duration(each.seconds)}</td>" in table
            assert f"<td>{each.tflops:.0f}</td>" in table or figure(each.tflops) in table
    assert escape("moekern bench --shape all --report <b>.html") in table
    assert "Some GPU" in table
    assert "abc123" in table


def test_reasons_are_listed_once(page: str) -> None:
    listed = page[page.index("Not measured, or wrong") : page.index("Every number")]
    assert listed.count("the package absent is not installed") == 1
    assert "RuntimeError: &lt;out of memory&gt;" in listed
    assert "<td>mixtral-8x7b forward</td>" in listed
    assert listed.count("<td>everywhere</td>") == 2  # wrong, and not installed


def test_roofline(page: str) -> None:
    svg = of_title(page, "Roofline")
    words = texts(svg)
    assert "FLOPs per byte, at the fewest bytes" in words
    assert "TFLOP/s" in words
    assert "copy 4200 GB/s" in words
    assert any(word.startswith("ceiling 6") for word in words)
    assert "qwen3-decode-1" in words
    tips = [node.text or "" for node in svg.iter("title")]
    assert any(tip.startswith("moekern, mixtral-8x7b, forward+backward: ") for tip in tips)
    assert not any(tip.startswith(("ceiling", "hasty", "absent")) for tip in tips)
    measured = [r for r in record().rows if r.status == "ok" and r.sweep is None and r.implementation != CEILING]
    assert len(tips) == len(measured)


def test_bars_mark_what_is_wrong(page: str) -> None:
    svg = of_title(page, "mixtral-8x7b, forward")
    assert [node.get("class") for node in svg.iter("rect")].count("wrong") == 1
    words = texts(svg)
    assert words.index("moekern") < words.index("sonicmoe") < words.index("hasty")
    assert any(word.startswith("wrong, ") for word in words)
    assert "TFLOP/s" in words
    assert "GB/s of the fewest bytes" in texts(of_title(page, "qwen3-decode-1, decode"))


def test_longer_bars_are_faster(page: str) -> None:
    svg = of_title(page, "qwen3-30b-a3b, forward")
    widths = dict(zip(("moekern", "dense", "sonicmoe", "grouped_mm", "hasty"), svg.iter("rect"), strict=True))
    width = {name: float(rect.get("width") or 0) for name, rect in widths.items()}
    rows = {
        r.implementation: r for r in record().rows if (r.shape, r.verb) == ("qwen3-30b-a3b", FORWARD) and not r.sweep
    }
    for name, rect in width.items():
        assert rect / width["moekern"] == pytest.approx(rows["moekern"].seconds / rows[name].seconds, rel=0.01)


def test_scaling_and_memory(page: str) -> None:
    tokens = of_title(page, "qwen3-30b-a3b, forward, over tokens")
    assert {"tokens", "TFLOP/s", "512", "32768", "moekern", "ceiling", "grouped_mm"} <= set(texts(tokens))
    assert "experts" in texts(of_title(page, "qwen3-30b-a3b, forward, over experts"))
    saved = next(r.saved_bytes for r in record().rows if r.verb == BOTH)
    assert f"{size(saved)} saved" in page


def test_parts_without_rows_are_left_out() -> None:
    page = render(
        Record("2030-01-02T03:04:05+00:00", "moekern bench", MACHINE, [row("mixtral-8x7b", FORWARD, MOEKERN)])
    )
    assert "Roofline" in page
    assert not {"Scaling", "<h2>Memory", "Not measured, or wrong"} & set(re.findall(r"<h2>[^<]*|Scaling", page))
    drawings(page)


@pytest.mark.parametrize("rows", [[], [row("mixtral-8x7b", FORWARD, MOEKERN, **without_time(SKIPPED, "why"))]])
def test_nothing_measured(rows: list[Row]) -> None:
    page = render(Record("2030-01-02T03:04:05+00:00", "moekern bench", MACHINE, rows))
    drawings(page)
    assert "Roofline" not in page


def test_labels_cover_nothing() -> None:
    """Seven points in one place: every name that is drawn keeps clear of the points and of the other names."""
    names = [f"a-long-name-{i}" for i in range(7)]
    drawn = [
        node
        for node in charts.labels([(300.0 + i, 60.0, name) for i, name in enumerate(names)], 536, [])
        if ">a-" in node
    ]
    boxes = []
    for node in drawn:
        element = ET.fromstring(node)
        left, base = float(element.get("x") or 0), float(element.get("y") or 0)
        boxes.append((left, base - 10, left + charts.LETTER * len(names[0]), base + 3))
    assert len(boxes) >= 5
    points = [(295.0 + i, 55.0, 305.0 + i, 65.0) for i in range(7)]
    assert not any(charts.overlap(a, b) for i, a in enumerate(boxes) for b in [*boxes[i + 1 :], *points])


def test_roofs_that_are_not_known() -> None:
    points = [Point(10.0, 0.1, verb, "series1", "a tip", "a name") for verb in (FORWARD, BOTH, DECODE)]
    for roof in (Roof(None, None), Roof(0.2, None), Roof(None, 0.03), Roof(0.2, 0.03)):
        words = texts(ET.fromstring(charts.roofline(points, roof)))
        assert ("ceiling 0.200 TFLOP/s" in words) == (roof.peak is not None)
        assert ("copy 30.0 GB/s" in words) == (roof.slope is not None)
    words = texts(ET.fromstring(charts.roofline(points, Roof(200.0, 30.0, 1e-3, "GFLOP/s"))))
    assert {"ceiling 200 GFLOP/s", "copy 30.0 GB/s", "GFLOP/s"} <= set(words)


def test_bars_of_nothing() -> None:
    ET.fromstring(charts.bars("memory", [Bar("moekern", 0.0, "0 B", "series1")], "GB"))


def test_sentences() -> None:
    sentences = summary.sentences(record())
    assert [sentence.split(":")[0] for sentence in sentences] == ["Forward", "Forward+backward", "Decode"]
    assert "of the ceiling in geometric mean over 3 cases" in sentences[0]
    assert "of the copy rate" in sentences[2]
    rows = [
        row("mixtral-8x7b", FORWARD, name, share=0.5, seconds=s)
        for name, s in ((MOEKERN, 2.0), ("a", 3.0), ("dense", 1.0))
    ]
    alone = Record("2030-01-02T03:04:05+00:00", "moekern bench", MACHINE, rows)
    assert summary.sentences(alone) == [
        "Forward: 0.500 of the ceiling; 1.50 times the speed of the fastest correct peer."
    ]


def test_reasons_that_several_share() -> None:
    late = without_time(SKIPPED, "too late")
    rows = [row("mixtral-8x7b", FORWARD, MOEKERN)]
    rows += [row("mixtral-8x7b", BOTH, name, sweep="top_k", **late) for name in (MOEKERN, "peer")]
    shown = summary.missing(Record("2030-01-02T03:04:05+00:00", "moekern bench", MACHINE, rows))
    assert shown == [("moekern, peer", SKIPPED, "too late", "mixtral-8x7b forward+backward with 2 top-k")]


@pytest.mark.parametrize(
    ("printed", "wanted"),
    [
        (size(0), "0 B"), (size(999), "999 B"), (size(1500), "1.50 kB"), (size(2.5e9), "2.50 GB"),
        (figure(99.96), "100"), (figure(9.02384e-05), "0.0000902"), (figure(0.0), "0"), (figure(-1.2345), "-1.23"),
        (rate(702.4), "702 TFLOP/s"), (rate(0.0393), "39.3 GFLOP/s"),
    ],
)  # fmt: skip
def test_units(printed: str, wanted: str) -> None:
    assert printed == wanted
