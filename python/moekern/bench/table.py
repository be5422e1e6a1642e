"""The rows of a benchmark as tables in the terminal."""

from __future__ import annotations

from itertools import groupby

from rich.markup import escape
from rich.table import Table

from moekern.bench.record import CEILING, DECODE, MOEKERN, OK, Row
from moekern.bench.units import duration, figure, size

LEGEND = (
    "[dim]✓: right within the rounding of the dtype, with the relative error against float32. ±: half of the middle "
    "half of the runs. of ceiling: the ceiling's time over this one's, median of pairs run together. × moekern: the "
    "time in multiples of moekern's.[/]"
)


def tables(rows: list[Row]) -> list[Table | str]:
    """For each verb of each problem: its sizes, a table of the timed ones, and lines for those not timed or wrong."""
    shown: list[Table | str] = []
    for _, group in groupby(rows, key=lambda row: row.case):
        members = list(group)
        timed = [row for row in members if row.seconds is not None]
        shown.append(heading(members[0]))
        if timed:
            shown.append(table(timed))
        remarks: dict[tuple[str, str], list[str]] = {}
        for row in members:
            if row.reason:
                remarks.setdefault((row.status, row.reason), []).append(row.implementation)
        for (status, reason), names in remarks.items():
            word = "note" if status == OK else status
            shown.append(f"  [dim]{word}:[/] {escape(', '.join(names))}: {escape(reason)}")
    return shown


def heading(row: Row) -> str:
    """The title of a table: verb, shape, sizes, routing."""
    return (
        f"[bold]{row.verb}, {escape(row.shape)}[/]: {row.tokens} tokens, hidden {row.hidden}, intermediate "
        f"{row.intermediate}, {row.top_k} of {row.experts} experts, {row.dtype}, {row.routing} routing"
    )


def table(rows: list[Row]) -> Table:
    """One line per implementation: the ceiling first, then moekern, then peers by their time."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    decode = rows[0].verb == DECODE
    unit = "GB/s" if decode else "TFLOP/s" if rows[0].device == "cuda" else "GFLOP/s"
    made.add_column("", min_width=19, no_wrap=True)
    made.add_column("result", no_wrap=True)
    saved = any(row.saved_bytes is not None for row in rows)
    for name in ("time", "±", unit, "of ceiling", "× moekern", *(["saved"] if saved else [])):
        made.add_column(name, justify="right", no_wrap=True)
    ours = next((row.seconds for row in rows if row.implementation == MOEKERN and row.status == OK), None)
    first = {CEILING: 0, MOEKERN: 1}
    for row in sorted(rows, key=lambda row: (first.get(row.implementation, 2), row.seconds or 0.0)):
        made.add_row(*cells(row, ours, unit), style="bold" if row.implementation == MOEKERN else None)
    return made


def cells(row: Row, ours: float | None, unit: str) -> list[str]:
    """A row's figures; a wrong result is compared with nothing, since its time means nothing."""
    seconds, low, high = row.seconds or 0.0, row.low or 0.0, row.high or 0.0
    right = row.status == OK
    speed = {"GB/s": row.gbps, "TFLOP/s": row.tflops, "GFLOP/s": (row.tflops or 0.0) * 1e3}[unit] or 0.0
    mark = "" if row.error is None else f"{row.error:.0e}".replace("e-0", "e-")
    return [
        escape(row.implementation),
        "" if row.implementation == CEILING else f"[green]✓[/] {mark}" if right else f"[red]WRONG {mark}[/]",
        duration(seconds),
        f"{50 * (high - low) / seconds:.0f}%",
        figure(float(speed)),
        f"{row.share:.2f}" if right and row.share is not None else "-",
        figure(seconds / ours) if right and ours else "-",
        *([] if row.saved_bytes is None else [size(row.saved_bytes)]),
    ]
