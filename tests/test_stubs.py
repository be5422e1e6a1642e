"""The stubs of `moekern._core` name exactly what the compiled module has, with the same parameters."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import moekern
from moekern import _core

STUBS = Path(moekern.__file__).with_name("_core.pyi")


def stub_functions() -> dict[str, ast.FunctionDef]:
    tree = ast.parse(STUBS.read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def stub_names() -> set[str]:
    names = set(stub_functions())
    for node in ast.parse(STUBS.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
    return names


def module_names() -> set[str]:
    ignored = {"__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__all__"}
    return set(vars(_core)) - ignored


def test_names_match() -> None:
    assert stub_names() == module_names()


@pytest.mark.parametrize("name", sorted(module_names()))
def test_signature_matches(name: str) -> None:
    member = getattr(_core, name)
    if not callable(member) or isinstance(member, type):
        pytest.skip("not a function")
    arguments = stub_functions()[name].args
    declared = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    parameters = inspect.signature(member).parameters.values()
    assert declared == [p.name for p in parameters]
    optional = len(arguments.defaults) + sum(default is not None for default in arguments.kw_defaults)
    assert optional == sum(p.default is not inspect.Parameter.empty for p in parameters)


@pytest.mark.parametrize("name", sorted(stub_functions()))
def test_every_argument_is_annotated(name: str) -> None:
    function = stub_functions()[name]
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    assert all(a.annotation is not None for a in arguments)
    assert function.returns is not None
