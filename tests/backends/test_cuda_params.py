"""Kernel parameters by name: the layout read from the CUDA sources is the compiler's, and bad names are errors."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch

from moekern.backends.cuda.build import loader, sources, variants
from moekern.backends.cuda.build.errors import KernelError
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.configuration import Configuration
from moekern.backends.cuda.kernels import gradients, router, tables
from moekern.backends.cuda.launch import params
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.params import signatures
from moekern.backends.cuda.launch.program import Placeholder

EVERY = variants.every()
FILES = sorted({source.file for source in EVERY})
LAUNCHERS_CONSTANTS = (
    "THREADS", "SHARED_BYTES", "TOKENS", "ROWS", "FEATURES", "BOX_ROWS", "TAIL_ROWS", "STORE_ROWS", "TILE_ROWS",
    "TILE_FEATURES", "EXPERTS", "WARPS", "TABLES", "SPAN", "RAGGED_STORE", "RAGGED_LOAD",
)  # fmt: skip


def without_kernels(text: str) -> str:
    """A source without its kernels: the compiler then only reads it, in a fraction of the time."""
    while (start := text.find('extern "C"')) >= 0:
        end = at = text.index("{", start)
        depth = 1
        while depth:
            end += 1
            depth += {"{": 1, "}": -1}.get(text[end], 0)
        text = text[:start] + re.sub("[^\n]", "", text[start:at]) + text[end + 1 :]
    return text


def compiles(text: str, source: KernelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "expand", lambda file: text)
    loader.compile_source(source)


@pytest.mark.parametrize("file", FILES)
def test_the_layout_is_the_compilers(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and offsets of all fields, and the constants, of the first and the last variant of each source."""
    pytest.importorskip("cupy")
    own = [source for source in EVERY if source.file == file]
    text = without_kernels(sources.expand(file))
    asserts = []
    for signature in signatures(file).values():
        kind, structure = signature.kind, signature.params
        asserts.append(f"static_assert(sizeof({kind}) == {structure.size});")
        asserts += [f"static_assert(__INTADDR__(&(({kind}*)0)->{f.name}) == {f.offset});" for f in structure.fields]
    assert len(asserts) > len(signatures(file)) > 0
    for source in dict.fromkeys((own[0], own[-1])):
        stated = constants(source)
        numbers = [(name, stated.get(name, -1)) for name in LAUNCHERS_CONSTANTS if name not in dict(source.macros)]
        values = [f"static_assert({name} == {value});" for name, value in numbers if value >= 0]
        assert values
        with monkeypatch.context() as patch:
            compiles("\n".join([text, *asserts, *values]), source, patch)
    with monkeypatch.context() as patch, pytest.raises(KernelError, match="static assert"):
        compiles(f"{text}\nstatic_assert(sizeof({kind}) == {structure.size + 8});", own[0], patch)


def test_constants_of_every_variant() -> None:
    """All of Hopper's kernels fit its shared memory, and leave the weight gradient's neighbour its kilobyte."""
    found = defaultdict(set)
    for source in EVERY:
        assert constants(source)["THREADS"] in (128, 256, 384, 512, 1024)
        found[source.file].add(constants(source).get("SHARED_BYTES", 0))
    assert {file for file, sizes in found.items() if sizes != {0}} == {
        "up.cu", "up_consumers.cu", "grouped_mm.cu", "grouped_288.cu", "dh.cu", "wgrad.cu"
    }  # fmt: skip
    assert all(max(sizes) <= 227 << 10 for sizes in found.values())
    assert max(found["wgrad.cu"]) <= (228 << 10) - 2 * 1024


def test_numbers_on_both_sides() -> None:
    """What Python states because a number chooses a variant, or is needed where no kernel is launched."""
    heights = tables.tile_heights()
    assert heights == [256, 272, 288]
    assert len(heights) == next(f.count for f in signatures("plan.cu")["tiles"].params.fields if f.name == "table")
    found = defaultdict(set)
    for source in EVERY:
        rows = constants(source).get("TILE_ROWS", 0)
        found[source.file].add(rows)
        assert rows in (0, *heights)
    split = {Configuration("hopper", tiles_288=tiles_288).split_tile_rows for tiles_288 in (False, True)}
    assert found["dh.cu"] == found["up.cu"] == split == {272, 288}
    assert found["up_consumers.cu"] == found["grouped_288.cu"] == {288}
    assert found["grouped_mm.cu"] == {256}
    logits = constants(router.logits_variant(torch.bfloat16))
    assert (logits["TOKENS"], logits["EXPERTS"]) == (router.LOGITS_TOKENS, router.LOGITS_EXPERTS)
    assert constants(router.route_variant(8))["MOST_TOP_K"] == router.MOST_TOP_K


def test_names_must_match() -> None:
    structure = signatures("combine.cu")["combine"].params
    values = dict.fromkeys((field.name for field in structure.fields), 1)
    assert len(structure.pack(values)) == structure.size
    with pytest.raises(TypeError, match=r"combine of combine\.cu: got no value for \['scores'\].*no field for \[\]"):
        structure.pack({name: 1 for name in values if name != "scores"})
    with pytest.raises(TypeError, match=r"no field for \['weights'\]"):
        structure.pack({**values, "weights": 0})
    with pytest.raises(ValueError, match=r"combine of combine\.cu: .*'tokens': 2147483648"):
        structure.pack({**values, "tokens": 1 << 31})


def test_addresses_numbers_and_arrays() -> None:
    tensor, place = torch.zeros(3), Placeholder(4, (8,), torch.int32, 0)
    structure = signatures("plan.cu")["tiles"].params
    packed = structure.pack(
        {"offsets": tensor, "table": (1, 2, 3), "expert_order": None, "counters": place, "experts": 5,
         "counter_count": 6}
    )  # fmt: skip
    words = [int.from_bytes(packed[i : i + 8], "little") for i in range(0, len(packed), 8)]
    assert words == [tensor.data_ptr(), 1, 2, 3, 0, place.data_ptr(), 5 | 6 << 32]


@pytest.mark.parametrize("declaration", ["int a : 3", "double a", "const u8* a, b", "Tile tile", "u16 a"])
def test_what_cannot_be_read_is_an_error(declaration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"struct P {{\n  int first;\n  {declaration};\n}};\nvoid f(const __grid_constant__ P p) {{\n}}\n"
    monkeypatch.setattr(params, "expand", lambda file: text)
    with pytest.raises(KernelError, match=re.escape(declaration)):
        signatures.__wrapped__("made up.cu")


def test_a_constant_that_is_not_there() -> None:
    with pytest.raises(KernelError, match=r"rows\.cu ELEMENT=Bf16 states no constant 'NO_SUCH'"):
        constants(gradients.rows_variant(torch.bfloat16))["NO_SUCH"]
    with pytest.raises(KernelError, match="ELEMENT is no number"):
        constants(gradients.rows_variant(torch.bfloat16))["ELEMENT"]
