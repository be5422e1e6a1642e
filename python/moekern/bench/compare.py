"""Compares two records: which rows became faster or slower by more than the measurements scatter.

A change counts when it is larger than LEAST and the middle halves of both measurements do not overlap, also after the
drift of the ceiling between the two runs is taken out (a card's clock, other guests of a host). Saved and peak memory
count as well. Only moekern's own rows can regress; peers and the ceiling are shown, since they tell how the machine
itself changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from moekern.bench import summary
from moekern.bench.record import CEILING, FAILED, MOEKERN, OK, WRONG, Machine, Record, Row
from moekern.bench.units import duration, size

# Two runs of the same program differ by one or two per cent, whatever the scatter within each.
LEAST = 0.02
SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "", "?"
# These fields differ when another program was measured; they do not mean another machine.
NOT_THE_MACHINE = ("moekern", "commit", "copy_gbps")


@dataclass
class Change:
    """One row in both records. ``ratio`` is the new time over the old one, None where one of them has none.

    verdict: "slower", "faster", "" for neither, "?" for times without quartiles. notes: what else changed.
    regressed: moekern slower, wrong or failing where it was right, or needing more memory.
    """

    old: Row
    new: Row
    ratio: float | None
    verdict: str
    notes: list[str]
    regressed: bool


@dataclass
class Comparison:
    """The comparison of two records."""

    changes: list[Change]
    vanished: list[Row]
    appeared: list[Row]
    warnings: list[str] = field(default_factory=list)

    @property
    def regressed(self) -> bool:
        """Whether any row of moekern is worse: the exit code of `moekern bench --compare` is then 1."""
        return any(change.regressed for change in self.changes)

    def text(self) -> str:
        """A table for the terminal; before it warnings, behind it rows of one record only and a count."""
        lines = [f"warning: {warning}" for warning in self.warnings]
        if self.changes:
            lines += aligned([("", "", "", "old", "new", "new/old", "of ceiling", ""), *map(cells, self.changes)])
        lines += [f"no longer measured: {described(row)}" for row in self.vanished]
        lines += [f"new: {described(row)}" for row in self.appeared]
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        """The outcome in one sentence."""
        ours = [change for change in self.changes if change.new.implementation == MOEKERN]
        if not ours:
            return "No row of moekern is in both records: nothing to compare."
        ratios = [change.ratio for change in ours if change.ratio]
        mean = f", new/old {summary.geometric_mean(ratios):.3f} in geometric mean" if ratios else ""
        worse = sum(change.regressed for change in ours)
        faster = sum(change.verdict == FASTER for change in ours)
        return f"moekern: {len(ours)} rows compared{mean}; {worse} regressed, {faster} faster."


def compare(old: Record, new: Record) -> Comparison:
    """Match the rows of two records by case and implementation."""
    before, after = by_key(old.rows), by_key(new.rows)
    changes = [changed(before[key], row, drift(before, after, row)) for key, row in after.items() if key in before]
    vanished = [row for key, row in before.items() if key not in after]
    appeared = [row for key, row in after.items() if key not in before]
    return Comparison(changes, vanished, appeared, differences(old.machine, new.machine))


def by_key(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    return {(*row.case, row.implementation): row for row in rows}


def drift(before: dict[tuple[Any, ...], Row], after: dict[tuple[Any, ...], Row], row: Row) -> float:
    """How much slower the ceiling of this case became, 1 if it is not known."""
    old, new = (rows.get((*row.case, CEILING)) for rows in (before, after))
    return new.seconds / old.seconds if old and new and old.seconds and new.seconds else 1.0


def changed(old: Row, new: Row, drift: float) -> Change:
    """Compare one row; `drift` is the ceiling's new time over its old one."""
    notes = []
    ours = new.implementation == MOEKERN
    regressed = False
    if old.status != new.status:
        notes.append(f"{old.status} -> {new.status}" + (f": {new.reason}" if new.reason else ""))
        regressed = old.status == OK and new.status in (WRONG, FAILED)
    for what in ("saved", "peak"):
        was, now = (getattr(row, f"{what}_bytes") for row in (old, new))
        if was is not None and now is not None and abs(now - was) > LEAST * was:
            notes.append(f"{what} {size(was)} -> {size(now)}")
            regressed |= now > was
    ratio = new.seconds / old.seconds if old.seconds and new.seconds else None
    verdict = judged(old, new, 1.0 if new.implementation == CEILING else drift)
    return Change(old, new, ratio, verdict, notes, ours and (regressed or verdict == SLOWER))


def judged(old: Row, new: Row, drift: float) -> str:
    """Slower or faster if both are right and the middle halves apart, as measured and without the ceiling's drift."""
    if not old.seconds or not new.seconds or WRONG in (old.status, new.status):
        return SAME
    if not (old.low and old.high and new.low and new.high):
        return UNKNOWN
    if new.low > old.high * max(1.0, drift) and new.seconds > old.seconds * max(1.0, drift) * (1 + LEAST):
        return SLOWER
    if new.high < old.low * min(1.0, drift) and new.seconds < old.seconds * min(1.0, drift) * (1 - LEAST):
        return FASTER
    return SAME


def differences(old: Machine, new: Machine) -> list[str]:
    """One sentence for each difference of the machines or their software."""
    found = []
    for entry in fields(Machine):
        was, now = getattr(old, entry.name), getattr(new, entry.name)
        if entry.name not in NOT_THE_MACHINE and was != now:
            found.append(f"the records are of different machines or versions: {entry.name} {was!r}, now {now!r}")
    return found


def cells(change: Change) -> tuple[str, ...]:
    old, new = change.old, change.new
    shares = [f"{row.share:.2f}" if row.share is not None else "-" for row in (old, new)]
    mark = "REGRESSED" if change.regressed else change.verdict
    return (
        described_case(new),
        new.verb,
        new.implementation,
        time_of(old),
        time_of(new),
        f"{change.ratio:.3f}" if change.ratio else "-",
        "" if new.implementation == CEILING or shares == ["-", "-"] else " -> ".join(shares),
        "; ".join([*([mark] if mark else []), *change.notes]),
    )


def time_of(row: Row) -> str:
    return duration(row.seconds) if row.seconds else row.status


def described_case(row: Row) -> str:
    """The shape, and everything unusual about the case; in a series the value too."""
    extra = [row.dtype, *([row.routing] if row.routing != "uniform" else [])]
    if row.sweep:
        extra.append(f"{row.sweep} {getattr(row, row.sweep)}")
    return f"{row.shape} ({', '.join(extra)})"


def described(row: Row) -> str:
    """One line about a row that the other record does not have."""
    return f"{described_case(row)}, {row.verb}, {row.implementation}: {time_of(row)}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns under each other, numbers to the right, texts to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = (0, 1, 2, len(widths) - 1)
    return [
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
