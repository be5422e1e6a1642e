"""The interface of an implementation that the benchmark measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.bench.problem import Problem, Results

# x [T, H], scores [T, K] float32 and the layer's own weights, in this order -> [T, H].
Forward = Callable[..., Tensor]


@dataclass
class Layer:
    """An implementation with the weights of one problem.

    forward: Called with x, scores and `weights`; it keeps ids and all else that is fixed.
    weights: As it stores them: the problem's own tensors if it takes Hugging Face's layout, else copies.
    in_our_layout: Converts gradients of its weights into those of w_gate_up and w_down.
    reference: The right results, if it computes something else than the experts.
    """

    forward: Forward
    weights: tuple[Tensor, ...]
    in_our_layout: Callable[..., tuple[Tensor, ...]] = lambda *gradients: gradients
    reference: Callable[[bool], Results] | None = None


class Peer(ABC):
    """An implementation of the experts.

    Attributes:
        name: As `--peers` takes it.
        about: A description in a few words.
        devices: Where it runs: "cpu", "cuda".
        usual: Devices on which it is measured by default.
        backward: Whether it has gradients.
        waits: Whether the host waits for the GPU during a run, so that no CUDA graph can hold it.
        compiles: Whether its first run compiles, and so says nothing about the time of the next.
    """

    name: str
    about: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    usual: tuple[str, ...] = ("cpu", "cuda")
    backward = True
    waits = False
    compiles = False

    def missing(self, problem: Problem) -> str | None:
        """Why it cannot run this problem here, for example for lack of a package; None if it can."""
        return None

    @abstractmethod
    def build(self, problem: Problem) -> Layer:
        """Build the layer with the problem's weights. May be slow; an exception is reported with the peer's name."""


def forward_of(layer: Layer, problem: Problem) -> Callable[[], Results]:
    """The forward pass as inference runs it: nothing is kept for a backward pass."""

    def run() -> Results:
        with torch.no_grad():
            return Results(layer.forward(problem.x, problem.scores, *layer.weights))

    return run


def both_of(layer: Layer, problem: Problem) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
    """Forward and backward: the output, and the gradients of x, scores and the layer's own weights."""
    leaves = tuple(t.detach().requires_grad_() for t in (problem.x, problem.scores, *layer.weights))

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = layer.forward(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, problem.dout)

    return run


def results_of(layer: Layer, problem: Problem, backward: bool) -> Results:
    """One run, with results in the problem's layout."""
    if not backward:
        return forward_of(layer, problem)()
    out, (dx, dscores, *weights) = both_of(layer, problem)()
    return Results(out, (dx, dscores, *layer.in_our_layout(*weights)))


def wanted_of(layer: Layer, problem: Problem, backward: bool) -> Results:
    """What the layer should compute, in float32."""
    return (layer.reference or problem.reference)(backward)


def saved_bytes(layer: Layer, problem: Problem) -> int:
    """Bytes kept between forward and backward, without the weights themselves; shared memory counts once."""
    leaves = tuple(t.detach().requires_grad_() for t in (problem.x, problem.scores, *layer.weights))
    weights = {t.untyped_storage().data_ptr() for t in layer.weights}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), tensor.numel() * tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer.forward(*leaves)
    del out
    return sum(kept.values())
