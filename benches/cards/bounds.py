"""Builds of the gathering kernels without their gather. Results are wrong; the times are the gather's limit."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from moekern.backends.cuda.build import sources

# Every cp.async of a gather uses one of these macros; as a comment it still takes its operands.
COPIES = {"hopper.cuh": "COPY_16", "wgrad.cu": "COPY"}
INSTRUCTION = '"cp.async.cg.shared.global.L2::256B "'


def without_copies() -> None:
    """Copy the CUDA sources to a directory, with the gathers' copies as comments, and build kernels from there."""
    directory = Path(tempfile.mkdtemp())
    shutil.copytree(sources.cuda_directory(), directory, dirs_exist_ok=True)
    for file, name in COPIES.items():
        text = (directory / file).read_text()
        copies = f"#define {name} {INSTRUCTION}"
        assert text.count(copies) == 1
        (directory / file).write_text(text.replace(copies, f'#define {name} "// "'))
    os.environ["MOEKERN_CUDA_DIR"] = str(directory)
