"""Drawings of the benchmark's report alone: the roofline, and bars that compare implementations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import atan2, degrees

from moekern.bench.record import BOTH, CEILING, DECODE, MOEKERN
from moekern.bench.units import figure
from moekern.report.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Axis, LogAxis, frame, text

# Hatching for wrong results; a page holds it once, before the first drawing.
HATCH = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs><pattern id="hatch" width="7" '
    'height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><line class="hatch" x1="0" x2="0" y1="0" '
    'y2="7"/></pattern></defs></svg>'
)
Box = tuple[float, float, float, float]  # left, top, right, bottom
PEERS = (2, 3, 4, 5, 7, 8, 9, 10)  # without the colour that looks like the ceiling's
LETTER = 6.9  # pixels per letter at 12 px, a little too wide

STYLE = """
.roof{stroke:var(--soft);stroke-width:1.8;fill:none}.limit{stroke:var(--soft);stroke-width:1.4;stroke-dasharray:4 4}
.hatch{stroke:var(--bad);stroke-width:2.5}.wrong{fill:url(#hatch);stroke:var(--bad)}
.name{font-size:13px;fill:var(--ink)}.value{font-size:12.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
.ours{font-weight:650}.whisker{stroke:var(--ink);stroke-width:1.2}.point{stroke:var(--card);stroke-width:1}
.place{font-size:12px;fill:var(--ink)}.roof-name{font-size:12px;fill:var(--soft)}.place,.roof-name{paint-order:stroke;stroke:var(--card);stroke-width:4px}
.lead-line{stroke:var(--soft);stroke-width:.8}.value.bad{fill:var(--bad)}
"""


def colours(implementations: Iterable[str]) -> dict[str, str]:
    """A CSS variable for each implementation, the same in all drawings of a page."""
    peers = [name for name in dict.fromkeys(implementations) if name not in (MOEKERN, CEILING)]
    chosen = {name: f"series{PEERS[i % len(PEERS)]}" for i, name in enumerate(peers)}
    return {MOEKERN: "series1", CEILING: "soft", **chosen}


@dataclass(frozen=True)
class Point:
    """A measurement under the roof: FLOPs per byte, rate, its mark and colour; `label` is printed next to it."""

    intensity: float
    rate: float
    verb: str
    colour: str
    tip: str
    label: str = ""


@dataclass(frozen=True)
class Roof:
    """The limits of a machine: rate of the matrix products, and rate at one FLOP per byte; None if not known.

    Rates are in `unit`; `factor` converts TFLOP/s to it.
    """

    peak: float | None
    slope: float | None
    factor: float = 1.0
    unit: str = "TFLOP/s"

    def draw(self, x: LogAxis, y: LogAxis, points: Sequence[Box]) -> tuple[list[str], list[str], list[Box]]:
        """The copy's line up to the level of the ceiling, then that level; their names; the places that they take."""
        parts: list[str] = []
        names: list[str] = []
        taken: list[Box] = []
        if self.slope:
            start = max(x.low, y.low / self.slope)
            end = min(x.high, (self.peak or y.high) / self.slope)
            if start < end:
                parts.append(segment(x(start), y(self.slope * start), x(end), y(self.slope * end)))
                across, up = x(end) - x(start), y(self.slope * start) - y(self.slope * end)
                # Above the line's lower part: there is nothing above a roof.
                turn = f"translate({x(start) + 0.35 * across:.1f} {y(self.slope * start) - 0.35 * up:.1f})"
                name = text(0, -7, f"copy {figure(1e3 * self.factor * self.slope)} GB/s", "roof-name", "middle")
                names.append(f'<g transform="{turn} rotate({-degrees(atan2(up, across)):.1f})">{name}</g>')
                steps = [i / 24 for i in range(25)]
                line = [(x(start) + step * across, y(self.slope * start) - step * up) for step in steps]
                taken += [(a - 5, b - 5, a + 5, b + 5) for a, b in line]
        if self.peak:
            ridge = max(x.low, min(x.high, self.peak / self.slope if self.slope else x.low))
            left, right, level = x(ridge), x(x.high), y(self.peak)
            parts.append(segment(left, level, right, level))
            name = f"ceiling {figure(self.peak)} {self.unit}"
            width = LETTER * len(name)
            ends = [right - i * (right - left - width) / 4 for i in range(5)]
            places = [(end - width, level - 18, end, level - 1) for end in ends]
            place = next((box for box in places if not any(overlap(box, point) for point in points)), places[0])
            names.append(text(place[2], level - 7, name, "roof-name", "end"))
            taken += [(left, level - 2, right, level + 2), place]
        return parts, names, taken


def segment(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="roof" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def roofline(points: Sequence[Point], roof: Roof) -> str:
    """Rates over FLOPs per byte, on logarithmic axes, under the machine's limits."""
    right = 24
    xs = [point.intensity for point in points]
    ys = [point.rate for point in points]
    if roof.peak:
        ys.append(roof.peak)
        if roof.slope:
            xs.append(roof.peak / roof.slope)  # the ridge belongs in the picture
    x = LogAxis(min(xs) / 2, max(xs) * 2.5, LEFT, WIDTH - right)
    y = LogAxis(min(ys) / 1.6, max(ys) * 1.8, HEIGHT - BOTTOM, TOP)
    boxes = [(x(p.intensity) - 5, y(p.rate) - 5, x(p.intensity) + 5, y(p.rate) + 5) for p in points]
    lines, names, taken = roof.draw(x, y, boxes)
    parts = [frame("Roofline", x, y, "FLOPs per byte, at the fewest bytes", roof.unit, right), *lines, *names]
    parts += [mark(x(p.intensity), y(p.rate), p) for p in points]
    parts += labels([(x(p.intensity), y(p.rate), p.label) for p in points], WIDTH - right, taken)
    return "".join([*parts, "</svg>"])


def mark(x: float, y: float, point: Point) -> str:
    """A circle for the forward pass, a square with the backward pass, a triangle for decode."""
    look = f'class="point" style="fill:var(--{point.colour})"'
    tip = f"<title>{escape(point.tip)}</title>"
    if point.verb == BOTH:
        return f'<rect {look} x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{tip}</rect>'
    if point.verb == DECODE:
        corners = f"{x:.1f},{y - 5:.1f} {x + 5:.1f},{y + 4:.1f} {x - 5:.1f},{y + 4:.1f}"
        return f'<polygon {look} points="{corners}">{tip}</polygon>'
    return f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="4.5">{tip}</circle>'


def legend_mark(verb: str) -> str:
    """The mark of a verb for a legend in HTML."""
    drawn = mark(8, 8, Point(1, 1, verb, "ink", verb))
    return f'<svg class="key" viewBox="0 0 16 16">{drawn}</svg>{escape(verb)}'


def labels(wanted: Sequence[tuple[float, float, str]], edge: float, taken: Sequence[Box]) -> list[str]:
    """Names near points, where they cover no point, no name and nothing else that is drawn; a name farther off gets a
    line to its point. A name that finds no place is left out: hovering over a point shows it.
    """
    boxes = [*taken, *((a - 5, b - 5, a + 5, b + 5) for a, b, _ in wanted)]
    parts = []
    for a, b, name in wanted:
        width = LETTER * len(name)
        places = [
            (a + dx, b + 4 + dy) for dy in (0, 15, -15, *range(30, 150, 10)) for dx in (-width - 9, 9, -width / 2)
        ]
        for left, base in places if name else []:
            box = (left, base - 10, left + width, base + 3)
            inside = box[0] > LEFT and box[2] < edge and box[1] > TOP and box[3] < HEIGHT - BOTTOM
            if inside and not any(overlap(box, other) for other in boxes):
                boxes.append(box)
                if base - b > 30:
                    near = min(max(a, left), left + width)
                    parts.append(f'<path class="lead-line" d="M{a:.1f} {b + 6:.1f}L{near:.1f} {base - 11:.1f}"/>')
                parts.append(text(left, base, name, "place", "start"))
                break
    return parts


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True)
class Bar:
    """One implementation: its value, the note to print behind it, quartiles if known, whether the result is wrong."""

    name: str
    value: float
    note: str
    colour: str
    low: float | None = None
    high: float | None = None
    wrong: bool = False
    faint: bool = False


def bars(title: str, entries: Sequence[Bar], unit: str, limit: float | None = None) -> str:
    """Horizontal bars from 0, their notes in a column at the right; `limit` draws a dashed line across them."""
    line, right, top = 26.0, 150.0, 6.0
    left = max(128.0, 14 + 7.8 * max(len(bar.name) for bar in entries))
    height = top + line * len(entries) + 40
    bottom = height - 40
    most = max([bar.high or bar.value for bar in entries] + ([limit] if limit else []))
    x = Axis(0, most * 1.02 or 1.0, left, WIDTH - right)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">']
    for tick in x.ticks():
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(text(x(tick), bottom + 16, f"{tick:g}", "tick", "middle"))
    parts.append(text((left + WIDTH - right) / 2, bottom + 33, unit, "label", "middle"))
    for number, bar in enumerate(entries):
        y = top + line * number
        middle = y + line / 2
        kind = "name ours" if bar.name == MOEKERN else "name"
        parts.append(text(left - 8, middle + 4, bar.name, kind, "end"))
        look = (
            'class="wrong"'
            if bar.wrong
            else f'style="fill:var(--{bar.colour});fill-opacity:{0.45 if bar.faint else 1}"'
        )
        width = max(1.0, x(bar.value) - left)
        parts.append(f'<rect {look} x="{left}" y="{y + 5:.1f}" width="{width:.1f}" height="{line - 10:.1f}" rx="2"/>')
        if bar.low is not None and bar.high is not None:
            parts.append(f'<path class="whisker" d="M{x(bar.low):.1f} {middle:.1f}H{x(bar.high):.1f}"/>')
        parts.append(text(WIDTH - right + 8, middle + 4, bar.note, "value bad" if bar.wrong else "value", "start"))
    if limit:
        parts.append(f'<line class="limit" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{top}" y2="{bottom}"/>')
    return "".join([*parts, f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{bottom}"/>', "</svg>"])
