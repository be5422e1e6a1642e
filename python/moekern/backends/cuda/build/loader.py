"""From CUDA sources to loaded kernels: NVRTC, the cache of cubins, CuPy modules.

What a verb needs is compiled side by side in processes of their own (compilers.py), and while
the forward pass of a layer waits for its kernels, those of the backward pass are already on their way. Compilation
needs NVRTC (through CuPy) but neither a GPU nor a driver, so continuous integration builds every kernel.
Nothing here imports torch, and CuPy is imported when it is first needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekern.backends.cuda.build import kernel_cache
from moekern.backends.cuda.build.compilers import Answer, Compilers, Job, NoProcessError, loaded_library
from moekern.backends.cuda.build.errors import KernelError
from moekern.backends.cuda.build.nvrtc_process import open_builtins
from moekern.backends.cuda.build.sources import KernelSource, expand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ARCHITECTURES = ("sm_90a",)
OLDEST_NVRTC = (12, 9)  # earlier ones serialise wgmma
# ptxas says these when setmaxnreg is ignored (C7508) or wgmma is serialised (C7510 … C7519), in place of an error.
_FATAL_NOTE = re.compile(r"C75(08|1\d)|C7602")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@cache
def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise KernelError(
            f"the CUDA kernels need CuPy, which cannot be imported ({error}); "
            "install moekern[cuda13] or moekern[cuda12]"
        ) from error
    try:
        version = tuple(nvrtc.getVersion())
    except Exception as error:
        raise KernelError(
            f"CuPy found no NVRTC library ({error}); install nvidia-cuda-nvrtc or a CUDA toolkit"
        ) from error
    if version < OLDEST_NVRTC:
        raise KernelError(
            f"NVRTC {version[0]}.{version[1]} serialises Hopper's wgmma; "
            f"{OLDEST_NVRTC[0]}.{OLDEST_NVRTC[1]} or newer is needed: upgrade nvidia-cuda-nvrtc"
        )
    return nvrtc


def get_ready() -> None:
    """Import CuPy and NVRTC; what is wrong with them is told when a kernel is needed."""
    with contextlib.suppress(KernelError):
        _nvrtc()


def _whole(cubin: bytes) -> bytes:
    """The cubin with its last byte: CuPy takes it for a string's terminator and drops it, and tools refuse the file.

    The byte is the top of a program header's 64-bit alignment, zero in every file; where the file ends its header says.
    """
    start, size, count = (int.from_bytes(cubin[i:j], "little") for i, j in ((32, 40), (54, 56), (56, 58)))
    return cubin.ljust(start + size * count, b"\0")


def check(arch: str) -> None:
    """Raise KernelError unless kernels exist for the architecture and a compiler for them is there."""
    if arch not in ARCHITECTURES:
        raise KernelError(f"arch: got {arch!r}; kernels exist for {', '.join(ARCHITECTURES)}")
    _nvrtc()


def _job(source: KernelSource, arch: str) -> Job:
    macros = (f"-D{name}={value}" for name, value in source.macros)
    options = (f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", "--no-source-include", *macros)
    return source.file, expand(source.file), options


@cache
def _open_builtins() -> None:
    with suppress(NoProcessError, OSError):  # compiling says what is missing
        open_builtins(loaded_library())


def _compile_here(job: Job) -> Answer:
    nvrtc = _nvrtc()
    _open_builtins()
    name, text, options = job
    program = nvrtc.createProgram(text, name, (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            return str(error), nvrtc.getProgramLog(program)
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def _checked(source: KernelSource, answer: Answer) -> tuple[bytes, str]:
    """The cubin and the log, or a KernelError: it did not compile, or not to what is wanted."""
    cubin, log = answer
    if isinstance(cubin, str):
        raise KernelError(f"{source}: {cubin}\n{log}")
    note = _FATAL_NOTE.search(log)
    spills = [match[0] for match in _SPILL.finditer(log) if match[1] != "0" or match[2] != "0"]
    if note or spills:
        raise KernelError(f"{source}: {note[0] if note else spills[0]}: such a kernel would be slow\n{log}")
    return _whole(cubin), log


def compile_source(source: KernelSource, arch: str = "sm_90a") -> tuple[bytes, str]:
    """Compile one variant to a cubin; returns the cubin and the compiler's log (registers, spills).

    Raises KernelError for an unknown architecture, a compile error, a spill, or a note of ptxas that setmaxnreg was
    ignored or wgmma serialised.
    """
    check(arch)
    return _checked(source, _compile_here(_job(source, arch)))


@cache
def _compilers() -> Compilers:
    return Compilers(tuple(_nvrtc().getVersion()), _compile_here)


def abandon() -> None:
    """Give up what still compiles; whoever waits for it gets an AbandonedError."""
    if _compilers.cache_info().currsize:
        _compilers().abandon()


_pending: dict[str, Future[bytes]] = {}
_present: dict[KernelSource, bytes] = {}  # held, so that nothing that befalls the cache matters to a running process
_lock = threading.Lock()


def _after_fork() -> None:
    """A child has none of the parent's threads: what these were doing is to be started again."""
    global _lock
    _lock = threading.Lock()
    _pending.clear()
    _compilers.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _file_name(job: Job) -> str:
    """The name in the cache: a hash of all that determines the content."""
    name, text, options = job
    digest = hashlib.sha256("\0".join((name, text, *options, str(_nvrtc().getVersion()))).encode()).hexdigest()
    return f"{Path(name).stem}-{digest[:40]}.cubin"


def start(
    source: KernelSource, arch: str = "sm_90a", keep: Callable[[str, bytes], object] = kernel_cache.keep
) -> Future[bytes]:
    """The cubin of a variant, compiled in the background if it is not in the cache; `keep` puts it there."""
    check(arch)
    kernel_cache.limit()  # a bad value is told now, to the caller
    job = _job(source, arch)
    name = _file_name(job)
    with _lock:
        if name in _pending:
            return _pending[name]
    future: Future[bytes] = Future()
    cubin = kernel_cache.find(name)
    if cubin is not None:
        future.set_result(cubin)
        return future
    with _lock:
        if name in _pending:
            return _pending[name]
        _pending[name] = future

    def finish(done: Future[Answer]) -> None:
        try:
            cubin = _checked(source, done.result())[0]
            keep(name, cubin)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(cubin)
        finally:
            _pending.pop(name, None)

    _compilers().submit(job).add_done_callback(finish)
    return future


def cubin_path(source: KernelSource, arch: str = "sm_90a") -> Path:
    """The cached file of a variant, compiled first if need be. Raises CacheError if it cannot be kept."""
    kernel_cache.wanted()
    cubin = start(source, arch, kernel_cache.kept).result()
    return kernel_cache.kept(_file_name(_job(source, arch)), cubin)


def compile_missing(sources: Iterable[KernelSource], wait: bool = True) -> None:
    """Bring variants into the cache, several at once. Without waiting, errors are left to the call that needs them."""
    started = {source: start(source) for source in dict.fromkeys(sources) if source not in _present}
    for source, future in started.items():
        if wait or (future.done() and future.exception() is None):
            _present[source] = future.result()


def all_present(sources: Iterable[KernelSource]) -> bool:
    """Whether these variants are known to be in the cache."""
    return all(source in _present for source in sources)


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel function of one device."""

    handle: int  # CUfunction
    module: Any  # keeps the module loaded


_kernels: dict[tuple[int, KernelSource, str], Kernel] = {}
_loading = threading.Lock()


def load(source: KernelSource, name: str, device: int, shared_bytes: int = 0, carve_out: int | None = None) -> Kernel:
    """The kernel `name` of a variant on a device, compiled and loaded on first use.

    `shared_bytes` is the dynamic shared memory it will be launched with; `carve_out` the percentage of an SM's memory
    that should be shared memory although the kernel itself uses less (to run beside one that does). Must not run for
    the first time while a CUDA graph is being captured: loading a module is not allowed there.
    """
    key = (device, source, name)
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    with _loading:
        if key in _kernels:
            return _kernels[key]
        cubin = _present.get(source)
        if cubin is None:
            cubin = start(source).result()
        import cupy
        from cupy.cuda import driver

        try:
            with cupy.cuda.Device(device):
                module = cupy.cuda.function.Module()
                module.load(cubin)
                function = module.get_function(name)
                handle = int(function.ptr)
                if shared_bytes > 48 * 1024:
                    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.funcSetAttribute(handle, attribute, shared_bytes)
                if carve_out is not None:
                    attribute = driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                    driver.funcSetAttribute(handle, attribute, carve_out)
        except Exception as error:
            raise KernelError(f"cannot load {source} on device {device}: {error}") from error
        _kernels[key] = Kernel(handle, (module, function))
        return _kernels[key]
