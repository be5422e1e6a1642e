"""The demo: text and its split, equal compute, training, and a report that shows the run's own numbers."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import moekern as mk
from moekern import cli
from moekern.demo import summary, train
from moekern.demo.model import Shape, build_dense, build_moe, parameter_counts
from moekern.demo.text import load_corpus, split_by_file, split_one
from moekern.demo.train import Balance, ModelResult, Options, Point, Result
from moekern.report import charts

TINY = Shape(width=32, layers=2, context=16, experts=4, top_k=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small text files, a copy of one, an empty one, a binary one, a hidden one and a cache."""
    root = tmp_path / "text"
    (root / "deep").mkdir(parents=True)
    (root / "__pycache__").mkdir()
    for number in range(40):
        place = root / ("deep" if number % 2 else ".") / f"{number:02}.txt"
        place.write_text("".join(f"file {number} line {line}\n" for line in range(20)))
    (root / "copy.txt").write_bytes((root / "00.txt").read_bytes())
    (root / "empty.txt").touch()
    (root / "image.png").write_bytes(b"\x89PNG\0\0\1\2" * 100)
    (root / ".hidden").write_text("hidden " * 1000)
    (root / "__pycache__" / "module.txt").write_text("cache " * 1000)
    return root


def file_numbers(text: torch.Tensor) -> set[int]:
    return {int(number) for number in re.findall(rb"file (\d+) ", bytes(text.tolist()))}


def test_text_is_split_by_file(folder: Path) -> None:
    corpus = load_corpus(str(folder), context=16)
    train, validation = file_numbers(corpus.train), file_numbers(corpus.validation)
    assert not train & validation
    assert train | validation == set(range(40))
    assert (len(train), len(validation)) == (corpus.train_files, corpus.validation_files) == (36, 4)
    assert corpus.notes == (f"1 binary files under {folder} were left out",)


def test_split_depends_on_contents_only(folder: Path, tmp_path: Path) -> None:
    before = load_corpus(str(folder), context=16)
    moved = folder.rename(tmp_path / "elsewhere")
    for number, path in enumerate(sorted(moved.rglob("*.txt"))):
        path.rename(path.with_name(f"renamed-{99 - number}.txt"))
    after = load_corpus(str(moved), context=16)
    assert file_numbers(after.validation) == file_numbers(before.validation)


def test_split_of_few_files_leaves_none_empty() -> None:
    large, small = b"a" * 1000, b"b" * 900
    assert split_by_file([large, small]) == ([large], [small])


def test_split_of_one_file_keeps_its_order(tmp_path: Path) -> None:
    data = bytes(range(1, 251)) * 4
    assert split_one(data) == ([data[:900]], [data[900:]])
    path = tmp_path / "one.txt"
    path.write_bytes(data)
    corpus = load_corpus(str(path), context=16)
    assert (len(corpus.train), len(corpus.validation), corpus.train_files) == (900, 100, 1)


def test_default_text_is_the_standard_library() -> None:
    corpus = load_corpus(None, context=128)
    assert corpus.source == "Python standard library"
    assert len(corpus.train) > 2_000_000
    assert 0.08 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.11
    assert b"import " in bytes(corpus.train[:100_000].tolist())


def test_targets_are_the_next_bytes(folder: Path) -> None:
    corpus = load_corpus(str(folder), context=16)
    inputs, targets = corpus.batch(5, 16, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (5, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    stream = bytes(corpus.train.tolist())
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert bytes([*row, target[-1]]) in stream


def test_validation_windows_do_not_overlap_and_reach_the_end(folder: Path) -> None:
    corpus = load_corpus(str(folder), context=16)
    places = replace(corpus, validation=torch.arange(170).to(torch.uint8))
    inputs, targets = places.validation_windows(1000, 16)
    starts = inputs[:, 0].tolist()
    assert len(starts) == 10
    assert starts[0] == 0
    assert targets[-1, -1] == 169
    assert all(b - a >= 16 for a, b in pairwise(starts))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8])
def test_compute_per_token_is_equal(top_k: int) -> None:
    shape = replace(TINY, experts=8, top_k=top_k)
    assert shape.expert_width * top_k == shape.mlp_width
    dense, active_dense = parameter_counts(build_dense(shape, seed=0))
    moe, active_moe = parameter_counts(build_moe(shape, seed=0))
    router = shape.layers * shape.experts * shape.width
    one_expert = 3 * shape.width * shape.expert_width
    assert active_dense == dense
    assert active_moe == dense + router
    assert moe == active_moe + shape.layers * (shape.experts - top_k) * one_expert


def test_model_is_causal() -> None:
    model = build_dense(TINY, seed=0)
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


@pytest.fixture
def run_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moekern.demo.train.EVALUATION_WINDOWS", 32)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer\n" for n in range(400)))

    def run(*arguments: str) -> tuple[str, dict[str, dict[str, object]], str]:
        sizes = ["--width", "32", "--layers", "2", "--context", "16", "--batch", "4", "--experts", "4"]
        code = cli.main(["demo", "--text", "text.txt", "--json", "numbers.json", *sizes, *arguments])
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, "")
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        return captured.out, numbers, (tmp_path / "moekern-report.html").read_text(encoding="utf-8")

    return run


def test_console_report_and_json_show_the_same_numbers(run_demo) -> None:  # type: ignore[no-untyped-def]
    out, numbers, report = run_demo("--steps", "12")
    result = numbers["result"]
    embedded = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', report, re.DOTALL)[1])
    assert embedded == numbers
    for model in (result["dense"], result["moe"]):
        shown = (
            f"{model['parameters']:,}",
            f"{model['active_parameters']:,}",
            f"{model['tokens_per_second']:,.0f}",
            f"{model['seconds']:.1f}",
            f"{model['bits_per_byte']:.3f}",
        )
        for number in shown:
            assert re.search(rf"(^| ){re.escape(number)}( |$)", out, re.MULTILINE), number
            assert f"<td>{number}</td>" in report
        assert model["history"][-1]["step"] == result["steps"] == 12
        assert model["history"][-1]["bits_per_byte"] == model["bits_per_byte"]
        assert [point["seconds"] for point in model["history"]] == sorted(p["seconds"] for p in model["history"])
    assert abs(result["moe"]["bits_per_byte"] - result["dense"]["bits_per_byte"] - result["difference"]) < 1e-9
    assert len(result["load"]) == 2
    for layer in result["load"]:
        assert len(layer) == 4
        assert abs(sum(layer) - 1) < 1e-9
    worst = [max(layer) * 4 for layer in result["load"]]
    assert result["balance"][-1]["max_over_mean"] == pytest.approx(worst)
    assert f"{max(worst):.2f}" in out
    assert all(f"layer {n} {ratio:.2f}" in report for n, ratio in enumerate(worst, start=1))


def test_report_needs_nothing_else(run_demo) -> None:  # type: ignore[no-untyped-def]
    _, _, report = run_demo("--steps", "1")
    assert not re.search(r"https?:|src=|href=|@import|url\(|<link", report)
    drawings = re.findall(r"<svg.*?</svg>", report, re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ET.fromstring(drawing)
        assert "nan" not in drawing
    assert report.count('class="cell"') == 2 * 4


def test_training_learns_and_repeats_exactly(run_demo) -> None:  # type: ignore[no-untyped-def]
    def bits(numbers) -> list[float]:  # type: ignore[no-untyped-def]
        models = (numbers["result"]["dense"], numbers["result"]["moe"])
        return [point["bits_per_byte"] for model in models for point in model["history"]]

    first, again, other = (bits(run_demo("--steps", "30", "--seed", seed)[1]) for seed in "334")
    assert first == again
    assert first != other
    half = len(first) // 2
    for history in (first[:half], first[half:]):
        assert history[0] > 7.5
        assert history[-1] < 6.5


def test_number_of_steps_follows_the_time_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.demo.train.EVALUATION_WINDOWS", 8)
    corpus = load_corpus(str(folder), context=16)
    options = Options(TINY, batch=2)
    assert train.steps_that_fit(corpus, replace(options, seconds=1e6)) == train.EXPECTED_STEPS
    assert train.steps_that_fit(corpus, replace(options, seconds=0.0)) == 20


def test_divergence_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.demo.train.LEARNING_RATE", float("inf"))
    corpus = load_corpus(str(folder), context=16)
    trainer, _ = train.make_trainers(corpus, Options(TINY, batch=2), steps=5)
    trainer.step()  # the first loss is that of the initial weights
    with pytest.raises(ValueError, match="the dense model diverged"):
        trainer.step()


def test_load_is_counted_over_all_validation_tokens(folder: Path) -> None:
    corpus = load_corpus(str(folder), context=16)
    _, moe = train.make_trainers(corpus, Options(TINY, batch=2), steps=5)
    bits, load = moe.evaluate(40)
    assert bits.shape == (40,)
    assert load.sum(dim=1).tolist() == [40 * 16 * TINY.top_k] * 2
    assert all(isinstance(layer, mk.MoE) for layer in moe.layers)


def made_up(dense: float, moe: float, error: float = 0.01) -> Result:
    def model(name: str, final: float, speed: float) -> ModelResult:
        history = (Point(0, 0.0, 8.0), Point(50, 50 / speed, 4.0), Point(100, 100 / speed, final))
        return ModelResult(name, 1000, 1000, 1e4 * speed, 100 / speed, final, history)

    return Result(
        steps=100,
        tokens_per_step=64,
        validation_bytes=4096,
        dense=model("dense", dense, 10.0),
        moe=model("MoE", moe, 5.0),
        difference=moe - dense,
        difference_error=error,
        load=((0.25, 0.75), (0.5, 0.5)),
        balance=(Balance(0, (2.0, 2.0)), Balance(100, (1.5, 1.0))),
    )


@pytest.mark.parametrize(
    ("dense", "moe", "words"),
    [
        (3.0, 2.4, "The MoE model needs 0.600 ± 0.010 fewer bits per byte than the dense one (20.0 %)"),
        (2.4, 3.0, "The MoE model needs 0.600 ± 0.010 more bits per byte than the dense one (25.0 %)"),
        (3.0, 2.985, "No clear difference after 100 steps on the same batches: -0.015 ± 0.010 bits per byte"),
    ],
)
def test_headline_says_who_is_ahead(dense: float, moe: float, words: str) -> None:
    assert words in summary.headline(made_up(dense, moe))


def test_catching_up_is_read_off_the_curve() -> None:
    assert summary.catch_up(made_up(dense=3.0, moe=2.0)) == (
        "The MoE model reached the dense model's final 3.000 bits per byte after about 75 steps and 15 s; "
        "the dense model took 100 and 10 s."
    )
    assert summary.catch_up(made_up(dense=2.0, moe=3.0)).startswith("The dense model reached the MoE model's final")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 600), (2.31, 4.02), (0.001, 0.0013), (1, 1e6)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = charts.Axis(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)


def test_labels_keep_their_distance() -> None:
    bottom = charts.HEIGHT - charts.BOTTOM
    for wanted in ([100.0, 101.0, 99.0], [float(bottom)] * 4, [20.0, 200.0]):
        placed = charts.spread(wanted, gap=17)
        assert all(b - a >= 17 - 1e-9 for a, b in pairwise(sorted(placed)))
        assert max(placed) <= bottom
    assert charts.spread([20.0, 200.0], gap=17) == [20.0, 200.0]
