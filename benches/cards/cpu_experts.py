"""A grid over experts, tokens and dtypes of what `moekern bench` measures on a CPU, as one table.

    python benches/cards/cpu_experts.py [--experts 8,64,128] [--tokens 64,256,2048] [--dtypes bf16,fp32]
        [--passes forward,both] [--peers loop,grouped_mm] [--rounds 5] [--json FILE.json [--add]] [--out FILE.md]

H = 2048, I = 1024, SwiGLU, top-8 (top-2 with 8 experts), uniform routing, all threads. "of bound" is the share of the
ceiling of moekern.bench.ceiling; loop (transformers' own) and grouped_mm are in multiples of moekern's time. A round
runs each once; times are medians of the rounds. GB/s: memory read and, with the backward pass, written. --json writes
the record, from which `make figures` makes the page and the blocks `figures:NAME grid`. With --add an existing record
keeps its other cases, and measured cases replace theirs: a long grid can be made in short runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from moekern import _core
from moekern.bench.cases import Options
from moekern.bench.peers import PEERS
from moekern.bench.record import BOTH, FORWARD, MOEKERN, Record, Row, load, save
from moekern.bench.runner import Session
from moekern.bench.shapes import Shape
from moekern.report import machine

NAMES = {"loop": "transformers", "grouped_mm": "grouped_mm"}
VERBS = {"forward": FORWARD, "both": BOTH}


def shape_of(experts: int, tokens: int) -> Shape:
    return Shape(f"cpu-{experts}-{tokens}", tokens, 2048, 1024, experts, 2 if experts == 8 else 8)


def place(row: Row) -> tuple[str, int, int, str]:
    """The position of a row in the grid."""
    return row.dtype, row.experts, row.tokens, row.verb


def line(rows: dict[str, Row], session: Session) -> str:
    """One row of the table, for one verb; "-" for a peer without a time."""
    ours = rows[MOEKERN]
    if ours.seconds is None or ours.share is None or ours.tflops is None:
        raise SystemExit(f"moekern {ours.status}: {ours.reason}")
    peers = (rows[name].seconds if name in rows else None for name in NAMES.values())
    rates = [statistics.median(each) / 1e9 for each in session.memory.rates.values() if each]
    cells = [
        ours.verb, ours.dtype, ours.experts, ours.top_k, ours.tokens, f"{ours.tokens * ours.top_k / ours.experts:.0f}",
        f"{ours.seconds * 1e3:.1f}", f"{ours.tflops * 1e3:.0f}", f"**{ours.share:.2f}**",
        *("-" if seconds is None else f"{seconds / ours.seconds:.1f}x" for seconds in peers),
        " / ".join(f"{rate:.0f}" for rate in rates),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    parser.add_argument("--experts", type=numbers, default=[8, 64, 128])
    parser.add_argument("--tokens", type=numbers, default=[64, 256, 2048])
    parser.add_argument("--dtypes", type=words, default=["bf16", "fp32"])
    parser.add_argument("--passes", type=words, default=list(VERBS))
    parser.add_argument("--peers", type=words, default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)

    lines = [
        f"`python benches/cards/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        f"{machine.cpu_name()}, {torch.get_num_threads()} threads, {_core.cpu_isa()}, torch {torch.__version__}",
        "",
        "| pass | dtype | E | K | T | rows/E | ms | GFLOP/s | of bound | loop | grouped_mm | GB/s |",
        "|" + " --- |" * 12,
    ]
    print("\n".join(lines), flush=True)
    session = Session(Options(
        shapes=tuple(shape_of(experts, tokens) for experts in options.experts for tokens in options.tokens),
        peers=tuple(PEERS[NAMES[name]] for name in options.peers), device="cpu", dtypes=tuple(options.dtypes),
        verbs=tuple(VERBS[name] for name in options.passes), minutes=24 * 60, rounds=options.rounds,
    ))  # fmt: skip
    command = " ".join(["python benches/cards/cpu_experts.py", *(sys.argv[1:] if arguments is None else arguments)])
    record = Record(datetime.now(UTC).isoformat(timespec="seconds"), command, session.machine)
    if options.add and options.json and options.json.exists():
        before = load(options.json)
        record.rows, record.command = before.rows, f"{before.command} && {command}"
    for rows in session.run():
        measured = {row.case for row in rows}
        record.rows = sorted([*(row for row in record.rows if row.case not in measured), *rows], key=place)
        for verb in dict.fromkeys(row.verb for row in rows):
            lines.append(line({row.implementation: row for row in rows if row.verb == verb}, session))
            print(lines[-1], flush=True)
        if options.json:  # after every case, since a long run may be cut short
            save(record, options.json)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
