"""Made-up records of `moekern bench`, for the tests of their readers."""

from __future__ import annotations

import random
from typing import Any

from moekern.bench.record import (
    BOTH,
    CEILING,
    DECODE,
    FAILED,
    FORWARD,
    MOEKERN,
    OK,
    SKIPPED,
    WRONG,
    Machine,
    Record,
    Row,
)  # fmt: skip

MACHINE = Machine(
    "Some CPU", 16, "avx2", "Some GPU", "600.1", "2.15.0", "13.0", "3.11.9", "0.1.0", "abc123", "Linux x86_64",
    "5.23.0", 4200.0,
)  # fmt: skip
SHAPES = {
    "qwen3-30b-a3b": (32768, 2048, 768, 128, 8),
    "mixtral-8x7b": (8192, 4096, 14336, 8, 2),
    "qwen3-256-rows": (4096, 2048, 768, 128, 8),
    "qwen3-decode-1": (1, 2048, 768, 128, 8),
}
SPEED = {MOEKERN: 660e12, CEILING: 700e12, "dense": 690e12, "grouped_mm": 350e12, "sonicmoe": 580e12}


def row(name: str, verb: str, implementation: str, **changes: Any) -> Row:
    """A correct row whose numbers follow from its sizes and the speed of its implementation."""
    tokens, hidden, inter, experts, top_k = (SHAPES | changes.pop("sizes", {})).get(name, SHAPES["qwen3-30b-a3b"])
    times = 3 if verb == BOTH else 1
    slots = tokens * top_k
    flops = 6.0 * slots * hidden * inter * times
    size = 2.0 * times * (min(experts, slots) * 3 * hidden * inter + 2 * tokens * hidden)
    speed = changes.pop("speed", SPEED.get(implementation, 600e12))
    roof = max(flops / SPEED[CEILING], size / 4.2e12)
    seconds = max(flops / speed, size / 4.2e12 * SPEED[CEILING] / speed)
    values = {
        "status": OK, "seconds": seconds, "low": 0.98 * seconds, "high": 1.03 * seconds, "runs": 9,
        "flops": flops, "bytes": size, "share": roof / seconds,
        "error": None if implementation == CEILING else 3e-3,
    }  # fmt: skip
    if verb == BOTH and implementation != CEILING:
        values["saved_bytes"] = int(2 * tokens * hidden + 4 * slots * inter)
        values["peak_bytes"] = int(size)
    sizes = (tokens, hidden, inter, experts, top_k)
    return Row(name, *sizes, "bf16", "uniform", "cuda", verb, implementation, **(values | changes))


def without_time(status: str, reason: str) -> dict[str, Any]:
    absent = dict.fromkeys(("seconds", "low", "high", "share", "error", "saved_bytes", "peak_bytes"))
    return {"status": status, "reason": reason, "runs": 0, **absent}


def record() -> Record:
    """Three shapes, decode, two sweeps; one implementation wrong, one not installed, one that fails."""
    rows = []
    jitter = random.Random(0)
    for name in SHAPES:
        for verb in (DECODE,) if "decode" in name else (FORWARD, BOTH):
            rows += [row(name, verb, each, speed=SPEED[each] * jitter.uniform(0.9, 1)) for each in SPEED]
            rows.append(row(name, verb, "hasty", speed=900e12, status=WRONG, error=0.31, reason="relative error 0.31"))
            rows.append(row(name, verb, "absent", **without_time(SKIPPED, "the package absent is not installed")))
    rows.append(row("mixtral-8x7b", FORWARD, "broken", **without_time(FAILED, "RuntimeError: <out of memory>")))
    for sweep, place, values in (("tokens", 0, (512, 2048, 8192, 32768)), ("experts", 3, (8, 32, 128))):
        for value in values:
            sizes = list(SHAPES["qwen3-30b-a3b"])
            sizes[place] = value
            rows += [
                row("qwen3-30b-a3b", FORWARD, each, sweep=sweep, sizes={"qwen3-30b-a3b": tuple(sizes)})
                for each in (MOEKERN, CEILING, "grouped_mm")
            ]
    return Record("2030-01-02T03:04:05+00:00", "moekern bench --shape all --report <b>.html", MACHINE, rows)
