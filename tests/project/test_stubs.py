"""The stubs of `moekern._core` name exactly what the compiled module has, with the same parameters."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moekern
from moekern import _core

TREE = ast.parse(Path(moekern.__file__).with_name("_core.pyi").read_text())


def declared(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Functions, classes and annotated names of a module or class body."""
    names = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {node.target.id: node for node in body if isinstance(node, ast.AnnAssign)}


def callables() -> list[Any]:
    """(dotted name, its declaration, the compiled function) of every function and method in the stubs."""
    found = []
    for name, node in declared(TREE.body).items():
        member = getattr(_core, name, None)
        if isinstance(node, ast.FunctionDef):
            found.append(pytest.param(node, member, id=name))
        elif isinstance(node, ast.ClassDef):
            for method, function in declared(node.body).items():
                # PyO3 puts the signature of __init__ on the class.
                compiled = member if method in ("__init__", "__new__") else getattr(member, method, None)
                found.append(pytest.param(function, compiled, id=f"{name}.{method}"))
    return found


def test_names_match() -> None:
    compiled = {name for name in vars(_core) if not name.startswith("__")}
    assert set(declared(TREE.body)) == compiled == set(_core.__all__)


@pytest.mark.parametrize("node", [node for node in TREE.body if isinstance(node, ast.ClassDef)], ids=lambda n: n.name)
def test_methods_match(node: ast.ClassDef) -> None:
    stubbed = {name for name in declared(node.body) if not name.startswith("__")}
    assert stubbed == {name for name in vars(getattr(_core, node.name)) if not name.startswith("__")}


@pytest.mark.parametrize(("node", "compiled"), callables())
def test_parameters_match(node: ast.FunctionDef, compiled: Callable[..., Any]) -> None:
    of = node.args
    names = [argument.arg for argument in (*of.posonlyargs, *of.args, *of.kwonlyargs) if argument.arg != "self"]
    parameters = [p for p in inspect.signature(compiled).parameters.values() if p.name != "self"]
    assert names == [parameter.name for parameter in parameters]
    optional = len(of.defaults) + sum(default is not None for default in of.kw_defaults)
    assert optional == sum(parameter.default is not inspect.Parameter.empty for parameter in parameters)


@pytest.mark.parametrize(("node", "compiled"), callables())
def test_everything_is_annotated(node: ast.FunctionDef, compiled: Callable[..., Any]) -> None:
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    assert all(argument.annotation is not None for argument in arguments if argument.arg != "self")
    assert node.returns is not None
