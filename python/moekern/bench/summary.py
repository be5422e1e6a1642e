"""A record's contents, however they are shown: cases with their measurements, means, leads over peers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from moekern.bench.record import CEILING, DECODE, MOEKERN, OK, VERBS, Record, Row
from moekern.bench.units import duration, figure

# A dense MLP of as many FLOPs: the experts replace it; it is not another way to compute them.
NO_EXPERTS = ("dense",)


def cases(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by case, in order of appearance; within a case by implementation, moekern first, the ceiling last."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.implementation] = row
    order = {MOEKERN: 0, CEILING: 2}
    return {case: dict(sorted(of.items(), key=lambda item: order.get(item[0], 1))) for case, of in found.items()}


def singles(record: Record) -> list[Row]:
    """The rows that belong to no sweep; all rows if a record has only sweeps."""
    return [row for row in record.rows if row.sweep is None] or record.rows


def peers(of: dict[str, Row]) -> list[Row]:
    """Other correct implementations of the experts at a case, the fastest first."""
    others = [row for name, row in of.items() if name not in (MOEKERN, CEILING, *NO_EXPERTS)]
    return sorted((row for row in others if row.status == OK and row.seconds), key=lambda row: row.seconds or 0.0)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def sizes(row: Row) -> str:
    """The five sizes in one phrase."""
    return f"T {row.tokens}, H {row.hidden}, I {row.intermediate}, E {row.experts}, K {row.top_k}"


def settings(row: Row) -> str:
    """The rest of a case: dtype, routing if it is not the usual one, device."""
    return ", ".join([row.dtype, *([f"{row.routing} routing"] if row.routing != "uniform" else []), row.device])


def rate_of(row: Row) -> float | None:
    """The rate of a case: GB/s of the minimum bytes for decode, else TFLOP/s."""
    return row.gbps if row.verb == DECODE else row.tflops


def sentences(record: Record) -> list[str]:
    """One sentence per verb: moekern's share of the ceiling and its lead over the best peer of each case."""
    found = cases(singles(record))
    said = []
    for verb in VERBS:
        ours = [(of[MOEKERN], of) for of in found.values() if MOEKERN in of and of[MOEKERN].verb == verb]
        shares = [row.share for row, _ in ours if row.status == OK and row.share]
        if not shares:
            continue
        what = "the copy rate" if verb == DECODE and ours[0][0].device == "cuda" else "the ceiling"
        words = f"{verb}: {figure(geometric_mean(shares))} of {what}"
        if len(shares) > 1:
            words += f" in geometric mean over {len(shares)} cases, {figure(min(shares))} to {figure(max(shares))}"
        leads = [
            best[0].seconds / row.seconds
            for row, of in ours
            if row.status == OK and row.seconds and (best := peers(of)) and best[0].seconds
        ]
        if leads:
            words += f"; {figure(geometric_mean(leads))} times the speed of the fastest correct peer"
            if len(leads) > 1:
                words += f" ({figure(min(leads))} to {figure(max(leads))})"
        said.append(words[0].upper() + words[1:] + ".")
    if not said and (rows := [row for row in record.rows if row.implementation == MOEKERN and row.seconds]):
        said = [f"{row.shape}, {row.verb}: {duration(row.seconds or 0.0)}." for row in rows[:3]]
    return said


def missing(record: Record) -> list[tuple[str, str, str, str]]:
    """Implementations that were not measured or are wrong, with status, reason and cases; each reason once."""
    singles = {place(row) for row in record.rows if row.sweep is None}
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in record.rows:
        if row.status != OK:
            reason = row.reason or (f"relative error {figure(row.error)}" if row.error is not None else "")
            found.setdefault((row.status, reason), {}).setdefault(row.implementation, []).append(place(row))
    lines: dict[tuple[str, str, str], list[str]] = {}
    for (status, reason), of in found.items():
        for name, places in of.items():
            where = "everywhere" if singles and singles <= set(places) else ", ".join(dict.fromkeys(places))
            lines.setdefault((status, reason, where), []).append(name)
    return [(", ".join(names), status, reason, where) for (status, reason, where), names in lines.items()]


def place(row: Row) -> str:
    """A case in a list of several."""
    value = f" with {getattr(row, row.sweep)} {row.sweep.replace('_', '-')}" if row.sweep else ""
    return f"{row.shape} {row.verb}{value}"
