"""`moekern compile`: compile the CUDA kernels into the cache ahead of time, with or without a GPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moekern.cli import Subparsers

EXAMPLES = """\
examples:
  moekern compile              the kernels of SwiGLU and gpt-oss layers in bfloat16
  moekern compile --set all    every variant: every activation, layout, dtype
  MOEKERN_CACHE_DIR=/shared/kernels moekern compile && chmod -R a+rX,go-w /shared/kernels
                               for all users of a machine: they set MOEKERN_CACHE_DIR and read what you wrote

The cache is ~/.cache/moekern or MOEKERN_CACHE_DIR, for you alone unless you let others read it. Kernels run with your
rights, so those in a folder that belongs to another user, or that other users may write to, are not used unless
MOEKERN_TRUSTED_CACHE=FOLDER names it. MOEKERN_CACHE_LIMIT (1GiB) is its size: those unused for longest are deleted.
moekern doctor reports where the cache is and what is wrong with it.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "compile",
        help="compile the CUDA kernels into the cache",
        description="Compile the CUDA kernels into the cache, so that the first call need not wait. Needs NVRTC "
        "(through CuPy), but neither a GPU nor a driver.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", default="sm_90a", help="GPU architecture (default: sm_90a, Hopper)")
    parser.add_argument(
        "--set", dest="which", choices=("usual", "covering", "all"), default="usual",
        help="usual: for today's models (default); covering: few variants that use every line; all: every variant",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time (default: cores)")
    parser.set_defaults(run=run)


@contextmanager
def _given_up_on_error(pool: ThreadPoolExecutor, abandon: Callable[[], None]) -> Iterator[None]:
    """On errors and Ctrl-C, cancel waiting compilations and abandon the running ones: the pool would wait for all."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        abandon()
        raise


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from moekern.backends.cuda.build import kernel_cache, loader, variants
    from moekern.backends.cuda.build.errors import CacheError, KernelError

    try:
        loader.check(args.arch)
        most = kernel_cache.limit()
    except KernelError as error:
        raise ValueError(str(error)) from error
    chosen = {"usual": variants.usual, "covering": variants.covering, "all": variants.every}[args.which]()
    start, failed = time.perf_counter(), []
    with ThreadPoolExecutor(max(args.jobs, 1)) as pool, _given_up_on_error(pool, loader.abandon):
        pending = {pool.submit(loader.cubin_path, source, args.arch): source for source in chosen}
        bar = tqdm(as_completed(pending), total=len(pending), desc=f"moekern {args.arch}", unit="kernel")
        for done in bar:
            bar.set_postfix_str(pending[done].file)
            failure = done.exception()
            if isinstance(failure, CacheError):
                raise OSError(str(failure)) from failure
            if failure is not None:
                failed.append(failure)
    for failure in failed:
        print(f"moekern compile: error: {failure}", file=sys.stderr)
    seconds = time.perf_counter() - start
    compiled = len(chosen) - len(failed)
    print(f"{compiled} of {len(chosen)} kernels in {kernel_cache.directory()}, {seconds:.1f} s")
    gone = sum(not done.result().exists() for done in pending if done.exception() is None)
    if gone:
        print(
            f"moekern compile: {gone} of them were deleted again: {kernel_cache.LIMIT} allows {most} bytes for all",
            file=sys.stderr,
        )
    return 1 if failed else 0
