"""The demo's own drawing: the load of the experts."""

import math
from collections.abc import Sequence

from moekern.report.charts import text


def heat_map(load: Sequence[Sequence[float]]) -> str:
    """Layers down, experts across: each cell is an expert's share of its layer's tokens, in per cent.

    Colour runs from the page's background at share 0 over the middle tone at the mean share to full at twice the mean.
    Cells too small for numbers have none; hovering shows every value.
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
