"""Inline SVG for the reports, drawn by hand: no plotting library, no script, nothing to load.

Colours come from the page's CSS variables, so the drawings follow its light and dark theme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 104, 16, 44


@dataclass(frozen=True)
class Line:
    """One curve: its label, the CSS variable of its colour, and its points."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A linear map from values to pixels, with round numbers as ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        step = round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is not below `rough`."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class LogAxis(Axis):
    """A logarithmic map, for values that are compared by their ratios; `low` is above 0."""

    def __call__(self, value: float) -> float:
        return self.start + math.log(value / self.low) / math.log(self.high / self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten, or the powers alone where that would be many."""
        powers = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if self.high / self.low < 3e3 else (1,)
        ticks = (float(f"{factor}e{power}") for power in powers for factor in factors)
        return [tick for tick in ticks if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    floor: float | None = None,
    by_ratio: bool = False,
    right: float = RIGHT,
) -> str:
    """A chart of `lines`, each labelled at the right margin, which is `right` pixels wide.

    `floor` fixes the lower end of the y axis. With `by_ratio` the x axis is logarithmic and its ticks are the points.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = (min(ys) if floor is None else floor), max(ys)
    pad = 0.06 * (high - low) or 0.1
    y = Axis(low - pad if floor is None else floor, high + pad, HEIGHT - BOTTOM, TOP)
    x: Axis
    if by_ratio:
        one = min(xs) == max(xs)
        x = LogAxis(min(xs) / (2 if one else 1), max(xs) * (2 if one else 1), LEFT + 12, WIDTH - right - 12)
        drawn = frame(title, x, y, x_label, y_label, right, apart(x, sorted(set(xs))))
    else:
        x = Axis(min(0.0, *xs), max(*xs, 1e-9), LEFT, WIDTH - right)
        drawn = frame(title, x, y, x_label, y_label, right)
    parts = [drawn]
    ends = spread([y(line.points[-1][1]) for line in lines], gap=17)
    for line, end in zip(lines, ends, strict=True):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        fill = f'style="fill:var(--{line.colour})"'
        parts.append(f'<polyline class="line" style="stroke:var(--{line.colour})" points="{path}"/>')
        for a, b in line.points:
            tip = f"<title>{escape(line.label)}: {b:.3f} at {a:.4g}</title>"
            parts.append(f'<circle {fill} cx="{x(a):.1f}" cy="{y(b):.1f}" r="3">{tip}</circle>')
        place = f'x="{WIDTH - right + 10}" y="{end + 4:.1f}"'
        parts.append(f'<text class="end" {fill} {place}>{escape(line.label)}</text>')
    return "".join([*parts, "</svg>"])


def apart(x: Axis, values: Sequence[float]) -> list[float]:
    """The ascending values whose numbers fit under the axis next to each other."""
    kept: list[float] = []
    for value in values:
        if not kept or x(value) - x(kept[-1]) >= 8 + 3.6 * (len(f"{value:g}") + len(f"{kept[-1]:g}")):
            kept.append(value)
    return kept


def frame(
    title: str, x: Axis, y: Axis, x_label: str, y_label: str, right: float, x_ticks: Sequence[float] | None = None
) -> str:
    """The start of a drawing that its caller continues and closes: grid, ticks and the names of both axes."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}", "tick", "end"))
    ticks = x.ticks() if x_ticks is None else x_ticks
    parts += [text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "tick", "middle") for tick in ticks]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - right}" y1="{y.start}" y2="{y.start}"/>')
    parts.append(text((LEFT + WIDTH - right) / 2, HEIGHT - 6, x_label, "label", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="translate(14 {middle}) rotate(-90)">{text(0, 0, y_label, "label", "middle")}</g>')
    return "".join(parts)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move label positions apart until neighbours are `gap` pixels from each other, and keep them in the picture."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for above, here in pairwise(order):
        placed[here] = max(placed[here], placed[above] + gap)
    limit = float(HEIGHT - BOTTOM)
    for here in reversed(order):
        placed[here] = min(placed[here], limit)
        limit = placed[here] - gap
    return placed


def text(x: float, y: float, content: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'
