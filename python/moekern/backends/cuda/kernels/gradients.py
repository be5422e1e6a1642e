"""The backward pass's own kernels as Python functions: tensor maps, parameters and launch of each.

The input gradient of a GEMM is that of grouped.py with the other orientation of the weights, and the sum over a token's
rows is one of combine.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from moekern.backends.cuda.build.sources import KernelSource
from moekern.backends.cuda.kernels.tables import Tables
from moekern.backends.cuda.kernels.tensors import ELEMENT, loaded_rows, matrices
from moekern.backends.cuda.launch.constants import constants
from moekern.backends.cuda.launch.kernel import launch

WGRAD_STORE_FEATURES = {3: 256, 4: 128}  # of one store, by stages


def dh_variant(
    dtype: torch.dtype, activation: str, transposed: bool, interleaved: bool, tile_rows: int = 272
) -> KernelSource:
    """The pre-activation's gradient, in tiles of up to 272 or 288 rows."""
    act = ACTIVATIONS[activation]
    return KernelSource.of(
        "dh.cu", ACTIVATION=act.code, ELEMENT=ELEMENT[dtype], INTERLEAVED=interleaved and act.gated,
        TILE_ROWS=tile_rows, TRANSPOSED=transposed,
    )  # fmt: skip


def partial_sums(inter: int) -> int:
    """Partial sums of dS in a row: one for each feature tile of dh.cu."""
    return -(-inter // constants(KernelSource("dh.cu"))["FEATURES"])


def wgrad_variant(
    dtype: torch.dtype, gather: bool, p_innermost: bool, launch_registers: int, stages: int
) -> KernelSource:
    """The weight gradient."""
    return KernelSource.of(
        "wgrad.cu", ELEMENT=ELEMENT[dtype], GATHER=gather, LAUNCH_REGISTERS=launch_registers, P_INNERMOST=p_innermost,
        RING_STAGES=stages, STORE_FEATURES=WGRAD_STORE_FEATURES[stages],
    )  # fmt: skip


def rows_variant(dtype: torch.dtype) -> KernelSource:
    """The small kernels that go over rows or slots."""
    return KernelSource.of("rows.cu", ELEMENT=ELEMENT[dtype])


class Rows:
    """Token and router weight of every row."""

    def __init__(self, like: Tensor, order: Tensor, scores: Tensor | None, top_k: int, token: Tensor, score: Tensor):
        """Launch the kernel that fills `token` int32 and `score` float32, both ``[S]``; `like` has the dtype."""
        slots = order.shape[0]
        self.token, self.score = token, score
        source = rows_variant(like.dtype)
        params = {
            "order": order, "scores": scores, "row_token": token, "row_score": score, "slots": slots, "top_k": top_k
        }  # fmt: skip
        blocks = -(-slots // constants(source)["THREADS"])
        launch(source, "row_values", like.get_device(), params, blocks=blocks)


def dh(
    dout: Tensor,
    w_down: Tensor,
    pre: Tensor,
    rows: Rows,
    tables: Tables,
    activation: str,
    transposed: bool,
    interleaved: bool,
    grad_pre: Tensor,
    scaled: Tensor | None,
    partials: Tensor | None,
    tile_rows: int = 272,
) -> None:
    """Fill the gradient of `pre`, A' ``[S, I]`` and the partial sums of dS, ``[S, partial_sums(I)]``."""
    hidden, inter = dout.shape[1], w_down.shape[1 if transposed else 2]
    source = dh_variant(dout.dtype, activation, transposed, interleaved, tile_rows)
    params = {
        "table": tables.table(tile_rows), "counter": tables.counter(), "source": dout,
        "row_token": rows.token, "row_score": rows.score, "pre": pre, "dh": grad_pre, "scaled": scaled,
        "partials": partials, "hidden": hidden, "inter": inter, "columns": partial_sums(inter),
        "source_pitch_16": hidden // 8,
    }  # fmt: skip
    launch(source, "dh", dout.get_device(), params, maps={"weights": matrices(w_down, 64)})


def wgrad(
    p: Tensor,
    q: Tensor,
    row_token: Tensor | None,
    offsets: Tensor,
    tables: Tables,
    out: Tensor,
    p_innermost: bool,
    launch_registers: int = 168,
    stages: int = 3,
) -> None:
    """``out[e] = sum over the rows of e of p_r^T q_r``: ``[E, p, q]``, or ``[E, q, p]`` with `p_innermost`.

    `p` has the rows themselves, or with `row_token` the tokens they are gathered from.
    """
    gather = row_token is not None
    source = wgrad_variant(q.dtype, gather, p_innermost, launch_registers, stages)
    q_map = loaded_rows(q)
    maps = {
        "p_map": q_map if gather else loaded_rows(p),  # with a gather not used
        "q_map": q_map,
        "result": matrices(out, WGRAD_STORE_FEATURES[stages] if p_innermost else 64),
    }
    params = {
        "offsets": offsets, "expert_order": tables.expert_order, "counter": tables.counter(), "source": p,
        "row_token": row_token, "experts": out.shape[0], "p_features": p.shape[1], "q_features": q.shape[1],
        "source_pitch": 2 * p.shape[1],
    }  # fmt: skip
    launch(source, "wgrad", q.get_device(), params, maps=maps)


def score_gradient(
    partials: Tensor, inverse: Tensor, offsets: Tensor, dout: Tensor, bias: Tensor | None, top_k: int, out: Tensor
) -> None:
    """dS of every slot from the partial sums of its row, and ``<dO_t, bias_e>``; zero for sentinels."""
    slots, source = out.numel(), rows_variant(dout.dtype)
    params = {
        "partials": partials, "inverse": inverse, "offsets": offsets, "dout": dout, "bias": bias, "out": out,
        "slots": slots, "top_k": top_k, "experts": offsets.shape[0] - 1, "columns": partials.shape[1],
        "hidden": dout.shape[1],
    }  # fmt: skip
    threads = constants(source)["THREADS"]
    slots_of_block = threads if bias is None else threads // 32
    launch(source, "score_gradient", dout.get_device(), params, blocks=-(-slots // slots_of_block))


def bias_gradient(
    source: Tensor, row_token: Tensor | None, row_score: Tensor | None, offsets: Tensor, out: Tensor
) -> None:
    """``out[e] = sum over the rows of e of score_r * source_r``, ``[E, N]``; `source` by token with `row_token`."""
    experts, features = out.shape
    columns = -(-features // 64)
    params = {
        "source": source, "row_token": row_token, "row_score": row_score, "offsets": offsets, "out": out,
        "features": features, "columns": columns,
    }  # fmt: skip
    launch(rows_variant(source.dtype), "bias_gradient", source.get_device(), params, blocks=experts * columns)
