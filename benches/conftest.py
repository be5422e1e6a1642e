"""Says on what machine and with which versions a benchmark was recorded, and keeps the record small."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("moekern", "torch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "transformers")


def cpu_model() -> str:
    """Name of the processor as the kernel gives it; the machine type where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine's in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a figure depends on, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with "+" behind it if tracked files differ from it; empty outside a checkout."""
    try:
        folder = Path(__file__).parent
        head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, text=True)
        changed = subprocess.call(["git", "diff", "--quiet", "HEAD"], cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """Everything about this machine that a reader of a figure needs to compare it with another."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": installed_versions(),
        "commit": commit(),
    }
    try:
        from moekern import _core

        facts["cpu_isa"] = _core.cpu_isa()
    except (ImportError, AttributeError):
        facts["cpu_isa"] = "unknown"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def pytest_benchmark_generate_machine_info(config: Any) -> dict[str, Any]:
    """Replaces pytest-benchmark's own description, which names the host but not the cores or the versions."""
    return {**machine(), "command": " ".join(["python -m pytest", *map(shlex.quote, config.invocation_params.args)])}


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Drops every single timing, megabytes that the statistics sum up, and rounds the rest to four figures."""
    for local in ("project", "branch"):
        output_json["commit_info"].pop(local, None)
    for record in output_json["benchmarks"]:
        stats = record["stats"]
        stats.pop("data", None)
        record["stats"] = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in stats.items()}
