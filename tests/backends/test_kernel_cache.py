"""The cache of compiled kernels: damaged, planted, emptied, unwritable, too large, shared by several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moekern.backends.cuda.build import kernel_cache as cache
from moekern.backends.cuda.build.errors import CacheError
from moekern.backends.cuda.build.trust import distrust_folder

CUBIN = b"\x7fELF" + bytes(range(256)) * 40
NAMES = [f"kernel_{i}-{i:040x}.cubin" for i in range(8)]
NAME = NAMES[0]
OTHER = 12345  # a user without a name

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes and owners are those of POSIX")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make files of another user"
)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder that other users may enter; pytest's is below folders that only their owner may enter."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name).resolve()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that does not exist yet, and a temporary folder of its own."""
    monkeypatch.setattr(cache, "_said", set())
    (tmp_path / "tmp").mkdir(mode=0o700)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path / "kernels"))
    for name in ("MOEKERN_CACHE_LIMIT", "MOEKERN_TRUSTED_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "kernels"


@contextmanager
def told(pattern: str) -> Iterator[None]:
    """There is one warning, which matches."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1, messages
    assert re.search(pattern, messages[0]), messages


def spare() -> Path:
    place = cache.temporary_directory()
    assert place is not None
    return place


@pytest.fixture
def as_another_user(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A function that turns this process into a user who is not root and owns nothing here; undone at the end."""

    def become() -> None:
        tmp_path.chmod(0o755)
        os.seteuid(OTHER)

    yield become
    os.seteuid(0)


def test_what_is_kept_is_found_and_synced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("sync"), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b))[1])
    assert cache.find(NAME) is None
    cache.keep(NAME, CUBIN)
    assert order == ["sync", "rename", "sync"]
    assert cache.find(NAME) == CUBIN
    assert [p.name for p in folder.iterdir()] == [NAME]


@posix
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077, 0o777])
def test_folder_and_files_are_private_whatever_the_umask(tmp_path: Path, monkeypatch, umask: int) -> None:
    folder = tmp_path / "a" / "b" / "kernels"
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(folder))
    before = os.umask(umask)
    try:
        cache.keep(NAME, CUBIN)
    finally:
        os.umask(before)
    assert (folder / NAME).stat().st_mode & 0o777 == 0o600
    for made in (folder, folder.parent, folder.parent.parent):
        assert made.stat().st_mode & 0o777 == 0o700
    assert cache.find(NAME) == CUBIN


def damaged() -> dict[str, bytes]:
    whole = cache.sealed(NAME, CUBIN)
    flipped = bytearray(whole)
    flipped[5000] ^= 1
    return {
        "empty": b"",
        "cut short": whole[:4096],
        "last byte lost": whole[:-1],
        "one bit": bytes(flipped),
        "zeros": bytes(len(whole)),
        "no digest": CUBIN,
        "another's": cache.sealed(NAMES[1], CUBIN),
        "only a digest": cache.sealed(NAME, b""),
        "appended": whole + b"x",
    }


@pytest.mark.parametrize("kind", damaged())
def test_damage_is_found_said_once_and_mended(folder: Path, kind: str) -> None:
    for name in NAMES:
        cache.keep(name, CUBIN)
    for name in NAMES[:2]:
        (folder / name).write_bytes(damaged()[kind])
    if kind == "another's":
        (folder / NAMES[1]).write_bytes(b"")
    with told(rf"{NAME} is damaged.*compiled again"):
        assert [cache.find(name) for name in NAMES[:2]] == [None, None]
    assert len(cache.survey(folder).unusable) == 2
    for name in NAMES[:2]:
        cache.keep(name, CUBIN)
    assert [cache.find(name) for name in NAMES] == [CUBIN] * len(NAMES)
    assert cache.survey(folder).unusable == []


def test_what_is_not_a_file(folder: Path, tmp_path: Path) -> None:
    cache.keep(NAMES[5], CUBIN)
    target = tmp_path / "target"
    target.write_bytes(cache.sealed(NAMES[1], CUBIN))
    (folder / NAMES[0]).mkdir()
    (folder / NAMES[1]).symlink_to(target)
    os.mkfifo(folder / NAMES[2])
    with (folder / NAMES[3]).open("wb") as file:
        file.truncate(2**40)  # a sparse terabyte is not read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [cache.find(name) for name in NAMES[:4]] == [None] * 4
        for name in NAMES[:4]:
            cache.keep(name, CUBIN)
    assert [cache.find(name) for name in NAMES[1:4]] == [CUBIN] * 3
    assert not (folder / NAMES[1]).is_symlink()
    assert target.read_bytes() == cache.sealed(NAMES[1], CUBIN)


def test_emptied_while_running(folder: Path) -> None:
    cache.keep(NAME, CUBIN)
    (folder / NAME).unlink()
    folder.rmdir()
    assert cache.find(NAME) is None
    cache.keep(NAME, CUBIN)
    assert cache.find(NAME) == CUBIN


@posix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o773, 0o702])
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_may_write_is_not_trusted(folder: Path, monkeypatch, mode: int, which: str) -> None:
    cache.keep(NAME, CUBIN)
    bad = folder if which == "folder" else folder / NAME
    bad.chmod(mode)
    with told(r"not trusted: .* is writable by other users \(mode"):
        assert cache.find(NAME) is None
    monkeypatch.setenv("MOEKERN_TRUSTED_CACHE", str(folder.parent))  # not this one
    assert cache.find(NAME) is None
    monkeypatch.setenv("MOEKERN_TRUSTED_CACHE", os.pathsep.join(["/elsewhere", f"{folder}/"]))
    assert cache.find(NAME) == CUBIN
    assert cache.survey(folder).by_name


@posix
def test_an_untrusted_folder_is_not_written_and_the_temporary_one_is(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with told(r"not trusted.*chmod go-w.*MOEKERN_TRUSTED_CACHE="):
        for name in NAMES[:3]:
            assert cache.find(name) is None
            cache.keep(name, CUBIN)
            assert cache.find(name) == CUBIN
    assert not list(folder.iterdir())
    assert sorted(p.name for p in spare().iterdir()) == NAMES[:3]
    assert spare().stat().st_mode & 0o777 == 0o700
    with pytest.raises(CacheError, match="not trusted"):
        cache.kept(NAME, CUBIN)


@posix
def test_folders_above_count_and_sticky_ones_protect(tmp_path: Path) -> None:
    above = tmp_path / "above"
    folder = above / "own" / "kernels"
    folder.mkdir(parents=True)
    assert distrust_folder(folder) is None
    above.chmod(0o777)
    assert "above is writable by other users" in str(distrust_folder(folder))
    assert "above is writable" in str(distrust_folder(above / "not" / "yet"))
    above.chmod(0o1777)
    assert distrust_folder(folder) is None
    assert distrust_folder(above / "not" / "yet") is None
    assert "above is writable" in str(distrust_folder(above))


@posix
def test_links_are_followed_step_by_step(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    exposed = tmp_path / "exposed"
    exposed.mkdir()
    exposed.chmod(0o777)
    (exposed / "link").symlink_to(real)
    assert "exposed is writable" in str(distrust_folder(exposed / "link"))  # it could be made to lead elsewhere
    (tmp_path / "link").symlink_to(Path("exposed") / ".." / "real")
    assert distrust_folder(tmp_path / "link" / "sub") is not None  # through a folder that others may change
    (tmp_path / "good").symlink_to("real")
    assert distrust_folder(tmp_path / "good" / "sub") is None
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in str(distrust_folder(tmp_path / "loop"))


@as_root
def test_what_belongs_to_another_user_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.keep(NAME, CUBIN)
    os.chown(folder / NAME, OTHER, OTHER)
    with told(rf"not trusted: .* belongs to user {OTHER}"):
        assert cache.find(NAME) is None
    os.chown(folder / NAME, 0, 0)
    assert cache.find(NAME) == CUBIN
    os.chown(folder, OTHER, OTHER)
    with told(rf"not trusted: .* belongs to user {OTHER}"):
        assert cache.find(NAME) is None
    monkeypatch.setenv("MOEKERN_TRUSTED_CACHE", str(folder))
    assert cache.find(NAME) == CUBIN


@as_root
def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    os.lchown(tmp_path / "link", OTHER, OTHER)
    assert f"belongs to user {OTHER}" in str(distrust_folder(tmp_path / "link"))


@as_root
def test_a_read_only_shared_cache_of_root_serves_others(folder: Path, as_another_user: Callable[[], None]) -> None:
    for name in NAMES[:3]:
        cache.keep(name, CUBIN)
    folder.chmod(0o755)
    (folder / NAMES[0]).chmod(0o644)
    (folder / NAMES[1]).chmod(0o644)
    (folder / NAMES[1]).write_bytes(b"cut")
    spare().parent.chmod(0o1777)
    as_another_user()
    assert cache.find(NAMES[0]) == CUBIN
    with told("is damaged"):
        assert cache.find(NAMES[1]) is None
    assert cache.find(NAMES[2]) is None  # theirs alone: counts as absent
    with told(r"Permission denied.*kept in .*moekern-12345"):
        for name in NAMES[1:]:
            cache.keep(name, CUBIN)
    assert [cache.find(name) for name in NAMES] == [CUBIN] * len(NAMES)
    assert spare().stat().st_uid == OTHER
    found = cache.survey(folder)
    assert (found.distrust, found.writable) == (None, False)


@as_root
def test_a_temporary_folder_that_another_user_made_first(folder: Path, as_another_user: Callable[[], None]) -> None:
    spare().parent.chmod(0o1777)
    planted = spare().with_name(f"moekern-{OTHER}")
    planted.mkdir()
    os.chown(planted, OTHER + 1, OTHER + 1)
    planted.chmod(0o777)
    (planted / NAME).write_bytes(cache.sealed(NAME, b"bad" * 100))
    as_another_user()
    assert cache.find(NAME) is None
    with told("nowhere: each process compiles its own"):
        cache.keep(NAME, CUBIN)
    assert cache.find(NAME) is None
    assert [p.name for p in planted.iterdir()] == [NAME]


@pytest.mark.parametrize("home", ["unset", "missing", "relative", "a file"])
def test_without_a_home_a_private_temporary_folder(home: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MOEKERN_CACHE_DIR")

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").touch()
    if home == "unset":
        monkeypatch.setattr(Path, "home", nobody)
    else:
        places = {"missing": tmp_path / "none", "relative": Path("."), "a file": tmp_path / "file"}
        monkeypatch.setattr(Path, "home", lambda: places[home])
    with told(r"no home directory.*MOEKERN_CACHE_DIR.*kept in"):
        for name in NAMES[:2]:
            assert cache.find(name) is None
            cache.keep(name, CUBIN)
            assert cache.find(name) == CUBIN
    assert not (tmp_path / "none").exists()
    with pytest.raises(CacheError, match="no home directory"):
        cache.kept(NAME, CUBIN)


@as_root
def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch, as_another_user: Callable[[], None]) -> None:
    monkeypatch.delenv("MOEKERN_CACHE_DIR")
    (tmp_path / "home").mkdir(mode=0o755)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    spare().parent.chmod(0o1777)
    as_another_user()
    assert cache.find(NAME) is None
    with told(r"cannot write compiled kernels to .*/home/\.cache/moekern.*kept in"):
        cache.keep(NAME, CUBIN)
    assert cache.find(NAME) == CUBIN


@pytest.mark.parametrize("kind", ["a file", "below a file", "a name too long", "a full disk"])
def test_a_folder_that_cannot_be_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    places = {"a file": file, "below a file": file / "x", "a name too long": tmp_path / ("n" * 300)}
    chosen = places.get(kind, tmp_path / "full")
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(chosen))
    if kind == "a full disk":
        replace = os.replace

        def full(source: str, target: Path) -> None:
            if Path(target).parent == chosen:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
    with told("kept in"):
        assert cache.find(NAME) is None
        cache.keep(NAME, CUBIN)
    assert cache.find(NAME) == CUBIN
    assert file.read_text() == "kept"
    assert not list((tmp_path / "full").glob("*"))
    with pytest.raises(CacheError, match="MOEKERN_CACHE_DIR"):
        cache.kept(NAME, CUBIN)


def age(path: Path, hours: float) -> None:
    time = path.stat().st_mtime - hours * 3600
    os.utime(path, (time, time))


def test_the_kernels_not_used_for_longest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(cache.sealed(NAME, CUBIN))
    for i, name in enumerate(NAMES[:6]):
        cache.keep(name, CUBIN)
        age(folder / name, hours=10 - i)
    earlier = folder / f"kernel_0-{0:032x}.cubin"  # named as by versions without digests
    earlier.write_bytes(CUBIN)
    age(earlier, hours=100)
    assert cache.survey(folder).unusable == []
    strange = folder / "notes.txt"
    strange.write_text("n" * 100_000)
    half, fresh = folder / "kernel-a.partial", folder / "kernel-b.partial"
    half.write_bytes(b"half")
    fresh.write_bytes(b"half")
    age(half, hours=2)
    assert cache.find(NAMES[0]) == CUBIN  # used just now
    monkeypatch.setenv("MOEKERN_CACHE_LIMIT", str(3 * size))
    cache.keep(NAMES[6], CUBIN)
    assert sorted(p.name for p in folder.glob("*.cubin")) == [NAMES[0], NAMES[5], NAMES[6]]
    assert strange.exists()
    assert fresh.exists()
    assert not half.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 2**30), ("0", 0), ("123", 123), ("500MB", 500 * 10**6), ("1.5 GiB", 3 * 2**29), ("2g", 2 * 10**9)],
)
def test_limits(text: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_CACHE_LIMIT", text)
    assert cache.limit() == value


@pytest.mark.parametrize("text", ["many", "-1", "1e9", "GiB", "1 XB", "nan", "inf"])
def test_bad_limits(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_CACHE_LIMIT", text)
    with pytest.raises(CacheError, match=rf"MOEKERN_CACHE_LIMIT: got '{text}', expected a size such as"):
        cache.limit()


def test_a_limit_below_one_kernel_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_CACHE_LIMIT", "0")
    cache.keep(NAME, CUBIN)
    assert not folder.exists()
    with pytest.raises(CacheError, match="MOEKERN_CACHE_LIMIT allows 0"):
        cache.kept(NAME, CUBIN)


SIDE_BY_SIDE = """
import random, sys, warnings
from moekern.backends.cuda.build import kernel_cache as cache
warnings.simplefilter("ignore")
role, seed = sys.argv[1], int(sys.argv[2])
names = [f"kernel_{i}-{i:040x}.cubin" for i in range(8)]
folder = cache.directory()
draw = random.Random(seed)
found = 0
for step in range(400):
    name = draw.choice(names)
    whole = name.encode() * 3000
    if role == "use":
        cubin = cache.find(name)
        if cubin is None:
            cache.keep(name, whole)
        else:
            found += 1
            assert cubin == whole, "wrong bytes"
    elif draw.random() < 0.5:
        (folder / name).unlink(missing_ok=True)
    elif folder.exists():
        try:
            with (folder / name).open("r+b") as file:
                file.truncate(draw.randrange(1000)) if draw.random() < 0.5 else file.write(b"damage")
        except FileNotFoundError:
            pass
assert role != "use" or found > 0
"""


@pytest.mark.parametrize("limit", ["1GiB", "300kB"])
def test_processes_side_by_side_one_of_which_damages(folder: Path, limit: str) -> None:
    environment = {**os.environ, "MOEKERN_CACHE_LIMIT": limit}
    roles = ["use", "use", "damage", "use"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SIDE_BY_SIDE, role, str(seed)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for seed, role in enumerate(roles)
    ]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(roles), errors
    assert not list(folder.glob("*.partial"))
