"""The figures in the texts are those of the records, and records/figures.py rounds and lays them out as expected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import figures
from made_up_records import record as made_up
from moekern.bench import record as records
from moekern.bench.record import BOTH, MOEKERN, WRONG, Row
from moekern.bench.units import duration, figure

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one record of each form and a text without blocks."""
    results = tmp_path / "benches" / "results"
    results.mkdir(parents=True)
    records.save(made_up(), results / "layers.json")
    (results / "plan.json").write_text(json.dumps(PYTEST_RECORD))
    (results / "kernels.json").write_text(json.dumps(KERNEL_RECORD))
    (results / "demo.md").write_text("validation bits per byte  2.358  2.319\n")
    (tmp_path / "README.md").write_text("No figures.\n")
    return tmp_path


def case(name: str, group: str | None, params: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
    stats = {"median": 0.00123456, "q1": 0.0012, "q3": 0.0013}
    fullname = f"benches/suite/bench_plan.py::{name}"
    return {"name": name, "fullname": fullname, "group": group, "params": params, "extra_info": extra, "stats": stats}


PYTEST_RECORD = {
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
KERNEL_RECORD = {
    "card": "Some GPU",
    "torch": "2.11.0",
    "routing": "uniform",
    "ceiling": "cuBLAS at the same FLOPs",
    "command": "python benches/cards/gpu_experts.py",
    "note": "A note",
    "figures": [
        {"shape": "one", "what": "plan", "ms": 0.02, "tflops": 0.0, "share": 0.0},
        {"shape": "one", "what": "moekern: forward", "ms": 4.08, "tflops": 606.4, "share": 0.9329},
        {"shape": "two", "what": "moekern: forward", "ms": 5.26, "tflops": 627.0, "share": 0.961},
    ],
}


def test_texts_show_what_the_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--check"]) == 0, capsys.readouterr().out


def test_texts_have_blocks() -> None:
    names = {
        text: {block.split()[0] for block, _ in figures.BLOCK.findall((ROOT / text).read_text())}
        for text in ("README.md", "docs/performance.md", "cuda/LADDER.md")
    }
    assert names["README.md"] == {"peers-h200"}
    assert {"plan-zen4", "demo-cpu", "layer-h200", "experts-zen4"} <= names["docs/performance.md"]
    assert names["cuda/LADDER.md"] == {"layer-h100", "layer-h200"}


def test_no_table_stands_twice() -> None:
    texts = [path for pattern in figures.TEXTS for path in sorted(ROOT.glob(pattern))]
    blocks = [block for text in texts for block, content in figures.BLOCK.findall(text.read_text()) if "\n|" in content]
    assert len(blocks) >= 10
    assert len(set(blocks)) == len(blocks)


def test_chart(root: Path) -> None:
    """A picture for README.md, and for a text in a folder, from one block each."""
    (root / "docs").mkdir()
    block = "<!-- figures:layers chart docs/bars.svg --><!-- /figures -->\n"
    (root / "README.md").write_text(block)
    (root / "docs/page.md").write_text(block)
    assert figures.main([], root) == 0
    ours = row_of("mixtral-8x7b", BOTH, MOEKERN)
    shown = f"moekern {figure(ours.tflops)}"
    for text, link in (("README.md", "(docs/bars.svg)"), ("docs/page.md", "(bars.svg)")):
        image = (root / text).read_text().splitlines()[1]
        assert shown in image.split("mixtral-8x7b, forward+backward, TFLOP/s: ", 1)[1].split(".", 1)[0]
        assert image.endswith(link)
    drawn = ElementTree.parse(root / "docs/bars.svg").getroot()
    panels = drawn.findall("{*}svg")
    cases = {row.case for row in made_up().rows if not row.sweep}
    assert len(panels) == len(cases)
    assert all(panel.findall("{*}rect") for panel in panels)
    corners = {(panel.get("x"), panel.get("y")) for panel in panels}
    assert len(corners) == len(panels)
    below = [float(panel.get("y", 0)) + float(panel.get("height", 0)) for panel in panels]
    assert max(below) < float(drawn.get("height", 0))
    colours = set(re.findall(r"var\(--(\w+)\)", ElementTree.tostring(drawn, "unicode")))
    style = drawn.findtext("{*}style") or ""
    light, dark = style.split("prefers-color-scheme:dark", 1)
    assert all(f"--{colour}:" in light and f"--{colour}:" in dark for colour in colours)
    (root / "docs/bars.svg").write_text("stale")
    assert figures.main(["--check"], root) == 1


def test_page_of_pytest_benchmark(root: Path) -> None:
    assert figures.main([], root) == 0
    lines = (root / "benches/results/plan.md").read_text().splitlines()
    assert lines[0] == "# plan"
    assert lines[2].startswith("Some CPU, 2 cores, 1 threads, instruction set `avx2`; Python 3.11.7, moekern 0.1.0")
    assert lines[2].endswith("commit abc+; 2030-01-02.")
    assert "    python -m pytest benches" in lines
    assert "| slots | median | middle half | ns_a_slot | against_sort |" in lines
    assert "| 8 | 1.23 ms | 1.20 ms – 1.30 ms | 2.00 |  |" in lines
    assert "| 4096 | 1.23 ms | 1.20 ms – 1.30 ms | 1.50 | 12x |" in lines
    assert "## benches/suite/bench_plan.py" in lines
    assert "| alone | 1.23 ms | 1.20 ms – 1.30 ms |" in lines


def test_page_of_kernels(root: Path) -> None:
    figures.main([], root)
    lines = (root / "benches/results/kernels.md").read_text().splitlines()
    assert "    python benches/cards/gpu_experts.py" in lines
    assert "A note." in lines
    assert "| one | plan | 0.0200 |  |  |" in lines
    assert "| one | moekern: forward | 4.0800 | 606 | 0.933 |" in lines


def test_page_of_moekern_bench(root: Path) -> None:
    figures.main([], root)
    page = (root / "benches/results/layers.md").read_text()
    assert page.splitlines()[2].startswith(
        "Some GPU, driver 600.1, CUDA 13.0, memory copies 4200 GB/s; Some CPU, 16 threads"
    )
    peers = "dense | grouped_mm | sonicmoe | hasty | absent | broken"
    assert f"| shape | verb | time | TFLOP/s | GB/s | of ceiling | {peers} |" in page
    ours = {(r.shape, r.verb): r for r in made_up().rows if r.implementation == MOEKERN and not r.sweep}
    for (shape, verb), row in ours.items():
        assert f"| {shape} | {verb} | {duration(row.seconds)} | " in page
        rate = row.gbps if "decode" in verb else row.tflops
        assert f" {figure(rate)} |" in page
        assert f" {row.share:.2f} |" in page
    assert "x (wrong) |" in page
    assert "## Over tokens" in page
    assert "| qwen3-30b-a3b | 2048 | forward | " in page
    assert "| absent | skipped | the package absent is not installed | everywhere |" in page


def test_every_row_has_as_many_cells_as_its_head(root: Path) -> None:
    figures.main([], root)
    for page in (root / "benches/results").glob("*.md"):
        cells = 0
        for line in page.read_text().splitlines():
            if line.startswith("|"):
                cells = cells or line.count("|")
                assert line.count("|") == cells, line
            else:
                cells = 0


VIEWS = {
    "range": ('plan range plan "ns_a_slot"', "1.50 to 2.00"),
    "range of one": ("plan range plan ns_a_slot slots=8", "2.00"),
    "median": ("plan range plan median", "1.23 ms"),
    "match": ("demo match 'per byte +([0-9.]+)'", "2.358"),
    "machine": ("layers machine", "Some GPU, driver 600.1"),
    "command": ("layers command", "`moekern bench --shape all"),
    "summary": ("layers summary", "Forward: 0."),
    "table": ("plan table plan", "| 8 | 1.23 ms"),
    "columns": ("kernels columns 'moekern: forward' plan", "| shape | forward | ms | ms |\n"),
    "grid": ("layers grid", "| E | K | T | H | I | verb | time | TFLOP/s | GB/s | of ceiling | dense |"),
    "shapes": ("layers shapes", "| shape | verb |"),
    "series": ("layers series experts", "| qwen3-30b-a3b | 128 | forward |"),
    "memory": ("layers memory", "| qwen3-30b-a3b | bf16 | forward+backward | moekern | 940 MB |"),
}


@pytest.mark.parametrize(("words", "shown"), VIEWS.values(), ids=VIEWS)
def test_views(root: Path, words: str, shown: str) -> None:
    text = f"Before <!-- figures:{words} -->stale<!-- /figures --> after"
    made = figures.filled(text, root / "benches/results")
    assert shown in made
    assert "stale" not in made
    assert figures.filled(made, root / "benches/results") == made


def test_wide(root: Path) -> None:
    made = figures.filled("<!-- figures:layers wide --><!-- /figures -->", root / "benches/results").splitlines()
    assert made[1].startswith("| shape | T, H, I, E, K | forward | of ceiling | fastest peer | forward+backward |")
    ours, best = (row_of("qwen3-30b-a3b", BOTH, name) for name in (MOEKERN, "sonicmoe"))
    cells = made[3].strip("| ").split(" | ")
    assert cells[:2] == ["qwen3-30b-a3b", "32768, 2048, 768, 128, 8"]
    assert cells[5:8] == [duration(ours.seconds), f"{ours.share:.2f}", f"{best.seconds / ours.seconds:.2f}x sonicmoe"]
    assert made[-2].startswith("| qwen3-decode-1 | 1, 2048, 768, 128, 8 |  |  |  |  |  |  | ")


def test_our_own_wrong_result_is_not_fast(root: Path) -> None:
    made = made_up()
    for row in made.rows:
        if row.implementation == MOEKERN:
            row.status = WRONG
    records.save(made, root / "benches/results/layers.json")
    for view in ("wide", "shapes"):
        text = figures.filled(f"<!-- figures:layers {view} --><!-- /figures -->", root / "benches/results")
        line = next(line for line in text.splitlines() if line.startswith("| mixtral-8x7b"))
        assert "ms (wrong) |" in line
        assert "x" not in line.removeprefix("| mixtral-8x7b")


def row_of(shape: str, verb: str, name: str) -> Row:
    rows = made_up().rows
    return next(r for r in rows if (r.shape, r.verb, r.implementation) == (shape, verb, name) and not r.sweep)


BAD = {
    "no record": ("a <!-- figures:nothing shapes --><!-- /figures -->", "No such file"),
    "no view": ("a <!-- figures:layers --><!-- /figures -->", "no view is named"),
    "unknown view": (
        "a <!-- figures:layers pie --><!-- /figures -->",
        "got the view pie, expected one of shapes",
    ),
    "view of another form": ("a <!-- figures:plan wide --><!-- /figures -->", "has no view wide"),
    "unknown group": ("a <!-- figures:plan table sort --><!-- /figures -->", "sort"),
    "nothing matches": ("a <!-- figures:demo match 'loss (.*)' --><!-- /figures -->", "demo.md has nothing like loss"),
    "not closed": ("a <!-- figures:plan table plan -->", "lacks its end"),
    "starts a line": ("a\n<!-- figures:layers machine --><!-- /figures -->", "starts a line"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_blocks(root: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.filled(text, root / "benches/results", "README.md")


def test_unknown_record(root: Path) -> None:
    (root / "benches/results/odd.json").write_text("{}")
    with pytest.raises(ValueError, match=r"odd.json: no record of moekern bench"):
        figures.main([], root)


def test_check_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--check"], root) == 1
    assert "benches/results/plan.md is not what its records give" in capsys.readouterr().out
    assert not (root / "benches/results/plan.md").exists()
    assert figures.main([], root) == 0
    capsys.readouterr()
    assert figures.main(["--check"], root) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [(2.5, "2.50 s"), (0.0123456, "12.3 ms"), (5.55e-6, "5.55 µs"), (4.2e-10, "0.420 ns"), (0.9999, "1000 ms")],
)
def test_duration(seconds: float, printed: str) -> None:
    assert duration(seconds) == printed
