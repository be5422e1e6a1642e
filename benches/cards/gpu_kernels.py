"""The kernels of both passes as lines of gpu_experts.py, each against cuBLAS on the same product, densely.

The lines keep the names that the records have: "few rows" is up_consumers.cu, "one tile" the tiles of 288 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gpu_items import Item, base_of
from moekern.backends import reference
from moekern.backends.call import Form, Weights
from moekern.backends.cuda.configuration import choose
from moekern.backends.cuda.kernels import combine, gradients, grouped, up
from moekern.backends.cuda.kernels.tables import Tables
from moekern.backends.cuda.passes import backward, forward
from moekern.bench.ceiling import Dense
from moekern.bench.problem import Problem

BACKWARD = ("dh", "dgrad", "dw_down", "dw_gate_up")  # products of the backward pass


def of_forward(problem: Problem, dense: Dense) -> list[Item]:
    """Planner, tile tables, both projections in their forms, and the combine."""
    p, s = problem, problem.shape
    order, inverse, offsets = reference.plan(p.ids, s.experts)
    activated, pre = p.x.new_empty(s.slots, s.intermediate), p.x.new_empty(s.slots, 2 * s.intermediate)
    rows, out = p.x.new_empty(s.slots, s.hidden), torch.empty_like(p.x)

    def tables() -> Tables:
        return Tables(offsets, s.slots)

    def run_up(t: Tables, save: bool, by_consumers: bool) -> None:
        kept, form = pre if save else None, ("swiglu", False, False, by_consumers, 272)
        up.up(p.x, order, p.w_gate_up, None, activated, kept, t, s.top_k, *form)

    def down(t: Tables, stages: int, store_rows: int) -> None:
        grouped.grouped_mm(activated, p.w_down, None, rows, t, False, stages, store_rows)

    def item(name: str, product: str, run: Callable[[Tables], None]) -> Item:
        return Item(name, run, base_of(dense, product), flops_of(problem, product), tables)

    beside = base_of(dense, "down")
    return [
        Item("plan", lambda: forward.plan(p.ids, s.experts), beside),
        Item("tiles", tables, beside),
        item("up, training", "up", partial(run_up, save=True, by_consumers=False)),
        item("up, training, few rows", "up", partial(run_up, save=True, by_consumers=True)),
        item("up, inference", "up", partial(run_up, save=False, by_consumers=False)),
        item("up, few rows", "up", partial(run_up, save=False, by_consumers=True)),
        item("down, 3 stages", "down", partial(down, stages=3, store_rows=256)),
        item("down, 4 stages", "down", partial(down, stages=4, store_rows=128)),
        item("down, one tile", "down", lambda t: grouped.grouped_288(activated, p.w_down, None, rows, t, False)),
        Item("combine", lambda: combine.combine(rows, p.scores, inverse, offsets, out, s.top_k), beside),
    ]


def of_backward(problem: Problem, dense: Dense, parts: bool = True) -> list[Item]:
    """The whole backward pass with its launches, and its kernels; "serial": with the combine on the same stream."""
    p, s = problem, problem.shape
    plan = order, inverse, offsets = reference.plan(p.ids, s.experts)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=p.x.device, dtype=p.dtype)

    pre = normal(s.slots, 2 * s.intermediate)
    configuration = choose(p.dtype, (9, 0), s.slots, s.experts, s.hidden, s.intermediate)

    def whole(beside: bool) -> None:
        weights, form = Weights(p.w_gate_up, p.w_down), Form("swiglu", False, False, s.top_k)
        backward.experts_backward(
            p.dout, p.x, pre, p.scores, plan, weights, form, [True, True, True, True, False, False],
            configuration if beside else replace(configuration, combine_beside=False),
        )  # fmt: skip

    flops = sum(flops_of(problem, product) for product in BACKWARD)
    base = base_of(dense, *BACKWARD)
    items = [
        Item("serial", partial(whole, beside=False), base, flops),
        Item("backward", partial(whole, beside=True), base, flops),
    ]
    if not parts:
        return items[1:]
    rows = gradients.Rows(
        p.x, order, p.scores, s.top_k, torch.empty_like(order), torch.empty(s.slots, device=p.x.device)
    )
    columns = gradients.partial_sums(s.intermediate)
    dh, scaled = pre.clone(), normal(s.slots, s.intermediate)
    partials = torch.empty(s.slots, columns, device=p.x.device)
    grad_rows, dx = normal(s.slots, s.hidden), torch.empty_like(p.x)
    dw_gate_up, dw_down = torch.empty_like(p.w_gate_up), torch.empty_like(p.w_down)

    def run_dh(t: Tables, tile_rows: int) -> None:
        gradients.dh(p.dout, p.w_down, pre, rows, t, "swiglu", False, False, dh, scaled, partials, tile_rows)

    def run_dgrad(t: Tables, tiles_288: bool) -> None:
        form = replace(configuration, tiles_288=tiles_288)
        grouped.grouped_product(dh, p.w_gate_up, None, grad_rows, t, True, form)

    def run_dw_down(t: Tables, stages: int) -> None:
        gradients.wgrad(p.dout, scaled, rows.token, offsets, t, dw_down, False, stages=stages)

    def run_dw_gate_up(t: Tables, stages: int) -> None:
        gradients.wgrad(p.x, dh, rows.token, offsets, t, dw_gate_up, True, stages=stages)

    def item(name: str, product: str, run: Callable[[Tables], None]) -> Item:
        return Item(name, run, base_of(dense, product), flops_of(problem, product), lambda: Tables(offsets, s.slots))

    return [
        item("dh", "dh", partial(run_dh, tile_rows=272)),
        item("dh, one tile", "dh", partial(run_dh, tile_rows=288)),
        item("dgrad", "dgrad", partial(run_dgrad, tiles_288=False)),
        item("dgrad, one tile", "dgrad", partial(run_dgrad, tiles_288=True)),
        *(item(f"dw_down, {n} stages", "dw_down", partial(run_dw_down, stages=n)) for n in (3, 4)),
        *(item(f"dw_gate_up, {n} stages", "dw_gate_up", partial(run_dw_gate_up, stages=n)) for n in (3, 4)),
        Item(
            "combine of gradients",
            lambda: combine.combine(grad_rows, None, inverse, offsets, dx, s.top_k),
            base_of(dense, "dh"),
        ),
        *items,
    ]


def flops_of(problem: Problem, product: str) -> float:
    """2 S H I for a product with one of the three weights of an expert, twice that for gate and up together."""
    s = problem.shape
    return 2.0 * s.slots * s.hidden * s.intermediate * (2 if product in ("up", "dgrad", "dw_gate_up") else 1)
