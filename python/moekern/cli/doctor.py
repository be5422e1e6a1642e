"""`moekern doctor`: what this machine can run, whether it computes correctly, and how to fix each problem."""

import argparse
import difflib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from moekern import __version__
from moekern.backends.cuda.build import kernel_cache as cache
from moekern.backends.cuda.build import loader, sources
from moekern.backends.cuda.build.errors import CacheError, KernelError
from moekern.backends.cuda.configuration import choose
from moekern.cli import HelpFormat, Subparsers
from moekern.cli.console import Console
from moekern.cli.selftest import ALLOWED, SelfTest, run_self_test
from moekern.report import machine
from moekern.verbs.backend import BACKENDS, ENVIRONMENT_VARIABLE, current, resolve

EXAMPLES = """\
examples:
  moekern doctor                          facts, self-tests, and one line per problem with its fix
  moekern doctor --json > machine.json    the same for a program or a bug report

The exit code is 0 if the CPU backend works, no self-test fails and no environment variable makes calls fail, 1
otherwise. A missing optional package is not a
failure: it is listed with the command that adds it.
"""
USUAL_SIZES = (65536, 64, 2048, 1024)  # slots, experts, hidden, intermediate: the answer holds for all multiples of 8
VARIABLES = {
    "MOEKERN_BACKEND", "MOEKERN_CPU_ISA", "MOEKERN_CUDA_DIR", "MOEKERN_DEBUG", "MOEKERN_COMMIT",
    cache.FOLDER, cache.LIMIT, cache.TRUSTED, "MOEKERN_FUZZ_CASES",
}  # fmt: skip


@dataclass
class Diagnosis:
    """The findings of doctor: facts by section, self-tests, and problems with their fixes."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    self_tests: list[SelfTest] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    usable: bool = True  # unless something in the environment makes calls fail

    def fact(self, section: str, name: str, value: str) -> None:
        self.facts.setdefault(section, {})[name] = value

    def problem(self, what: str, fix: str) -> None:
        self.problems.append((what, fix))

    def failure(self, what: str, fix: str) -> None:
        """A problem that makes calls fail."""
        self.usable = False
        self.problem(what, fix)

    @property
    def healthy(self) -> bool:
        cpu = [test for test in self.self_tests if test.backend == "cpu"]
        return self.usable and bool(cpu) and all(test.passed for test in self.self_tests)


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="report what this machine can run and test that it computes correctly",
        description="Say what this machine can run, test each backend against float64, and name each problem's fix.",
        epilog=EXAMPLES,
        formatter_class=HelpFormat,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    diagnosis = diagnose()
    if args.json:
        print(json.dumps({"healthy": diagnosis.healthy, **asdict(diagnosis)}, indent=2))
    else:
        show(diagnosis, Console())
    return 0 if diagnosis.healthy else 1


def diagnose() -> Diagnosis:
    diagnosis = Diagnosis()
    for examine in (examine_packages, examine_environment, examine_cpu, examine_gpu, examine_cupy, examine_cache):
        examine(diagnosis)
    for backend, device in backends_here():
        for dtype in ALLOWED:
            test = run_self_test(backend, dtype, device)
            diagnosis.self_tests.append(test)
    complain_about(diagnosis)
    return diagnosis


def complain_about(diagnosis: Diagnosis) -> None:
    """One problem for all dtypes in which a backend fails with the same message."""
    failures: dict[tuple[str, str], list[str]] = {}
    for test in diagnosis.self_tests:
        if not test.passed:
            failures.setdefault((test.backend, test.message), []).append(test.dtype)
    for (backend, message), dtypes in failures.items():
        diagnosis.problem(f"the {backend} backend fails in {', '.join(dtypes)}: {message}", fix_of_backend(backend))


def examine_packages(diagnosis: Diagnosis) -> None:
    diagnosis.fact("software", "moekern", __version__)
    diagnosis.fact("software", "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    diagnosis.fact("software", "torch", torch.__version__)
    transformers = machine.package_version("transformers")
    diagnosis.fact("software", "transformers", transformers or "not installed (optional: pip install 'moekern[hf]')")
    forced = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MOEKERN_")}
    if forced:
        diagnosis.fact("software", "environment", ", ".join(f"{name}={value}" for name, value in forced.items()))


def examine_environment(diagnosis: Diagnosis) -> None:
    """Environment variables that make calls fail, or that moekern does not read."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    refusals = []
    for device in devices:
        try:
            resolve(device)
        except ValueError as error:
            refusals.append(str(error))
    if len(refusals) == len(devices):
        diagnosis.failure(
            f"{ENVIRONMENT_VARIABLE}={current()} makes every call fail: {refusals[0]}",
            f"unset {ENVIRONMENT_VARIABLE}, or set it to what works here ({', '.join(BACKENDS)})",
        )
    try:
        sources.cuda_directory()
    except KernelError as error:
        report = diagnosis.failure if torch.cuda.is_available() else diagnosis.problem
        report(str(error), "unset MOEKERN_CUDA_DIR, or reinstall moekern")
    for name in sorted(os.environ):
        if name.startswith("MOEKERN_") and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1)
            diagnosis.problem(
                f"moekern reads no environment variable {name}",
                f"{f'did you mean {near[0]}? ' if near else ''}it reads {', '.join(sorted(VARIABLES))}",
            )


def examine_cpu(diagnosis: Diagnosis) -> None:
    diagnosis.fact("CPU", "name", machine.cpu_name())
    diagnosis.fact("CPU", "features", " ".join(machine.cpu_features()) or "unknown")
    diagnosis.fact("CPU", "cores", f"{machine.usable_cores()} usable, {torch.get_num_threads()} threads used")
    try:
        from moekern import _core

        diagnosis.fact("CPU", "kernels", _core.cpu_isa())
    except ImportError as error:
        diagnosis.fact("CPU", "kernels", "missing")
        diagnosis.problem(f"the compiled extension cannot be loaded: {error}", fix_of_backend("cpu"))
    except (ValueError, RuntimeError) as error:
        diagnosis.fact("CPU", "kernels", "not usable")
        diagnosis.problem(str(error), "unset MOEKERN_CPU_ISA, or set it to a level this CPU has")


def examine_gpu(diagnosis: Diagnosis) -> None:
    driver = machine.driver_version()
    diagnosis.fact("GPU", "driver", driver or "none")
    diagnosis.fact("GPU", "torch CUDA", torch.version.cuda or "none (torch was built for the CPU only)")
    complaints = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        complaints = [str(warning.message) for warning in caught]
    if not available:
        diagnosis.fact("GPU", "devices", "none")
        if driver and torch.version.cuda is None:
            diagnosis.problem(
                "there is an NVIDIA driver, but torch was built for the CPU only",
                "install a CUDA build of torch: https://pytorch.org/get-started/locally",
            )
        elif driver:
            reason = f": {' '.join(complaints[0].split())}" if complaints else ""
            diagnosis.problem(
                f"there is an NVIDIA driver, but torch cannot use a GPU{reason}",
                "check nvidia-smi and CUDA_VISIBLE_DEVICES; the driver must be as new as the CUDA version of torch",
            )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        memory = properties.total_memory / 2**30
        diagnosis.fact("GPU", f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB")
        diagnosis.fact("GPU", f"cuda:{index} in bf16", str(choose(torch.bfloat16, capability, *USUAL_SIZES)))


def examine_cupy(diagnosis: Diagnosis) -> None:
    """CuPy and the compiler that it finds. Without a GPU their absence is a fact, not a problem."""
    wanted = f"cuda{(torch.version.cuda or '13').split('.')[0]}"
    report = diagnosis.problem if torch.cuda.is_available() else lambda what, fix: None
    if not machine.is_importable("cupy"):
        diagnosis.fact("GPU", "CuPy", f"not installed (for GPUs: pip install 'moekern[{wanted}]')")
        report("CuPy is missing", f"pip install 'moekern[{wanted}]'")
        return
    both = [name for name in ("cupy-cuda12x", "cupy-cuda13x") if machine.package_version(name)]
    if len(both) > 1:
        diagnosis.problem(
            f"{' and '.join(both)} exclude each other", f"pip uninstall {both[0]} {both[1]}, then install one"
        )
    attempts: tuple[tuple[str, Callable[[], str], str], ...] = (
        ("CuPy", cupy_version, f"pip install --force-reinstall 'moekern[{wanted}]'"),
        ("NVRTC", nvrtc_version, f"pip install nvidia-cuda-nvrtc, or pip install 'moekern[{wanted}]'"),
    )
    for name, version, fix in attempts:
        try:
            diagnosis.fact("GPU", name, version())
        except Exception as error:  # a broken CuPy fails in many ways; all mean that it is not usable
            diagnosis.fact("GPU", name, "not usable")
            report(f"{name} is not usable: {' '.join(str(error).split())}", fix)


def cupy_version() -> str:
    import cupy

    return str(cupy.__version__)


def nvrtc_version() -> str:
    from cupy.cuda import nvrtc

    version = tuple(nvrtc.getVersion())
    if version < loader.OLDEST_NVRTC:
        oldest = ".".join(map(str, loader.OLDEST_NVRTC))
        raise RuntimeError(f"version {'.'.join(map(str, version))} is too old, {oldest} or newer is needed")
    return ".".join(map(str, version))


def examine_cache(diagnosis: Diagnosis) -> None:
    """Compiled CUDA kernels are kept on disk; the folder is made when it is first needed."""
    try:
        most = f"{cache.limit() / 2**20:.0f} MiB"
    except CacheError as error:
        most = "not usable"
        diagnosis.failure(str(error), f"unset {cache.LIMIT}, or set it to a size")
    folder, spare = cache.directory(), cache.temporary_directory()
    if folder is None:
        diagnosis.fact("GPU", "kernel cache", "none: there is no home directory")
        diagnosis.problem(
            "there is no home directory to keep compiled kernels in", f"set {cache.FOLDER} to a writable folder"
        )
    else:
        examine_cache_folder(diagnosis, "kernel cache", folder, most)
    if spare is not None and spare != folder and spare.exists():
        examine_cache_folder(diagnosis, "in its place", spare, most)


def examine_cache_folder(diagnosis: Diagnosis, name: str, folder: Path, most: str) -> None:
    found = cache.survey(folder)
    trust = "NOT trusted" if found.distrust else f"trusted by {cache.TRUSTED}" if found.by_name else "trusted"
    access = "writable" if found.writable else "not writable"
    held = f"{found.files} kernels, {found.size / 2**20:.1f} of at most {most}"
    diagnosis.fact("GPU", name, f"{folder} ({access}, {trust}): {held}")
    if found.distrust:
        diagnosis.problem(
            f"compiled kernels in {folder} are not used, since others could have written them: {found.distrust}",
            cache.how_to_trust(folder),
        )
    elif not found.writable:
        diagnosis.problem(
            f"the cache of compiled kernels cannot be written: {folder}",
            f"set {cache.FOLDER} to a writable folder",
        )
    if found.unusable:
        more = f" and {len(found.unusable) - 1} more" if len(found.unusable) > 1 else ""
        diagnosis.problem(
            f"bad files among the compiled kernels in {folder}: {found.unusable[0]}{more}",
            "no fix is needed: they are compiled again on demand; delete them to silence this notice",
        )


def backends_here() -> Iterator[tuple[str, str]]:
    """(backend, device) pairs to test."""
    yield "reference", "cpu"
    yield "cpu", "cpu"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield "cuda", f"cuda:{index}"


def fix_of_backend(backend: str) -> str:
    if backend == "cuda":
        return "see the GPU lines above; until then MOEKERN_BACKEND=reference uses plain PyTorch"
    if backend == "cpu":
        return "pip install --force-reinstall --no-deps moekern; then, if needed, report it with moekern doctor --json"
    return "report it with the output of moekern doctor --json"


def show(diagnosis: Diagnosis, console: Console) -> None:
    for section, facts in diagnosis.facts.items():
        table = plain_table(section, show_header=False)
        table.add_column(style="dim", min_width=14)
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(name, escape(value))
        console.print(table)
        console.print()
    table = plain_table("self-test against float64", show_header=True)
    table.add_column("backend", min_width=14)
    for name in ("dtype", "error", "allowed", "result"):
        table.add_column(name)
    for test in diagnosis.self_tests:
        error = "-" if test.error is None else f"{test.error:.1e}"
        result = "[green]good[/]" if test.passed else "[red]FAILED[/]"
        note = f"  {escape(test.message)}" if test.passed and test.message else ""
        table.add_row(test.backend, test.dtype, error, f"{test.allowed:.1e}", result + note)
    console.print(table)
    console.print()
    for what, fix in diagnosis.problems:
        console.print(f"[red]problem:[/] {escape(what)}; [bold]fix:[/] {escape(fix)}", soft_wrap=True)
    if not diagnosis.problems:
        console.print("[green]No problems found.[/]")


def plain_table(title: str, *, show_header: bool) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=show_header, pad_edge=False
    )
