"""pytest with moekern in place of every implementation of transformers' experts.

    SUITES_CALLS=calls SUITES_RECORD=record.jsonl python forced.py PYTEST-ARGUMENTS

Run as a program, so that processes which a test spawns import this file too, and moekern is forced in them as well.
Every call of moekern adds one byte to the file SUITES_CALLS; without that variable nothing is forced. SUITES_RECORD
gets one JSON object per line: what was collected, begun and found.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

CALLS, RECORD = "SUITES_CALLS", "SUITES_RECORD"
# What the default of a model may be, and what tests ask for by name to compare with "eager".
REPLACED = ("grouped_mm", "batched_mm")


def force() -> None:
    """Let moekern run the experts of every transformers model that is made in this process from now on."""
    import torch
    import transformers
    from transformers.integrations import moe as interface

    import moekern.hf
    from moekern.hf import blocks

    if hasattr(interface, "_forced"):  # this file is imported under two names
        return
    interface._forced = True
    calls = os.open(os.environ[CALLS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                os.write(calls, b".")
            return function(*args, **kwargs)

        return call

    forward = counted(moekern.hf.experts_forward)
    for name in (moekern.hf.NAME, *REPLACED):
        interface.ExpertsInterface.register(name, forward)
    for name in REPLACED:
        setattr(interface, f"{name}_experts_forward", forward)
    blocks.experts = counted(blocks.experts)

    model = transformers.PreTrainedModel
    checked, initialise = model.get_correct_experts_implementation, model.__init__

    def default_to_ours(self: Any, requested_experts: str | None) -> str:
        if requested_experts is None and self._can_set_experts_implementation():
            requested_experts = moekern.hf.NAME
        return checked(self, requested_experts)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Not earlier: transformers initialises weights by the classes of modules.
        if not torch.compiler.is_compiling() and any(map(blocks.block_for, self.modules())):
            moekern.hf.replace(self)
        return torch.nn.Module.__call__(self, *args, **kwargs)

    @functools.wraps(initialise)
    def replace_when_called(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if blocks.has_blocks_of_its_own(type(self)):
            type(self).__call__ = call

    model.get_correct_experts_implementation = default_to_ours
    model.__init__ = replace_when_called


class Recorder:
    """The hooks of pytest that write SUITES_RECORD."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  until the process ends

    def write(self, **entry: Any) -> None:
        self.file.write(json.dumps(entry) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.write(collected=len(session.items))

    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.write(collected=len(ids))

    pytest_xdist_node_collection_finished = pytest.hookimpl(optionalhook=True)(pytest_xdist_node_collection_finished)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", why=reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(begun=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.write(test=report.nodeid, outcome=report.outcome, why=reason(report) if report.failed else "")


def reason(report: Any) -> str:
    """The line that says why, as pytest's own summary does."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines() or [""]
    return lines[0] if crash else lines[-1]


def pytest_configure(config: pytest.Config) -> None:
    if RECORD in os.environ and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to their parent
        config.pluginmanager.register(Recorder(os.environ[RECORD]))


if CALLS in os.environ:
    force()
if __name__ == "__main__":
    # By name, so that workers of pytest-xdist load it too.
    sys.exit(pytest.main(["-p", "forced", *sys.argv[1:]]))
