"""The contents of the wheel and of the source distribution, which builds and installs without the checkout."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import moekern

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed; builds share the checkout's target folder, so that crates compile once.

    maturin leaves its library there too, under one name, so pytest-xdist's workers build one after the other.
    """
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    target.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "CARGO_TARGET_DIR": str(target), **environment}
    # maturin's build backend looks for the maturin program on the PATH, and a venv need not be activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    with open(target / "packaging.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def only(paths: list[Path]) -> Path:
    assert len(paths) == 1, paths
    return paths[0]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "maturin", "build", "--release", "--locked", "-i", sys.executable, "--out", out, cwd=ROOT)
    return only(list(out.glob("*.whl")))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "maturin", "sdist", "--out", out, cwd=ROOT)
    return only(list(out.glob("*.tar.gz")))


@pytest.fixture(scope="session")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return only(list(folder.iterdir()))


@pytest.fixture(scope="session")
def wheel_from_sdist(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, through the build backend, with the maturin that is installed."""
    out = tmp_path_factory.mktemp("wheel-from-sdist")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out),
        unpacked_sdist,
        cwd=out,
    )
    return only(list(out.glob("*.whl")))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def sources(folder: str, *suffixes: str) -> set[str]:
    """Files of that folder of the checkout, relative to it."""
    base = ROOT / folder
    return {str(path.relative_to(base)) for path in base.rglob("*") if path.suffix in suffixes}


def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    names = contents(wheel)
    assert {"moekern/_core.abi3.so", "moekern/_core.pyi", "moekern/py.typed"} <= names
    assert {f"moekern/{name}" for name in sources("python/moekern", ".py", ".pyi")} <= names


def test_wheel_ships_the_kernels_as_sources(wheel: Path) -> None:
    shipped = {name.removeprefix("moekern/cuda/") for name in contents(wheel) if name.startswith("moekern/cuda/")}
    assert shipped == sources("cuda", ".cu", ".cuh")
    assert shipped


def test_wheel_puts_nothing_else_into_site_packages(wheel: Path) -> None:
    top = {name.split("/")[0] for name in contents(wheel)}
    assert top == {"moekern", f"moekern-{moekern.__version__}.dist-info"}
    stray = [name for name in contents(wheel) if "__pycache__" in name or name.endswith((".pyc", ".rs", ".toml"))]
    assert stray == []


def test_wheel_serves_every_python_from_3_11(wheel: Path) -> None:
    assert re.fullmatch(rf"moekern-{re.escape(moekern.__version__)}-cp311-abi3-\w+\.whl", wheel.name)


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        dist_info = f"moekern-{moekern.__version__}.dist-info"
        info = metadata.PathDistribution(zipfile.Path(archive, f"{dist_info}/")).metadata
        assert f"{dist_info}/licenses/LICENSE" in archive.namelist()
    assert info["Name"] == "moekern"
    assert info["License-Expression"] == "Apache-2.0"
    assert info["Requires-Python"] == ">=3.11"
    assert set(info.get_all("Provides-Extra")) == {"cuda12", "cuda13", "hf", "bench", "test"}
    required = [line for line in info.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in required} == {"torch", "rich", "tqdm"}


def test_version_is_stated_once() -> None:
    stated = re.findall(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert stated == [moekern.__version__] == [metadata.version("moekern")]
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_sdist_holds_what_a_build_needs(unpacked_sdist: Path) -> None:
    names = {str(path.relative_to(unpacked_sdist)) for path in unpacked_sdist.rglob("*") if path.is_file()}
    assert {"LICENSE", "README.md", "Cargo.toml", "Cargo.lock", "pyproject.toml"} <= names
    assert {f"cuda/{name}" for name in sources("cuda", ".cu", ".cuh")} <= names
    assert {f"rust/{name}" for name in sources("rust", ".rs") if "/tests/" not in name} <= names
    assert {f"python/moekern/{name}" for name in sources("python/moekern", ".py", ".pyi", ".typed")} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_sdist_builds_the_same_wheel(wheel: Path, wheel_from_sdist: Path) -> None:
    assert contents(wheel_from_sdist) == contents(wheel)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(wheel_from_sdist) as theirs:
        for name in contents(wheel):
            if name.startswith("moekern/") and not name.endswith(".so"):
                assert ours.read(name) == theirs.read(name), name


def test_wheel_from_sdist_plans_and_computes(wheel_from_sdist: Path, tmp_path: Path) -> None:
    """In a process that sees only the installed folder and torch's, from a folder that is not the checkout."""
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel_from_sdist, cwd=tmp_path)
    torch_site = Path(torch.__file__).parents[1]
    script = f"""
import sys
sys.path[:0] = [{str(site)!r}, {str(torch_site)!r}]
import torch
import moekern as mk

assert mk.__file__.startswith({str(site)!r}), mk.__file__
plan = mk.plan(torch.tensor([[1, 0], [-1, 1]]), num_experts=2)
assert plan.offsets.tolist() == [0, 1, 3], plan.offsets
layer = mk.MoE(hidden_size=16, intermediate_size=8, num_experts=2, top_k=1)
layer(torch.randn(3, 16)).sum().backward()
print(mk.__version__)
"""
    printed = run(sys.executable, "-I", "-S", "-c", script, cwd=tmp_path)
    assert printed.split()[-1] == moekern.__version__
