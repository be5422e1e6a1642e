"""Text for the demo: read files, split them into training and validation, cut batches of bytes.

The split is by file and depends only on the files' contents: no window of validation text comes from a file that was
trained on, identical copies of a file count once, and every run on the same files gets the same split.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 0.1
MAX_BYTES = 1 << 28  # 256 MiB: more than a demo can read, little enough for any machine's memory
SNIFF_BYTES = 8192
# Folders of the standard library that hold other people's packages, or tests with tables of odd bytes.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Two byte streams (uint8, one dimension) and their source."""

    source: str
    train: Tensor
    validation: Tensor
    train_files: int
    validation_files: int
    notes: tuple[str, ...] = ()

    def batch(self, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training windows: inputs and next bytes, int64[batch, context] each, on the CPU."""
        starts = torch.randint(len(self.train) - context, (batch,), generator=generator)
        return windows(self.train, starts, context)

    def validation_windows(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """At most `count` evenly spaced validation windows without overlap, the same every time."""
        count = min(count, (len(self.validation) - 1) // context)
        starts = torch.linspace(0, len(self.validation) - context - 1, count, dtype=torch.float64).long()
        return windows(self.validation, starts, context)


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    picked = text[starts[:, None] + torch.arange(context + 1)].long()
    return picked[:, :-1], picked[:, 1:]


def load_corpus(path: str | None, context: int) -> Corpus:
    """Read the text of the demo.

    path: a file, a folder (every readable text file under it), or None for Python's own standard library.
    context: length of one window in bytes; both halves of the split must hold at least one.
    Raises ValueError if the text is missing, unreadable, binary or too short.
    """
    notes: list[str] = []
    root = Path(sysconfig.get_path("stdlib") if path is None else path).expanduser()
    source = "Python standard library" if path is None else str(path)
    try:
        if path is None:
            files = read_folder(root, ".py", SKIPPED_FOLDERS, notes)
        elif root.is_dir():
            files = read_folder(root, "", frozenset({"__pycache__"}), notes)
        else:
            files = [read_file(root)]
    except OSError as error:
        raise ValueError(f"--text: cannot read {root}: {error.strerror}; a text file or a folder is needed") from error
    if not files:
        raise ValueError(f"--text: no text files found in {root}; give a text file or a folder that has some")
    train, validation = split_one(files[0]) if len(files) == 1 else split_by_file(files)
    for name, part in (("training", train), ("validation", validation)):
        size = sum(len(data) for data in part)
        if size <= context:
            raise ValueError(
                f"--text: {source} leaves {size} bytes for {name}; at least {context + 1} (--context + 1) are needed"
            )
    return Corpus(source, as_tensor(train), as_tensor(validation), len(train), len(validation), tuple(notes))


def read_file(path: Path) -> bytes:
    """One file that the user named: any problem with it is an error."""
    if path.exists() and not path.is_file():  # a device or a pipe could be read forever
        raise ValueError(f"--text: {path} is neither a regular file nor a folder")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES)
    if not data:
        raise ValueError(f"--text: {path} is empty")
    if is_binary(data):
        raise ValueError(f"--text: {path} looks binary (it holds zero bytes); plain text is needed")
    return data


def is_binary(data: bytes) -> bool:
    return b"\0" in data[:SNIFF_BYTES]


def read_folder(root: Path, suffix: str, skipped_folders: frozenset[str], notes: list[str]) -> list[bytes]:
    """The distinct text files under `root`, in the order of their names. `notes` tells which files are left out."""
    texts: dict[bytes, bytes] = {}
    unreadable = binary = total = 0
    for path in walk(root, suffix, skipped_folders):
        try:
            data = path.read_bytes()
        except OSError:
            unreadable += 1
            continue
        if is_binary(data):
            binary += 1
        elif total + len(data) > MAX_BYTES:
            notes.append(f"the text is cut at {MAX_BYTES >> 20} MiB")
            break
        elif data:
            texts[hashlib.sha256(data).digest()] = data
            total += len(data)
    if unreadable:
        notes.append(f"{unreadable} files under {root} could not be read")
    if binary:
        notes.append(f"{binary} binary files under {root} were left out")
    return list(texts.values())


def walk(root: Path, suffix: str, skipped_folders: frozenset[str]) -> Iterator[Path]:
    def complain(error: OSError) -> None:
        if error.filename == str(root):  # the folder itself; subfolders that cannot be listed are passed over
            raise error

    for folder, subfolders, names in os.walk(root, onerror=complain):
        subfolders[:] = sorted(name for name in subfolders if name not in skipped_folders and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                yield path


def split_by_file(files: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Give validation a tenth of the bytes: files in the order of their hashes, as long as they fit."""
    ordered = sorted(files, key=lambda data: hashlib.sha256(data).digest())
    budget = VALIDATION_SHARE * sum(len(data) for data in files)
    train: list[bytes] = []
    validation: list[bytes] = []
    used = 0
    for data in ordered:
        # The search for a file that fits ends near the budget: continuing would collect only small files.
        if used < 0.9 * budget and used + len(data) <= budget:
            validation.append(data)
            used += len(data)
        else:
            train.append(data)
    if not validation:  # a handful of large files
        validation.append(min(train, key=len))
        train.remove(validation[0])
    return train, validation


def split_one(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """One file cannot be split by file: its last tenth is validation."""
    cut = len(data) - int(len(data) * VALIDATION_SHARE)
    return [data[:cut]], [data[cut:]]


def as_tensor(files: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)
