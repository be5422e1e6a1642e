"""Where the suites come from: transformers' source archive or a checkout, and peft's source distribution."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

# The release on the package index has no tests of models.
ARCHIVE = "https://github.com/huggingface/transformers/archive/refs/tags/v{version}.tar.gz"
# Blocks that moekern.hf.replace knows, in models that are not on transformers' experts interface.
OWN_BLOCKS = ("dbrx", "llama4")


def transformers(folder: Path, checkout: str | None) -> Path:
    """The root of transformers' sources: a checkout, or the archive of the installed release, kept in `folder`.

    Raises:
        OSError: The archive cannot be had.
        ValueError: The checkout has no tests.
    """
    if checkout:
        root = Path(checkout).resolve()
        if not (root / "tests" / "models").is_dir() or not (root / "src" / "transformers").is_dir():
            raise ValueError(f"--source: got {checkout}, which lacks tests/models or src/transformers")
        return root
    release = version("transformers")
    root = folder / f"transformers-{release}"
    if not root.is_dir():
        url = ARCHIVE.format(version=release)
        archive = folder / f"{root.name}.tar.gz"
        try:
            download(url, archive)
        except OSError as error:
            raise OSError(
                f"cannot download {url} ({error}): give a checkout of transformers {release} "
                "(make suites TRANSFORMERS_SOURCE=/path/to/transformers)"
            ) from error
        unpack(archive, root)
    return root


def peft(folder: Path) -> Path:
    """The root of the source distribution of the installed peft, kept in `folder`.

    Raises:
        OSError: pip cannot get it.
    """
    root = folder / f"peft-{version('peft')}"
    if not root.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft", "-d", str(folder)]
        done = subprocess.run([*pip, f"peft=={version('peft')}"], capture_output=True, text=True, check=False)
        archive = folder / f"{root.name}.tar.gz"
        if done.returncode or not archive.is_file():
            raise OSError(f"pip cannot download the sources of {root.name}: {done.stderr.strip()[-300:]}")
        unpack(archive, root)
    return root


def download(url: str, path: Path) -> None:
    """Read `url` into a file, which is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    print(f"downloading {url}", flush=True)
    with urllib.request.urlopen(url, timeout=60) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target)
    part.rename(path)


def unpack(archive: Path, root: Path) -> None:
    """Unpack an archive that holds the folder `root.name`, and delete it."""
    part = root.with_suffix(".part")
    with tarfile.open(archive) as tar:
        tar.extractall(part, filter="data")
    (part / root.name).rename(root)
    part.rmdir()
    archive.unlink()


def models(root: Path) -> list[str]:
    """The models of a transformers checkout whose experts moekern can run, by the names of their folders."""
    found = []
    for file in sorted((root / "src" / "transformers" / "models").glob("*/modeling_*.py")):
        name = file.parent.name
        ours = name in OWN_BLOCKS or re.search(r"^@use_experts_implementation", file.read_text("utf-8"), re.MULTILINE)
        if ours and name not in found and test_files(root, name):
            found.append(name)
    return found


def test_files(root: Path, model: str) -> list[str]:
    """The files with a model's tests, relative to the root."""
    return [str(path.relative_to(root)) for path in sorted((root / "tests" / "models" / model).glob("test_model*.py"))]
