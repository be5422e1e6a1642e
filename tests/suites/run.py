"""Run the tests of transformers and peft with moekern as the experts of every model, and say what fails with it only.

A test that fails is run again without moekern. One that passes then is run once more with it, since some are unsteady.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import sources
import tiny_hub
from forced import CALLS, RECORD

HERE = Path(__file__).resolve().parent
USUAL = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "dbrx")
PEFT = ("tests/test_target_parameters.py", "tests/test_integrations.py")
EXAMPLES = f"""\
examples:
  make suites                            {", ".join(USUAL)}, and peft
  make suites MODELS=all                 every model of transformers with experts, and peft: hours
  make suites MODELS=qwen3_moe,olmoe SUITES=transformers ARGS="-k 'ep_ or fsdp'"
  make suites TRANSFORMERS_SOURCE=../transformers

Records and pytest's output are kept in --folder. The exit code is 1 if a test fails with moekern only, or if a row of
the table shows no call of moekern.
"""
SETTINGS = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "log_cli=false"]


@dataclass
class Suite:
    """One row of the table: some test files of a source tree, and what was found."""

    name: str
    root: Path
    files: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    lost: int = 0
    passed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    unsteady: set[str] = field(default_factory=set)

    @property
    def ours(self) -> dict[str, str]:
        """What fails with moekern only, with the reasons."""
        return {test: why for test, why in self.failed.items() if test not in self.without | self.unsteady}

    def row(self) -> list[str]:
        found = (len(self.passed), len(self.skipped), len(self.failed), len(self.without), len(self.unsteady))
        return [self.name, *map(str, (sum(found[:3]), *found, len(self.ours), self.calls))]


HEADER = ["suite", "tests", "passed", "skipped", "failed", "also without", "unsteady", "moekern only", "calls"]


class Run:
    """One pytest process and its record, read while it is written.

    Attributes:
        outcomes: The worst outcome of each test, with the reason.
    """

    def __init__(self, suite: Suite, tests: list[str], arguments: list[str], folder: Path, title: str) -> None:
        stem = f"{suite.name.replace('/', '-')}-{title.replace(' ', '-')}"
        self.title, self.log, self.record = f"{suite.name} {title}", folder / f"{stem}.log", folder / f"{stem}.jsonl"
        self.calls = folder / f"{stem}.calls"
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.collected, self.current, self.told = 0, "", 0.0
        for path in (self.record, self.calls):
            path.unlink(missing_ok=True)
        path = [str(HERE), str(suite.root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **suite.environment, RECORD: str(self.record), "PYTHONPATH": os.pathsep.join(path)}
        if title != "without moekern":
            environment[CALLS] = str(self.calls)
        command = [sys.executable, str(HERE / "forced.py"), *SETTINGS, *arguments, *tests]
        with self.log.open("w") as log:
            process = subprocess.Popen(command, cwd=suite.root, env=environment, stdout=log, stderr=log)
            try:
                self.follow(process)
            finally:
                process.kill()
        code = process.wait()
        self.lost = 0
        if code not in (0, 1, 5):  # passed, some failed, nothing selected
            test = self.current or f"{suite.name}: pytest"
            self.outcomes[test] = "failed", f"the process ended with code {code}, see {self.log}"
            self.lost = max(self.collected - len(self.outcomes), 0)

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        """Read the record until the process ends, and say how far it is."""
        position = 0
        running = True
        while running:
            running = process.poll() is None
            if self.record.exists():
                with self.record.open() as record:
                    record.seek(position)
                    while (line := record.readline()).endswith("\n"):
                        position = record.tell()
                        self.read(json.loads(line))
            self.tell(last=not running)
            time.sleep(0.5 if running else 0)

    def read(self, entry: dict[str, str]) -> None:
        """One line of the record."""
        self.collected = int(entry.get("collected", self.collected))
        self.current = entry.get("begun", "" if "test" in entry else self.current)
        if "test" in entry and self.outcomes.get(entry["test"], ("",))[0] != "failed":
            self.outcomes[entry["test"]] = entry["outcome"], entry["why"]

    def tell(self, last: bool) -> None:
        """A line that is written over on a terminal; elsewhere one every minute."""
        terminal = sys.stdout.isatty()
        if not last and time.monotonic() < self.told + (0.5 if terminal else 60):
            return
        self.told = time.monotonic()
        failed = sum(outcome == "failed" for outcome, _ in self.outcomes.values())
        text = f"{self.title}: {len(self.outcomes)} of {self.collected} tests, {failed} failed"
        text += "" if last else f"   {self.current.rpartition('::')[2]}"
        print(f"\r\033[K{text[:110]}" if terminal else text, end="\n" if last or not terminal else "", flush=True)

    def failures(self) -> dict[str, str]:
        return {test: why for test, (outcome, why) in self.outcomes.items() if outcome == "failed"}


def run(suite: Suite, arguments: list[str], folder: Path) -> None:
    """The suite with moekern; what fails, without it; what then passes, with it again."""
    first = Run(suite, suite.files, arguments, folder, "with moekern")
    suite.calls = first.calls.stat().st_size if first.calls.exists() else 0
    suite.lost, suite.failed = first.lost, first.failures()
    for test, (outcome, _) in first.outcomes.items():
        if outcome != "failed":
            (suite.passed if outcome == "passed" else suite.skipped).add(test)
    tests = [test for test in suite.failed if "::" in test] or suite.files
    if suite.failed:
        suite.without = suite.failed.keys() & Run(suite, tests, [], folder, "without moekern").failures().keys()
    if suite.ours and all("::" in test for test in suite.ours):
        again = Run(suite, list(suite.ours), [], folder, "with moekern again").failures()
        suite.unsteady = {test for test in suite.ours if test not in again}


def suites(args: argparse.Namespace) -> list[Suite]:
    """What is to be run.

    Raises:
        OSError, ValueError: A source cannot be had, or an option names what is not there.
    """
    chosen = []
    if "transformers" in args.suites:
        root = sources.transformers(args.folder, args.source)
        there = sources.models(root)
        names = there if args.models == "all" else args.models.split(",")
        for name in names:
            if name not in there:
                raise ValueError(f"--models: got {name!r}, expected all or some of {', '.join(there)}")
            chosen.append(Suite(f"transformers/{name}", root, sources.test_files(root, name)))
    if "peft" in args.suites:
        root = sources.peft(args.folder)
        environment = {}
        if os.environ.get("HF_HUB_OFFLINE"):
            cache = args.folder / "hub"
            tiny_hub.make(cache)
            environment["HF_HUB_CACHE"] = str(cache)
            print("HF_HUB_OFFLINE is set: peft's tests load random models, so those of trained weights fail either way")
        chosen.append(Suite("peft", root, list(PEFT), environment))
    return chosen


def show(done: list[Suite]) -> bool:
    """The table, and below it what is wrong; whether nothing is."""
    table = [HEADER, *(suite.row() for suite in done)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    wrong = [f"{test}\n    {why}" for suite in done for test, why in suite.ours.items()]
    ran = [suite for suite in done if suite.passed or suite.failed]  # of Llama 4, transformers has slow tests only
    wrong += [f"{suite.name}: no test called moekern" for suite in ran or done if not suite.calls]
    wrong += [f"{suite.name}: {suite.lost} tests were not run, since pytest was lost" for suite in done if suite.lost]
    print("\nFailing with moekern only, or wrong otherwise:" if wrong else "\nNothing fails with moekern only.")
    for line in wrong:
        print(f"  {line}")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make suites", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(USUAL), help="names with commas between them, or all")
    parser.add_argument("--suites", default="transformers,peft", help="transformers, peft, or both (default)")
    parser.add_argument("--source", help="a checkout of transformers in place of the installed release's archive")
    parser.add_argument("--folder", type=Path, default=Path("target/suites"), help="sources and records (%(default)s)")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and pytest with it
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    done = []
    try:
        for suite in suites(args):
            run(suite, args.arguments, args.folder)
            done.append(suite)
    except (OSError, ValueError) as error:
        print(f"make suites: error: {error}", file=sys.stderr)
        return 2
    return 0 if show(done) else 1


if __name__ == "__main__":
    sys.exit(main())
