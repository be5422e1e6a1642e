"""What mkdocs does before it builds the site: pages from the whole repository at their places, and the reference.

Links in the texts are those of the repository (`../cuda/README.md`); they work on the site because every page keeps its
path.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("*.md", "LICENSE", "cuda/*.md", "benches/results/*.md")
ROLE = re.compile(
    r":(?:attr|class|data|func|meth|mod|obj):<code>~?"
)  # Sphinx's, which docstrings use and mkdocs does not know


def on_files(files: Files, config: Any) -> Files:
    """The files of docs/ under their paths in the repository, the texts outside of docs/, and the reference's pages."""
    for file in list(files):
        if file.abs_src_path and (ROOT / "docs") in Path(file.abs_src_path).parents:
            files.remove(file)
            if file.inclusion.is_included():
                files.append(File.generated(config, f"docs/{file.src_uri}", abs_src_path=file.abs_src_path))
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name, content in reference().items():
        files.append(File.generated(config, f"api/{name}.md", content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """The page without the roles of its docstrings: `:func:` in front of a name in code."""
    return ROLE.sub("<code>", html)


def reference() -> dict[str, str]:
    """The reference's pages by name: directives that mkdocstrings fills from the docstrings."""
    found = public(ROOT / "python/moekern/__init__.py")
    names = [f"::: {where}.{name}\n    options: {{heading_level: 2}}\n" for name, where in sorted(found.items())]
    module = "# {0}\n\n::: {0}\n    options: {{show_root_heading: false, heading_level: 2}}\n"
    return {
        "moekern": "\n".join(["# Public names\n\n`import moekern as mk`; everything here is `mk.NAME`.\n", *names]),
        "upcycling": module.format("moekern.layer.upcycling"),
        "hf": module.format("moekern.hf"),
    }


def public(path: Path) -> dict[str, str]:
    """The names in a module's `__all__` without the version, each with the module that it is imported from."""
    body = ast.parse(path.read_text()).body
    imported = {
        name.asname or name.name: node.module or ""
        for node in body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {name: imported[name] for name in ast.literal_eval(node.value) if name != "__version__"}
    raise ValueError(f"{path} has no __all__")
