"""Adds the machine and the versions to the record of a benchmark, and keeps the record small."""

from __future__ import annotations

import os
import platform
import shlex
from typing import Any

import pytest
import torch

from cases import PARAMETERS, cases
from moekern import _core
from moekern.bench.facts import commit
from moekern.bench.shapes import SHAPES
from moekern.report import machine
from moekern.report.machine import driver_version

PACKAGES = ("moekern", "torch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "transformers")
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # settings that change the figures of torch's operators


def facts() -> dict[str, Any]:
    """The facts about this machine that a reader needs to compare its figures with another's."""
    versions = {name: machine.package_version(name) for name in PACKAGES}
    return {
        "cpu": machine.cpu_name(),
        "cpu_features": machine.cpu_features(),
        "cpu_isa": _core.cpu_isa(),
        "cores": machine.usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name, version in versions.items() if version},
        "commit": commit(__file__),
        **(gpu_facts() if torch.cuda.is_available() else {}),
    }


def gpu_facts() -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(), "driver": driver_version(), "cuda": torch.version.cuda}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes", default="", help="benchmarks of the experts on these shapes of moekern.bench.shapes, with commas"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """As in the tests: GPU benchmarks are skipped without a GPU; with one, torch may serve cases without a kernel."""
    quiet = pytest.mark.filterwarnings("ignore:moekern.*runs through torch:UserWarning")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(quiet if torch.cuda.is_available() else pytest.mark.skip(reason="no CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The values of `case`: all of the suite, but small ones if each benchmark runs once, as in `make test`."""
    if "case" in metafunc.fixturenames:
        names = [name for name in metafunc.config.getoption("--shapes").split(",") if name]
        if unknown := [name for name in names if name not in SHAPES]:
            raise pytest.UsageError(f"--shapes: got {unknown[0]!r}, expected of {', '.join(SHAPES)}")
        once = bool(metafunc.config.getoption("--benchmark-disable"))
        found = cases(once, metafunc.function.__name__, names)
        metafunc.parametrize("case", found)


def pytest_benchmark_generate_machine_info(config: Any) -> dict[str, Any]:
    """Replaces pytest-benchmark's own description, which names the host but not the cores or the versions."""
    waiting = [f"{name}={os.environ[name]}" for name in THREADS if name in os.environ]
    arguments = [*waiting, "python", "-m", "pytest", *map(shlex.quote, config.invocation_params.args)]
    return {**facts(), "command": " ".join(arguments)}


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Drops every single timing, megabytes that the statistics sum up, and rounds the rest to four figures.

    The sizes and names of a case of the suite, which pytest-benchmark cannot write, become the parameters.
    """
    for local in ("project", "branch"):
        output_json["commit_info"].pop(local, None)
    for record in output_json["benchmarks"]:
        if "case" in (record["params"] or {}):
            record["params"] = {name: record["extra_info"].pop(name) for name in PARAMETERS}
        stats = record["stats"]
        stats.pop("data", None)
        record["stats"] = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in stats.items()}
