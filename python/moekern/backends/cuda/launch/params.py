"""A kernel's parameters by name, as its CUDA source declares them.

Every kernel takes its tensor maps and then one structure, all by value. Their names, types and order are read from the
source, so that nothing in Python repeats them:

    struct Params {
      const u8* x;
      int tokens, hidden;
    };
    extern "C" __global__ void f(const __grid_constant__ TensorMap weights, const __grid_constant__ Params p) {
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from moekern.backends.cuda.build.errors import KernelError
from moekern.backends.cuda.build.sources import expand
from moekern.backends.pointers import address

_COMMENT = re.compile(r"//[^\n]*")
_KERNEL = re.compile(r"\b(\w+)\(\s*((?:const __grid_constant__ \w+ \w+(?:,\s*)?)+)\)\s*\{")
_ARGUMENT = re.compile(r"__grid_constant__ (\w+) (\w+)")
_DECLARATION = re.compile(r"(?:const )?(\w+)(\*?) (\w+(?:, \w+)*)(?:\[(\d+)\])?")
_NUMBERS = {"int": "i", "u32": "I", "u64": "Q", "float": "f"}


@dataclass(frozen=True)
class Field:
    """One field of a structure."""

    name: str
    code: str  # of Python's module struct
    is_address: bool
    count: int  # elements of an array, 1 of none
    offset: int  # bytes


class Structure:
    """A structure of addresses and numbers, laid out as C does it."""

    def __init__(self, name: str, fields: list[Field]):
        """Lay out; the fields know where they begin."""
        self.name, self.fields = name, tuple(fields)
        layout, end = "<", 0
        for field in fields:
            layout += f"{field.offset - end}x{field.count}{field.code}"
            end = field.offset + field.count * struct.calcsize(field.code)
        alignment = max((struct.calcsize(field.code) for field in fields), default=1)
        self._struct = struct.Struct(f"{layout}{-end % alignment}x")
        self.size = self._struct.size
        self._names = {field.name for field in fields}

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """The bytes of the structure; an address is given as a tensor, None for null, or the number itself."""
        if values.keys() != self._names:
            missing, unknown = sorted(self._names - values.keys()), sorted(values.keys() - self._names)
            raise TypeError(f"{self.name}: got no value for {missing}, and there is no field for {unknown}")
        flat: list[Any] = []
        for field in self.fields:
            value = values[field.name]
            if field.count > 1:
                flat += value
            else:
                flat.append(address(value) if field.is_address and type(value) is not int else value)
        try:
            return self._struct.pack(*flat)
        except struct.error as error:
            raise ValueError(f"{self.name}: {error}; got {dict(values)}") from error


@dataclass(frozen=True)
class Signature:
    """What a kernel takes."""

    maps: tuple[str, ...]  # names of its tensor maps, in order
    kind: str  # of the structure, in the source
    params: Structure


def _structure(name: str, body: str) -> Structure:
    fields: list[Field] = []
    end = 0
    for declaration in filter(None, map(str.strip, body.split(";"))):
        found = _DECLARATION.fullmatch(declaration)
        code = found and ("Q" if found[2] else _NUMBERS.get(found[1]))
        if found is None or code is None or (found[2] and "," in found[3]):
            raise KernelError(f"{name}: cannot read the declaration {declaration!r}")
        size, count = struct.calcsize(code), int(found[4] or 1)
        for field in found[3].split(", "):
            offset = -(-end // size) * size
            fields.append(Field(field, code, bool(found[2]), count, offset))
            end = offset + count * size
    return Structure(name, fields)


@cache
def signatures(file: str) -> dict[str, Signature]:
    """What each kernel of a source takes, by the kernel's name. Read once, as kernels are loaded once."""
    text = _COMMENT.sub("", expand(file))
    found = {}
    for kernel, arguments in _KERNEL.findall(text):
        *maps, (kind, _) = _ARGUMENT.findall(arguments)
        body = re.search(rf"\bstruct {kind} {{([^{{}}]*)}};", text)
        if body is None or any(kind != "TensorMap" for kind, _ in maps):
            raise KernelError(f"{file}: {kernel} takes no tensor maps with one structure behind them")
        found[kernel] = Signature(tuple(name for _, name in maps), kind, _structure(f"{kernel} of {file}", body[1]))
    return found
