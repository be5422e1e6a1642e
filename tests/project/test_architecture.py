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
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(name: str) -> Iterator[tuple[str, str | None]]:
    """Modules of the package that a file imports, with the name taken from it or None; TYPE_CHECKING's count too."""
    for node in ast.walk(TREES[name]):
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
ARROWS = sorted({(name, module) for name in FILES for module, _ in imports(name) if module != name})
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


def test_every_layer_exists() -> None:
    known = {*FILES, *RUST_FILES, "moekern._core"}
    assert [name for layer in LAYERS for name in layer if name not in known] == []


@pytest.mark.parametrize("name", FILES)
def test_imports_name_the_whole_module(name: str) -> None:
    """A relative import would be an arrow that nothing here sees."""
    nodes = ast.walk(TREES[name])
    assert [ast.unparse(node) for node in nodes if isinstance(node, ast.ImportFrom) and node.level] == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_members(tree: ast.Module) -> set[str]:
    """Private names that a file gives to its classes and objects."""
    found = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                    found.add(inner.name)
                elif isinstance(inner, ast.AnnAssign | ast.Assign):
                    targets = [inner.target] if isinstance(inner, ast.AnnAssign) else inner.targets
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if is_private(name)}


MEMBERS = {name: private_members(tree) for name, tree in TREES.items()}


def foreign_names(tree: ast.Module, name: str) -> Iterator[str]:
    """Private names of other files that a file imports, takes out of a module, or reads from an object."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if "moekern" in alias.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moekern":
            for alias in node.names:
                if f"{node.module}.{alias.name}" in FILES:
                    modules.add(alias.asname or alias.name)
                elif is_private(alias.name) and f"{node.module}.{alias.name}" != "moekern._core":
                    yield f"{node.module}.{alias.name}"
    others = set().union(*(members for other, members in MEMBERS.items() if other != name)) - MEMBERS.get(name, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            path = ast.unparse(node.value).split(".")
            if (path[0] in modules and path[:2] != ["moekern", "_core"]) or node.attr in others:
                yield ast.unparse(node)


@pytest.mark.parametrize("name", FILES)
def test_no_file_uses_anothers_private_name(name: str) -> None:
    assert list(foreign_names(TREES[name], name)) == []


def test_private_names_are_found() -> None:
    """Imported, in a module, in an object; not one's own, and not torch's."""
    taken = max(MEMBERS["moekern.layer.moe"])
    source = f"""
from moekern import _core
from moekern.verbs import ops
from moekern.verbs.ops import _module
import moekern.backends.cpu as cpu
ops._module, cpu._result, layer.{taken}, self._own, torch._C, _core.plan
self._own = 1
"""
    tree = ast.parse(source)
    found = ["moekern.verbs.ops._module", "cpu._result", f"layer.{taken}", "ops._module"]
    assert sorted(foreign_names(tree, "moekern.made_up")) == sorted(found)


def names_given(tree: ast.Module) -> Iterator[str]:
    """Names that a file defines or takes from elsewhere, modules apart."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" not in FILES:
                    yield alias.asname or alias.name


def test_no_module_is_hidden_by_a_name_of_its_package() -> None:
    """`import moekern.x.y` gives the module y, not a function of the package x."""
    for name, path in FILES.items():
        if path.name == "__init__.py":
            assert [given for given in names_given(TREES[name]) if f"{name}.{given}" in FILES] == [], name
