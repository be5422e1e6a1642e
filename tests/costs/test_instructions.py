"""The CPU verbs' cost in instructions, which a busy machine does not change: bounds on what a change may add."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Measured with rustc 1.95 on x86-64. Counts depend on the compiler, hence a slack of an eighth or so.
# 14.25 instructions per slot for 64 experts, 14.37 for 1024; an added pass over the slots, or bounds checks in both
# passes, would exceed this.
MOST_INSTRUCTIONS_A_SLOT = 16
# Per multiply-add of the matrix products, forward and backward, with all other work: one AVX2 instruction does eight of
# them, and reading and packing need twice as many instructions. Combine: per element of a row.
MOST_INSTRUCTIONS = {
    ("forward", "fp32"): 0.42,  # 0.363
    ("forward", "bf16"): 0.42,  # 0.358
    ("backward", "fp32"): 0.39,  # 0.340
    ("backward", "bf16"): 0.40,  # 0.348
    ("combine", "fp32"): 1.1,  # 0.955
    ("combine", "bf16"): 2.0,  # 1.719
}
UNAVAILABLE = 3  # exit code of verb_once


@pytest.fixture(scope="module")
def examples() -> Path:
    """The folder with the programs that run one verb once."""
    for tool in ("valgrind", "cargo"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if not (ROOT / "Cargo.toml").exists():
        pytest.skip("not a checkout of the sources")
    programs = ["--example", "plan_once", "--example", "verb_once"]
    command = ["cargo", "build", "--release", "--locked", "-p", "moekern-core", *programs]
    output = subprocess.run([*command, "--message-format", "json"], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return Path(re.findall(r'"executable":"([^"]+)"', output.stdout)[-1]).parent


def instructions(program: Path, *arguments: object) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program), *map(str, arguments)]
    output = subprocess.run(command, capture_output=True, text=True)
    if output.returncode == UNAVAILABLE:
        pytest.skip("this processor, or valgrind's picture of it, has no AVX2")
    assert output.returncode == 0, output.stderr
    return int(re.findall(r"Collected : (\d+)", output.stderr)[0])


@pytest.mark.slow
@pytest.mark.parametrize("experts", [64, 1024])
def test_instructions_a_slot(examples: Path, experts: int) -> None:
    program, short, long = examples / "plan_once", 1 << 15, 1 << 16
    # The difference leaves out starting the program and scanning the counters.
    a_slot = (instructions(program, long, experts) - instructions(program, short, experts)) / (long - short)
    assert a_slot <= MOST_INSTRUCTIONS_A_SLOT, f"{a_slot:.2f} instructions per slot"


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "dtype"), MOST_INSTRUCTIONS)
def test_instructions_of_verbs(examples: Path, verb: str, dtype: str) -> None:
    program = examples / "verb_once"
    # Tokens: enough for whole tiles of rows, few enough for an interpreted processor.
    short, long = (512, 1024) if verb == "combine" else (32, 64)
    more = instructions(program, verb, "avx2", dtype, long) - instructions(program, verb, "avx2", dtype, short)
    slots, hidden, inter = 2 * (long - short), 256, 128
    work = slots * hidden * {"combine": 1, "forward": 3 * inter, "backward": 6 * inter}[verb]
    assert more / work <= MOST_INSTRUCTIONS[verb, dtype], f"{more / work:.3f} instructions"
