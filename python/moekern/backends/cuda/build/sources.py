"""The CUDA sources: where they are, their text with includes in place, and the name of one variant of a kernel."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from moekern.backends.cuda.build.errors import KernelError
from moekern.backends.cuda.build.wgmma import wgmma_source

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*$')


@dataclass(frozen=True)
class KernelSource:
    """One compilation: a file of the CUDA directory and the macros that choose the variant."""

    file: str
    macros: tuple[tuple[str, int | str], ...] = ()

    @staticmethod
    def of(file: str, **macros: int | str) -> KernelSource:
        """Make a source of its macros, in canonical order; True and False are 1 and 0."""
        return KernelSource(file, tuple(sorted((n, int(v) if isinstance(v, bool) else v) for n, v in macros.items())))

    def __str__(self) -> str:
        return " ".join([self.file, *(f"{name}={value}" for name, value in self.macros)])


def cuda_directory() -> Path:
    """The directory of the CUDA sources: `MOEKERN_CUDA_DIR`, the installed package's, or a source checkout's."""
    chosen = os.environ.get("MOEKERN_CUDA_DIR")
    if chosen:
        candidates = [Path(chosen)]
    else:
        package = Path(__file__).resolve().parents[3]
        candidates = [package / "cuda", package.parents[1] / "cuda"]
    for candidate in candidates:
        if (candidate / "hopper.cuh").is_file():
            return candidate
    raise KernelError(
        f"the CUDA sources are not in {' or '.join(map(str, candidates))}; reinstall moekern or set MOEKERN_CUDA_DIR "
        "to a directory that holds hopper.cuh"
    )


@cache
def _wgmma_lines() -> list[str]:
    return wgmma_source().splitlines()


@lru_cache(maxsize=64)
def _lines_of(path: str, changed: int, size: int) -> list[tuple[str, str | None]]:
    """The lines of a file, and of those that include another one its name; read again when the file has changed."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    includes = (_INCLUDE.match(line) if "#" in line else None for line in lines)
    return [(line, found[1] if found else None) for line, found in zip(lines, includes, strict=True)]


def expand(file: str) -> str:
    """The text of a source with its quoted includes inserted, each file once."""
    directory = cuda_directory()
    seen: set[str] = set()

    def lines_of(name: str) -> list[str]:
        if name in seen:
            return []
        seen.add(name)
        if name == "wgmma.cuh":
            return _wgmma_lines()
        path = directory / name
        try:
            state = path.stat()
            lines = _lines_of(str(path), state.st_mtime_ns, state.st_size)
        except OSError as error:
            raise KernelError(f"cannot read the CUDA source {path}: {error}") from error
        out = [f'#line 1 "{name}"']
        for number, (line, include) in enumerate(lines, 1):
            if include is not None:
                out += [*lines_of(include), f'#line {number + 1} "{name}"']
            elif line != "#pragma once":
                out.append(line)
        return out

    return "\n".join(lines_of(file)) + "\n"
