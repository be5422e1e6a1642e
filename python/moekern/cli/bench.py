"""`moekern bench`: the speed of the layer here, against its peers and against the best that the machine could do."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moekern.bench import shapes
from moekern.bench.peers import PEERS
from moekern.bench.peers import chosen as chosen_peers
from moekern.bench.record import BOTH, DECODE, FORWARD, Record, Row, load, save
from moekern.bench.routing import ROUTINGS
from moekern.bench.table import LEGEND, tables
from moekern.cli import HelpFormat
from moekern.cli.console import Console
from moekern.cli.demo import check_writable, whole_number

if TYPE_CHECKING:
    from moekern.bench.cases import Options
    from moekern.cli import Subparsers

VERBS = {"forward": FORWARD, "both": BOTH, "decode": DECODE}
DTYPES = ("bf16", "fp16", "fp32")
SWEEPS = ("tokens", "experts", "top_k")
SECONDS = {"cuda": 0.3, "cpu": 0.8}
MINUTES = {"cuda": 7.0, "cpu": 5.0}

EXAMPLES = """\
examples:
  moekern bench                                      usual shapes and peers, in about two minutes
  moekern bench --quick                              one small shape, in seconds; half a minute with --report
  moekern bench --shape olmoe-1b-7b --shape mixtral-8x7b --routing zipf
  moekern bench --thiek 4096,2048,1024,64,8          your own layer: tokens, hidden, intermediate, experts, top-k
  moekern bench --peers grouped_mm,transformers      only these peers; "all" includes those that tune for minutes
  moekern bench --json new.json --report new.html    keep the figures; a page with charts and scaling
  moekern bench --compare old.json                   measure again and show what became faster or slower
  moekern bench --from new.json --compare old.json   compare two files without measuring; --report works too

shapes: {shapes}

peers:
{peers}

Every implementation is first checked against float32: a wrong result is shown as WRONG, not as fast. Then they run
alternately, each directly after the ceiling. On a GPU the ceiling is cuBLAS doing dense matrix products of the same
FLOPs (for decode, a copy of as many bytes). On a CPU it is the larger of two times: that of torch's dense matmul, and
that of reading the weights. "of ceiling" 1.00 means: no kernel can do much better here. Small shapes can pass it, where
the ceiling's own products are too small to run well. GPU times are taken with a swept L2 cache; decode runs in a CUDA
graph over several sets of weights, one after the other.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure the layer against its peers and against the machine's limit",
        description="Measure the experts' forward and backward pass, and compare it with other implementations and "
        "with the machine's limit.",
        epilog=EXAMPLES.format(shapes=", ".join(shapes.SHAPES), peers=peer_list()),
        formatter_class=HelpFormat,
    )

    def several(option: str, text: str) -> None:
        parser.add_argument(option, action="append", type=names, metavar="NAME", help=text)

    several("--shape", "named sizes, or all of this device; repeat the option, or use commas, for more")
    parser.add_argument("--thiek", action="append", metavar="T,H,I,E,K", help="sizes of your own; repeat for more")
    several("--peers", "names, usual, all or none (default: usual)")
    several("--routing", f"{', '.join(ROUTINGS)} (default: uniform)")
    several("--dtype", f"{', '.join(DTYPES)} (default: bf16, but fp32 on CPUs without bfloat16 units)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    several("--verbs", f"{', '.join(VERBS)} (default: decode for decode shapes, forward and both for others)")
    parser.add_argument("--threads", type=whole_number(1, 4096), metavar="N", help="CPU threads (default: as torch)")
    several(
        "--sweep", f"vary {', '.join(SWEEPS)} of the first shape, or none (default: all three with --report, else none)"
    )
    parser.add_argument("--quick", action="store_true", help="one small shape unless you name others, short timing and "
                        "three sizes per series")  # fmt: skip
    parser.add_argument("--minutes", type=positive, metavar="M", help="start no case after this many minutes "
                        f"(default: {MINUTES['cuda']:g} on a GPU, {MINUTES['cpu']:g} on a CPU)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the figures, for --compare and for programs")
    parser.add_argument("--report", metavar="FILE.html", help="write one page with charts")
    parser.add_argument("--compare", metavar="OLD.json", help="measure the same again and report what changed; "
                        "exit code 1 if moekern became slower or wrong")  # fmt: skip
    parser.add_argument("--from", dest="source", metavar="FILE.json", help="measure nothing: take the figures of this "
                        "file, for the table, for --report and for --compare")  # fmt: skip
    parser.set_defaults(run=run)


def peer_list() -> str:
    """One line per peer: its name and description."""
    width = max(map(len, PEERS))
    return "\n".join(f"  {name:{width}}  {peer.about}" for name, peer in PEERS.items())


def names(text: str) -> list[str]:
    """The items of a list with commas, without empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def run(args: argparse.Namespace) -> int:
    from moekern.bench.compare import compare
    from moekern.bench.report import render

    old = load(args.compare) if args.compare else None
    options = options_of(args, old) if args.source is None else None
    for option, path in (("--json", args.json), ("--report", args.report)):
        if path is not None:
            check_writable(option, Path(path))
    console = Console(highlight=False)
    if options is None:
        record = of_file(args, console)
    else:
        threads = torch.get_num_threads()
        if args.threads:
            torch.set_num_threads(args.threads)
        try:
            record = measured(options, console, command_line(), args.json)
        finally:
            torch.set_num_threads(threads)
    if args.json:
        save(record, args.json)
        console.print(f"figures: {escape(args.json)}", soft_wrap=True)
    if args.report:
        Path(args.report).write_text(render(record), encoding="utf-8")
        console.print(f"report: {escape(args.report)}", soft_wrap=True)
    if old is None:
        return 0
    comparison = compare(old, record)
    console.print(f"\nagainst {escape(args.compare)}, of {old.made[:16]}:\n{escape(comparison.text())}", soft_wrap=True)
    return 1 if comparison.regressed else 0


def options_of(args: argparse.Namespace, old: Record | None = None) -> Options:
    """The choices of the run; an old record supplies those that are not given.

    Raises:
        ValueError: An argument is wrong; the message names it and says what is accepted.
    """
    from moekern.bench.cases import Options

    rows = [] if old is None else [row for row in old.rows if row.sweep is None]
    before = dict.fromkeys(row.device for row in rows)
    device = device_of(next(iter(before), "auto") if args.device == "auto" else args.device)
    chosen = shapes.chosen(flat(args.shape), device) + [shapes.parse_thiek(text) for text in args.thiek or ()]
    named = bool(chosen)
    if not chosen and rows:
        chosen = list(dict.fromkeys(
            shapes.Shape(r.shape, r.tokens, r.hidden, r.intermediate, r.experts, r.top_k) for r in rows
        ))  # fmt: skip
    if not chosen:
        chosen = shapes.chosen((shapes.QUICK if args.quick else shapes.USUAL)[device], device)
    implementations = dict.fromkeys(row.implementation for row in rows if row.seconds is not None)
    known = [name for name in implementations if name in PEERS]
    sweeps = flat(args.sweep) or (list(SWEEPS) if args.report else ["none"])
    sweeps = [] if sweeps == ["none"] else checked("--sweep", sweeps, SWEEPS)
    swept = next((shape for shape in chosen if named and not shape.decode), shapes.SHAPES[shapes.SWEPT[device]])
    dtypes = flat(args.dtype) or list(dict.fromkeys(row.dtype for row in rows)) or [usual_dtype(device)]
    routings = flat(args.routing) or list(dict.fromkeys(row.routing for row in rows)) or ["uniform"]
    return Options(
        shapes=tuple(chosen),
        peers=tuple(chosen_peers(flat(args.peers) or (known or ["none"] if rows else ["usual"]), device)),
        device=device,
        dtypes=tuple(checked("--dtype", dtypes, DTYPES)),
        routings=tuple(checked("--routing", routings, tuple(ROUTINGS))),
        verbs=tuple(VERBS[verb] for verb in checked("--verbs", flat(args.verbs), tuple(VERBS))),
        sweeps=tuple(sweeps),
        swept=(swept,),
        coarse=args.quick,
        seconds=SECONDS[device] / (8 if args.quick else 1),
        minutes=args.minutes or MINUTES[device],
        named=frozenset(flat(args.peers)),
    )


def flat(lists: Sequence[Sequence[str]] | None) -> list[str]:
    """The values of one option, which may be repeated and may have commas."""
    return [name for each in lists or () for name in each]


def checked(option: str, given: list[str], accepted: Sequence[str]) -> list[str]:
    for name in given:
        if name not in accepted:
            raise ValueError(f"{option}: got {name!r}, expected of {', '.join(accepted)}")
    return list(dict.fromkeys(given))


def device_of(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got 'cuda', but torch finds no usable GPU here; moekern doctor says why")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def usual_dtype(device: str) -> str:
    """bf16, but fp32 on CPUs without bfloat16 units, where all peers would be slow in bf16."""
    from moekern import _core

    return "bf16" if device == "cuda" or _core.cpu_isa() == "avx512bf16" else "fp32"


def command_line() -> str:
    """The command as it was typed, with the program's name in place of its path."""
    return shlex.join(["moekern", *sys.argv[1:]])


def measured(options: Options, console: Console, command: str, path: str | None) -> Record:
    """Measure, show each table as soon as it is complete, and write the record to `path` after each case."""
    from moekern.bench.apart import session_of
    from moekern.bench.cases import cases

    made = datetime.now(UTC).isoformat(timespec="seconds")
    steps = sum(case.steps for case in cases(options))
    with progress_of(console, steps) as tick, session_of(options, tick) as session:
        machine = session.machine
        where = f"{machine.gpu}, driver {machine.driver}, CUDA {machine.cuda}" if machine.gpu else (
            f"{machine.cpu}, {machine.cpu_threads} threads, {machine.isa}"
        )  # fmt: skip
        console.print(f"{escape(where)}, torch {machine.torch}, moekern {machine.moekern}", soft_wrap=True)
        console.print(f"memory: {machine.copy_gbps:.0f} GB/s in a copy, bytes read and written\n")
        record = Record(made, command, machine)
        for rows in session.run():
            record.rows += rows
            show(rows, console)
            if path:  # after each case, since a long run may be cut short
                save(record, path)
    console.print(LEGEND, soft_wrap=True)
    return record


def of_file(args: argparse.Namespace, console: Console) -> Record:
    """Show the record that --from names as if it had just been measured.

    Raises:
        OSError, ValueError: The file cannot be read, or an option that chooses measurements is given.
    """
    measuring = ("shape", "thiek", "peers", "routing", "dtype", "verbs", "threads", "sweep", "quick", "minutes")
    for option in measuring:
        if getattr(args, option):
            raise ValueError(f"--from: measures nothing, but --{option} says what to measure")
    record = load(args.source)
    show(record.rows, console)
    console.print(LEGEND, soft_wrap=True)
    return record


def show(rows: list[Row], console: Console) -> None:
    """Tables of some rows."""
    for each in tables(rows):
        console.print(each, soft_wrap=isinstance(each, str))
    console.print()


@contextmanager
def progress_of(console: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar that advances one step per call; the call names the work."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps)

        def tick(text: str) -> None:
            progress.update(task, description=escape(text), advance=1)

        yield tick
