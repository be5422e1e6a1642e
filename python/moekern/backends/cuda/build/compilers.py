"""A few NVRTC processes that compile side by side, started when there is work.

A layer's first call compiles ten kernels of up to several seconds each. Within a process NVRTC compiles one program at
a time, so each compilation gets a process (nvrtc_process.py). If none can be started, the caller's thread compiles.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

Job = tuple[str, str, tuple[str, ...]]  # name, text, options
Answer = tuple[bytes | str, str]  # cubin or error, log
MOST_PROCESSES = 16
IDLE_SECONDS = 2.0  # of idleness, after which a process ends


class NoProcessError(RuntimeError):
    """No NVRTC process can be started here; says why."""


class AbandonedError(RuntimeError):
    """A compilation was abandoned because the program ends or was interrupted."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loaded_library() -> str:
    """The path of the NVRTC library that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise NoProcessError(f"/proc/self/maps cannot be read ({error})") from error
    for line in lines:
        path = line.partition("/")[2]
        if "/libnvrtc.so" in f"/{path}":
            return f"/{path}"
    raise NoProcessError("no NVRTC library is loaded")


class _Process:
    def __init__(self, version: tuple[int, ...]):
        # An application that embeds Python must not be started a second time.
        if not sys.executable or not Path(sys.executable).name.startswith("python"):
            raise NoProcessError(f"sys.executable is {sys.executable!r}")
        script = Path(__file__).with_name("nvrtc_process.py")
        command = [sys.executable, "-I", "-S", str(script), loaded_library()]
        try:
            # In a session of its own, where no terminal interrupts it: it ends when this process closes its input.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise NoProcessError(f"{' '.join(command)}: {error!r}") from error
        try:
            got = self._receive()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self.close()
            raise NoProcessError(f"{' '.join(command)}: {error!r}") from error
        if tuple(got) != tuple(version):
            self.close()
            raise NoProcessError(f"the process has NVRTC {got}, this one {version}")

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        return pickle.load(self._process.stdout)

    def compile(self, job: Job) -> Answer:
        assert self._process.stdin is not None
        pickle.dump(job, self._process.stdin)
        self._process.stdin.flush()
        return self._receive()  # type: ignore[no-any-return]

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unsent bytes to a process that has ended
                    pipe.close()
        self._process.wait()


class Compilers:
    """Compiles jobs in the order of their submission, as many at once as there are cores."""

    def __init__(self, version: tuple[int, ...], in_this_process: Callable[[Job], Answer], most: int | None = None):
        """Prepare; `version` is that of the loaded NVRTC; `in_this_process` compiles if no process can be started."""
        self._version, self._fallback = version, in_this_process
        self._most = min(_cores(), MOST_PROCESSES) if most is None else most
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Answer], int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._waiting = 0
        self._processes: set[_Process] = set()
        self._abandoned = 0  # how often; each job has the count of its submission
        _all.add(self)

    def abandon(self) -> None:
        """Abandon all submitted jobs that are not done: their futures raise AbandonedError. Later jobs run as usual."""
        with self._lock:
            self._abandoned += 1
            waiting: list[Future[Answer]] = []
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._jobs.get_nowait()[1])
            for process in self._processes:
                process.kill()
        for future in waiting:
            future.set_exception(AbandonedError("given up before it began"))

    def submit(self, job: Job) -> Future[Answer]:
        """Compile when a process is free."""
        future: Future[Answer] = Future()
        with self._lock:
            self._jobs.put((job, future, self._abandoned))
            if self._jobs.qsize() > self._waiting and self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, name="moekern-nvrtc", daemon=True).start()
        return future

    def _next(self) -> tuple[Job, Future[Answer], int] | None:
        with self._lock:
            self._waiting += 1
        try:
            return self._jobs.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            return None
        finally:
            with self._lock:
                self._waiting -= 1

    def _work(self) -> None:
        process: _Process | None = None
        while True:
            task = self._next()
            if task is None:
                with self._lock:
                    if not self._jobs.empty():  # submitted in the meantime, relying on this thread
                        continue
                    self._threads -= 1
                break
            job, future, submitted = task
            try:
                try:
                    process = process or self._start(submitted)
                    answer = process.compile(job)
                except (NoProcessError, OSError, EOFError, pickle.UnpicklingError):
                    self._let_go(process)
                    process = None
                    if submitted != self._abandoned:
                        raise AbandonedError("given up while it was compiled") from None
                    answer = self._fallback(job)
                future.set_result(answer)
            except BaseException as error:
                future.set_exception(error)
        self._let_go(process)

    def _start(self, submitted: int) -> _Process:
        """A process for a job with this count; killed at once if the job was abandoned while it started."""
        process = _Process(self._version)
        with self._lock:
            self._processes.add(process)
            if submitted != self._abandoned:
                process.kill()
        return process

    def _let_go(self, process: _Process | None) -> None:
        if process is not None:
            with self._lock:
                self._processes.discard(process)
            process.close()


_all: weakref.WeakSet[Compilers] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """A program that ends while kernels compile in the background does not wait for them; they end too."""
    for compilers in list(_all):
        compilers.abandon()
