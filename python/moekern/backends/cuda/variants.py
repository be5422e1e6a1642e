"""Which kernel variants exist: for `moekern compile`, and for the tests that compile them without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from moekern.activations import ACTIVATIONS
from moekern.backends.cuda import backward_kernels, kernels, routing
from moekern.backends.cuda.loader import KernelSource

DTYPES = (torch.bfloat16, torch.float16)
DOWN_FORMS = ((3, 256), (4, 128))  # stages, rows of a store: configuration.py
UP_FORMS = (  # saving the pre-activation; few rows, one tile
    (True, False, False), (False, False, False), (False, True, False), (True, True, False), (True, True, True),
    (False, True, True),
)  # fmt: skip
LAUNCH_REGISTERS = (168, 160)  # of the weight gradient: alone, and beside the combine
WGRAD_STAGES = (3, 4)


def layer(
    dtype: torch.dtype, activation: str, transposed: bool = False, interleaved: bool = False, bias: bool = False
) -> list[KernelSource]:
    """Every variant that training and inference of such a layer can launch, at any size."""
    element = kernels.ELEMENT[dtype]
    planners = [KernelSource.of(file, {}) for file in ("plan.cu", "host_plan.cu")]
    routers = [KernelSource.of("route.cu", {"PER_LANE": n}) for n in routing.PER_LANE]
    by_element = [KernelSource.of(f, {"ELEMENT": element}) for f in ("logits.cu", "route_backward.cu", "rows.cu")]
    found = [*planners, *routers, *by_element]
    for save, few_rows, one_tile in UP_FORMS:
        file, macros = kernels.up_variant(dtype, activation, transposed, interleaved, bias, save, few_rows, one_tile)
        found.append(KernelSource.of(file, dict(macros)))
    # The down projection, and the input gradient of the up projection: the other orientation, without bias.
    for has_bias, way in ((bias, transposed), (False, not transposed)):
        for stages, store_rows in DOWN_FORMS:
            macros = kernels.grouped_mm_variant(dtype, has_bias, way, stages, store_rows)
            found.append(KernelSource.of("grouped_mm.cu", dict(macros)))
        found.append(KernelSource.of("grouped_few.cu", dict(kernels.grouped_few_variant(dtype, has_bias, way))))
    found += [
        KernelSource.of("combine.cu", dict(kernels.combine_variant(dtype, top_k)))
        for top_k in (*kernels.COMBINE_TOP_K, 0)
    ]
    found += [
        KernelSource.of("combine_beside.cu", dict(backward_kernels.combine_beside_variant(dtype, top_k)))
        for top_k in backward_kernels.BESIDE_TOP_K
    ]
    for one_tile in (False, True):
        macros = backward_kernels.dh_variant(dtype, activation, transposed, interleaved, one_tile)
        found.append(KernelSource.of("dh.cu", dict(macros)))
    for innermost, registers, stages in itertools.product((False, True), LAUNCH_REGISTERS, WGRAD_STAGES):
        macros = backward_kernels.wgrad_variant(dtype, True, innermost, registers, stages)
        found.append(KernelSource.of("wgrad.cu", dict(macros)))
    return found


def products(dtype: torch.dtype) -> list[KernelSource]:
    """Every variant that grouped products launch."""
    kinds = itertools.product((False, True), DOWN_FORMS)
    found = [kernels.grouped_mm_variant(dtype, False, transposed, *form) for transposed, form in kinds]
    sources = [KernelSource.of("grouped_mm.cu", dict(macros)) for macros in found]
    found = [backward_kernels.wgrad_variant(dtype, False, False, LAUNCH_REGISTERS[0], s) for s in WGRAD_STAGES]
    gradients = [KernelSource.of("wgrad.cu", dict(macros)) for macros in found]
    tall = [kernels.grouped_few_variant(dtype, False, transposed) for transposed in (False, True)]
    sources += [KernelSource.of("grouped_few.cu", dict(macros)) for macros in tall]
    return [KernelSource.of("plan.cu", {}), *sources, *gradients]


def _distinct(groups: Iterable[list[KernelSource]]) -> list[KernelSource]:
    return list(dict.fromkeys(itertools.chain.from_iterable(groups)))


def usual() -> list[KernelSource]:
    """What today's models need: SwiGLU without bias in Hugging Face's layout, gpt-oss's own; bfloat16."""
    oai = layer(torch.bfloat16, "swiglu_oai", transposed=True, interleaved=True, bias=True)
    return _distinct((layer(torch.bfloat16, "swiglu"), oai, products(torch.bfloat16)))


def covering() -> list[KernelSource]:
    """Few variants in which every line of the sources is compiled: each activation, type, layout, bias."""
    layouts = itertools.cycle(itertools.product((False, True), repeat=3))
    groups = [layer(torch.bfloat16, "swiglu"), products(torch.bfloat16)]
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
    """All of them: some hundreds."""
    yes_no = (False, True)
    layers = (layer(*c) for c in itertools.product(DTYPES, ACTIVATIONS, yes_no, yes_no, yes_no))
    return _distinct((*layers, *map(products, DTYPES)))
