"""Inline SVG for the demo's report, drawn by hand: no plotting library, no script, nothing to load.

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


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, *, floor: float | None = None) -> str:
    """A chart of `lines`, each labelled at the right margin. `floor` fixes the lower end of the y axis."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = (min(ys) if floor is None else floor), max(ys)
    pad = 0.06 * (high - low) or 0.1
    x = Axis(min(0.0, *xs), max(*xs, 1e-9), LEFT, WIDTH - RIGHT)
    y = Axis(low - pad if floor is None else floor, high + pad, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}", "tick", "end"))
    parts += [text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "tick", "middle") for tick in x.ticks()]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.start}" y2="{y.start}"/>')
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "label", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="translate(14 {middle}) rotate(-90)">{text(0, 0, y_label, "label", "middle")}</g>')
    ends = spread([y(line.points[-1][1]) for line in lines], gap=17)
    for line, end in zip(lines, ends, strict=True):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        fill = f'style="fill:var(--{line.colour})"'
        parts.append(f'<polyline class="line" style="stroke:var(--{line.colour})" points="{path}"/>')
        for a, b in line.points:
            tip = f"<title>{escape(line.label)}: {b:.3f} at {a:.4g}</title>"
            parts.append(f'<circle {fill} cx="{x(a):.1f}" cy="{y(b):.1f}" r="3">{tip}</circle>')
        place = f'x="{WIDTH - RIGHT + 10}" y="{end + 4:.1f}"'
        parts.append(f'<text class="end" {fill} {place}>{escape(line.label)}</text>')
    return "".join([*parts, "</svg>"])


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


def heat_map(load: Sequence[Sequence[float]]) -> str:
    """Layers down, experts across: each cell is an expert's share of its layer's tokens, in per cent.

    Colour runs from the page's background at share 0 over the middle tone at the mean share to full at twice the mean.
    Cells too many for numbers stay without; hovering shows every value.
    """
    experts = len(load[0])
    cell = max(8.0, min(56.0, 960 / experts))
    height = 40.0
    left, top = 74, 8
    width = left + cell * experts + 4
    bottom = top + height * len(load)
    parts = [
        f'<svg style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {bottom + 40:.0f}" '
        'role="img" aria-label="Share of tokens per expert and layer">'
    ]
    for number, shares in enumerate(load, start=1):
        y = top + height * (number - 1)
        parts.append(text(left - 10, y + height / 2 + 4, f"layer {number}", "tick", "end"))
        for expert, share in enumerate(shares):
            heat = min(1.0, share * experts / 2)
            x = left + cell * expert
            tip = f"layer {number}, expert {expert}: {100 * share:.2f} % ({share * experts:.2f} times the mean)"
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" height="{height - 2:.1f}" '
                f'rx="3" style="fill-opacity:{0.04 + 0.96 * heat:.3f}"><title>{tip}</title></rect>'
            )
            if cell >= 34:
                shade = "light" if heat > 0.7 else "dark"
                parts.append(text(x + cell / 2, y + height / 2 + 4, f"{100 * share:.1f}", f"share {shade}", "middle"))
    every = max(1, math.ceil(26 / cell))
    parts += [
        text(left + cell * (expert + 0.5), bottom + 16, str(expert), "tick", "middle")
        for expert in range(0, experts, every)
    ]
    parts.append(text(left + cell * experts / 2, bottom + 34, "expert", "label", "middle"))
    return "".join([*parts, "</svg>"])
