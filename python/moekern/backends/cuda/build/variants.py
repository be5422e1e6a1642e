"""The kernel variants: for `moekern compile`, and for the tests that compile them without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels import combine, gradients, grouped, permute, router, up

DTYPES = (torch.bfloat16, torch.float16)
DOWN_FORMS = ((3, 256), (4, 128))  # stages, rows of a store: configuration.py
UP_FORMS = (  # saving the pre-activation; the consumers' epilogue; rows of a tile of the other form
    (True, False, 272), (False, False, 272), (False, True, 272), (True, True, 272), (True, True, 288),
    (False, True, 288),
)  # fmt: skip
LAUNCH_REGISTERS = (168, 160)  # of the weight gradient: alone, and while the combine runs
WGRAD_STAGES = (3, 4)


def layer(
    dtype: torch.dtype, activation: str, transposed: bool = False, interleaved: bool = False, bias: bool = False
) -> list[KernelSource]:
    """Every variant that training and inference of such a layer can launch, at any size."""
    planners = [KernelSource(file) for file in ("plan.cu", "host_plan.cu")]
    routers = [router.route_variant(32 * n) for n in router.PER_LANE]
    small = [router.logits_variant(dtype), router.route_backward_variant(dtype), gradients.rows_variant(dtype)]
    found = [*planners, *routers, *small]
    found += [up.up_variant(dtype, activation, transposed, interleaved, bias, *form) for form in UP_FORMS]
    # The down projection, and the input gradient of the up projection: the other orientation, without bias.
    for has_bias, way in ((bias, transposed), (False, not transposed)):
        found += [grouped.grouped_mm_variant(dtype, has_bias, way, *form) for form in DOWN_FORMS]
        found.append(grouped.grouped_288_variant(dtype, has_bias, way))
    found += [combine.combine_variant(dtype, top_k) for top_k in (*combine.TOP_K, 0)]
    found += [combine.combine_beside_variant(dtype, top_k) for top_k in combine.TOP_K]
    found += [gradients.dh_variant(dtype, activation, transposed, interleaved, tile_rows) for tile_rows in (272, 288)]
    for innermost, registers, stages in itertools.product((False, True), LAUNCH_REGISTERS, WGRAD_STAGES):
        found.append(gradients.wgrad_variant(dtype, True, innermost, registers, stages))
    return found


def products(dtype: torch.dtype) -> list[KernelSource]:
    """Every variant that grouped products launch."""
    kinds = itertools.product((False, True), DOWN_FORMS)
    found = [grouped.grouped_mm_variant(dtype, False, transposed, *form) for transposed, form in kinds]
    found += [grouped.grouped_288_variant(dtype, False, transposed) for transposed in (False, True)]
    found += [gradients.wgrad_variant(dtype, False, False, LAUNCH_REGISTERS[0], n) for n in WGRAD_STAGES]
    return [KernelSource("plan.cu"), *found]


def rows(dtype: torch.dtype, vectors: Iterable[int] = permute.VECTORS) -> list[KernelSource]:
    """Every variant that permute and combine launch, both passes, for rows of such vectors."""
    sizes = [n for n in vectors if n >= dtype.itemsize]
    found = [permute.permute_variant(n) for n in sizes]
    for n in sizes:
        found += [combine.combine_variant(dtype, top_k, n) for top_k in (*combine.TOP_K, 0)]
        found.append(permute.combine_backward_variant(dtype, n))
    return found


def _distinct(groups: Iterable[list[KernelSource]]) -> list[KernelSource]:
    return list(dict.fromkeys(itertools.chain.from_iterable(groups)))


def usual() -> list[KernelSource]:
    """The variants that today's models need: SwiGLU without bias in Hugging Face's layout, gpt-oss's own; bfloat16."""
    oai = layer(torch.bfloat16, "swiglu_oai", transposed=True, interleaved=True, bias=True)
    return _distinct((layer(torch.bfloat16, "swiglu"), oai, products(torch.bfloat16), rows(torch.bfloat16, (16,))))


def covering() -> list[KernelSource]:
    """Few variants in which every line of the sources is compiled: each activation, type, layout, bias."""
    layouts = itertools.cycle(itertools.product((False, True), repeat=3))
    groups = [layer(torch.bfloat16, "swiglu"), products(torch.bfloat16), rows(torch.bfloat16)]
    groups += [rows(torch.float16, (16, 2)), rows(torch.float32, (16, 4))]
    for i, (activation, layout) in enumerate(zip(ACTIVATIONS, layouts, strict=False)):
        sources = layer(DTYPES[i % 2], activation, *layout)
        ups = list(dict.fromkeys(s for s in sources if s.file in ("up.cu", "up_consumers.cu")))
        groups.append([ups[i % len(ups)], *(s for s in sources if s.file == "dh.cu")])
    groups.append(
        [
            s
            for s in layer(torch.float16, "swiglu", bias=True)
            if s.file in ("grouped_mm.cu", "grouped_288.cu", "wgrad.cu")
        ][:4]
    )
    return _distinct(groups)


def every() -> list[KernelSource]:
    """All variants: several hundred."""
    yes_no = (False, True)
    layers = (layer(*c) for c in itertools.product(DTYPES, ACTIVATIONS, yes_no, yes_no, yes_no))
    return _distinct((*layers, *map(products, DTYPES), *map(rows, (*DTYPES, torch.float32))))
