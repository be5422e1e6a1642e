"""Turns records of `make bench` into tables: python benches/report.py benches/results/NAME.json writes NAME.md.

A section a benchmark group, a row a case. Columns are the parameters that vary, the median with the middle half of the
rounds, and whatever the benchmark put into ``extra_info`` (rates, shares of a bound, what it was compared with).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def duration(seconds: float) -> str:
    """Three figures in the unit that leaves them in front of the point: 0.00123 -> "1.23 ms"."""
    scale, unit = next(((s, u) for s, u in UNITS if seconds >= s), UNITS[-1])
    return f"{figure(seconds / scale)} {unit}"


def figure(value: Any) -> str:
    """A number with three figures and no exponent; anything else as it prints."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or value != value or abs(value) >= 100:
        return f"{value:.0f}"
    rounded = f"{value:#.3g}"
    return rounded if "e" not in rounded else f"{value:g}"


def ordered_keys(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """Keys of all of them, in the order of first appearance."""
    return list(dict.fromkeys(key for d in dicts for key in d))


def table(records: list[dict[str, Any]]) -> str:
    """One markdown table; a parameter that is the same everywhere is left to the caption."""
    params = [record.get("params") or {} for record in records]
    extras = [record.get("extra_info") or {} for record in records]
    param_keys, extra_keys = ordered_keys(params), ordered_keys(extras)
    names = [record["name"].split("[")[0].removeprefix("test_").removeprefix("bench_") for record in records]
    named = len(set(names)) > 1 or not param_keys

    header = [*(["case"] if named else []), *param_keys, "median", "middle half", *extra_keys]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for record, name, param, extra in zip(records, names, params, extras, strict=True):
        stats = record["stats"]
        cells = [
            *([name] if named else []),
            *(figure(param.get(key, "")) for key in param_keys),
            duration(stats["median"]),
            f"{duration(stats['q1'])} – {duration(stats['q3'])}",
            *(figure(extra.get(key, "")) for key in extra_keys),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(record: dict[str, Any], title: str) -> str:
    """The whole page for one record, as pytest-benchmark wrote it with benches/conftest.py's additions."""
    facts = record["machine_info"]
    parts = [
        f"# {title}",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, instruction set `{facts['cpu_isa']}`"
        + (f"; {facts['gpu']}, CUDA {facts['cuda']}" if "gpu" in facts else "")
        + f"; Python {facts['python']}, "
        + ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
        + f"; commit {facts['commit'] or 'unknown'}; {record['datetime'][:10]}.",
        f"    {facts['command']}",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for benchmark in record["benchmarks"]:
        groups.setdefault(benchmark.get("group") or benchmark["fullname"].split("::")[0], []).append(benchmark)
    for group, records in groups.items():
        parts += [f"## {group}", table(records)]
    return "\n\n".join(parts) + "\n"


def main(paths: list[str]) -> None:
    """Writes one page a record."""
    if not paths:
        sys.exit("usage: python benches/report.py RECORD.json …")
    for path in map(Path, paths):
        page = path.with_suffix(".md")
        page.write_text(report(json.loads(path.read_text()), path.stem))
        print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
