"""The whole layer, of moekern and of its peers, as lines of gpu_experts.py; each is checked before it is timed."""

from __future__ import annotations

from gpu_items import Item, base_of
from moekern.bench import decode
from moekern.bench.ceiling import Copy, Dense, Streamed
from moekern.bench.peers import Layer, Peer
from moekern.bench.peers.base import both_of, forward_of, results_of, wanted_of
from moekern.bench.problem import ALLOWED, Problem, Results
from moekern.bench.record import BOTH, DECODE, FORWARD

LABELS = {"grouped_mm": "torch grouped_mm"}  # as in the records so far


class WrongError(Exception):
    """A result differs from float32 by more than rounding."""


def label(peer: Peer) -> str:
    return LABELS.get(peer.name, peer.name)


def checked(peer: Peer, problem: Problem, backward: bool, check: bool = True) -> Layer:
    """The layer of a peer, checked to be right within the rounding of the dtype.

    Raises:
        WrongError: Its results are wrong.
        ImportError: It is not installed, or cannot run this problem.
    """
    if reason := peer.missing(problem):
        raise ImportError(reason)
    layer = peer.build(problem)
    if check:
        ensure_right(results_of(layer, problem, backward), wanted_of(layer, problem, backward), problem)
    return layer


def ensure_right(results: Results, wanted: Results, problem: Problem) -> None:
    """Raise WrongError if the results are off by more than the dtype's rounding."""
    error = results.error_against(wanted)
    if not error <= ALLOWED[problem.dtype]:
        raise WrongError(f"off by {error:.1e}, allowed {ALLOWED[problem.dtype]:.1e}")


def whole(peer: Peer, problem: Problem, dense: Dense, forward_only: bool, check: bool = True) -> list[Item]:
    """The passes of the layer."""
    layer = checked(peer, problem, not forward_only, check)
    leaves = tuple(t.detach().requires_grad_() for t in (problem.x, problem.scores, *layer.weights))
    once, flops = base_of(dense, "up", "down"), problem.flops(FORWARD)
    items = [
        Item(f"{label(peer)}: forward, inference", forward_of(layer, problem), once, flops),
        Item(f"{label(peer)}: forward, training", lambda: layer.forward(*leaves), once, flops),
    ]
    if not forward_only:
        both = both_of(layer, problem)
        items.append(Item(f"{label(peer)}: forward + backward", both, base_of(dense), problem.flops(BOTH)))
    return items


def few_tokens(peer: Peer, problem: Problem, several: list[Problem], memory: Copy, check: bool) -> tuple[Item, Item]:
    """A forward pass eagerly, for the wall clock, and in a CUDA graph."""
    layer = checked(peer, problem, False, check)
    layers = [layer, *(peer.build(each) for each in several[1:])]
    moved = sum(each.bytes(DECODE) for each in several) / len(several)
    work, passes, remark = decode.work(layers, several, waits=peer.waits)
    if check:
        ensure_right(work(), wanted_of(layers[-1], several[-1], False), problem)
    ceiling, flops = Streamed(moved, memory), problem.flops(DECODE)
    return (
        Item(f"{label(peer)}, eager", forward_of(layer, problem), ceiling),
        Item(f"{label(peer)}, {remark or 'graph'}", work, ceiling, flops, passes=passes),
    )
