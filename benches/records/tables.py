"""Markdown tables of the records in benches/results, for each form of record.

These write records: `moekern bench` (:mod:`moekern.bench.record`), pytest-benchmark through `make bench`, and, in a
third form, benches/cards/gpu_experts.py and gpu_permute.py. :func:`page` makes a whole page of any of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moekern.bench import record as records
from moekern.bench import summary
from moekern.bench.record import CEILING, DECODE, MOEKERN, OK, VERBS, WRONG, Record, Row
from moekern.bench.units import RATES, duration, figure, size, unit_of

Cells = Sequence[str]


def page(path: Path) -> str:
    """The page of a record, titled like its file.

    Raises:
        ValueError: The file is in none of the three forms, or a field is missing.
    """
    content = json.loads(path.read_text())
    if "rows" in content:
        parts = of_bench(records.load(path))
    elif "benchmarks" in content:
        parts = of_pytest(content)
    elif "figures" in content:
        parts = of_kernels(content)
    else:
        raise ValueError(f"{path}: no record of moekern bench, of pytest-benchmark or of benches/cards/gpu_experts.py")
    return "\n\n".join([f"# {path.stem}", *parts]) + "\n"


def markdown(header: Cells, rows: Iterable[Cells]) -> str:
    """A table without empty columns."""
    rows = [list(row) for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [" | ".join(header[i] for i in kept), " | ".join("---" for _ in kept)]
    lines += [" | ".join(row[i] for i in kept) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


# Records of moekern bench


def of_bench(record: Record) -> list[str]:
    """Machine and command, the outcome in words, every shape, memory, the series, and what was not measured."""
    parts = [machine_sentence(record), f"    {record.command}", " ".join(summary.sentences(record)), shapes(record)]
    if memory(record):
        parts += ["## Memory", "Saved between forward and backward (weights not counted), and peak.", memory(record)]
    for sweep in dict.fromkeys(row.sweep for row in record.rows if row.sweep):
        parts += [f"## Over {sweep}", series(record, sweep)]
    missing = summary.missing(record)
    if missing:
        parts += ["## Not measured, or wrong", markdown(("implementation", "status", "reason", "where"), missing)]
    return [part for part in parts if part]


def machine_sentence(record: Record) -> str:
    """The machine and the versions of a record, in one sentence."""
    m = record.machine
    cpu = f"{m.cpu}, {m.cpu_threads} threads, `{m.isa}`"
    copy = f", memory copies {figure(m.copy_gbps)} GB/s" if m.copy_gbps else ""
    versions = [
        f"Python {m.python}",
        f"torch {m.torch}",
        *([f"transformers {m.transformers}"] if m.transformers else []),
    ]
    gpu = f"{m.gpu}, driver {m.driver}, CUDA {m.cuda}{copy}; {cpu}" if m.gpu else cpu + copy
    return f"{gpu}; {', '.join(versions)}, moekern {m.moekern}; commit {m.commit or 'unknown'}; {record.made[:10]}."


def shapes(record: Record) -> str:
    """A row for each shape and verb: moekern's time, rate and share of the ceiling, and the peers' times over it."""
    return case_table(summary.singles(record), ())


def series(record: Record, sweep: str) -> str:
    """The same for a series over one size."""
    return case_table([row for row in record.rows if row.sweep == sweep], (sweep,))


def case_table(rows: list[Row], sizes: Cells, *, named: bool = True) -> str:
    found = summary.cases(rows)
    varying = [what for what in ("dtype", "routing", "device") if len({getattr(row, what) for row in rows}) > 1]
    peers = [name for name in dict.fromkeys(r.implementation for r in rows) if name not in (MOEKERN, CEILING)]
    factor, unit = unit_of(max((row.tflops or 0.0 for row in rows), default=1.0), RATES)
    header = ["shape" if named else "", *sizes, *varying, "verb", "time", unit, "GB/s", "of ceiling", *peers]
    lines = []
    for of in found.values():
        if MOEKERN not in of:
            continue
        ours = of[MOEKERN]
        decode = ours.verb == DECODE
        lines.append([
            ours.shape if named else "", *(str(getattr(ours, what)) for what in (*sizes, *varying)), ours.verb,
            time_of(ours),
            figure(ours.tflops / factor) if ours.tflops and not decode else "",
            figure(ours.gbps) if ours.gbps and decode else "",
            share_of(ours),
            *(times_ours(of.get(name), ours) for name in peers),
        ])  # fmt: skip
    return markdown(header, lines)


def grid(record: Record) -> str:
    """The same for shapes that differ in few sizes, which replace their names."""
    rows = summary.singles(record)
    sizes = {"experts": "E", "top_k": "K", "tokens": "T", "hidden": "H", "intermediate": "I"}
    varying = [what for what in sizes if len({getattr(row, what) for row in rows}) > 1]
    lines = case_table(rows, varying, named=False).splitlines()
    head = [sizes.get(cell, cell) for cell in lines[0].strip("| ").split(" | ")]
    return "\n".join([f"| {' | '.join(head)} |", *lines[1:]])


def time_of(row: Row) -> str:
    """A time, marked if the result is wrong; or why there is none."""
    if not row.seconds:
        return row.status
    return duration(row.seconds) + (" (wrong)" if row.status == WRONG else "")


def times_ours(peer: Row | None, ours: Row) -> str:
    """A peer's time over ours."""
    if peer is None or not peer.seconds or not ours.seconds or ours.status == WRONG:
        return "" if peer is None else "-"
    ratio = f"{figure(peer.seconds / ours.seconds)}x"
    return f"{ratio} (wrong)" if peer.status == WRONG else ratio


def share_of(row: Row) -> str:
    """The share of the ceiling to two places."""
    return (
        "" if row.share is None or row.status == WRONG else f"{row.share:.2f}" if row.share < 10 else figure(row.share)
    )


def wide(record: Record) -> str:
    """A row for each shape: its verbs next to each other, with the fastest correct peer of each."""
    by_shape: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = {}
    for of in summary.cases(summary.singles(record)).values():
        if MOEKERN in of and of[MOEKERN].seconds:
            row = of[MOEKERN]
            key = (row.shape, row.tokens, row.hidden, row.intermediate, row.experts, row.top_k)
            by_shape.setdefault(key, {}).setdefault(row.verb, of)
    verbs = [verb for verb in VERBS if any(verb in of for of in by_shape.values())]
    header = ["shape", "T, H, I, E, K"]
    for verb in verbs:
        header += [verb, "of ceiling", "fastest peer"]
    lines = []
    for (shape, *sizes), of_verbs in by_shape.items():
        cells = [str(shape), ", ".join(map(str, sizes))]
        for verb in verbs:
            of = of_verbs.get(verb, {})
            ours = of.get(MOEKERN)
            best = summary.peers(of)[:1] if ours else []
            cells += [
                time_of(ours) if ours else "",
                share_of(ours) if ours else "",
                *([f"{times_ours(peer, ours)} {peer.implementation}" for peer in best if ours] or [""]),
            ]
        lines.append(cells)
    return markdown(header, lines)


def memory(record: Record) -> str:
    """Saved and peak bytes of every implementation, one row per case that has them."""
    lines = []
    for of in summary.cases(summary.singles(record)).values():
        lines += [
            (row.shape, row.dtype, row.verb, row.implementation, size(row.saved_bytes or 0), size(row.peak_bytes or 0))
            for row in of.values()
            if row.saved_bytes and row.peak_bytes and row.status == OK
        ]
    return markdown(("shape", "dtype", "verb", "implementation", "saved", "peak"), lines) if lines else ""


# Records of pytest-benchmark, with benches/conftest.py's additions


def of_pytest(record: dict[str, Any]) -> list[str]:
    """One section per benchmark group, one row per case.

    Columns are the parameters that vary, the median with the middle half of the rounds, and the entries of
    ``extra_info``: rates, shares of a bound, comparisons.
    """
    facts = record["machine_info"]
    parts = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, instruction set `{facts['cpu_isa']}`"
        + (f"; {facts['gpu']}, CUDA {facts['cuda']}" if "gpu" in facts else "")
        + f"; Python {facts['python']}, "
        + ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
        + f"; commit {facts['commit'] or 'unknown'}; {record['datetime'][:10]}.",
        f"    {facts['command']}",
    ]
    for group, cases in groups(record).items():
        parts += [f"## {group}", group_table(cases)]
    return parts


def groups(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The benchmarks by group; those without a group, by file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for benchmark in record["benchmarks"]:
        found.setdefault(benchmark.get("group") or benchmark["fullname"].split("::")[0], []).append(benchmark)
    return found


def ordered_keys(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """Keys of all of them, in the order of first appearance."""
    return list(dict.fromkeys(key for d in dicts for key in d))


def group_table(cases: list[dict[str, Any]]) -> str:
    params = [case.get("params") or {} for case in cases]
    extras = [case.get("extra_info") or {} for case in cases]
    param_keys, extra_keys = ordered_keys(params), ordered_keys(extras)
    names = [case["name"].split("[")[0].removeprefix("test_").removeprefix("bench_") for case in cases]
    named = len(set(names)) > 1 or not param_keys
    header = ["case" if named else "", *param_keys, "median", "middle half", *extra_keys]
    lines = [
        [
            name if named else "",
            *(figure(param.get(key, "")) for key in param_keys),
            duration(case["stats"]["median"]),
            f"{duration(case['stats']['q1'])} – {duration(case['stats']['q3'])}",
            *(figure(extra.get(key, "")) for key in extra_keys),
        ]
        for case, name, param, extra in zip(cases, names, params, extras, strict=True)
    ]
    return markdown(header, lines)


# Records of benches/cards/gpu_experts.py and gpu_permute.py


def of_kernels(record: dict[str, Any]) -> list[str]:
    """Every figure of the record: time, rate and share of the ceiling."""
    head = (
        f"{record['card']}, torch {record['torch']}, bfloat16, {record['routing']} routing; of ceiling: the time of "
        f"{record['ceiling']} over own time, the median of paired runs."
    )
    lines = [
        (
            entry["shape"],
            entry["what"],
            f"{entry['ms']:.4f}" if entry.get("ms") else "",
            figure(entry["tflops"]) if entry.get("tflops") else "",
            f"{entry['share']:.3f}" if entry.get("share") else "",
            str(entry.get("run", "")),
        )
        for entry in record["figures"]
    ]
    command = [f"    {record['command']}"] if "command" in record else []
    note = [f"{record['note']}."] if "note" in record else []
    return [head, *command, *note, markdown(("shape", "what", "ms", "TFLOP/s", "of ceiling", "run"), lines)]


def kernel_columns(record: dict[str, Any], whats: Cells) -> str:
    """One row per shape; for each named figure, its share in per cent and its milliseconds, to a microsecond below one.

    Raises:
        ValueError: The record has no figure of a name.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in record["figures"]:
        found.setdefault(entry["shape"], {})[entry["what"]] = entry
    for what in whats:
        if not any(what in of for of in found.values()):
            raise ValueError(f"the record has no figure {what!r}")
    header, places = ["shape"], {}
    for what in whats:
        header += [what.removeprefix("moekern: "), "ms"]
        places[what] = 2 if any(of[what].get("ms", 0) >= 1 for of in found.values() if what in of) else 3
    lines = []
    for shape, of in found.items():
        cells = [shape]
        for what in whats:
            entry = of.get(what, {})
            cells += [
                f"{100 * entry['share']:.1f}" if entry.get("share") else "",
                f"{entry['ms']:.{places[what]}f}" if entry.get("ms") else "",
            ]
        lines.append(cells)
    return markdown(header, lines)
