"""Pictures of records for the texts: one SVG file without other files, light or dark like the reader's system."""

from __future__ import annotations

from html import escape

from moekern.bench import charts, report, summary
from moekern.bench.record import CEILING, OK, Record, Row
from moekern.bench.units import figure
from moekern.report.page import COLOURS

WIDTH, MARGIN, GAP, HEAD, CAPTION, FOOT = 980, 20, 20, 62, 26, 34
# Letters are larger than in the reports: here two drawings share a line, and pages shrink the whole.
STYLE = """
.paper{fill:var(--card);stroke:var(--rule)}
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;fill:var(--ink)}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.limit{stroke:var(--soft);stroke-width:1.6;stroke-dasharray:4 4}
.title{font-size:18px;font-weight:650}.caption{font-size:14px;font-weight:600}
.sizes{font-size:11.5px;font-weight:400;fill:var(--soft)}.soft{font-size:13px;fill:var(--soft)}
.tick,.label{font-size:13.5px;fill:var(--soft)}.name{font-size:15.5px}.ours{font-weight:700}
.value{font-size:14.5px;fill:var(--soft);font-variant-numeric:tabular-nums}.whisker{stroke:var(--ink);stroke-width:1.2}
"""


def speed(record: Record) -> str:
    """Bars of all cases of a record of `moekern bench`, two on a line; wrong results and failures are left out."""
    found = summary.cases(summary.singles(record))
    colours = charts.colours(row.implementation for row in record.rows)
    across = (WIDTH - 2 * MARGIN - GAP) // 2
    parts, y, line_height = [], float(HEAD), 0.0
    for number, of in enumerate(found.values()):
        drawing, height = bars_of(of, colours, across)
        if number % 2 == 0:
            y, line_height = y + line_height, 0.0
        x = MARGIN + (across + GAP) * (number % 2)
        row = next(iter(of.values()))
        caption = f"{row.shape}, {row.verb.replace('+', ' + ')}"
        parts.append(f'<text class="caption" x="{x}" y="{y + 16:.0f}">{escape(caption)} ')
        parts.append(f'<tspan class="sizes"> {escape(summary.sizes(row))}</tspan></text>')
        parts.append(
            drawing.replace("<svg ", f'<svg x="{x}" y="{y + CAPTION:.0f}" width="{across}" height="{height}" ', 1)
        )
        line_height = max(line_height, CAPTION + height + 8)
    height = int(y + line_height + FOOT)
    machine, first = record.machine, record.rows[0]
    title = f"Mixture-of-Experts layers on one {machine.gpu or machine.cpu}, {first.dtype}: longer is faster"
    legend = (
        "Dashed: cuBLAS on dense products of the same FLOPs, which gather nothing. "
        "Right: rate, time, share of the dashed line."
    )
    notes = [
        f"torch {machine.torch}",
        f"{first.routing} routing",
        record.made[:10],
        "thin lines: the middle half of the runs",
    ]
    absent = [f"{names}: {where}" for names, _, _, where in summary.missing(record)]
    foot = "; ".join([*notes, *(["not measured: " + ", ".join(absent)] if absent else [])])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(alternative(record))}">\n<style>{COLOURS}{STYLE}</style>\n'
        f'<rect class="paper" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="12"/>\n'
        f'<text class="title" x="{MARGIN}" y="32">{escape(title)}</text>\n'
        f'<text class="soft" x="{MARGIN}" y="52">{escape(legend)}</text>\n'
        + "\n".join(parts)
        + f'\n<text class="soft" x="{MARGIN}" y="{height - 14}">{escape(foot)}</text>\n</svg>\n'
    )


def bars_of(of: dict[str, Row], colours: dict[str, str], across: int) -> tuple[str, int]:
    """The bars of one case, ours first, then the fastest; and their height when they are `across` pixels wide."""
    rows = [row for name, row in of.items() if name != CEILING and row.status == OK]
    factor, unit = report.unit_of_rates(of.values())
    limit = summary.rate_of(of[CEILING])
    entries = [report.bar(row, factor, colours) for row in sorted(rows, key=lambda row: row.seconds or 0.0)]
    entries.sort(key=lambda bar: bar.name != "moekern")
    drawing = charts.bars("", entries, unit, limit and limit / factor)
    tall = float(drawing.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
    return drawing, round(tall * across / charts.WIDTH)


def alternative(record: Record) -> str:
    """The picture in words, for readers who cannot see it."""
    words = []
    for of in summary.cases(summary.singles(record)).values():
        factor, unit = report.unit_of_rates(of.values())
        rows = sorted((row for row in of.values() if row.status == OK), key=lambda row: row.seconds or 0.0)
        rates = [f"{row.implementation} {figure((summary.rate_of(row) or 0.0) / factor)}" for row in rows]
        words.append(f"{rows[0].shape}, {rows[0].verb}, {unit}: {', '.join(rates)}.")
    return f"Speed on one {record.machine.gpu or record.machine.cpu}. {' '.join(words)}"
