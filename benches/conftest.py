"""Says on what machine and with which versions a benchmark was recorded, and keeps the record small."""

from __future__ import annotations

import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from moekern import _core, machine

PACKAGES = ("moekern", "torch", "numpy", "cupy-cuda12x", "cupy-cuda13x", "transformers")


def commit() -> str:
    """The checkout's commit, with "+" behind it if tracked files differ from it; empty outside a checkout."""
    try:
        folder = Path(__file__).parent
        head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, text=True)
        changed = subprocess.call(["git", "diff", "--quiet", "HEAD"], cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if changed else "")


def facts() -> dict[str, Any]:
    """Everything about this machine that a reader of a figure needs to compare it with another."""
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
        "commit": commit(),
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
    }


def pytest_benchmark_generate_machine_info(config: Any) -> dict[str, Any]:
    """Replaces pytest-benchmark's own description, which names the host but not the cores or the versions."""
    return {**facts(), "command": " ".join(["python -m pytest", *map(shlex.quote, config.invocation_params.args)])}


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Drops every single timing, megabytes that the statistics sum up, and rounds the rest to four figures."""
    for local in ("project", "branch"):
        output_json["commit_info"].pop(local, None)
    for record in output_json["benchmarks"]:
        stats = record["stats"]
        stats.pop("data", None)
        record["stats"] = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in stats.items()}
