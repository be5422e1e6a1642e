"""The imports of the package: they point down only, in no circle, and at no other file's private names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "moekern"

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
    ("moekern.backends.cuda.passes",),
    ("moekern.backends.cuda.build.variants",),
    ("moekern.backends.cuda.kernels",),
    ("moekern.backends.cuda.launch",),
    ("moekern.backends.cuda.build", "moekern.backends.cuda.configuration", "moekern.backends.cuda.torch_path"),
    ("moekern.backends.reference", "moekern.backends.cpu"),
    ("moekern.backends.activations",),
    ("moekern.backends.pointers", "moekern.backends.observers"),
    ("moekern._core",),
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


def rank(module: str) -> int:
    fitting = [
        (len(prefix), i)
        for i, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fitting)[1]


ARROWS = sorted({(name, module) for name, path in FILES.items() for module, _ in imports(path) if module != name})


def test_arrows_point_down() -> None:
    assert len(ARROWS) > 200
    upwards = [f"{a} -> {b}" for a, b in ARROWS if rank(b) < rank(a)]
    assert not upwards, "\n".join(upwards)


def test_there_is_no_circle() -> None:
    below: dict[str, set[str]] = {}
    for a, b in ARROWS:
        below.setdefault(a, set()).add(b)
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(below.get(module, ())):
                walk(other, (*way, module))
            done.add(module)

    for module in FILES:
        walk(module, ())


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
