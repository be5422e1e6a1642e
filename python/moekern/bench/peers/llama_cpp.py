"""llama.cpp's experts on a CPU: `mul_mat_id` of the ggml that comes with llama-cpp-python, called through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.bench.peers.base import Layer, Peer
from moekern.bench.problem import Problem

PACKAGES = ("llama_cpp", "llama_cpp_py_sync")
LIBRARIES = ("ggml-base", "ggml-cpu", "ggml")  # each needs the ones before it
TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 26, torch.bfloat16: 30}
CPU_DEVICE = 0
METADATA = 1 << 20  # bytes for the descriptions of two dozen tensors and their graph

# Function: result, arguments. "p" is a pointer, "q" a 64-bit number, "i" an int, "s" a string.
FUNCTIONS = {
    "ggml_new_tensor_3d": ("p", "piqqq"),
    "ggml_mul_mat_id": ("p", "pppp"),
    "ggml_swiglu": ("p", "pp"),
    "ggml_mul": ("p", "ppp"),
    "ggml_add": ("p", "ppp"),
    "ggml_view_2d": ("p", "ppqqqq"),
    "ggml_new_graph": ("p", "p"),
    "ggml_build_forward_expand": ("", "pp"),
    "ggml_backend_cpu_buffer_from_ptr": ("p", "pq"),
    "ggml_backend_tensor_alloc": ("i", "ppp"),
    "ggml_backend_tensor_get": ("", "ppqq"),
    "ggml_backend_get_default_buffer_type": ("p", "p"),
    "ggml_gallocr_new": ("p", "p"),
    "ggml_gallocr_alloc_graph": ("i", "pp"),
    "ggml_backend_graph_compute": ("i", "pp"),
    "ggml_backend_get_device": ("p", "p"),
    "ggml_backend_dev_backend_reg": ("p", "p"),
    "ggml_backend_reg_get_proc_address": ("p", "ps"),
    "ggml_backend_dev_by_type": ("p", "i"),
    "ggml_backend_init_by_type": ("p", "is"),
    "ggml_backend_load_all_from_path": ("", "s"),
    "ggml_backend_buffer_free": ("", "p"),
    "ggml_gallocr_free": ("", "p"),
    "ggml_free": ("", "p"),
}
C_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "s": ctypes.c_char_p, "": None}


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def folder() -> Path | None:
    """Where an installed package keeps ggml's libraries."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            for inner in (Path(place) / "lib", Path(place)):
                if library(inner, "ggml-base"):
                    return inner
    return None


def library(place: Path, name: str) -> Path | None:
    """The file of a library, under the name that the operating system uses."""
    names = (f"lib{name}.so", f"lib{name}.so.0", f"lib{name}.dylib", f"lib{name}.0.dylib", f"{name}.dll")
    return next((place / each for each in names if (place / each).exists()), None)


@cache
def ggml() -> dict[str, Any]:
    """ggml's functions by name, and its backend for the CPU as "backend".

    Raises:
        OSError: A library cannot be loaded, or lacks a function.
    """
    place = folder()
    assert place is not None
    found = [library(place, name) for name in LIBRARIES]
    loaded = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in found if path]
    functions: dict[str, Any] = {}
    for name, (result, arguments) in FUNCTIONS.items():
        function = next((getattr(each, name) for each in loaded if hasattr(each, name)), None)
        if function is None:
            raise OSError(f"ggml in {place} has no function {name}")
        function.restype, function.argtypes = C_TYPES[result], [C_TYPES[kind] for kind in arguments]
        functions[name] = function
    init = loaded[0].ggml_init
    init.restype, init.argtypes = ctypes.c_void_p, [InitParams]
    functions["ggml_init"] = init
    if not functions["ggml_backend_dev_by_type"](CPU_DEVICE):
        functions["ggml_backend_load_all_from_path"](str(place).encode())
    functions["backend"] = functions["ggml_backend_init_by_type"](CPU_DEVICE, None)
    if not functions["backend"]:
        raise OSError(f"ggml in {place} has no backend for the CPU")
    return functions


def use_threads(threads: int) -> None:
    """Set the number of threads of all later graphs."""
    g = ggml()
    registry = g["ggml_backend_dev_backend_reg"](g["ggml_backend_get_device"](g["backend"]))
    address = g["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_set_n_threads")
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(g["backend"], threads)


class Experts:
    """A ggml graph like the one that llama.cpp builds for its experts, over torch's memory."""

    def __init__(self, problem: Problem) -> None:
        s, g = problem.shape, ggml()
        use_threads(torch.get_num_threads())
        self.context = g["ggml_init"](InitParams(METADATA, None, True))
        self.kept: list[Tensor] = []
        self.freed = ExitStack()
        weakref.finalize(self, self.freed.close)
        self.freed.callback(g["ggml_free"], self.context)
        self.x = torch.empty(s.tokens, s.hidden)
        self.scores = torch.empty(s.tokens, s.top_k)
        self.out = torch.empty(s.tokens, s.hidden)
        ids = self.place(problem.ids.int(), s.top_k, s.tokens, 1)
        x = self.place(self.x, s.hidden, 1, s.tokens)
        scores = self.place(self.scores, 1, s.top_k, s.tokens)
        w_gate_up = self.place(problem.w_gate_up, s.hidden, 2 * s.intermediate, s.experts)
        w_down = self.place(problem.w_down, s.intermediate, s.hidden, s.experts)

        inner = g["ggml_swiglu"](self.context, g["ggml_mul_mat_id"](self.context, w_gate_up, x, ids))
        rows = g["ggml_mul"](self.context, g["ggml_mul_mat_id"](self.context, w_down, inner, ids), scores)
        row = s.hidden * self.out.itemsize
        views = [
            g["ggml_view_2d"](self.context, rows, s.hidden, s.tokens, s.top_k * row, k * row) for k in range(s.top_k)
        ]
        self.result = views[0]
        for view in views[1:]:
            self.result = g["ggml_add"](self.context, self.result, view)
        self.graph = g["ggml_new_graph"](self.context)
        g["ggml_build_forward_expand"](self.graph, self.result)
        allocator = g["ggml_gallocr_new"](g["ggml_backend_get_default_buffer_type"](g["backend"]))
        self.freed.callback(g["ggml_gallocr_free"], allocator)
        if not g["ggml_gallocr_alloc_graph"](allocator, self.graph):
            raise MemoryError("ggml has no memory for the graph")

    def place(self, tensor: Tensor, *sizes: int) -> Any:
        """A ggml tensor over the memory of a torch tensor; sizes innermost first."""
        g = ggml()
        self.kept.append(tensor)
        placed = g["ggml_new_tensor_3d"](self.context, TYPES[tensor.dtype], *sizes)
        buffer = g["ggml_backend_cpu_buffer_from_ptr"](tensor.data_ptr(), tensor.nbytes)
        self.freed.callback(g["ggml_backend_buffer_free"], buffer)
        g["ggml_backend_tensor_alloc"](buffer, placed, tensor.data_ptr())
        return placed

    def __call__(self, x: Tensor, scores: Tensor, *weights: Tensor) -> Tensor:
        """float32, in memory that the next call overwrites."""
        g = ggml()
        self.x.copy_(x)
        self.scores.copy_(scores)
        if g["ggml_backend_graph_compute"](g["backend"], self.graph) != 0:
            raise RuntimeError("ggml failed to compute the graph")
        g["ggml_backend_tensor_get"](self.result, self.out.data_ptr(), 0, self.out.nbytes)
        return self.out


class LlamaCpp(Peer):
    """The three matrix products of llama.cpp's experts, gate and up in one."""

    name = "llama.cpp"
    about = "llama.cpp's experts (ggml), unquantized"
    devices = usual = ("cpu",)
    backward = False

    def missing(self, problem: Problem) -> str | None:
        if folder() is None:
            return "llama_cpp is not installed: pip install llama-cpp-python"
        return "one expert per token is not measured" if problem.shape.top_k == 1 else None

    def build(self, problem: Problem) -> Layer:
        return Layer(Experts(problem), (problem.w_gate_up, problem.w_down))
