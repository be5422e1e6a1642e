"""Writes every figure of the texts from the records: `python benches/records/figures.py`, or `make figures`.

Each record benches/results/NAME.json gets its page NAME.md. In README.md, docs/*.md and other texts a block

    <!-- figures:NAME VIEW … -->anything<!-- /figures -->

is filled again from the record NAME. Views:

- of a record of `moekern bench`: `shapes` (a row per shape and verb), `wide` (a row per shape), `grid` (sizes instead
  of names), `memory`, `series tokens` (or experts, top_k), `summary` (sentences), `machine`, `command`; `chart FILE`, a
  picture, which is drawn into that file (from the root of the repository) and shown;
- of one of pytest-benchmark: `table GROUP`; `range GROUP COLUMN [PARAMETER=VALUE …]`, the smallest and largest value of
  a column, where COLUMN may be `median`;
- of one of benches/cards/gpu_experts.py or gpu_permute.py: `columns NAME …`;
- of a page without a record: `match PATTERN`, the first group of a regular expression.

Tables and pictures take their own lines; everything else is part of its sentence.

`--check` writes nothing and exits with 1 if anything would change.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drawings
import tables
from moekern.bench import record as records
from moekern.bench import summary
from moekern.bench.units import duration, figure

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- figures:(.*?) -->(.*?)<!-- /figures -->", re.DOTALL)
UNTRACKED = "latest"  # the record that `make bench` writes without a name; git ignores it
TEXTS = ("README.md", "docs/*.md", "cuda/*.md", "benches/results/README.md")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write or check everything; 1 if `--check` found a difference."""
    parser = argparse.ArgumentParser(description="Writes every figure of the texts from benches/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything would change")
    check = parser.parse_args(arguments).check
    texts = {path: text for path, text in wanted(root).items() if not (check and path.stem == UNTRACKED)}
    changed = {path: text for path, text in texts.items() if not path.exists() or path.read_text() != text}
    for path, text in changed.items():
        print(f"{path.relative_to(root)}{' is not what its records give' if check else ''}")
        if not check:
            path.write_text(text)
    return 1 if check and changed else 0


def wanted(root: Path) -> dict[Path, str]:
    """The contents that every page of a record and every text with blocks should have."""
    results = root / "benches" / "results"
    pages = {path.with_suffix(".md"): tables.page(path) for path in sorted(results.glob("*.json"))}
    paths = [path for pattern in TEXTS for path in sorted(root.glob(pattern)) if path not in pages]
    texts = {path: path.read_text() for path in paths}
    pictures: dict[Path, str] = {}
    for text in texts.values():
        for words in (shlex.split(block[1]) for block in BLOCK.finditer(text)):
            if words[1:2] == ["chart"] and len(words) == 3:
                pictures[root / words[2]] = drawings.speed(records.load(results / f"{words[0]}.json"))
    made = {path: filled(text, results, str(path.relative_to(root))) for path, text in texts.items()}
    return {**pages, **pictures, **made}


def filled(text: str, results: Path, where: str = "text") -> str:
    """The text with all its blocks filled again.

    Raises:
        ValueError: A block names no record, no view of its record, is not closed, or starts a line of its sentence.
    """

    def fill(block: re.Match[str]) -> str:
        words = shlex.split(block[1])
        try:
            content = view(results, words[0], words[1:], Path(where).parent)
        except (LookupError, OSError, ValueError) as error:
            raise ValueError(f"{where}: block figures:{block[1]}: {error}") from error
        if content.startswith(("|", "![")):
            content = f"\n{content}\n"
        elif block.start() == 0 or text[block.start() - 1] == "\n":
            raise ValueError(f"{where}: block figures:{block[1]}: a comment that starts a line ends its paragraph")
        return f"<!-- figures:{block[1]} -->{content}<!-- /figures -->"

    made = BLOCK.sub(fill, text)
    if len(re.findall(r"<!-- figures:", text)) != len(BLOCK.findall(text)):
        raise ValueError(f"{where}: a block of figures lacks its end, <!-- /figures -->")
    return made


def view(results: Path, name: str, words: list[str], folder: Path = Path()) -> str:
    """One view of one record, for a text in `folder` of the repository."""
    if not words:
        raise ValueError("no view is named")
    what, *rest = words
    if what == "match":
        found = re.search(rest[0], (results / f"{name}.md").read_text())
        if found is None:
            raise ValueError(f"{name}.md has nothing like {rest[0]}")
        return found[1]
    path = results / f"{name}.json"
    content = json.loads(path.read_text())
    if "rows" in content:
        if what == "chart" and len(rest) == 1:
            record = records.load(path)
            return f"![{drawings.alternative(record)}]({Path(rest[0]).relative_to(folder)})"
        return view_of_bench(records.load(path), what, rest)
    if what == "table":
        return tables.group_table(tables.groups(content)[rest[0]])
    if what == "range":
        return column_range(tables.groups(content)[rest[0]], rest[1], rest[2:])
    if what == "columns":
        return tables.kernel_columns(content, rest)
    raise ValueError(f"a record of this form has no view {what}")


def view_of_bench(record: records.Record, what: str, rest: list[str]) -> str:
    views = {
        "shapes": lambda: tables.shapes(record),
        "wide": lambda: tables.wide(record),
        "grid": lambda: tables.grid(record),
        "memory": lambda: tables.memory(record),
        "series": lambda: tables.series(record, *rest),
        "summary": lambda: " ".join(summary.sentences(record)),
        "machine": lambda: tables.machine_sentence(record),
        "command": lambda: f"`{record.command}`",
    }
    if what not in views:
        raise ValueError(f"got the view {what}, expected one of {', '.join(views)}, chart FILE")
    return views[what]()


def column_range(cases: list[dict[str, Any]], column: str, conditions: list[str]) -> str:
    """Smallest to largest value of a column where the parameters are as given; a single value stands alone."""
    chosen = dict(condition.split("=", 1) for condition in conditions)
    matching = [
        case
        for case in cases
        if all(str((case.get("params") or {}).get(key)) == value for key, value in chosen.items())
    ]
    if column == "median":
        values = [case["stats"]["median"] for case in matching]
        ends = [duration(min(values)), duration(max(values))]
    else:
        values = [case["extra_info"][column] for case in matching]
        ends = [figure(min(values)), figure(max(values))]
    return " to ".join(dict.fromkeys(ends))


if __name__ == "__main__":
    raise SystemExit(main())
