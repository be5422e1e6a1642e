"""Forward-mode differentiation, vmap, batches of gradients: the right values for every verb, or a refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad

import moekern as mk
from moekern.verbs import ops
from problems import error

# torch's own warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:torch.searchsorted\(\):UserWarning"),
]

T, H, I, E, K = 7, 6, 5, 4, 2
F64 = torch.float64
TOLERANCE = 1e-6  # of central differences in float64

Function = Callable[..., Tensor]

LAYERS: dict[str, dict[str, Any]] = {
    "layer": {"bias": True, "router_bias": True},
    "layer with capacity": {"capacity_factor": 1.0},
    "layer with rounding": {"round_tokens_to": 2, "rounding": "up"},
    "layer with shared expert": {
        "routing": "deepseek_v3",
        "n_group": 2,
        "topk_group": 1,
        "shared_intermediate_size": 4,
    },
    "layer with fused expert": {"shared_intermediate_size": 2 * I, "fuse_shared_expert": True},
    "layer with scaled input": {"routing": "llama4", "scale_input": True},
    "layer with expert choice": {"routing": "expert_choice"},
}
VERBS = (
    "experts", "experts with plan", "experts transposed", "grouped_mlp", "grouped_mm", "grouped_mm of a view",
    "grouped_mm of rows", "permute", "combine", "combine without weights", *LAYERS,
)  # fmt: skip
LINEAR = ("permute", "combine without weights")


def case(verb: str, device: str) -> tuple[Function, tuple[Tensor, ...]]:
    """A function of tensors, all of which are differentiable, and values for them."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=F64).to(device)

    if verb in LAYERS:
        torch.manual_seed(0)
        layer = mk.MoE(H, I, E, K, dtype=F64, **LAYERS[verb]).to(device)
        names = [name for name, _ in layer.named_parameters()]
        values = tuple(p.detach() for p in layer.parameters())

        def call(x: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

        return call, (normal(T, H), *values)
    weights, ids = mk.route(normal(T, E), K)
    ids[0, 0] = -1
    plan = mk.plan(ids, E)
    offsets = torch.tensor([0, 1, 3, 3, 6], device=device)  # an empty expert, and a row past the last
    projections = (normal(E, 2 * I, H), normal(E, H, I), normal(E, 2 * I), normal(E, H))
    x, rows = normal(T, H), normal(T * K, H)
    up, down = (w.mT.contiguous() for w in projections[:2])
    return {
        "experts": (lambda x, *a: mk.experts(x, ids, *a), (x, weights, *projections)),
        "experts with plan": (
            lambda x, *a: mk.experts(x, None, *a, plan=plan, activation="swiglu_oai"), (x, weights, *projections)
        ),
        "experts transposed": (
            lambda x, *a: mk.experts(x, ids, None, *a, transposed=True, interleaved=True), (x, up, down)
        ),
        "grouped_mlp": (lambda x, *a: mk.grouped_mlp(x, offsets, *a), (x, *projections)),
        "grouped_mm": (lambda a, b: mk.grouped_mm(a, b, offsets), (x, normal(E, H, 3))),
        "grouped_mm of a view": (lambda a, b: mk.grouped_mm(a, b.mT, offsets), (x, normal(E, 3, H))),
        "grouped_mm of rows": (lambda a, b: mk.grouped_mm(a, b, offsets), (x, normal(T, 3))),
        "permute": (lambda x: mk.permute(x, plan), (x,)),
        "combine": (lambda y, w: mk.combine(y, plan, w), (rows, weights)),
        "combine without weights": (lambda y: mk.combine(y, plan), (rows,)),
    }[verb]  # fmt: skip


def random_like(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(v) for v in values)


def difference(f: Function, at: tuple[Tensor, ...], along: tuple[Tensor, ...], step: float = 1e-6) -> Tensor:
    """The directional derivative, by central differences."""
    ahead, behind = (f(*(v + s * t for v, t in zip(at, along, strict=True))) for s in (step, -step))
    return (ahead - behind) / (2 * step)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("verb", VERBS)
def test_forward_mode(device: str, verb: str, requires_grad: bool, grad_enabled: bool) -> None:
    f, values = case(verb, device)
    along = random_like(values)
    truth = difference(f, values, along)
    values = tuple(v.requires_grad_(requires_grad) for v in values)
    with torch.set_grad_enabled(grad_enabled):
        assert error(torch.func.jvp(f, values, along)[1], truth) < TOLERANCE
        with forward_ad.dual_level():
            out = f(*(forward_ad.make_dual(v, t) for v, t in zip(values, along, strict=True)))
            assert error(forward_ad.unpack_dual(out).tangent, truth) < TOLERANCE


@pytest.mark.parametrize("verb", VERBS)
def test_linearize_and_jacobians(device: str, verb: str) -> None:
    f, values = case(verb, device)
    along = random_like(values)
    assert error(torch.func.linearize(f, *values)[1](*along), difference(f, values, along)) < TOLERANCE
    x, *others = values

    def of_first(x: Tensor) -> Tensor:
        return f(x, *others)

    basis = torch.eye(x.numel(), dtype=F64, device=device).reshape(-1, *x.shape)
    truth = torch.stack([difference(of_first, (x,), (e,)) for e in basis], -1)
    truth = truth.reshape(*truth.shape[:-1], *x.shape)
    jacobian = torch.autograd.functional.jacobian
    assert error(torch.func.jacfwd(of_first)(x), truth) < TOLERANCE
    assert error(torch.func.jacrev(of_first)(x), truth) < TOLERANCE
    assert error(jacobian(of_first, x, vectorize=True), truth) < TOLERANCE
    assert error(jacobian(of_first, x, vectorize=True, strategy="forward-mode"), truth) < TOLERANCE


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in LINEAR])
def test_second_derivatives(device: str, verb: str) -> None:
    """Forward over reverse, reverse over forward, and Hessians by all orders."""
    f, values = case(verb, device)
    along, upstream = random_like(values), torch.randn_like(f(*values))

    def gradient(*v: Tensor) -> Tensor:
        return flat(torch.func.vjp(f, *v)[1](upstream))

    truth = difference(gradient, values, along)
    assert error(torch.func.jvp(gradient, values, along)[1], truth) < TOLERANCE
    back = torch.func.grad(lambda v: (torch.func.jvp(f, v, along)[1] * upstream).sum())(values)
    assert error(flat(back), truth) < TOLERANCE

    x, *others = values

    def loss(x: Tensor) -> Tensor:
        return (f(x, *others).square() * upstream).sum()

    twice = torch.func.jacrev(torch.func.jacrev(loss))(x)
    assert error(torch.func.hessian(loss)(x), twice) < TOLERANCE
    assert error(torch.func.jacfwd(torch.func.jacfwd(loss))(x), twice) < TOLERANCE


# A dense shared expert's gradient is torch's own, and that of silu refuses tangents.
@pytest.mark.parametrize("verb", [v for v in VERBS if v != "layer with shared expert"])
def test_a_tangent_that_comes_after_the_forward_pass(device: str, verb: str) -> None:
    f, values = case(verb, device)
    values = tuple(v.requires_grad_() for v in values)
    out = f(*values)
    upstream = torch.randn_like(out)
    truth = torch.autograd.grad(out, values, upstream, retain_graph=True)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(out, values, forward_ad.make_dual(torch.ones_like(out), upstream))
        for gradient, expected in zip(grads, truth, strict=True):
            assert error(forward_ad.unpack_dual(gradient).tangent, expected) < TOLERANCE


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap(device: str, verb: str, dim: int) -> None:
    """Over every argument, such as weights of an ensemble, and over all: values, gradients and tangents of slices."""
    f, values = case(verb, device)
    upstream = torch.randn_like(f(*values))
    all_of_them = tuple(range(len(values)))

    def loss(*v: Tensor) -> Tensor:
        return (f(*v) * upstream).sum()

    gradient = torch.func.grad(loss, argnums=all_of_them)
    for batched in [(i,) for i in all_of_them] + [all_of_them]:
        stacked = tuple(torch.stack([v, v * 1.1], dim) if i in batched else v for i, v in enumerate(values))
        in_dims = tuple(dim if i in batched else None for i in all_of_them)

        def slices(tensors: tuple[Tensor, ...], batched: tuple[int, ...] = batched) -> list[tuple[Tensor, ...]]:
            return [tuple(t.select(dim, s) if i in batched else t for i, t in enumerate(tensors)) for s in range(2)]

        mapped = torch.func.vmap(f, in_dims=in_dims)
        truth = torch.stack([f(*s) for s in slices(stacked)])
        assert error(mapped(*stacked), truth) < 1e-12
        inside = torch.func.vmap(gradient, in_dims=in_dims)(*stacked)
        for s, expected in enumerate(map(gradient, *zip(*slices(stacked), strict=True))):
            assert error(flat(g[s] for g in inside), flat(expected)) < 1e-12
        outside = torch.func.grad(lambda *v, m=mapped: (m(*v) * upstream).sum(), argnums=all_of_them)(*stacked)
        by_hand = torch.func.grad(lambda *v, s=slices: sum(loss(*part) for part in s(v)), argnums=all_of_them)(*stacked)
        assert error(flat(outside), flat(by_hand)) < 1e-12
        along = random_like(stacked)
        truth = torch.stack([difference(f, *pair) for pair in zip(slices(stacked), slices(along), strict=True)])
        assert error(torch.func.jvp(mapped, stacked, along)[1], truth) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("verb", VERBS)
def test_batches_of_gradients(device: str, verb: str, dtype: torch.dtype) -> None:
    f, values = case(verb, device)
    if verb in LAYERS and dtype != F64:
        pytest.skip("the layer's parameters are float64")
    values = tuple(v.to(dtype).requires_grad_() for v in values)
    out = f(*values)
    upstream = torch.randn(3, *out.shape, dtype=dtype, device=device)
    grads = torch.autograd.grad(out, values, upstream, is_grads_batched=True, retain_graph=True)
    for s in range(3):
        expected = torch.autograd.grad(out, values, upstream[s], retain_graph=True)
        assert error(flat(g[s] for g in grads), flat(expected)) < 1e-6


@pytest.mark.parametrize("verb", ["experts", "grouped_mm", "permute", "combine without weights", "layer"])
def test_a_graph_of_batched_gradients_is_refused(device: str, verb: str) -> None:
    """The graph of a Function is lost in the vmap behind is_grads_batched: second derivatives would be zero."""
    f, values = case(verb, device)
    values = tuple(v.requires_grad_() for v in values)
    out = f(*values)
    with pytest.raises(NotImplementedError, match=r"moekern\..*create_graph=True.*use torch\.func"):
        torch.autograd.grad(out, values, torch.ones(2, *out.shape).to(out), is_grads_batched=True, create_graph=True)


def test_operators_under_the_older_vmap() -> None:
    """Two of them, in a thread of its own as autograd's are on a GPU: such a thread is told of none."""
    rng = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 2, T, H, generator=rng), torch.rand(2, T, K, generator=rng)
    matrices = torch.randn(E, 2 * I, H, generator=rng), torch.randn(E, H, I, generator=rng), None, None
    plan = mk.plan(torch.arange(T * K).reshape(T, K) % E, E)

    def verb(x: Tensor, weights: Tensor) -> Tensor:
        out, _ = ops.experts_forward(x, weights, plan[:3], matrices, "swiglu", False, False, K, False, "cpu")
        return out  # type: ignore[no-any-return]

    with ThreadPoolExecutor() as pool:

        def batch(x: Tensor, weights: Tensor) -> Tensor:
            return pool.submit(verb, x, weights).result()

        got = _vmap(lambda x: _vmap(batch)(x, weights))(x)
    for outer in range(3):
        for inner in range(2):
            assert torch.equal(got[outer, inner], verb(x[outer, inner], weights[inner]))


def test_vmap_of_routing_and_plans(device: str) -> None:
    logits = torch.randn(3, 900, E, device=device)  # enough for both ways to choose
    weights, ids = torch.func.vmap(lambda l: mk.route(l, K))(logits)
    order = torch.func.vmap(lambda i: mk.plan(i, E).order)(ids)
    for s in range(3):
        expected = mk.route(logits[s], K)
        assert torch.equal(weights[s], expected[0])
        assert torch.equal(ids[s], expected[1])
        assert torch.equal(order[s], mk.plan(ids[s], E).order)
    x = torch.randn(3, 900, H, device=device)
    layer = mk.MoE(H, I, E, K).to(device).eval().requires_grad_(False)
    assert error(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x])) < 1e-6


def test_an_empty_vmap_is_refused() -> None:
    plan = mk.plan(torch.zeros(T, 1, dtype=torch.int64), E)
    with pytest.raises(ValueError, match="vmapped dimension of size 0"):
        torch.func.vmap(lambda x: mk.permute(x, plan))(torch.zeros(0, T, H))


@pytest.mark.parametrize("verb", ["experts", "grouped_mm", "permute", "combine"])
def test_operators_refuse_tangents(verb: str) -> None:
    """An operator that gets a tangent raises, as a compiled function does."""
    f, values = case(verb, "cpu")
    compiled = torch.compile(lambda v, t: torch.func.jvp(f, v, t)[1], backend="eager", fullgraph=True)
    along = random_like(values)
    with pytest.raises(Exception, match=r"moekern::|autograd\.Function"):  # Dynamo's, around ours
        compiled(values, along)
