"""Imports, of Python and of Rust: they point down only, in no circle, and at no other file's private names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "moekern"
CRATES = {"moekern_python": ROOT / "rust" / "python" / "src", "moekern_core": ROOT / "rust" / "core" / "src"}

# From the top down; a file may import from its own layer and from those below. The longest name that fits counts.
LAYERS = (
    ("moekern.cli", "moekern.__main__"),
    ("moekern.demo", "moekern.bench"),
    ("moekern.report", "moekern.hf", "moekern.torchtitan"),
    ("moekern",),
    ("moekern.layer",),
    ("moekern.routing",),
    ("moekern.functional",),
    ("moekern.verbs",),
    ("moekern.backends",),
    ("moekern.backends.cuda",),
    ("moekern.backends.cuda.verbs",),
    ("moekern.backends.cuda.passes",),
    ("moekern.backends.cuda.build.variants",),
    ("moekern.backends.cuda.kernels",),
    ("moekern.backends.cuda.launch",),
    ("moekern.backends.cuda.build", "moekern.backends.cuda.configuration", "moekern.backends.cuda.torch_path"),
    ("moekern.backends.reference", "moekern.backends.cpu"),
    ("moekern.backends.call",),
    ("moekern.backends.activations",),
    ("moekern.backends.pointers", "moekern.backends.observers", "moekern.backends.codes"),
    ("moekern._core",),
    ("moekern_python",),
    ("moekern_core",),
    ("moekern_core.experts",),
    ("moekern_core.gemm",),
    ("moekern_core.gemm.nn", "moekern_core.gemm.nt", "moekern_core.gemm.tn"),
    ("moekern_core.gemm.tile", "moekern_core.gemm.pack"),
    ("moekern_core.gemm.grouped",),
    ("moekern_core.gemm.activation",),
    ("moekern_core.permute",),
    ("moekern_core.plan",),
    ("moekern_core.threads",),
    ("moekern_core.memory",),
    ("moekern_core.vector",),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Modules of the package that a file imports, with the name taken from it or None; TYPE_CHECKING's count too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "moekern")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moekern":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole in FILES or whole == "moekern._core"
                yield (whole, None) if is_module else (node.module or "", alias.name)


def rust_name_of(crate: str, path: Path) -> str:
    parts = (crate, *path.relative_to(CRATES[crate]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] in ("lib", "mod") else parts)


RUST_FILES = {rust_name_of(crate, path): path for crate, src in CRATES.items() for path in sorted(src.rglob("*.rs"))}


def used_paths(tree: str) -> Iterator[str]:
    """The paths of a `use` without its keyword: `a::{b, c::{d}}` has `a::b` and `a::c::d`."""
    opened = tree.find("{")
    if opened < 0:
        yield tree.split(" as ")[0].strip()
        return
    depth, start = 0, opened + 1
    for at in range(opened, len(tree)):
        depth += (tree[at] == "{") - (tree[at] == "}")
        if (tree[at], depth) in (("}", 0), (",", 1)):
            if tree[start:at].strip():
                yield from (tree[:opened].strip() + path for path in used_paths(tree[start:at]))
            start = at + 1


def inline_modules(source: str) -> Iterator[tuple[int, int, str]]:
    """Where each `mod name { … }` of a file begins and ends."""
    for found in re.finditer(r"\bmod (\w+) \{", source):
        depth, end = 1, found.end()
        while depth:
            depth += (source[end] == "{") - (source[end] == "}")
            end += 1
        yield found.end(), end, found[1]


def rust_imports(name: str) -> Iterator[str]:
    """Modules of the workspace that a Rust file names, in `use`, in a path or as its own `mod`; those of tests too."""
    source = re.sub(r"//.*", "", RUST_FILES[name].read_text())
    yield from (f"{name}.{module}" for module in re.findall(r"\bmod (\w+);", source))
    inlined = list(inline_modules(source))
    for found in re.finditer(r"\b(?:crate|super|self|moekern_core)::", source):
        end = source.find(";", found.start()) if source[: found.start()].endswith(("use ", "use $")) else None
        tree = source[found.start() : end] if end else re.match(r"[\w:]+", source[found.start() :])[0]  # type: ignore[index]
        for path in used_paths(tree):
            first, *rest = path.split("::")
            base = [*name.split("."), *(inner for start, stop, inner in inlined if start <= found.start() < stop)]
            if first in ("crate", "moekern_core"):
                base = base[:1] if first == "crate" else [first]
            elif first == "super":
                base = base[:-1]
            while rest and rest[0] == "super":
                base, rest = base[:-1], rest[1:]
            whole = [*base, *rest]
            yield next(module for n in range(len(whole), 0, -1) if (module := ".".join(whole[:n])) in RUST_FILES)


def rank(module: str) -> int:
    fitting = [
        (len(prefix), i)
        for i, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fitting)[1]


Arrow = tuple[str, str]
ARROWS = sorted({(name, module) for name, path in FILES.items() for module, _ in imports(path) if module != name})
RUST_ARROWS = sorted({(name, module) for name in RUST_FILES for module in rust_imports(name) if module != name})
BOTH = pytest.mark.parametrize("arrows", [ARROWS, RUST_ARROWS], ids=["python", "rust"])


def upwards(arrows: Iterable[Arrow]) -> list[str]:
    return [f"{a} -> {b}" for a, b in arrows if rank(b) < rank(a)]


def circle(arrows: Iterable[Arrow]) -> str | None:
    """A circle of imports, if there is one."""
    below: dict[str, set[str]] = {}
    for a, b in arrows:
        below.setdefault(a, set()).add(b)
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> str | None:
        if module in way:
            return " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(below.get(module, ())):
                if found := walk(other, (*way, module)):
                    return found
            done.add(module)
        return None

    return next((found for module in below if (found := walk(module, ()))), None)


@BOTH
def test_arrows_point_down(arrows: list[Arrow]) -> None:
    assert len(arrows) > 150
    assert not upwards(arrows), "\n".join(upwards(arrows))


@BOTH
def test_there_is_no_circle(arrows: list[Arrow]) -> None:
    assert circle(arrows) is None


def test_rust_arrows_are_found() -> None:
    """In `use` trees, in paths, in macros, in tests and in inline modules; not in comments."""
    assert ("moekern_core.gemm.nn.pass", "moekern_core.vector.simd") in RUST_ARROWS
    assert ("moekern_core.vector.isa", "moekern_core.vector.avx512") in RUST_ARROWS  # a path in a macro
    assert ("moekern_core.vector.math", "moekern_core.vector.isa") in RUST_ARROWS  # of its tests
    assert ("moekern_python.plan", "moekern_core.plan") in RUST_ARROWS
    assert ("moekern_core.gemm.tile.panels", "moekern_core.gemm.tile.tiles") not in RUST_ARROWS  # of its documentation
    assert sorted(used_paths("a::{b, c::{d as e, f}, *}")) == ["a::*", "a::b", "a::c::d", "a::c::f"]
    assert upwards([("moekern_core.plan.sort", "moekern_core.gemm.pack")]) == [
        "moekern_core.plan.sort -> moekern_core.gemm.pack"
    ]
    assert circle([("a", "b"), ("b", "c"), ("c", "b")]) == "b -> c -> b"


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_anothers_private_name(name: str) -> None:
    private = [f"{module}.{taken}" for module, taken in imports(FILES[name]) if taken and taken.startswith("_")]
    assert [p for p in private if not p.endswith("__")] == []


def test_no_module_is_hidden_by_a_name_of_its_package() -> None:
    """`import moekern.x.y` gives the module y, not a function that the package's face took out of it."""
    for name, path in FILES.items():
        if path.name == "__init__.py":
            taken = {alias for module, alias in imports(path) if alias}
            assert not [t for t in taken if f"{name}.{t}" in FILES], name
