"""The command line: help that teaches, errors on one line, exit codes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moekern
from moekern import cli
from moekern.backends.cuda.build import sources
from moekern.cli import bench, demo

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs a command line in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEKERN_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_without_a_command_the_help_is_shown(call: Call) -> None:
    code, out, _ = call()
    assert code == 2
    assert "moekern demo" in out


# A module whose command would hide a builtin carries a suffix: `moekern compile` is in compile_command.
NAMES = [module.rpartition(".")[2].removesuffix("_command") for module in cli.COMMANDS]


def test_help_lists_every_command_with_examples(call: Call) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert "examples:" in out
    for command in NAMES:
        assert f"\n    {command} " in out


@pytest.mark.parametrize("command", NAMES)
def test_help_of_a_command_has_examples(call: Call, command: str) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert "examples:" in out
    assert f"  moekern {command}" in out


def test_help_says_defaults(call: Call) -> None:
    _, out, _ = call("demo", "--help")
    assert "per layer (default: 16)" in out
    assert "(default: None)" not in out


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"moekern {moekern.__version__}\n", "")


BAD_INPUT = {
    "unknown command": (["dance"], "argument COMMAND: invalid choice: 'dance'"),
    "unknown option": (["demo", "--stepz", "3"], "unknown arguments: --stepz 3"),
    "stray argument": (["demo", "novel.txt"], "unknown arguments: novel.txt"),
    "no steps": (["demo", "--steps", "0"], "argument --steps: got '0', expected a whole number of at least 1"),
    "negative steps": (["demo", "--steps=-5"], "--steps: got '-5'"),
    "steps not a number": (["demo", "--steps", "many"], "--steps: got 'many', expected a whole number"),
    "fractional steps": (["demo", "--steps", "1.5"], "--steps: got '1.5'"),
    "steps without value": (["demo", "--steps"], "argument --steps: expected one argument"),
    "seed negative": (["demo", "--seed=-1"], "--seed: got '-1', expected a whole number from 0 to"),
    "seed too large": (["demo", "--seed", str(2**63)], "--seed: got '9223372036854775808'"),
    "seed not a number": (["demo", "--seed", "x"], "--seed: got 'x'"),
    "no experts": (["demo", "--experts", "0"], "--experts: got '0'"),
    "no top-k": (["demo", "--top-k", "0"], "--top-k: got '0'"),
    "top-k above experts": (
        ["demo", "--experts", "4", "--top-k", "5"],
        "--top-k: got 5, expected at most --experts (4)",
    ),
    "width": (["demo", "--width", "100"], "--width: got 100, expected a multiple of 32"),
    "no layers": (["demo", "--layers", "0"], "--layers: got '0'"),
    "context of one": (["demo", "--context", "1"], "--context: got '1', expected a whole number of at least 2"),
    "no batch": (["demo", "--batch", "0"], "--batch: got '0'"),
    "unknown device": (["demo", "--device", "abacus"], "--device: got 'abacus', expected cpu, cuda or cuda:N"),
    "unserved device": (["demo", "--device", "meta"], "--device: got 'meta', expected cpu, cuda or cuda:N"),
    "missing text": (
        ["demo", "--text", "nowhere.txt"],
        "--text: cannot read nowhere.txt: No such file or directory; a text file or",
    ),
    "empty text": (["demo", "--text", "empty.txt"], "--text: empty.txt is empty"),
    "binary text": (["demo", "--text", "binary.bin"], "--text: binary.bin looks binary"),
    "short text": (["demo", "--text", "short.txt"], "--text: short.txt leaves"),
    "folder without text": (["demo", "--text", "hollow"], "--text: no text files found in hollow"),
    "text below a file": (["demo", "--text", "short.txt/x"], "--text: cannot read short.txt/x: Not a directory"),
    "text is a device": (["demo", "--text", os.devnull], "is neither a regular file nor a folder"),
    "report is a folder": (["demo", "--report", "hollow"], "--report: got hollow, a folder; expected a file"),
    "report nowhere": (
        ["demo", "--report", "no/where.html"],
        "--report: got no/where.html, but the folder no does not",
    ),
    "json nowhere": (["demo", "--json", "no/where.json"], "--json: got no/where.json"),
    "doctor option": (["doctor", "--jason"], "unknown arguments: --jason"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(call: Call, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.bin").write_bytes(b"MZ\0\1" * 4000)
    (tmp_path / "short.txt").write_text("too short for a window of context")
    (tmp_path / "hollow").mkdir()
    arguments, message = BAD_INPUT[name]
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    command = arguments[0] if arguments[0] in ("demo", "doctor") else ""
    assert err.startswith(f"moekern {command}".strip() + ": error: ")
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary.bin", "empty.txt", "hollow", "short.txt"]


def test_unreadable_text(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked.txt"
    locked.write_text("secret " * 1000)
    if os.access(locked, os.R_OK) and os.geteuid() == 0:  # permissions do not stop root

        def refuse(path: Path, mode: str) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
    else:
        locked.chmod(0)
    code, out, err = call("demo", "--text", "locked.txt")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "moekern demo: error: --text: cannot read locked.txt: Permission denied" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(call: Call) -> None:
    code, _, err = call("demo", "--device", "cuda")
    assert code == 2
    assert "--device: got 'cuda', but torch finds no usable GPU here; moekern doctor says why" in err


def test_debug_shows_the_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="cannot read nowhere"):
        cli.main(["demo", "--text", "nowhere.txt"])


def test_messages_of_many_lines_become_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str | None, context: int) -> None:
        raise ValueError("first\n  second\n\tthird")

    monkeypatch.setattr(demo, "load_corpus", fail)
    assert call("demo") == (2, "", "moekern demo: error: first second third\n")


def test_interrupt(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: str | None, context: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_corpus", interrupt)
    code, _, err = call("demo")
    assert code == 130
    assert err.strip() == "moekern demo: interrupted"


SMALL_DEMO = "--device cpu --steps 2 --layers 1 --width 32 --experts 2 --top-k 1 --context 8 --batch 2"
SMALL_BENCH = "--device cpu --quick --peers none --thiek 4,32,32,2,1 --verbs forward"
PRINTING = {
    "demo": f"demo {SMALL_DEMO}",
    "doctor": "doctor",
    "doctor --json": "doctor --json",
    "bench": f"bench {SMALL_BENCH}",
    "compile": "compile",
    "help": "--help",
}
# Compiles nothing, since that takes minutes, and reports so.
COMPILE_NOTHING = (
    "import sys; from moekern import cli; from moekern.backends.cuda.build import loader, variants; "
    "loader.check, variants.usual = lambda arch: None, list; sys.exit(cli.main())"
)


@pytest.mark.parametrize("name", PRINTING)
def test_a_reader_that_leaves(name: str, tmp_path: Path) -> None:
    """`moekern demo | head -1`: no traceback when nobody reads, and no failure either."""
    assert {command.split()[0] for command in PRINTING.values()} == {*NAMES, "--help"}
    reader, writer = os.pipe()
    os.close(reader)
    program = ["-c", COMPILE_NOTHING] if name == "compile" else ["-m", "moekern"]
    process = subprocess.run(
        [sys.executable, *program, *PRINTING[name].split()],
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    os.close(writer)
    assert process.returncode == 0
    assert "Traceback" not in process.stderr
    assert "BrokenPipe" not in process.stderr


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_cuda_sources_that_are_nowhere(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """As on a GPU, which compiles the first kernel in the middle of the run."""

    def look(*_: object) -> None:
        sources.cuda_directory()

    monkeypatch.setenv("MOEKERN_CUDA_DIR", str(tmp_path))
    monkeypatch.setattr(*{"demo": (demo, "load_corpus"), "bench": (bench, "measured")}[command], look)
    code, _, err = call(command)
    assert code == 2
    assert err.startswith(f"moekern {command}: error: the CUDA sources are not in {tmp_path}; ")
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes the streams")
@pytest.mark.parametrize(
    ("arguments", "how"),
    [("doctor --json", ">&-"), *(("--help", how) for how in (">&- 2>&- <&-", ">/dev/full", "| true"))],
)
def test_streams_that_are_closed_full_or_gone(arguments: str, how: str) -> None:
    command = f"{sys.executable} -m moekern {arguments} {how}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("\n") <= 1
    if "full" not in how:
        assert done.returncode == 0
