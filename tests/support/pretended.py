"""Runs a script with the driver of pretended_driver.c in place of CUDA's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def run(program: str, folder: Path) -> str:
    """The program's standard output, then its errors, stripped. The library is built in `folder`."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler, or not Linux")
    source, library = Path(__file__).with_name("pretended_driver.c"), folder / "libcuda.so.1"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", library, source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return (result.stdout + result.stderr).strip()
