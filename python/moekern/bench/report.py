"""The report of `moekern bench`: one HTML file with roofline, bars against peers, scaling, memory and every number.

It needs no network and no scripts. The page holds the record itself as JSON (id "data").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from html import escape

from moekern.bench import charts, summary
from moekern.bench.charts import Bar, Point
from moekern.bench.record import BOTH, CEILING, DECODE, FAILED, MOEKERN, OK, SKIPPED, VERBS, WRONG, Machine, Record, Row
from moekern.bench.units import RATES, SIZES, duration, figure, rate, size, unit_of
from moekern.report.charts import Line, line_chart
from moekern.report.page import figure as drawn
from moekern.report.page import page, settings_table

STYLE = (
    charts.STYLE
    + """
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;font-size:14px;color:var(--soft)}
.legend span{display:inline-flex;align-items:center;gap:6px}
.legend i{width:12px;height:12px;border-radius:3px}.key{width:16px;height:16px;display:inline-block}
.pair{grid-template-columns:repeat(auto-fill,minmax(420px,1fr))}
.wide{overflow-x:auto}.rows th,.rows td{padding:4px 18px 4px 0;font-size:14px;white-space:nowrap}
.rows td:first-child,.rows td:last-child,.rows th:last-child{text-align:left}
.rows td:last-child{white-space:normal;min-width:16ch}.rows tr.case td{padding-top:18px;font-weight:600}
.rows tr.moekern td{font-weight:600}.rows td.bad{color:var(--bad)}
.missing td,.missing th{text-align:left;vertical-align:top;font-size:14px}.missing{max-width:100%}
"""
)
MARKS = {OK: "✓", WRONG: "✗ wrong", SKIPPED: "skipped", FAILED: "failed"}
COLUMNS = ("", "median", "middle half", "FLOP/s", "GB/s", "of ceiling", "error", "saved", "peak", "result")


def render(record: Record) -> str:
    """The whole page of a record."""
    # Peers with times first: colours repeat after eight peers.
    colours = charts.colours(row.implementation for row in sorted(record.rows, key=lambda row: row.seconds is None))
    found = summary.cases(summary.singles(record))
    sections = [
        heading(record),
        legend(record, colours),
        *rooflines(record, colours),
        *comparison(found, colours),
        *scaling(record, colours),
        *memory(found, colours),
        *missing(record),
        "<h2>Every number</h2>",
        '<p class="soft">Median and middle half of the runs; GB/s of the fewest bytes; the share is the median of '
        "pairs run one after the other; the error is relative, in the Frobenius norm, against float32.</p>",
        table(record),
        f'<div class="pair">{drawn("This run", settings_table(facts(record)))}</div>',
    ]
    return page("moekern bench", charts.HATCH + "\n".join(sections), asdict(record), STYLE)


def heading(record: Record) -> str:
    said = "".join(f'<p class="lead">{escape(sentence)}</p>' for sentence in summary.sentences(record))
    machine = record.machine
    where = machine.gpu or f"{machine.cpu}, {machine.cpu_threads} threads, {machine.isa}"
    return f'<h1>moekern bench</h1><p class="soft">{escape(where)}; {escape(record.made[:10])}</p>{said}'


def legend(record: Record, colours: dict[str, str]) -> str:
    """Colours of the implementations and marks of the verbs that occur."""
    measured = {row.implementation for row in record.rows if row.seconds}
    parts = [
        f'<span><i style="background:var(--{colour})"></i>{escape(name)}</span>'
        for name, colour in colours.items()
        if name in measured
    ]
    verbs = [verb for verb in VERBS if any(row.verb == verb for row in record.rows)]
    parts += [f"<span>{charts.legend_mark(verb)}</span>" for verb in verbs]
    if any(row.status == WRONG for row in record.rows):
        look = "background:repeating-linear-gradient(45deg,var(--bad) 0 2px,transparent 2px 5px)"
        parts.append(f'<span><i style="{look}"></i>wrong result</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


def rooflines(record: Record, colours: dict[str, str]) -> list[str]:
    """One drawing per device and dtype, whose ceilings differ; one more without decode if that stretches the first."""
    rows = [row for row in summary.singles(record) if row.status == OK and row.tflops and row.flops and row.bytes]
    kinds = dict.fromkeys((row.device, row.dtype) for row in rows if row.implementation != CEILING)
    if not kinds:
        return []
    copy = record.machine.copy_gbps
    drawings = []
    for device, dtype in kinds:
        here = [row for row in rows if (row.device, row.dtype) == (device, dtype)]
        ceilings = [row.tflops or 0.0 for row in here if row.implementation == CEILING and row.verb != DECODE]
        # moekern last: drawn above the others.
        shown = sorted((r for r in here if r.implementation != CEILING), key=lambda r: r.implementation == MOEKERN)
        factor, unit = unit_of(max(ceilings, default=max(row.tflops or 0.0 for row in shown)), RATES)
        peak = max(ceilings) / factor if ceilings else None
        roof = charts.Roof(peak, copy / 1e3 / factor if copy else None, factor, unit)
        batches = [row for row in shown if row.verb != DECODE]
        mixed = 0 < len(batches) < len(shown)
        whole = [point(row, factor, colours, named=row.verb == DECODE or not mixed) for row in shown]
        drawings.append(drawn(f"{device}, {dtype}", charts.roofline(whole, roof)))
        if mixed:
            near = [point(row, factor, colours, named=True) for row in batches]
            drawings.append(drawn(f"{device}, {dtype}, without decode", charts.roofline(near, roof)))
    intro = (
        "FLOPs per byte against FLOPs per second. Under the level line the matrix products decide, under the slope the "
        "memory: the ceiling is the best that dense matrix products reached in this run, the slope the rate of a copy."
    )
    return ["<h2>Roofline</h2>", f'<p class="soft">{intro}</p>', f'<div class="pair">{"".join(drawings)}</div>']


def point(row: Row, factor: float, colours: dict[str, str], *, named: bool) -> Point:
    tflops = row.tflops or 0.0
    tip = f"{row.implementation}, {row.shape}, {row.verb}: {rate(tflops)}, {duration(row.seconds or 0.0)}"
    label = row.shape if named and row.implementation == MOEKERN and row.verb != BOTH else ""
    return Point(row.flops / row.bytes, tflops / factor, row.verb, colours[row.implementation], tip, label)


def comparison(found: dict[tuple[object, ...], dict[str, Row]], colours: dict[str, str]) -> list[str]:
    """Bars for each case; the longest is the fastest. The ceiling is a line across them."""
    drawings = []
    for of in found.values():
        measured = [row for name, row in of.items() if name != CEILING and row.seconds]
        if not measured:
            continue
        measured.sort(key=lambda row: (row.implementation != MOEKERN, row.status == WRONG, row.seconds))
        factor, unit = unit_of_rates([of[CEILING]] if CEILING in of and of[CEILING].seconds else measured)
        entries = [bar(row, factor, colours) for row in measured]
        limit = (summary.rate_of(of[CEILING]) or 0.0) / factor if CEILING in of else None
        absent = [row.implementation for row in of.values() if row.status in (SKIPPED, FAILED) and not row.seconds]
        note = f'<p class="soft">Not measured, see below: {escape(", ".join(absent))}.</p>' if absent else ""
        row = measured[0]
        caption = f"{row.shape}, {row.verb}"
        detail = f'<p class="soft">{summary.sizes(row)}; {escape(summary.settings(row))}</p>'
        drawings.append(drawn(caption, detail + charts.bars(caption, entries, unit, limit) + note))
    if not drawings:
        return []
    intro = (
        "The longest bar is the fastest. Dashed: the ceiling, for decode the bytes at the rate of memory. Behind each "
        "bar its rate, its time and its share of the ceiling; the thin line is the middle half of the runs."
    )
    return ["<h2>Against peers</h2>", f'<p class="soft">{intro}</p>', f'<div class="pair">{"".join(drawings)}</div>']


def unit_of_rates(rows: Iterable[Row]) -> tuple[float, str]:
    """The divisor of rates, and the unit of the result."""
    rows = list(rows)
    if rows[0].verb == DECODE:
        return 1.0, "GB/s of the fewest bytes"
    return unit_of(max(row.tflops or 0.0 for row in rows), RATES)


def bar(row: Row, factor: float, colours: dict[str, str]) -> Bar:
    seconds = row.seconds or 1.0
    speed = (summary.rate_of(row) or 0.0) / factor
    parts = [figure(speed), duration(seconds)]
    if row.status == WRONG:
        parts[0] = "wrong"
    elif row.share is not None:
        parts.append(f"{100 * row.share:.0f} %")
    return Bar(
        row.implementation,
        speed,
        ", ".join(parts),
        colours[row.implementation],
        low=speed * seconds / row.high if row.high else None,
        high=speed * seconds / row.low if row.low else None,
        wrong=row.status == WRONG,
    )


def scaling(record: Record, colours: dict[str, str]) -> list[str]:
    """One chart per series over tokens, experts or top-k, with one line per implementation."""
    series: dict[tuple[object, ...], list[Row]] = {}
    for row in record.rows:
        if row.sweep and row.seconds and row.status == OK:
            key = (row.sweep, row.shape, row.dtype, row.routing, row.device, row.verb)
            series.setdefault(key, []).append(row)
    drawings = []
    for rows in series.values():
        sweep = rows[0].sweep or ""
        if len({getattr(row, sweep) for row in rows}) < 2:
            continue
        factor, unit = unit_of_rates(rows)
        by_name: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            place = (float(getattr(row, sweep)), (summary.rate_of(row) or 0.0) / factor)
            by_name.setdefault(row.implementation, []).append(place)
        lines = [Line(name, colours[name], sorted(points)) for name, points in by_name.items()]
        what = {"tokens": "tokens", "experts": "experts", "top_k": "experts per token (top-k)"}[sweep]
        caption = f"{rows[0].shape}, {rows[0].verb}, over {what}"
        fixed = "; ".join([fixed_sizes(rows[0], sweep), summary.settings(rows[0])])
        margin = 24 + 8.5 * max(len(line.label) for line in lines)
        svg = line_chart(caption, lines, what, unit, floor=0.0, by_ratio=True, right=margin)
        drawings.append(drawn(caption, f'<p class="soft">{escape(fixed)}</p>{svg}'))
    if not drawings:
        return []
    return ["<h2>Scaling</h2>", f'<div class="pair">{"".join(drawings)}</div>']


def fixed_sizes(row: Row, sweep: str) -> str:
    """The sizes that stay the same in a series."""
    letter = {"tokens": "T", "experts": "E", "top_k": "K"}[sweep]
    return ", ".join(part for part in summary.sizes(row).split(", ") if not part.startswith(letter))


def memory(found: dict[tuple[object, ...], dict[str, Row]], colours: dict[str, str]) -> list[str]:
    """The memory of each shape's training step: saved for the backward pass, and at the peak."""
    drawings = []
    for of in found.values():
        rows = [
            row for row in of.values() if row.verb == BOTH and row.status == OK and (row.saved_bytes or row.peak_bytes)
        ]
        if not rows:
            continue
        largest = max(max(row.saved_bytes or 0, row.peak_bytes or 0) for row in rows)
        factor, unit = unit_of(float(largest), SIZES)
        entries = []
        for row in rows:
            colour, name = colours[row.implementation], row.implementation
            if row.saved_bytes is not None:
                entries.append(Bar(name, row.saved_bytes / factor, f"{size(row.saved_bytes)} saved", colour))
                name = ""
            if row.peak_bytes is not None:
                entries.append(Bar(name, row.peak_bytes / factor, f"{size(row.peak_bytes)} peak", colour, faint=True))
        drawings.append(drawn(f"{rows[0].shape}, {rows[0].dtype}", charts.bars("Memory", entries, unit)))
    if not drawings:
        return []
    intro = "Kept between forward and backward, weights not counted."
    if any(row.peak_bytes is not None and row.verb == BOTH for of in found.values() for row in of.values()):
        intro += " Pale: the most allocated during both beyond the inputs, gradients included."
    return ["<h2>Memory</h2>", f'<p class="soft">{intro}</p>', f'<div class="pair">{"".join(drawings)}</div>']


def missing(record: Record) -> list[str]:
    """Implementations that were not measured or are wrong, and why."""
    lines = []
    for names, status, reason, where in summary.missing(record):
        cells = (names, MARKS[status], reason, where)
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    if not lines:
        return []
    head = "<tr><th>implementation</th><th>status</th><th>reason</th><th>where</th></tr>"
    return ["<h2>Not measured, or wrong</h2>", f'<table class="missing">{head}{"".join(lines)}</table>']


def table(record: Record) -> str:
    """All rows, grouped by case."""
    factor, unit = unit_of(max((row.tflops or 0.0 for row in record.rows), default=1.0), RATES)
    lines = []
    for of in summary.cases(record.rows).values():
        row = next(iter(of.values()))
        details = f"<span class=soft>{summary.sizes(row)}; {escape(summary.settings(row))}</span>"
        title = f"{escape(row.shape)}, {row.verb} {details}"
        lines.append(f'<tr class="case"><td colspan="{len(COLUMNS)}">{title}</td></tr>')
        lines += [table_row(row, factor) for row in of.values()]
    head = "".join(f"<th>{unit if name == 'FLOP/s' else name}</th>" for name in COLUMNS)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="rows">{body}</table></div>'


def table_row(row: Row, factor: float) -> str:
    half = f"{duration(row.low)} – {duration(row.high)}" if row.low and row.high else ""
    cells = (
        row.implementation,
        duration(row.seconds) if row.seconds else "",
        half,
        figure(row.tflops / factor) if row.tflops else "",
        figure(row.gbps) if row.gbps else "",
        f"{row.share:.3f}" if row.share is not None and row.implementation != CEILING else "",
        f"{row.error:.1e}" if row.error is not None else "",
        size(row.saved_bytes) if row.saved_bytes is not None else "",
        size(row.peak_bytes) if row.peak_bytes is not None else "",
    )
    status = MARKS[row.status] + (f": {row.reason}" if row.reason else "")
    kind = ' class="moekern"' if row.implementation == MOEKERN else ""
    last = f'<td class="bad">{escape(status)}</td>' if row.status in (WRONG, FAILED) else f"<td>{escape(status)}</td>"
    return f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}{last}</tr>"


def facts(record: Record) -> dict[str, str]:
    """Machine, versions and command."""
    return {"command": record.command, "made": record.made, **machine_facts(record.machine)}


def machine_facts(machine: Machine) -> dict[str, str]:
    """Names and values of the known facts about a machine."""
    values = {
        "GPU": machine.gpu,
        "driver": machine.driver,
        "CUDA": machine.cuda,
        "CPU": machine.cpu,
        "threads": str(machine.cpu_threads),
        "instruction set": machine.isa,
        "memory copy": f"{figure(machine.copy_gbps)} GB/s read and written" if machine.copy_gbps else None,
        "system": machine.system or None,
        "Python": machine.python,
        "torch": machine.torch,
        "transformers": machine.transformers,
        "moekern": f"{machine.moekern}, commit {machine.commit}" if machine.commit else machine.moekern,
    }
    return {name: value for name, value in values.items() if value}
