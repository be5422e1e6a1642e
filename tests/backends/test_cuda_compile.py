"""The CUDA kernels without a GPU: they compile, spill nothing, and their machine code keeps its promises."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekern.cli import main

pytest.importorskip("cupy")

from moekern import _core
from moekern.backends.call import Form
from moekern.backends.cuda.build import loader, sources, variants
from moekern.backends.cuda.build.errors import KernelError
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels import combine, tensors
from moekern.backends.cuda.launch import kernel, program

SMALLEST = KernelSource.of("combine.cu", ELEMENT="Bf16", TOP_K=1, VECTOR=16)


def disassembler() -> str:
    """The disassembler of the wheel nvidia-cuda-nvdisasm, of Triton, or of a CUDA toolkit."""
    found = shutil.which("nvdisasm")
    for root in map(Path, sys.path):
        if found is None and root.name == "site-packages":
            found = next((str(p) for p in root.glob("**/bin/nvdisasm") if p.is_file()), None)
    if found is None:
        pytest.skip("no nvdisasm: neither the wheel nvidia-cuda-nvdisasm nor a CUDA toolkit")
    return found


def machine_code(source: KernelSource) -> list[str]:
    command = [disassembler(), "-c", loader.cubin_path(source)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def multiplying_loops(lines: list[str]) -> list[list[str]]:
    """The innermost loops with wgmma in them, each from the target of a conditional backward branch to the branch.

    The retries of a failed wait lie out of line at the end and branch back unconditionally: no loops.
    """
    labels, spans = {}, set()
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        branch = re.search(r"@!?U?P\d BRA(?:\.\S+)? .*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels and any("HGMMA" in line for line in lines[labels[branch[1]] : i]):
            spans.add((labels[branch[1]], i))
    inner = [(i, j) for i, j in spans if not any((i, j) != (k, m) and i <= k and m <= j for k, m in spans)]
    return [lines[i:j] for i, j in inner]


# A gather's copy of 16 bytes: its source's register. One that may fill with zeros has a predicate behind the address.
WHOLE_COPY = re.compile(r"LDGSTS\.E\.BYPASS\.LTC256B\.128 .*\[(R\d+)\.64(?:\+0x\w+)?\] ;")

HEAVY_FILES = ("up.cu", "up_consumers.cu", "grouped_mm.cu", "grouped_288.cu", "dh.cu", "wgrad.cu")
HEAVY = [s for s in variants.layer(torch.bfloat16, "swiglu") if s.file in HEAVY_FILES]


@pytest.mark.slow
@pytest.mark.parametrize("source", HEAVY, ids=str)
def test_main_loops(source: KernelSource) -> None:
    lines = machine_code(source)
    loops = multiplying_loops(lines)
    assert len(loops) >= (1 if source.file == "wgrad.cu" else 5), "fewer loops with wgmma than N classes"
    for loop in loops:
        assert not any("MEMBAR.ALL.GPU" in line for line in loop), "a GPU-wide memory barrier in a main loop"
    assert not any(re.search(r"\b(LDL|STL)\b", line) for line in lines), "local memory"


@pytest.mark.slow
@pytest.mark.parametrize("source", [s for s in HEAVY if s.file.startswith("up")], ids=str)
def test_gather_copies_do_not_wait_for_each_other(source: KernelSource) -> None:
    """The eight copies of 128 rows follow each other and name registers of their own: see copy_rows."""
    lines = [line for line in machine_code(source) if re.search(r"/\*[0-9a-f]{4,5}\*/", line)]
    copies = [i for i, line in enumerate(lines) if WHOLE_COPY.search(line)]
    runs = [copies[i : i + 8] for i in range(len(copies) - 7) if copies[i + 7] - copies[i] <= 22]
    assert runs
    for run in runs:
        assert len({WHOLE_COPY.search(lines[i])[1] for i in run}) == 8  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "copies"),
    [(s, 10) for s in HEAVY if s.file in ("dh.cu", "wgrad.cu")],
    ids=lambda value: str(value) if isinstance(value, KernelSource) else "",
)
def test_backward_gathers_issue_their_copies_in_a_row(source: KernelSource, copies: int) -> None:
    """The copies of a full k-block have registers of their own (pairs share one in wgrad) and no wait between them."""
    lines = [line for line in machine_code(source) if re.search(r"/\*[0-9a-f]{4,5}\*/", line)]
    at = [i for i, line in enumerate(lines) if WHOLE_COPY.search(line)]
    runs = [at[i : i + copies] for i in range(len(at) - copies + 1) if at[i + copies - 1] - at[i] <= 2 * copies + 2]
    assert runs
    for run in runs[:1]:
        assert not any("SYNCS" in line or "BAR" in line for line in lines[run[0] : run[-1]])
        registers = {WHOLE_COPY.search(lines[i])[1] for i in run}  # type: ignore[index]
        assert len(registers) >= copies // (2 if source.file == "wgrad.cu" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("source", variants.covering(), ids=str)
def test_every_kernel_compiles(source: KernelSource) -> None:
    """The loader refuses spills and the notes that setmaxnreg was ignored or wgmma serialised."""
    assert loader.cubin_path(source).read_bytes().startswith(b"\x7fELF")


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path / "kernels"))
    path = loader.cubin_path(SMALLEST)
    first = path.stat().st_mtime_ns
    assert path.parent == tmp_path / "kernels"
    assert loader.cubin_path(SMALLEST) == path
    assert path.stat().st_mtime_ns == first
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    other = KernelSource.of("combine.cu", ELEMENT="F16", TOP_K=1, VECTOR=16)
    assert loader.cubin_path(other) != path


def test_cache_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "cuda"
    shutil.copytree(sources.cuda_directory(), copy)
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path / "kernels"))
    before = loader.cubin_path(SMALLEST)
    monkeypatch.setenv("MOEKERN_CUDA_DIR", str(copy))
    assert loader.cubin_path(SMALLEST) == before
    with (copy / "base.cuh").open("a") as header:
        header.write("// changed\n")
    assert loader.cubin_path(SMALLEST) != before


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"sm_80.*sm_90a"):
        loader.compile_source(SMALLEST, "sm_80")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(blocked / "below"))
    with pytest.raises(KernelError, match="MOEKERN_CACHE_DIR"):
        loader.cubin_path(SMALLEST)
    monkeypatch.setenv("MOEKERN_CUDA_DIR", str(tmp_path))
    with pytest.raises(KernelError, match="MOEKERN_CUDA_DIR"):
        sources.expand("up.cu")


def test_a_bad_kernel_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hopper.cuh").write_text("")
    (tmp_path / "broken.cu").write_text("int f() { return oops; }")
    monkeypatch.setenv("MOEKERN_CUDA_DIR", str(tmp_path))
    with pytest.raises(KernelError, match="oops"):
        loader.compile_source(KernelSource("broken.cu"))


def test_old_compilers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda import nvrtc

    monkeypatch.setattr(nvrtc, "getVersion", lambda: (12, 8))
    loader._nvrtc.cache_clear()
    try:
        with pytest.raises(KernelError, match=r"12\.8.*12\.9"):
            loader._nvrtc()
    finally:
        loader._nvrtc.cache_clear()


def test_a_missing_cupy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, module, None)
    loader._nvrtc.cache_clear()
    try:
        for use in (lambda: loader.check("sm_90a"), lambda: loader.cubin_path(SMALLEST)):
            with pytest.raises(KernelError, match=r"need CuPy.*install moekern\[cuda13\] or moekern\[cuda12\]"):
                use()
    finally:
        loader._nvrtc.cache_clear()


def test_a_missing_nvrtc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda import nvrtc

    def fail() -> None:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "getVersion", fail)
    loader._nvrtc.cache_clear()
    try:
        with pytest.raises(KernelError, match=r"no NVRTC library.*libnvrtc\.so\.13.*install nvidia-cuda-nvrtc"):
            loader._nvrtc()
    finally:
        loader._nvrtc.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_missing_driver_is_named() -> None:
    with pytest.raises(KernelError, match=r"cannot load combine\.cu.*on device 0: .*driver"):
        loader.load(SMALLEST, "combine", 0)
    with pytest.raises(RuntimeError, match="libcuda"):
        _core.cuda_launch(0, 0, 1, 1, 0, 0, [], b"")


def test_compile_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOEKERN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(variants, "usual", lambda: [SMALLEST])
    assert main(["compile"]) == 0
    assert "1 of 1 kernels" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1
    assert main(["compile", "--arch", "sm_80"]) != 0
    assert "sm_90a" in capsys.readouterr().err


def test_the_usual_variants_are_a_subset_of_all() -> None:
    every = set(variants.every())
    assert set(variants.usual()) <= every
    assert set(variants.covering()) <= every
    assert {s.file for s in every} == {p.name for p in sources.cuda_directory().glob("*.cu")}


def test_a_verbs_variants_are_listed() -> None:
    """`moekern compile` prepares the kernels that the forward pass launches."""
    from moekern.backends.cuda.configuration import Configuration
    from moekern.backends.cuda.passes import forward
    from moekern.backends.cuda.passes.sizes import Sizes

    seen: list[KernelSource] = []
    forms = [tuple(i < n for i in range(3)) for n in range(4)]  # up by consumers, even where it saves, tiles of 288
    for activation, save, form_of_up in itertools.product(("swiglu", "relu2"), (False, True), forms):
        configuration = Configuration("hopper", *form_of_up, *variants.DOWN_FORMS[form_of_up[0]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "multiprocessors", lambda device: 132)
            patch.setattr(combine, "multiprocessors", lambda device: 132)
            patch.setattr(forward, "record", lambda device, verb, meanwhile: seen.extend(program.sources_of(verb)))
            form = Form(activation, False, False, 2)
            columns = 48 if activation == "swiglu" else 24
            sizes = Sizes(0, torch.bfloat16, 32, 64, columns, 24, 4, form, True, False, False, configuration)
            forward._forward_program.__wrapped__(sizes, save)
    listed = {*variants.layer(torch.bfloat16, "swiglu"), *variants.layer(torch.bfloat16, "relu2")}
    assert set(seen) <= listed


def test_the_backward_passs_variants_are_listed() -> None:
    from moekern.backends.cuda.configuration import Configuration
    from moekern.backends.cuda.passes import backward
    from moekern.backends.cuda.passes.sizes import Sizes

    seen: list[KernelSource] = []

    def note(device: int, parts: list[Callable[[], None]]) -> list[None]:
        seen.extend(source for part in parts for source in program.sources_of(part))
        return [None] * len(parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combine, "multiprocessors", lambda device: 132)
        patch.setattr(kernel, "multiprocessors", lambda device: 132)
        patch.setattr(backward, "record_parts", note)
        for tokens, activation, tiles_288 in ((32768, "swiglu", True), (32768, "swiglu", False), (16, "relu2", False)):
            configuration = Configuration("hopper", tiles_288=tiles_288)
            form = Form(activation, False, False, 8)
            columns = 1536 if activation == "swiglu" else 768
            sizes = Sizes(0, torch.bfloat16, tokens, 2048, columns, 768, 64, form, True, True, True, configuration)
            before = len(seen)
            programs, _ = backward._programs.__wrapped__(sizes, (True,) * 6)
            assert len(programs) == (3 if tokens == 32768 else 1)
            assert set(backward.sources(sizes)) == set(seen[before:])
    assert {"combine_beside.cu", "combine.cu", "dh.cu", "wgrad.cu", "rows.cu"} <= {s.file for s in seen}
    assert set(seen) <= {*variants.layer(torch.bfloat16, "swiglu"), *variants.layer(torch.bfloat16, "relu2")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("hidden", "vector"), [(2048, 16), (2052, 8), (2050, 4), (2047, 2)])
def test_the_variants_of_permute_and_combine_are_listed(dtype: torch.dtype, hidden: int, vector: int) -> None:
    from moekern.backends.cuda.kernels import permute

    def place(index: int, *shape: int) -> program.Placeholder:
        return program.Placeholder(index, shape, dtype, 0)

    def verb() -> None:
        for tokens, top_k in ((5, 3), (5, 8), (50000, 8)):
            x, y, index = place(0, tokens, hidden), place(1, tokens * top_k, hidden), place(2, tokens * top_k)
            weights = place(3, tokens, top_k)
            permute.permute(x, index, index, y, top_k)
            combine.combine(y, weights, index, index, x, top_k)
            permute.combine_backward(x, y, weights, index, index, y, weights, top_k)

    with pytest.MonkeyPatch.context() as patch:
        for module in (combine, permute):
            patch.setattr(module, "multiprocessors", lambda device: 132)
        sources = program.sources_of(verb)
    assert set(sources) <= set(variants.rows(dtype))
    wider = vector * dtype.itemsize // 2  # a row of as many float32 has twice the bytes
    assert {dict(source.macros)["VECTOR"] for source in sources} == {min(16, wider)}


def test_shares_of_a_token() -> None:
    """All slots of a token per warp where there are many tokens, fewer if a GPU would otherwise be idle."""
    from moekern.backends.cuda.kernels.permute import share_of

    assert [share_of(tokens, 8, 132) for tokens in (1 << 20, 16384, 4096, 1)] == [8, 8, 2, 1]
    assert share_of(1 << 20, 100, 132) == 32
    assert share_of(1, 1, 132) == 1


def test_recorded_addresses() -> None:
    """A placeholder's address, shifted as ragged maps shift it, still names its place."""
    for place in (0, 3, 200):
        tensor = program.Placeholder(place, (4, 8), torch.bfloat16, 0, offset=512)
        assert program._relocation(tensor.data_ptr()) == (place, 512)
        assert program._relocation(tensors.ragged_base(tensor.data_ptr(), 1 << 17)) == (place, 512 - (1 << 26))
