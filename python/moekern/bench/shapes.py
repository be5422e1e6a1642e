"""The sizes that all benchmarks share, by name: tokens T, hidden H, intermediate I, experts E, experts per token K.

A name gives the model and, where that is not the model's usual batch, the number of tokens or of rows per expert.
Names with "decode" have the few tokens of text generation; names with "cpu" suit the speed of a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer and its batch."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def slots(self) -> int:
        """Rows that the experts compute: T K."""
        return self.tokens * self.top_k

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, H, I, E, K."""
        return self.tokens, self.hidden, self.intermediate, self.experts, self.top_k

    @property
    def decode(self) -> bool:
        """Whether this shape measures decode: the time of reading weights."""
        return "decode" in self.name

    @property
    def thiek(self) -> str:
        """The sizes as `--thiek` takes them."""
        return ",".join(map(str, self.sizes))


def named(sizes: dict[str, tuple[int, int, int, int, int]]) -> dict[str, Shape]:
    return {name: Shape(name, *thiek) for name, thiek in sizes.items()}


GPU = named({
    "qwen3-30b-a3b": (32768, 2048, 768, 128, 8),
    "olmoe-1b-7b": (32768, 2048, 1024, 64, 8),
    "sonic-30b": (32768, 4096, 1024, 64, 4),
    "mixtral-8x7b": (8192, 4096, 14336, 8, 2),
    "deepseek-v3-rank": (16384, 7168, 2048, 64, 8),  # the 64 experts of one rank of four
    "qwen3-512-rows": (8192, 2048, 768, 128, 8),
    "qwen3-256-rows": (4096, 2048, 768, 128, 8),
    "sonic-7b": (24576, 1536, 256, 128, 8),
    "gpt-oss-20b": (16384, 2880, 2880, 32, 4),
    "qwen2-moe": (16381, 2048, 1408, 60, 4),  # sizes that no tile divides
})  # fmt: skip
GPU_DECODE = named({
    "qwen3-decode-1": (1, 2048, 768, 128, 8),
    "qwen3-decode-8": (8, 2048, 768, 128, 8),
    "qwen3-decode-64": (64, 2048, 768, 128, 8),
    "qwen3-decode-256": (256, 2048, 768, 128, 8),
    "mixtral-decode-1": (1, 4096, 14336, 8, 2),
    "mixtral-decode-8": (8, 4096, 14336, 8, 2),
    "gpt-oss-decode-1": (1, 2880, 2880, 32, 4),
    "deepseek-v3-rank-decode-1": (1, 7168, 2048, 64, 8),
})  # fmt: skip
CPU = named({
    "cpu-small": (256, 512, 256, 16, 4),
    "cpu-mixtral": (512, 1024, 3584, 8, 2),  # Mixtral's layer, each side divided by four
    "cpu-olmoe": (256, 2048, 1024, 64, 8),  # the layers of OLMoE and Qwen3 at 32 and 16 rows per expert
    "cpu-qwen3": (256, 2048, 768, 128, 8),
    "cpu-olmoe-2048": (2048, 2048, 1024, 64, 8),
})  # fmt: skip
CPU_DECODE = named({
    "cpu-olmoe-decode-1": (1, 2048, 1024, 64, 8),
    "cpu-qwen3-decode-8": (8, 2048, 768, 128, 8),
})  # fmt: skip
TINY = named({
    "tiny": (48, 128, 64, 8, 2),  # for tests and for trying the command
    "tiny-decode": (1, 128, 64, 8, 2),
})  # fmt: skip

SHAPES: dict[str, Shape] = {**GPU, **GPU_DECODE, **CPU, **CPU_DECODE, **TINY}
ALL = {"cuda": [*GPU, *GPU_DECODE], "cpu": [*CPU, *CPU_DECODE]}
USUAL = {
    "cuda": ["qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b", "qwen3-decode-1", "qwen3-decode-64"],
    "cpu": ["cpu-mixtral", "cpu-olmoe", "cpu-olmoe-decode-1"],
}
QUICK = {"cuda": ["qwen3-512-rows", "qwen3-decode-1"], "cpu": ["cpu-small"]}
# The shape that `--sweep` varies if none is named.
SWEPT = {"cuda": "olmoe-1b-7b", "cpu": "cpu-small"}


def chosen(names: Iterable[str], device: str) -> list[Shape]:
    """The shapes of these names in order, each once; "all" stands for all of a device's.

    Raises:
        ValueError: A name is unknown; the message lists the known ones.
    """
    found: dict[str, Shape] = {}
    for name in names:
        if name != "all" and name not in SHAPES:
            raise ValueError(f"--shape: got {name!r}, expected all or one of {', '.join(SHAPES)}")
        for each in ALL[device] if name == "all" else [name]:
            found[each] = SHAPES[each]
    return list(found.values())


def parse_thiek(text: str) -> Shape:
    """A shape from "T,H,I,E,K", named by these sizes.

    Raises:
        ValueError: It is not five whole numbers of at least 1, or K exceeds E.
    """
    parts = text.split(",")
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) != 5 or min(sizes) < 1:
        raise ValueError(
            f"--thiek: got {text!r}, expected five whole numbers of at least 1: "
            "tokens, hidden size, intermediate size, experts, experts per token"
        )
    tokens, hidden, intermediate, experts, top_k = sizes
    if top_k > experts:
        raise ValueError(f"--thiek: got {top_k} experts per token, expected at most the {experts} experts")
    return Shape(f"{tokens}x{hidden}x{intermediate}x{experts}x{top_k}", tokens, hidden, intermediate, experts, top_k)
