"""The compiled part: Rust behind raw addresses. Internal; the wrappers in Python hold the documentation of the verbs.

Tensors are contiguous and have the sizes given. Of a tensor only the address is asked for, its ``data_ptr()``; some
functions take the addresses themselves. Callers have checked shapes, dtypes and devices: sizes that cannot be are
refused here with ValueError, but addresses are trusted. Dtype codes: 0 float32, 1 float64, 2 bfloat16, 3 float16. Long
work releases the interpreter lock.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

# What `fields` lists: moekern.backends.call has them, most as named tuples.
_PlanTensors = tuple[Tensor | None, Tensor, Tensor]
_Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
_Form = tuple[str, bool, bool, int]
_Sizes = tuple[int, int, int, int]
_TokenSizes = tuple[int, int, int, int]
_Gradients = tuple[Tensor | None, ...]

def plan(
    ids: int, id_type: int, slots: int, experts: int, order: int, inverse: int, offsets: int, threads: int
) -> None:
    """Sort ``ids[slots]`` into int32 ``order[slots]``, ``inverse[slots]``, ``offsets[experts + 1]``.

    ``id_type``: 0 uint8, 1 uint16, 2 int32, 3 int64.
    """

def cuda_plan_memory(slots: int, experts: int) -> tuple[int, int]:
    """What :func:`cuda_plan` needs of pinned memory: int32 words of marks, bytes beside them."""

def cuda_plan(
    narrow: int,
    spread: int,
    device: int,
    stream: int,
    marks: int,
    epoch: int,
    memory: int,
    ids: int,
    id_type: int,
    slots: int,
    experts: int,
    threads: int,
    allocate: Callable[[], tuple[int, int, int]],
) -> None:
    """As :func:`plan` for ids and outputs on a device.

    ``narrow`` and ``spread`` are the kernels of cuda/host_plan.cu. No two plans in a row with the same marks have the
    same ``epoch``, which is not 0. ``allocate`` is called once, while the ids are on their way, and returns the
    addresses of order, inverse and offsets; what it raises is raised.
    """

def tiles(offsets: int, experts: int, height: int, longest_first: bool, out: int, capacity: int) -> int:
    """Write int32 ``out[capacity, 3]``, rows of (expert, first row, rows); return how many."""

def plan_stats(offsets: int, experts: int) -> tuple[int, float, float, int]:
    """Largest load, mean load, entropy in nats, experts without slots."""

def permute(
    dtype: int,
    threads: int,
    sizes: _TokenSizes,
    x: Tensor,
    plan: _PlanTensors,
    out: Tensor,
) -> None:
    """Copy ``x[tokens, hidden]`` to the rows ``out[tokens * top_k, hidden]``; zeros for sentinels.

    Of the plan, ``order`` is not needed here and may be None; so for ``combine`` and its gradients.
    """

def combine(
    dtype: int,
    threads: int,
    sizes: _TokenSizes,
    y: Tensor,
    weights: Tensor | None,
    plan: _PlanTensors,
    out: Tensor,
) -> None:
    """Sum the rows of ``y[tokens * top_k, hidden]`` into ``out[tokens, hidden]``.

    ``weights[tokens, top_k]`` is float32 (float64 with float64 rows), or None for ones.
    """

def combine_backward(
    dtype: int,
    threads: int,
    sizes: _TokenSizes,
    dout: Tensor,
    y: Tensor | None,
    weights: Tensor | None,
    plan: _PlanTensors,
    dy: Tensor | None,
    dweights: Tensor | None,
) -> None:
    """The gradients of ``combine``; None is not wanted. Without ``dweights``, ``y`` may be None."""

def experts_forward(
    dtype: int,
    threads: int,
    tokens: int,
    sizes: _Sizes,
    x: Tensor,
    scores: Tensor | None,
    plan: _PlanTensors,
    weights: _Weights,
    form: _Form,
    pre: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``out[tokens, hidden]`` and, unless None, the pre-activation ``pre[slots, features]``."""

def experts_backward(
    dtype: int,
    threads: int,
    tokens: int,
    sizes: _Sizes,
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    scores: Tensor | None,
    plan: _PlanTensors,
    weights: _Weights,
    form: _Form,
    gradients: _Gradients,
) -> None:
    """Write the gradients that are not None; work for the others is skipped."""

def grouped_mm(
    dtype: int,
    threads: int,
    kind: int,
    experts: int,
    rows: int,
    k: int,
    n: int,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    out: Tensor,
) -> None:
    """Grouped product: ``kind`` 0 ``a b[e]^T``, 1 ``a b[e]``, 2 ``a_e^T b_e``."""

def fields() -> list[tuple[str, list[str]]]:
    """The structures that functions here take as tuples, by position: their names and those of their fields."""

class Pages:
    """Writable memory for one large result, uninitialised, on huge pages: a buffer. Freed memory is used again."""

    def __init__(self, bytes: int) -> None:
        """MemoryError if the system refuses."""

def memory_rate(start: int, bytes: int, threads: int, write: bool) -> float:
    """Bytes a second at which threads read, or overwrite past the caches, the memory at `start`."""

def codes() -> dict[str, dict[str, int]]:
    """The codes of ``dtype``, ``id_type``, ``activation`` and ``kind`` by the names that Rust gives them."""

def cpu_isa() -> str:
    """The instruction set in use: scalar, avx2, avx512 or avx512bf16. ValueError if the one requested is lacking."""

def cuda_launch(
    function: int,
    device: int,
    grid: int,
    block: int,
    shared: int,
    stream: int,
    maps: Sequence[tuple[int, int, Sequence[int], Sequence[int], Sequence[int]]],
    params: bytes,
) -> None:
    """Launch a kernel with tensor maps (data type, address, sizes, strides in bytes, box) and a structure.

    RuntimeError without a CUDA driver, or with what the driver reports.
    """

# Element type, place, byte offset, dimensions, strides in bytes, box.
_RecordedMap = tuple[int, int, int, Sequence[int], Sequence[int], Sequence[int]]

class CudaProgram:
    """A verb's launches, recorded for its sizes: function, grid, block, shared memory, maps, parameters, addresses."""

    def __init__(
        self,
        device: int,
        launches: Sequence[tuple[int, int, int, int, Sequence[_RecordedMap], bytes, Sequence[tuple[int, int, int]]]],
    ) -> None: ...
    def replay(self, stream: int, addresses: Sequence[int]) -> None:
        """Launch everything on `stream` with these addresses."""
