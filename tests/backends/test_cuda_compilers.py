"""NVRTC in other processes: the same cubins and errors as here, side by side, and compilation here if none starts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("cupy")

from moekern.backends.cuda.build import compilers, kernel_cache, loader
from moekern.backends.cuda.build.compilers import AbandonedError, Answer, Compilers, Job
from moekern.backends.cuda.build.errors import CacheError, KernelError
from moekern.backends.cuda.build.sources import KernelSource

COMBINES = [KernelSource.of("combine.cu", ELEMENT="Bf16", TOP_K=k, VECTOR=16) for k in (1, 2, 4)]
BROKEN = ("broken.cu", "int f() { return oops; }", ("--gpu-architecture=sm_90a",))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(loader, "_present", {})
    loader._compilers.cache_clear()
    yield
    loader._compilers.cache_clear()


def refuse(job: Job) -> Answer:
    raise AssertionError(f"{job[0]} was compiled in this process")


def version() -> tuple[int, ...]:
    return tuple(loader._nvrtc().getVersion())


def test_processes_give_what_this_process_gives() -> None:
    pool = Compilers(version(), refuse, most=2)
    jobs = [loader._job(source, "sm_90a") for source in COMBINES]
    answers = [future.result() for future in [pool.submit(job) for job in (*jobs, BROKEN)]]
    for source, (cubin, log) in zip(COMBINES, answers, strict=False):
        here, here_log = loader.compile_source(source)
        assert loader._whole(cubin) == here
        assert "registers" in log
        assert "registers" in here_log
    failure, log = answers[-1]
    assert failure == "NVRTC_ERROR_COMPILATION (6)"
    assert "oops" in log


@pytest.mark.parametrize("reason", ["embedded", "missing", "another version", "no library"])
def test_without_processes_this_one_compiles(reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = version()
    if reason == "embedded":
        monkeypatch.setattr(sys, "executable", "/usr/bin/an-application")
    elif reason == "missing":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    elif reason == "another version":
        wanted = (1, 2)
    else:
        monkeypatch.setattr(compilers, "loaded_library", lambda: str(tmp_path / "libnvrtc.so"))
    done: list[str] = []
    pool = Compilers(wanted, lambda job: done.append(job[0]) or ("", "here"), most=1)
    assert pool.submit(BROKEN).result() == ("", "here")
    assert done == ["broken.cu"]


def test_failures_of_the_caller_reach_it() -> None:
    def fail(job: Job) -> Answer:
        raise RuntimeError("no compiler")

    pool = Compilers((1, 2), fail, most=1)
    futures = [pool.submit(BROKEN) for _ in range(3)]
    for future in futures:
        with pytest.raises(RuntimeError, match="no compiler"):
            future.result()


def test_processes_go_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "IDLE_SECONDS", 0.0)
    pool = Compilers(version(), refuse, most=4)
    for _ in range(2):
        for future in [pool.submit(BROKEN) for _ in range(3)]:
            future.result()
        while pool._threads:
            pass


def test_a_variant_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Job] = []

    class Held:
        @staticmethod
        def cache_clear() -> None:
            pass

        def submit(self, job: Job) -> Future[Answer]:
            submitted.append(job)
            return future

    future: Future[Answer] = Future()
    monkeypatch.setattr(loader, "_compilers", Held)
    loader.compile_missing(COMBINES[:1], wait=False)
    both = [loader.start(COMBINES[0]) for _ in range(2)]
    assert len(submitted) == 1
    future.set_result(loader._compile_here(submitted[0]))
    assert both[0].result() == both[1].result() == loader.start(COMBINES[0]).result()
    assert not loader._pending
    assert len(submitted) == 1


def test_background_errors_wait_for_who_needs_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hopper.cuh").write_text("")
    (tmp_path / "broken.cu").write_text(BROKEN[1])
    monkeypatch.setenv("MOEKERN_CUDA_DIR", str(tmp_path))
    source = KernelSource("broken.cu")
    loader.compile_missing([source], wait=False)
    with pytest.raises(KernelError, match="oops"):
        loader.compile_missing([source])


def test_an_unwritable_cache_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CacheError, match=r"disk full.*MOEKERN_CACHE_DIR"):
        loader.cubin_path(COMBINES[0])
    assert not list((tmp_path / "kernels").iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_compiles_too() -> None:
    loader.cubin_path(COMBINES[0])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if loader.cubin_path(COMBINES[1]).is_file() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_abandoned_ends_at_once_and_what_comes_later_is_compiled() -> None:
    pool = Compilers(version(), refuse, most=1)
    jobs = [loader._job(source, "sm_90a") for source in COMBINES]
    futures = [pool.submit(job) for job in jobs]
    pool.abandon()
    for future in futures:
        with pytest.raises(AbandonedError):
            future.result(timeout=20)
    assert isinstance(pool.submit(jobs[0]).result(timeout=60)[0], bytes)


def test_what_is_abandoned_while_its_process_starts_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Compilers(version(), refuse, most=1)

    class Slow(compilers._Process):
        def __init__(self, wanted: tuple[int, ...]) -> None:
            super().__init__(wanted)
            pool.abandon()

    monkeypatch.setattr(compilers, "_Process", Slow)
    with pytest.raises(AbandonedError):
        pool.submit(loader._job(COMBINES[0], "sm_90a")).result(timeout=60)


@pytest.mark.parametrize("end", ["returns", "raises", "exits"])
def test_a_program_that_ends_while_kernels_compile_says_nothing_of_it(end: str, tmp_path: Path) -> None:
    last = {"returns": "", "raises": "raise SystemExit(3)", "exits": "import os; os._exit(0)"}[end]
    script = (
        "import time\nfrom moekern.backends.cuda.build import loader, variants\n"
        f"for source in variants.usual()[:6]: loader.start(source)\ntime.sleep(1.5)\n{last}"
    )
    environment = {**os.environ, "MOEKERN_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == (3 if end == "raises" else 0)
    assert done.stderr == ""


def test_ctrl_c_ends_the_compile_command(tmp_path: Path) -> None:
    environment = {**os.environ, "MOEKERN_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "moekern", "compile", "--set", "all", "--jobs", "2"]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob("*.cubin")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.rstrip().endswith("moekern compile: interrupted")
    assert len(list(tmp_path.glob("*.cubin"))) < 20  # of hundreds


def test_a_damaged_kernel_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    path = loader.cubin_path(COMBINES[0])
    cubin = loader.start(COMBINES[0]).result()
    path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setattr(kernel_cache, "_said", set())
    with pytest.warns(UserWarning, match=f"{path.name} is damaged.*compiled again"):
        loader.compile_missing(COMBINES[:1])
    assert loader._present[COMBINES[0]] == cubin == loader.start(COMBINES[0]).result()
    assert path.stat().st_size > 1000


def test_a_cache_emptied_while_running_does_not_matter() -> None:
    loader.compile_missing(COMBINES[:2])
    held = dict(loader._present)
    path = loader.cubin_path(COMBINES[0])
    shutil.rmtree(path.parent)
    loader.compile_missing(COMBINES[:2])
    assert loader._present == held
    assert loader.start(COMBINES[0]).result() == held[COMBINES[0]]
    assert path.is_file()


def test_what_is_loaded_are_the_bytes_that_were_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    loaded: list[bytes] = []

    class Module:
        def load(self, cubin: bytes) -> None:
            loaded.append(cubin)

        def get_function(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(ptr=7)

    monkeypatch.setattr(cupy.cuda.function, "Module", Module)
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: nullcontext())
    monkeypatch.setattr(loader, "_kernels", {})
    loader.compile_missing(COMBINES[:1])
    cubin = loader._present[COMBINES[0]]
    loader.cubin_path(COMBINES[0]).write_bytes(b"planted after the check")
    assert loader.load(COMBINES[0], "combine", 0).handle == 7
    assert loaded == [cubin]


def test_an_unusable_cache_stops_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path / "file"))
    (tmp_path / "tmp").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(kernel_cache, "_said", set())
    with pytest.warns(UserWarning, match="set MOEKERN_CACHE_DIR to a writable directory.*kept in"):
        loader.compile_missing(COMBINES[:1])
    assert len(list((tmp_path / "tmp").glob("moekern-*/combine-*.cubin"))) == 1
    with pytest.raises(CacheError, match="MOEKERN_CACHE_DIR"):
        loader.cubin_path(COMBINES[0])


def test_a_bad_limit_is_named() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEKERN_CACHE_LIMIT", "plenty")
        with pytest.raises(KernelError, match="MOEKERN_CACHE_LIMIT: got 'plenty'"):
            loader.start(COMBINES[0])
