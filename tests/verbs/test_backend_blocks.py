"""`with mk.backend(...)` in threads, tasks, generators and compiled code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

import moekern as mk
from moekern.verbs import backend as dispatch


@pytest.fixture(autouse=True)
def _default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_default", "auto")


def test_threads_overlap() -> None:
    """Each sees its own block; none stays in force, in any order of leaving."""
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        seen.append(dispatch.current())
        with mk.backend("cpu"):
            entered.set()
            leave.wait(60)
            seen.append(dispatch.current())
        seen.append(dispatch.current())

    thread = threading.Thread(target=other)
    with mk.backend("reference"):
        thread.start()
        assert entered.wait(60)
        assert dispatch.current() == "reference"
    assert dispatch.current() == "auto"
    leave.set()
    thread.join()
    assert seen == ["auto", "cpu", "auto"]
    assert dispatch.current() == "auto"
    assert not dispatch._open


def test_tasks_overlap() -> None:
    async def run(name: str, first: float, second: float) -> list[str]:
        await asyncio.sleep(first)
        with mk.backend(name):
            await asyncio.sleep(second)
            inside = dispatch.current()
        return [inside, dispatch.current()]

    async def both() -> list[list[str]]:
        return await asyncio.gather(run("cpu", 0, 0.02), run("reference", 0.01, 0.03))

    assert asyncio.run(both()) == [["cpu", "auto"], ["reference", "auto"]]


def test_blocks_left_in_another_order() -> None:
    def generator(name: str) -> Iterator[None]:
        with mk.backend(name):
            yield

    first, second = generator("cpu"), generator("reference")
    next(first)
    next(second)
    first.close()
    assert dispatch.current() == "reference"
    second.close()
    assert dispatch.current() == "auto"
    third = generator("reference")
    thread = threading.Thread(target=lambda: next(third))
    thread.start()
    thread.join()
    with mk.backend("cpu"):
        third.close()  # entered in another thread
        assert dispatch.current() == "cpu"
    assert dispatch.current() == "auto"


def test_one_block_entered_twice() -> None:
    block = mk.backend("reference")
    with block:
        with mk.backend("cpu"):
            with block:
                assert dispatch.current() == "reference"
            assert dispatch.current() == "cpu"
        assert dispatch.current() == "reference"
    assert dispatch.current() == "auto"


@pytest.mark.parametrize("on_context", [True, False])
def test_compiled_code_guards_on_it(on_context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a Dynamo that knows no context variables."""
    monkeypatch.setattr(dispatch, "_guards_on_context", on_context and dispatch._guards_on_context)
    torch.compiler.reset()

    def name_as_number(x: torch.Tensor) -> torch.Tensor:
        return x + dispatch.BACKENDS.index(dispatch.current())

    compiled = torch.compile(name_as_number, backend="eager", fullgraph=True)
    for name in ("auto", "reference", "cpu", "reference"):
        with mk.backend(name):
            assert compiled(torch.zeros(())) == dispatch.BACKENDS.index(name)
        assert compiled(torch.zeros(())) == 0


def test_a_block_in_compiled_code() -> None:
    torch.compiler.reset()

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with mk.backend("reference"):
            inside = x + dispatch.BACKENDS.index(dispatch.current())
        return inside, x + dispatch.BACKENDS.index(dispatch.current())

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for _ in range(2):
        assert [int(t) for t in compiled(torch.zeros(()))] == [dispatch.BACKENDS.index("reference"), 0]
        assert dispatch.current() == "auto"


def test_a_backward_pass_in_threads_of_autograd() -> None:
    """Deeply nested backward passes leave the calling thread, as all do on a GPU; checkpoints read the name there."""
    seen: list[tuple[int, str]] = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, depth: int) -> torch.Tensor:  # type: ignore[override]
            ctx.depth = depth  # type: ignore[attr-defined]
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            seen.append((threading.get_ident(), dispatch.current()))
            if ctx.depth:  # type: ignore[attr-defined]
                with torch.enable_grad():
                    x = torch.ones((), requires_grad=True)
                    Nested.apply(x, ctx.depth - 1).backward()  # type: ignore[attr-defined]
            return grad, None

    for name in ("reference", "auto"):
        seen.clear()
        with mk.backend(name):
            Nested.apply(torch.ones((), requires_grad=True), 70).backward()  # type: ignore[no-untyped-call]
        assert len({thread for thread, _ in seen}) > 1
        assert {name for _, name in seen} == {name}
