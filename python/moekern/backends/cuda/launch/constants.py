"""Numbers that a CUDA source states and its launcher needs too: threads of a block, shared memory, sizes of boxes."""

from __future__ import annotations

import operator
import re
from functools import cache

from moekern.backends.cuda.build.errors import KernelError
from moekern.backends.cuda.build.sources import KernelSource, expand

_COMMENT = re.compile(r"//[^\n]*")
_CONSTANTS = re.compile(r"^constexpr (?:int|u32|bool) ([^;]+);", re.MULTILINE)  # of a file, not of a structure
_TOKEN = re.compile(r"\s*(\d+|\w+|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%<>?:()!])")
_OPERATIONS = (  # from the weakest
    {"||": lambda a, b: int(bool(a or b))},
    {"&&": lambda a, b: int(bool(a and b))},
    {"==": operator.eq, "!=": operator.ne},
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
    {"<<": operator.lshift, ">>": operator.rshift},
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.floordiv, "%": operator.mod},
)


class _Expression:
    """An integer expression of C++: literals, names, and the operations above; numbers are not negative."""

    def __init__(self, text: str, constants: Constants):
        self._tokens = _TOKEN.findall(text)
        self._constants = constants
        if "".join(self._tokens) != "".join(text.split()):
            raise KernelError(f"cannot read the constant expression {text!r}")

    def value(self) -> int:
        value = self._choice()
        if self._tokens:
            raise KernelError(f"cannot read a constant expression from {' '.join(self._tokens)!r} on")
        return value

    def _accept(self, *tokens: str) -> str | None:
        return self._tokens.pop(0) if self._tokens and self._tokens[0] in tokens else None

    def _choice(self) -> int:
        condition = self._binary(0)
        if not self._accept("?"):
            return condition
        yes = self._choice()
        self._accept(":")
        no = self._choice()
        return yes if condition else no

    def _binary(self, level: int) -> int:
        if level == len(_OPERATIONS):
            return self._unary()
        value = self._binary(level + 1)
        while sign := self._accept(*_OPERATIONS[level]):
            value = int(_OPERATIONS[level][sign](value, self._binary(level + 1)))
        return value

    def _unary(self) -> int:
        if self._accept("!"):
            return int(not self._unary())
        if self._accept("("):
            value = self._choice()
            self._accept(")")
            return value
        token = self._tokens.pop(0) if self._tokens else ""
        return int(token) if token.isdigit() else self._constants[token]


class Constants:
    """The constants of one variant of a kernel, by name."""

    def __init__(self, source: KernelSource):
        """Read the source; values are worked out when they are asked for."""
        self._source = source
        self._known: dict[str, int | str] = dict(source.macros)
        self._text: dict[str, str] = {}
        for declaration in _CONSTANTS.findall(_COMMENT.sub("", expand(source.file))):
            for one in re.split(r",\s*(?=\w+ = )", declaration):
                name, _, expression = one.partition(" = ")
                self._text[name] = expression

    def get(self, name: str, otherwise: int) -> int:
        """The value, or another one where neither the source nor a macro of the variant states it."""
        return self[name] if name in self._known or name in self._text else otherwise

    def __getitem__(self, name: str) -> int:
        """The value; KernelError where there is none, or none of integers."""
        if name not in self._known:
            if name not in self._text:
                raise KernelError(f"{self._source} states no constant {name!r}")
            self._known[name] = _Expression(self._text[name], self).value()
        value = self._known[name]
        if not isinstance(value, int):
            raise KernelError(f"{self._source}: {name} is no number")
        return value


@cache
def constants(source: KernelSource) -> Constants:
    """The constants of a variant. Read once, as kernels are loaded once."""
    return Constants(source)
