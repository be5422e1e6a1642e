"""`moekern demo`: trains a dense and an MoE model side by side on real text. Options, progress, table, report."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from moekern.cli import HelpFormat, Subparsers
from moekern.cli.console import Console
from moekern.demo.model import HEAD_WIDTH, Shape
from moekern.demo.report import render
from moekern.demo.summary import details, headline, table_rows
from moekern.demo.text import Corpus, load_corpus
from moekern.demo.train import EXPECTED_STEPS, Options, Result, Trainer, steps_that_fit, train
from moekern.report import machine

EXAMPLES = """\
examples:
  moekern demo                                   the standard library's sources, at most three minutes on two cores
  moekern demo --steps 60                        a first look in half a minute
  moekern demo --text ~/novels --seed 1          your own text (a file, or a folder and all text files in it)
  moekern demo --experts 64 --top-k 4            more and smaller experts; the active compute stays the same
  moekern demo --device cuda --width 512 --layers 8 --context 512 --batch 32 --steps 3000

Both models see the same batches. An expert is dense width / top-k wide, so a token costs the same in both. The MoE
model adds its router, and the parameters that a token does not use. All numbers in the table and in the report come
from the run itself.
"""
LARGEST_SEED = 2**63 - 1


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train a dense and an MoE language model on the same real text and compare them",
        description="Train two small byte-level transformers on real text, one with dense MLPs, one with moekern.MoE "
        "at the same active compute per token, and compare them.",
        epilog=EXAMPLES,
        formatter_class=HelpFormat,
    )
    parser.add_argument("--text", metavar="PATH", help="a text file, or a folder of them (default: the Python library)")
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        help=f"training steps of each model (default: {EXPECTED_STEPS}, or as many as fit into about 2.5 minutes)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=whole_number(0, LARGEST_SEED), default=0, help="seed of weights and batches")
    parser.add_argument("--experts", type=whole_number(1, 4096), default=Shape.experts, help="experts per layer")
    parser.add_argument("--top-k", type=whole_number(1), default=Shape.top_k, help="experts that each token uses")
    parser.add_argument(
        "--width", type=whole_number(1), default=Shape.width, help=f"width of the models, a multiple of {HEAD_WIDTH}"
    )
    parser.add_argument("--layers", type=whole_number(1), default=Shape.layers, help="transformer blocks")
    parser.add_argument("--context", type=whole_number(2), default=Shape.context, help="bytes that a model looks at")
    parser.add_argument("--batch", type=whole_number(1), default=Options.batch, help="windows of text per step")
    parser.add_argument("--report", metavar="PATH", default="moekern-report.html", help="HTML file to write")
    parser.add_argument("--json", metavar="PATH", help="also write all numbers as JSON")
    parser.set_defaults(run=run)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    accepted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {accepted}")
        return value

    return parse


def run(args: argparse.Namespace) -> int:
    options = checked_options(args)
    for option, path in (("--report", args.report), ("--json", args.json)):
        if path is not None:
            check_writable(option, Path(path))
    corpus = load_corpus(args.text, args.context)
    console = Console(highlight=False)
    settings = describe(corpus, options)
    for name in ("text", "models", "computed on"):
        console.print(f"[dim]{name + ':':<13}[/]{escape(settings[name])}", soft_wrap=True)
    for note in corpus.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    result = experiment(corpus, options, console)
    settings["steps"] = f"{result.steps} of {result.tokens_per_step:,} bytes each"
    show(result, console)
    Path(args.report).write_text(render(result, settings), encoding="utf-8")
    console.print(f"report: {escape(str(Path(args.report)))}", soft_wrap=True)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"result": asdict(result), "settings": settings}, indent=2), encoding="utf-8"
        )
        console.print(f"numbers: {escape(str(Path(args.json)))}", soft_wrap=True)
    return 0


def checked_options(args: argparse.Namespace) -> Options:
    """The options, after all checks."""
    if args.top_k > args.experts:
        raise ValueError(f"--top-k: got {args.top_k}, expected at most --experts ({args.experts})")
    if args.width % HEAD_WIDTH:
        raise ValueError(f"--width: got {args.width}, expected a multiple of {HEAD_WIDTH}")
    shape = Shape(args.width, args.layers, args.context, args.experts, args.top_k)
    return Options(shape, args.batch, args.steps, seed=args.seed, device=checked_device(args.device))


def checked_device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device: got {name!r}, but torch finds no usable GPU here; moekern doctor says why")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device: got {name!r}, but there are only {torch.cuda.device_count()} GPUs")
    return name


def check_writable(option: str, path: Path) -> None:
    """Check that the file can be written, before minutes of training. Leaves no file behind."""
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"{option}: got {path}, a folder; expected a file to write")
    if not folder.is_dir():
        raise ValueError(f"{option}: got {path}, but the folder {folder} does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{option}: got {path}, which cannot be written")


def describe(corpus: Corpus, options: Options) -> dict[str, str]:
    """The settings for the head of the output and for the report's box about the run."""
    shape = options.shape
    sizes = f"{shape.layers} layers, width {shape.width}, context {shape.context}"
    return {
        "text": f"{corpus.source}: {megabytes(corpus.train)} to train on ({counted(corpus.train_files, 'file')}), "
        f"{megabytes(corpus.validation)} to validate ({counted(corpus.validation_files, 'file')})",
        "models": f"{sizes}; a dense MLP of width {shape.mlp_width}, "
        f"or {shape.experts} experts of width {shape.expert_width}, top-{shape.top_k}",
        "computed on": f"{machine.device_name(options.device)}, torch {torch.__version__}",
        "seed": str(options.seed),
        "command": shlex.join(["moekern", *sys.argv[1:]]) if sys.argv[1:2] == ["demo"] else "moekern demo",
    }


def megabytes(text: torch.Tensor) -> str:
    return f"{len(text) / 1e6:.2f} MB"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def experiment(corpus: Corpus, options: Options, console: Console) -> Result:
    """Train with a progress bar on a terminal, and with one line per evaluation everywhere."""
    steps = options.steps
    if steps is None:
        with console.status("measuring the time of a step"):
            steps = steps_that_fit(corpus, options)
        if steps < EXPECTED_STEPS:
            console.print(
                f"[yellow]note:[/] {steps} steps instead of {EXPECTED_STEPS}, as many as this machine, under its "
                f"present load, does in about {options.seconds / 60:.1f} minutes; --steps sets another number",
                soft_wrap=True,
            )
    latest: dict[str, float] = {}
    with progress_bar(console, 2 * steps) as (progress, task):

        def on_step(trainer: Trainer) -> None:
            progress.advance(task)

        def on_evaluation(trainer: Trainer) -> None:
            latest[trainer.name] = trainer.history[-1].bits_per_byte
            scores = "   ".join(f"{name} {bits:.3f}" for name, bits in latest.items())
            progress.update(task, description=scores)
            if trainer.name == "MoE":
                progress.console.print(f"step {trainer.history[-1].step:>5}   {scores}   bits per byte")

        return train(corpus, options, steps, on_step, on_evaluation)


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task("", total=total)


def show(result: Result, console: Console) -> None:
    table = Table(title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    table.add_column("dense", justify="right", header_style="bold blue")
    table.add_column("MoE", justify="right", header_style="bold dark_orange")
    for what, dense, moe in table_rows(result):
        table.add_row(what, dense, moe, style="bold" if "bits" in what else "")
    console.print()
    console.print(table)
    console.print()
    console.print(f"[bold]{headline(result)}[/]", soft_wrap=True)
    for line in details(result):
        console.print(line, soft_wrap=True)
    console.print()
    console.print("share of validation tokens per expert, in per cent:")
    for number, shares in enumerate(result.load, start=1):
        console.print(f"  layer {number}: " + " ".join(f"{100 * share:4.1f}" for share in shares), soft_wrap=True)
    console.print()
