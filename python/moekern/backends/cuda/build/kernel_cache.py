"""Compiled kernels on disk: private, checked when read, and never the reason why a call fails.

A file is a cubin followed by a digest of its name and content, which finds damage: a file cut short by a power loss,
a bad disk. The digest does not protect against other users, since they could write it too; owners and modes do
(trust.py). A damaged or untrusted file counts as absent: the kernel is compiled again, with one warning. If
the folder cannot be used, a private one in the temporary folder replaces it. Callers get the bytes that were checked,
not a path to read again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moekern.backends.cuda.build.errors import CacheError
from moekern.backends.cuda.build.trust import distrust, distrust_folder

FOLDER, LIMIT, TRUSTED = "MOEKERN_CACHE_DIR", "MOEKERN_CACHE_LIMIT", "MOEKERN_TRUSTED_CACHE"
USUAL_LIMIT = "1GiB"
LARGEST = 64 * 2**20  # most bytes of a file that is read; kernels have about 0.1 MiB
_SEAL = b"moekern\0"
_SEALED = len(_SEAL) + hashlib.sha256().digest_size
_NAME = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{40}\.cubin")
_EARLIER = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{32}\.cubin")  # without a digest; never read, but removed like the others
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_STALE = 3600.0  # seconds: age of half-written files of killed processes; also the precision of "last used"

_said: set[str] = set()


def _say_once(topic: str, text: str) -> None:
    if topic not in _said:
        _said.add(topic)
        warnings.warn(f"moekern: {text}", UserWarning, stacklevel=3)


def _absolute(text: str) -> Path:
    path = Path(text)
    with suppress(RuntimeError):  # ~ of an unknown user
        path = path.expanduser()
    return path if path.is_absolute() else Path(os.getcwd(), path)


def directory() -> Path | None:
    """The chosen folder of kernels: `MOEKERN_CACHE_DIR`, by default `~/.cache/moekern`; None without a home."""
    chosen = os.environ.get(FOLDER)
    if chosen:
        return _absolute(chosen)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "moekern" if home.is_absolute() and home.is_dir() else None


def temporary_directory() -> Path | None:
    """The private folder that replaces a cache that cannot be used; None if it cannot be made."""
    with suppress(OSError):
        user = str(os.geteuid()) if hasattr(os, "geteuid") else "kernels"
        return Path(tempfile.gettempdir(), f"moekern-{user}").absolute()
    return None


def limit() -> int:
    """The most bytes of the cache: `MOEKERN_CACHE_LIMIT`, as 500MB or 2GiB, by default 1 GiB.

    Raises:
        CacheError: It is not a size.
    """
    text = os.environ.get(LIMIT) or USUAL_LIMIT
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise CacheError(f"environment variable {LIMIT}: got {text!r}, expected a size such as 500MB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


def why_not_trusted(folder: Path) -> str | None:
    """Why kernels from a folder must not be run, or None. A folder that `MOEKERN_TRUSTED_CACHE` names is trusted."""
    return None if _trusted_by_name(folder) else distrust_folder(folder)


def _trusted_by_name(folder: Path) -> bool:
    named = os.environ.get(TRUSTED, "").split(os.pathsep)
    return any(name and _absolute(name) == folder for name in named)


def _not_trusted(folder: Path, reason: str) -> str:
    return f"compiled kernels in {folder} are not trusted: {reason}; {how_to_trust(folder)}"


def how_to_trust(folder: Path) -> str:
    """Advice to a user about a folder that is not trusted."""
    return (
        f"remove the others' right to write (chmod go-w), set {FOLDER} to a folder of your own, or set "
        f"{TRUSTED}={folder} if all who can write there may run code as you"
    )


def sealed(name: str, cubin: bytes) -> bytes:
    """The content of a file of this name."""
    return cubin + _SEAL + hashlib.sha256(name.encode() + b"\0" + cubin).digest()


def _opened(name: str, content: bytes) -> bytes | None:
    """The cubin, or None if the file is damaged."""
    cubin = content[:-_SEALED]
    return cubin if len(content) > _SEALED and sealed(name, cubin) == content else None


def _read(path: Path, by_name: bool, used: bool = True) -> tuple[bytes | None, str]:
    """The cubin in a file; or None and the file's problem, which is empty if it is absent or may not be read."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(path, flags)
    except OSError as error:
        there = error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
        return None, f"cannot be read ({error.strerror})" if there else ""
    try:
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode):
            return None, "is not a file"
        reason = None if by_name else distrust(path, state)
        if reason:
            return None, f"is not trusted: {reason}"
        if state.st_size > LARGEST:
            return None, f"is damaged ({state.st_size} bytes)"
        with os.fdopen(os.dup(file), "rb") as stream:
            cubin = _opened(path.name, stream.read(LARGEST + 1))
        if cubin is None:
            return None, f"is damaged ({state.st_size} bytes that its digest does not fit)"
        if used and time.time() - state.st_mtime > _STALE and os.utime in os.supports_fd:
            with suppress(OSError):  # not ours, or read-only: then it must not be removed either
                os.utime(file)
        return cubin, ""
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    finally:
        os.close(file)


def find(name: str) -> bytes | None:
    """The cubin that is kept under a name, checked; None if it must be compiled."""
    folder = directory()
    for place in (folder, temporary_directory()):
        if place is None:
            continue
        if place != folder and folder is not None and _usable(folder):
            break
        cubin, wrong = None, why_not_trusted(place)
        if wrong and place == folder:
            _say_once(f"unusable {place}", f"{_not_trusted(place, wrong)}. Until then they are kept elsewhere")
        if wrong is None:
            cubin, wrong = _read(place / name, _trusted_by_name(place))
            if wrong:
                _say_once(f"bad {place}", f"the cached kernel {place / name} {wrong}; such kernels are compiled again")
        if cubin is not None:
            return cubin
    return None


def _usable(folder: Path) -> bool:
    """Whether kernels can be kept in a folder, judged without writing."""
    return f"unusable {folder}" not in _said and _writable(folder) and why_not_trusted(folder) is None


def _writable(folder: Path) -> bool:
    """Whether the folder, or the one in which it would be made, may be written."""
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except OSError:
        return False
    effective = os.access in os.supports_effective_ids
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK, effective_ids=effective)


def _make(folder: Path) -> None:
    """Make a folder and the missing ones above it, for the user alone."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)  # whatever the umask
    if not folder.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(folder))


def _write(folder: Path, name: str, cubin: bytes) -> None:
    """Keep a cubin: it appears whole, by a rename, after its bytes have reached the disk. Raises CacheError."""
    content = sealed(name, cubin)
    most = limit()
    if len(content) > most:
        raise CacheError(f"{name} has {len(content)} bytes; {LIMIT} allows {most}")
    try:
        for step in (lambda: None, lambda: _make(folder)):  # checks before and after: in /tmp another user may be first
            step()
            reason = why_not_trusted(folder)
            if reason:
                raise CacheError(_not_trusted(folder, reason))
        file, partial = tempfile.mkstemp(suffix=".partial", prefix="kernel-", dir=folder)
        try:
            with os.fdopen(file, "wb") as stream:
                if hasattr(os, "fchmod"):
                    os.fchmod(file, 0o600)  # whatever the umask
                stream.write(content)
                stream.flush()
                os.fsync(file)
            os.replace(partial, folder / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise CacheError(
            f"cannot write compiled kernels to {folder} ({error}); set {FOLDER} to a writable directory"
        ) from error
    _sync(folder)
    _shrink(folder, most, name)


def _sync(folder: Path) -> None:
    """Bring the rename to the disk, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of a cache and those that are being written, with their states."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            half_written = entry.name.startswith("kernel-") and entry.name.endswith(".partial")
            if half_written or _NAME.fullmatch(entry.name) or _EARLIER.fullmatch(entry.name):
                with suppress(OSError):  # another process has just removed it
                    found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    return found


def _shrink(folder: Path, most: int, newest: str) -> None:
    """Remove half-written files of killed processes and, above the limit, the kernels unused for longest."""
    kernels = []
    for path, state in _files(folder):
        if path.suffix == ".cubin":
            kernels.append((state.st_mtime_ns, state.st_size, path))
        elif time.time() - state.st_mtime > _STALE:
            with suppress(OSError):
                path.unlink()
    total = sum(size for _, size, _ in kernels)
    for _, size, path in sorted(kernels):
        if total <= most:
            return
        if path.name != newest:
            with suppress(OSError):
                path.unlink()
            total -= size


def keep(name: str, cubin: bytes) -> None:
    """Keep a cubin for later processes; if the chosen folder cannot be used, in the temporary one, with one warning."""
    folder, spare = directory(), temporary_directory()
    try:
        _write(wanted(), name, cubin)
    except CacheError as error:
        if len(cubin) + _SEALED > limit():
            return
        reason, where = str(error), "nowhere: each process compiles its own"
        if spare is not None:
            with suppress(CacheError):
                _write(spare, name, cubin)
                where = str(spare)
        _say_once(f"unusable {folder}", f"{reason}. Until then they are kept in {where}")


def wanted() -> Path:
    """The chosen folder of kernels. Raises CacheError if there is none, or if it is not trusted."""
    folder = directory()
    if folder is None:
        raise CacheError(f"there is no home directory to keep compiled kernels in; set {FOLDER} to a folder")
    reason = why_not_trusted(folder)
    if reason:
        raise CacheError(_not_trusted(folder, reason))
    return folder


def kept(name: str, cubin: bytes) -> Path:
    """The file of a cubin in the chosen folder, written if needed.

    Raises:
        CacheError: It cannot be kept there; the message says why and what to do.
    """
    folder = wanted()
    if _read(folder / name, _trusted_by_name(folder))[0] is None:
        _write(folder, name, cubin)
    return folder / name


@dataclass
class Survey:
    """The contents of a folder of compiled kernels."""

    folder: Path
    distrust: str | None  # why its kernels are not run
    by_name: bool  # trusted because MOEKERN_TRUSTED_CACHE names it
    writable: bool
    files: int = 0
    size: int = 0  # bytes
    unusable: list[str] = field(default_factory=list)  # each file and its problem


def survey(folder: Path) -> Survey:
    """Examine a folder without changing it; every file is read."""
    found = Survey(folder, why_not_trusted(folder), _trusted_by_name(folder), _writable(folder))
    for path, state in _files(folder):
        found.size += state.st_size
        if _NAME.fullmatch(path.name):
            found.files += 1
            wrong = _read(path, found.by_name, used=False)[1]
            if wrong:
                found.unusable.append(f"{path.name} {wrong}")
    return found
