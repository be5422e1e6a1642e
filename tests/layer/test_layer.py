"""mk.MoE as a module: shapes, state, copies, conversion of dense MLPs, and comparison with transformers' block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import moekern as mk
from problems import error

H, I, E, K = 32, 16, 6, 2


def layer(**options: object) -> mk.MoE:
    return mk.MoE(H, I, E, K, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(H,), (3, H), (2, 5, H), (2, 0, H), (2, 1, 3, H)])
def test_any_leading_dimensions(device: str, shape: tuple[int, ...]) -> None:
    moe = layer().to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = moe(x)
    assert y.shape == x.shape
    assert torch.equal(y.reshape(-1, H), moe(x.reshape(-1, H)))
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_same_as_its_parts(device: str) -> None:
    moe = layer(bias=True, router_bias=True, activation="geglu", routing="topk_softmax").to(device)
    x = torch.randn(9, H, device=device)
    weights, ids = mk.route(moe.gate(x), K, method="topk_softmax")
    e = moe.experts
    parts = mk.experts(
        x, ids, weights, e.gate_up_proj, e.down_proj, e.gate_up_proj_bias, e.down_proj_bias, activation="geglu"
    )
    assert torch.equal(moe(x), parts)


def test_every_parameter_gets_a_gradient(device: str) -> None:
    moe = layer(bias=True, router_bias=True).to(device)
    moe(torch.randn(50, H, device=device)).square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_state_dict_has_transformers_names() -> None:
    assert {k: tuple(v.shape) for k, v in layer().state_dict().items()} == {
        "gate.weight": (E, H),
        "experts.gate_up_proj": (E, 2 * I, H),
        "experts.down_proj": (E, H, I),
    }
    assert set(layer(bias=True, router_bias=True).state_dict()) == {
        "gate.weight", "gate.bias", "experts.gate_up_proj", "experts.gate_up_proj_bias",
        "experts.down_proj", "experts.down_proj_bias",
    }  # fmt: skip


def test_transformers_block_with_the_same_state_dict() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, num_attention_heads=2
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    moe = layer()
    moe.load_state_dict(block.state_dict())
    x = torch.randn(2, 7, H, requires_grad=True)
    ours, theirs = moe(x), block(x)
    assert error(ours, theirs) < 1e-6
    dout = torch.randn_like(x)
    (dx,) = torch.autograd.grad(ours, x, dout)
    (dx_theirs,) = torch.autograd.grad(theirs, x, dout)
    assert error(dx, dx_theirs) < 1e-5


def test_copies_and_pickles_compute_the_same_and_share_nothing() -> None:
    moe = layer()
    x = torch.randn(7, H)
    y = moe(x)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.experts.down_proj.zero_()
        assert torch.equal(moe(x), y)


def test_reset_parameters_draws_anew() -> None:
    moe = layer(bias=True, router_bias=True)
    before = {k: v.clone() for k, v in moe.state_dict().items()}
    moe.reset_parameters()
    for name, value in moe.state_dict().items():
        assert name == "gate.bias" or not torch.equal(value, before[name])


def test_meta_device_then_materialised() -> None:
    moe = layer(device="meta")
    assert moe(torch.empty(3, H, device="meta")).shape == (3, H)
    moe.to_empty(device="cpu")
    moe.reset_parameters()
    assert torch.isfinite(moe(torch.randn(3, H))).all()


def test_repr_tells_the_sizes() -> None:
    text = repr(layer(bias=True))
    for part in (
        "num_experts=6",
        "hidden_size=32",
        "intermediate_size=16",
        "top_k=2",
        "activation='swiglu'",
        "bias=True",
    ):
        assert part in text


class Gated(nn.Module):
    """Llama's MLP, with biases to make it harder."""

    def __init__(self, bias: bool, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, I, bias=bias)
        self.up_proj = nn.Linear(H, I, bias=bias)
        self.down_proj = nn.Linear(I, H, bias=bias)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def dense_mlps() -> dict[str, nn.Module]:
    return {
        "llama": Gated(False, nn.SiLU()),
        "gated with biases": Gated(True, nn.GELU()),
        "tanh gelu": Gated(False, nn.GELU(approximate="tanh")),
        "relu": Gated(True, nn.ReLU()),
        "sequential": nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H, bias=False)),
        "sequential silu": nn.Sequential(nn.Linear(H, I, bias=False), nn.SiLU(), nn.Linear(I, H)),
    }


@pytest.mark.parametrize("name", dense_mlps())
def test_from_dense_computes_the_same_function(device: str, name: str) -> None:
    dense = dense_mlps()[name].to(device)
    moe = mk.MoE.from_dense(dense, num_experts=5, top_k=3)
    x = torch.randn(4, 6, H, device=device)
    assert error(moe(x), dense(x)) < 1e-6
    assert moe.num_experts == 5
    moe.experts.down_proj.data.zero_()
    assert dense(x).abs().sum() > 0  # the dense weights are copied, not shared


def test_from_dense_reads_transformers_modules() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    llama = LlamaMLP(transformers.LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2))
    gpt2 = GPT2MLP(I, transformers.GPT2Config(n_embd=H, n_head=2)).eval()
    x = torch.randn(5, H)
    for dense, activation in ((llama, "swiglu"), (gpt2, "gelu_tanh")):
        moe = mk.MoE.from_dense(dense, num_experts=4, top_k=2)
        assert moe.activation == activation
        assert error(moe(x), dense(x)) < 1e-6


def test_from_dense_refuses_what_it_cannot_keep() -> None:
    dense = dense_mlps()["llama"]
    with pytest.raises(ValueError, match="activation: got 'relu2', which has no gate"):
        mk.MoE.from_dense(dense, 4, 2, activation="relu2")
    with pytest.raises(ValueError, match="norm_topk_prob: got False"):
        mk.MoE.from_dense(dense, 4, 2, norm_topk_prob=False)
    with pytest.raises(ValueError, match="activation 'Tanh' is not recognised"):
        mk.MoE.from_dense(nn.Sequential(nn.Linear(H, I), nn.Tanh(), nn.Linear(I, H)), 4, 2)


def test_latest_routing_and_auxiliary_loss(device: str) -> None:
    moe = layer().to(device)
    x = torch.randn(40, H, device=device)
    assert moe.latest_routing is None
    moe.eval()(x)
    assert moe.latest_routing is None
    moe.train()(x)
    counts = moe.latest_routing.tokens_per_expert
    _, ids = mk.route(moe.gate(x), K)
    assert torch.equal(counts.cpu().long(), torch.bincount(ids.flatten().cpu(), minlength=E))
    loss = mk.aux_loss(nn.Sequential(moe, nn.Linear(H, H, device=device)))
    loss.backward()
    assert moe.gate.weight.grad.abs().sum() > 0
    assert moe.experts.down_proj.grad is None


def test_auxiliary_loss_is_that_of_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, E)
    _, ids = mk.route(logits, K)
    counts = torch.bincount(ids.flatten(), minlength=E)
    theirs = load_balancing_loss_func((logits,), E, K)
    assert float(mk.load_balancing_loss(logits, counts)) == pytest.approx(float(theirs), rel=1e-6)


def test_auxiliary_loss_is_least_when_even() -> None:
    even = mk.load_balancing_loss(torch.zeros(60, E), torch.full((E,), 60 * K // E))
    assert float(even) == pytest.approx(K, rel=1e-6)
    logits = torch.zeros(60, E)
    logits[:, :K] = 5
    counts = torch.zeros(E)
    counts[:K] = 60
    assert float(mk.load_balancing_loss(logits, counts)) > 2 * K
