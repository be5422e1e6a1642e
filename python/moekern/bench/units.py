"""Numbers as people read them: three figures, in the unit that keeps them before the decimal point."""

from __future__ import annotations

import math
from typing import Any

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
RATES = ((1.0, "TFLOP/s"), (1e-3, "GFLOP/s"), (1e-6, "MFLOP/s"))


def figure(value: Any) -> str:
    """A number with three figures and no exponent; anything else as it prints."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or value != value or abs(value) >= 100:
        return f"{value:.0f}"
    rounded = f"{value:#.3g}".rstrip(".")
    return rounded if "e" not in rounded else f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def duration(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    return scaled(seconds, TIMES)


def size(bytes: float) -> str:
    """12345678 -> "12.3 MB"; a MB is 10^6 bytes."""
    return scaled(bytes, SIZES)


def rate(tflops: float) -> str:
    """0.393 -> "393 GFLOP/s"."""
    return scaled(tflops, RATES)


def scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """The value in the largest of the units (factor, name) that it reaches, or in the last."""
    factor, unit = unit_of(value, units)
    whole = unit == "B" and value == int(value)  # half bytes do not exist, and neither should "5.00 B"
    return f"{int(value) if whole else figure(value / factor)} {unit}"


def unit_of(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest of the units (factor, name) that the value reaches, or the last."""
    return next((unit for unit in units if value >= unit[0]), units[-1])
