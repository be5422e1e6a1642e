"""`make suites` on made-up suites: moekern is forced and counted, and what fails with it only is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

RUN = Path(__file__).parents[1] / "suites" / "run.py"

MIXED = """
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import transformers

SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
TOKENS = torch.arange(6).reshape(2, 3)


def mixtral(**options):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **options)).eval()


def in_another_process():
    model = mixtral()
    model(TOKENS)
    if "SUITES_CALLS" in os.environ:
        assert model.config._experts_implementation == "moekern"


def test_same_as_eager():
    model = mixtral()
    logits = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        logits[name] = model(TOKENS).logits
        torch.testing.assert_close(logits[name], logits["eager"])


def test_llama4():
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**SIZES, intermediate_size_mlp=8)).eval()
    before = os.path.getsize(os.environ["SUITES_CALLS"])
    model(TOKENS)
    assert os.path.getsize(os.environ["SUITES_CALLS"]) == before + 1


def test_spawned():
    before = os.path.getsize(os.environ["SUITES_CALLS"])
    process = multiprocessing.get_context("spawn").Process(target=in_another_process)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert os.path.getsize(os.environ["SUITES_CALLS"]) == before + 1


@pytest.mark.skip
def test_skipped():
    pass


def test_fails_either_way():
    assert mixtral()(TOKENS).logits.isnan().all()


def test_fails_with_moekern():
    assert mixtral().config._experts_implementation == "grouped_mm"


def test_fails_at_first():
    tried = Path(__file__).with_suffix(".tried")
    if not tried.exists():
        tried.touch()
        pytest.fail("the first time")
"""
QUIET = "def test_without_experts():\n    pass\n"
SKIPPED = "import pytest\n\n\n@pytest.mark.skip\ndef test_slow():\n    pass\n"
LOST = "import os\n\n\ndef test_exit():\n    os._exit(3)\n\n\ndef test_later():\n    pass\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What looks like a checkout of transformers with four models."""
    root = tmp_path / "source"
    for name, text in (("mixed", MIXED), ("quiet", QUIET), ("skipped", SKIPPED), ("lost", LOST)):
        model = root / "src" / "transformers" / "models" / name
        model.mkdir(parents=True)
        (model / f"modeling_{name}.py").write_text("@use_experts_implementation\nclass Experts: ...\n")
        tests = root / "tests" / "models" / name
        tests.mkdir(parents=True)
        (tests / f"test_modeling_{name}.py").write_text(text)
    return root


def run(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SUITES_"))}
    command = [sys.executable, str(RUN), "--suites", "transformers", "--source", str(source)]
    folder = ["--folder", str(source.parent / "kept")]
    return subprocess.run(
        [*command, *folder, *arguments], capture_output=True, text=True, env=environment, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_what_fails_with_moekern_only_is_found(source: Path) -> None:
    done = run(source, "--models", "all")
    assert done.returncode == 1, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith("transformers/")}
    # tests, passed, skipped, failed, also without, unsteady, moekern only, calls
    assert rows["transformers/mixed"][:-1] == ["7", "3", "1", "3", "1", "1", "1"]
    assert int(rows["transformers/mixed"][-1]) == 2 + 1 + 1 + 1
    assert rows["transformers/quiet"] == ["1", "1", "0", "0", "0", "0", "0", "0"]
    assert rows["transformers/lost"] == ["1", "0", "0", "1", "1", "0", "0", "0"]
    wrong = done.stdout.partition("wrong otherwise:")[2]
    assert "::test_fails_with_moekern\n    AssertionError" in wrong
    assert "::test_fails_at_first" not in wrong
    assert "::test_fails_either_way" not in wrong
    assert "transformers/quiet: no test called moekern" in wrong
    assert "transformers/skipped" not in wrong
    assert "transformers/lost: 1 tests were not run, since pytest was lost" in wrong


@pytest.mark.slow
def test_arguments_choose_tests(source: Path) -> None:
    done = run(source, "--models", "mixed", "--", "-k", "eager")
    assert done.returncode == 0, done.stderr
    assert "Nothing fails with moekern only." in done.stdout
    assert "1 of 1 tests, 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "mixed,nothing"], "--models: got 'nothing', expected all or some of lost, mixed, quiet, skipped"),
        (["--source", "nowhere"], "--source: got nowhere, which lacks tests/models or src/transformers"),
    ],
)
def test_bad_input_is_one_line(source: Path, arguments: list[str], message: str) -> None:
    done = run(source, *arguments)
    assert done.returncode == 2
    assert done.stderr == f"make suites: error: {message}\n"
