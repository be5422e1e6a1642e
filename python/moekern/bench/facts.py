"""The facts of a measurement: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import moekern
from moekern import _core
from moekern.bench.record import Machine
from moekern.report import machine
from moekern.report.machine import driver_version

COMMIT_VARIABLE = "MOEKERN_COMMIT"


def commit(file: str | Path = __file__) -> str:
    """The commit of the checkout that holds this file, with "+" if tracked files differ from it; else empty.

    A file that git does not track, such as an installed package in a project's folder, has no commit. The environment
    variable MOEKERN_COMMIT names the commit of a copy of the sources on another machine.
    """
    path = Path(file).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=path.parent, capture_output=True, text=True, timeout=10)

    try:
        if git("ls-files", "--error-unmatch", path.name).returncode != 0:
            return os.environ.get(COMMIT_VARIABLE, "")
        head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        return head + ("+" if git("diff", "--quiet", "HEAD").returncode else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT_VARIABLE, "")


def machine_of(device: str) -> Machine:
    """The facts about this machine, without its copy rate, which is measured later."""
    on_gpu = device == "cuda"
    return Machine(
        cpu=machine.cpu_name(),
        cpu_threads=torch.get_num_threads(),
        isa=_core.cpu_isa(),
        gpu=torch.cuda.get_device_name() if on_gpu else None,
        driver=driver_version() if on_gpu else None,
        torch=torch.__version__,
        cuda=torch.version.cuda if on_gpu else None,
        python=platform.python_version(),
        moekern=moekern.__version__,
        commit=commit(),
        system=f"{platform.system()} {platform.machine()}",
        transformers=machine.package_version("transformers"),
    )
