"""The kernel variants: for `moekern compile`, and for the tests that compile them without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels import gradients, grouped, permute, router

DTYPES = (torch.bfloat16, torch.float16)
DOWN_FORMS = ((3, 256), (4, 128))  # stages, rows of a store: configuration.py
UP_FORMS = (  # saving the pre-activation; few rows, one tile
    (True, False, False), (False, False, False), (False, True, False), (True, True, False), (True, True, True),
    (False, True, True),
)  # fmt: skip
LAUNCH_REGISTERS = (168, 160)  # of the weight gradient: alone, and while the combine runs
WGRAD_STAGES = (3, 4)


def layer(
    dtype: torch.dtype, activation: str, transposed: bool = False, interleaved: bool = False, bias: bool = False
) -> list[KernelSource]:
    """Every variant that training and inference of such a layer can launch, at any size."""
    element = grouped.ELEMENT[dtype]
    planners = [KernelSource.of(file, {}) for file in ("plan.cu", "host_plan.cu")]
    routers = [KernelSource.of("route.cu", {"PER_LANE": n}) for n in router.PER_LANE]
    by_element = [KernelSource.of(f, {"ELEMENT": element}) for f in ("logits.cu", "route_backward.cu", "rows.cu")]
    found = [*planners, *routers, *by_element]
    for save, few_rows, one_tile in UP_FORMS:
        file, macros = grouped.up_variant(dtype, activation, transposed, interleaved, bias, save, few_rows, one_tile)
        found.append(KernelSource.of(file, dict(macros)))
    # The down projection, and the input gradient of the up projection: the other orientation, without bias.
    for has_bias, way in ((bias, transposed), (False, not transposed)):
        for stages, store_rows in DOWN_FORMS:
            macros = grouped.grouped_mm_variant(dtype, has_bias, way, stages, store_rows)
            found.append(KernelSource.of("grouped_mm.cu", dict(macros)))
        found.append(KernelSource.of("grouped_few.cu", dict(grouped.grouped_few_variant(dtype, has_bias, way))))
    found += [
        KernelSource.of("combine.cu", dict(grouped.combine_variant(dtype, top_k)))
        for top_k in (*grouped.COMBINE_TOP_K, 0)
    ]
    found += [
        KernelSource.of("combine_beside.cu", dict(gradients.combine_beside_variant(dtype, top_k)))
        for top_k in gradients.BESIDE_TOP_K
    ]
    for one_tile in (False, True):
        macros = gradients.dh_variant(dtype, activation, transposed, interleaved, one_tile)
        found.append(KernelSource.of("dh.cu", dict(macros)))
    for innermost, registers, stages in itertools.product((False, True), LAUNCH_REGISTERS, WGRAD_STAGES):
        macros = gradients.wgrad_variant(dtype, True, innermost, registers, stages)
        found.append(KernelSource.of("wgrad.cu", dict(macros)))
    return found


def products(dtype: torch.dtype) -> list[KernelSource]:
    """Every variant that grouped products launch."""
    kinds = itertools.product((False, True), DOWN_FORMS)
    found = [grouped.grouped_mm_variant(dtype, False, transposed, *form) for transposed, form in kinds]
    sources = [KernelSource.of("grouped_mm.cu", dict(macros)) for macros in found]
    found = [gradients.wgrad_variant(dtype, False, False, LAUNCH_REGISTERS[0], s) for s in WGRAD_STAGES]
    weight_gradients = [KernelSource.of("wgrad.cu", dict(macros)) for macros in found]
    tall = [grouped.grouped_few_variant(dtype, False, transposed) for transposed in (False, True)]
    sources += [KernelSource.of("grouped_few.cu", dict(macros)) for macros in tall]
    return [KernelSource.of("plan.cu", {}), *sources, *weight_gradients]


def rows(dtype: torch.dtype, vectors: Iterable[int] = permute.VECTORS) -> list[KernelSource]:
    """Every variant that permute and combine launch, both passes, for rows of such vectors."""
    sizes = [n for n in vectors if n >= dtype.itemsize]
    found = [KernelSource.of("permute.cu", dict(permute.permute_variant(n))) for n in sizes]
    for n in sizes:
        combines = [grouped.combine_variant(dtype, top_k, n) for top_k in (*grouped.COMBINE_TOP_K, 0)]
        found += [KernelSource.of("combine.cu", dict(macros)) for macros in combines]
        macros = permute.combine_backward_variant(dtype, n)
        found.append(KernelSource.of("combine_backward.cu", dict(macros)))
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
        up = list(dict.fromkeys(s for s in sources if s.file in ("up.cu", "up_few.cu")))
        groups.append([up[i % len(up)], *(s for s in sources if s.file == "dh.cu")])
    groups.append(
        [
            s
            for s in layer(torch.float16, "swiglu", bias=True)
            if s.file in ("grouped_mm.cu", "grouped_few.cu", "wgrad.cu")
        ][:4]
    )
    return _distinct(groups)


def every() -> list[KernelSource]:
    """All variants: several hundred."""
    yes_no = (False, True)
    layers = (layer(*c) for c in itertools.product(DTYPES, ACTIVATIONS, yes_no, yes_no, yes_no))
    return _distinct((*layers, *map(products, DTYPES), *map(rows, (*DTYPES, torch.float32))))
