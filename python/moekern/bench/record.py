"""The record of one run of `moekern bench`, as dataclasses and as JSON.

Times are in seconds, sizes in bytes, rates in GB/s; None stands for a value that was not measured. A record may come
from an older or newer program: an unknown version, a missing field and a wrong type are ValueErrors that name it.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

VERSION = 1

OK, WRONG, SKIPPED, FAILED = STATUSES = ("ok", "wrong", "skipped", "failed")
MOEKERN, CEILING = "moekern", "ceiling"
FORWARD, BOTH, DECODE = VERBS = ("forward", "forward+backward", "decode")

Made = TypeVar("Made")


@dataclass
class Machine:
    """Where a record was made. ``copy_gbps`` counts bytes read plus bytes written; ``gpu`` is None on a CPU."""

    cpu: str
    cpu_threads: int
    isa: str
    gpu: str | None
    driver: str | None
    torch: str
    cuda: str | None
    python: str
    moekern: str
    commit: str
    system: str = ""
    transformers: str | None = None
    copy_gbps: float | None = None


@dataclass
class Row:
    """One verb of one implementation at one shape.

    shape: name of the shape; in a sweep, tokens, experts or top_k hold the sweep's value.
    verb: one of VERBS. implementation: "moekern", "ceiling" or a peer's name.
    status: "ok"; "wrong": measured, but the result is off by ``error``; "skipped": not available here, or not for this
        shape; "failed": it raised. ``reason`` says why; for "ok" it is a remark or empty.
    seconds, low, high: median and quartiles of ``runs`` runs.
    flops: of the verb, 6TKHI forward and 18TKHI with the backward pass. bytes: the fewest that it must move.
    share: the ceiling's time over this one's, the median of pairs run one after the other; 1 for the ceiling itself.
    error: relative error in the Frobenius norm against float32, the largest of all results.
    saved_bytes: kept between forward and backward. peak_bytes: the most allocated during the verb, inputs not counted.
    sweep: "tokens", "experts" or "top_k" if the row belongs to a series over that size, else None.
    """

    shape: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str
    routing: str
    device: str
    verb: str
    implementation: str
    status: str
    reason: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    share: float | None = None
    error: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    sweep: str | None = None

    @property
    def case(self) -> tuple[Any, ...]:
        """The key of the work, without the implementation: rows of one case are comparable."""
        return (self.shape, self.tokens, self.hidden, self.intermediate, self.experts, self.top_k, self.dtype,
                self.routing, self.device, self.verb, self.sweep)  # fmt: skip

    @property
    def tflops(self) -> float | None:
        """10^12 floating-point operations per second."""
        return self.flops / self.seconds / 1e12 if self.seconds else None

    @property
    def gbps(self) -> float | None:
        """10^9 of the minimum bytes per second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else None


@dataclass
class Record:
    """A run of the benchmark. ``made`` is an ISO time with its zone; ``command`` repeats the run."""

    made: str
    command: str
    machine: Machine
    rows: list[Row] = field(default_factory=list)
    version: int = VERSION


def save(record: Record, path: str | Path) -> None:
    """Write as JSON, floats to six figures, one row per line so that records can be compared by eye."""
    head = {"version": record.version, "made": record.made, "command": record.command}
    lines = ["{", *(f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items())]
    lines.append(f' "machine": {json.dumps(rounded(asdict(record.machine)))},')
    lines.append(' "rows": [')
    lines.append(",\n".join("  " + json.dumps(rounded(asdict(row))) for row in record.rows))
    lines += [" ]", "}"]
    Path(path).write_text("\n".join(lines) + "\n")


def load(path: str | Path) -> Record:
    """Read what :func:`save` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a record, or one of another version; the message names the file and the field.
    """
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or "version" not in content or "rows" not in content:
        raise ValueError(f"{path}: not a record of moekern bench, which has the fields version and rows")
    if content["version"] != VERSION:
        raise ValueError(f"{path}: got a record of version {content['version']!r}, expected {VERSION}")
    if not isinstance(content["rows"], list):
        raise ValueError(f"{path}: rows: got {type(content['rows']).__name__}, expected a list")
    machine = make(Machine, content.get("machine"), f"{path}: machine")
    rows = [make(Row, row, f"{path}: rows[{i}]") for i, row in enumerate(content["rows"])]
    return make(Record, {**content, "machine": machine, "rows": rows}, str(path))


def make(kind: type[Made], values: Any, where: str) -> Made:
    """An instance of a dataclass from a dictionary; unknown keys are dropped, so that fields can be added later."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: got {type(values).__name__}, expected an object")
    hints = get_type_hints(kind)
    known: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name in values:
            known[entry.name] = checked(values[entry.name], hints[entry.name], f"{where}: {entry.name}")
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{where}: the field {entry.name} is missing")
    if "status" in known and known["status"] not in STATUSES:
        raise ValueError(f"{where}: status: got {known['status']!r}, expected one of {', '.join(STATUSES)}")
    return kind(**known)


def checked(value: Any, hint: Any, where: str) -> Any:
    """The value, if it has the annotated type; whole numbers serve as floats."""
    origin = typing.get_origin(hint)
    kinds = get_args(hint) if origin in (types.UnionType, typing.Union) else (origin or hint,)
    accepted = tuple({*kinds, int} if float in kinds else kinds)
    if isinstance(value, bool) or not isinstance(value, accepted):
        names = " or ".join(kind.__name__.replace("NoneType", "null") for kind in kinds)
        raise ValueError(f"{where}: got {value!r}, expected {names}")
    return value


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Six significant figures: more than any clock gives, fewer digits in the file."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}
