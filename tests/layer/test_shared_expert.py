"""Shared experts, jitter and the other routing options of mk.MoE, against the blocks of transformers that have them."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moekern as mk
from problems import error

H, I, S, E, K = 32, 16, 24, 8, 3


def block_of(modeling: Any, block: str, config: str, **options: Any) -> nn.Module:
    """A random block of transformers that computes its experts eagerly."""
    made = getattr(modeling, config)(hidden_size=H, num_experts_per_tok=K, **options)
    made._experts_implementation = "eager"  # a block without a model around it has none in transformers 5.0
    return randomised(getattr(modeling, block)(made))


def randomised(block: nn.Module) -> nn.Module:
    for tensor in (*block.parameters(), *block.buffers()):
        nn.init.normal_(tensor, std=0.2)
    return block


def check_same(device: str, ours: nn.Module, theirs: nn.Module, rename: dict[str, str]) -> None:
    """Output, gradient of the input and of every parameter."""
    x = torch.randn(2, 7, H, device=device)
    dout = torch.randn_like(x)
    results = []
    for module in (ours.to(device), theirs.to(device)):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.backward(dout)
        results.append({"out": out, "x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}})
    theirs_by_name = {rename_key(name, rename): value for name, value in results[1].items()}
    assert results[0].keys() == theirs_by_name.keys()
    for name, value in results[0].items():
        assert error(value, theirs_by_name[name]) < 1e-5, name


def rename_key(name: str, rename: dict[str, str]) -> str:
    for old, new in rename.items():
        name = name.replace(old, new)
    return name


def test_block_of_qwen2_moe(device: str) -> None:
    modeling = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe", reason="needs transformers")
    block = block_of(
        modeling, "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", moe_intermediate_size=I,
        shared_expert_intermediate_size=S, num_experts=E, norm_topk_prob=False,
    )  # fmt: skip
    moe = mk.MoE(H, I, E, K, norm_topk_prob=False, shared_intermediate_size=S, shared_gate=True)
    moe.load_state_dict(block.state_dict())
    check_same(device, moe, block, {})


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_block_of_deepseek_v3(device: str, family: str) -> None:
    name = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe"}[family]
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}", reason="needs transformers")
    block = block_of(
        modeling, f"{name}MoE" if hasattr(modeling, f"{name}MoE") else f"{name}SparseMoeBlock", f"{name}Config",
        moe_intermediate_size=I, n_routed_experts=E, n_group=4, topk_group=2, n_shared_experts=2,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    moe = mk.MoE(
        H, I, E, K, routing=family, n_group=4, topk_group=2, routed_scaling_factor=2.5, selection_bias=True,
        shared_intermediate_size=2 * I,
    )  # fmt: skip
    rename = {"shared_experts.": "shared_expert."}
    moe.load_state_dict({rename_key(k, rename): v for k, v in block.state_dict().items()})
    check_same(device, moe, block, rename)


def test_jitter_of_mixtral(device: str) -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers")
    block = block_of(
        modeling, "MixtralSparseMoeBlock", "MixtralConfig", intermediate_size=I, num_local_experts=E,
        router_jitter_noise=0.2,
    ).to(device)  # fmt: skip
    moe = mk.MoE(H, I, E, K, router_jitter_noise=0.2).to(device)
    moe.load_state_dict(block.state_dict())
    x = torch.randn(2, 7, H, device=device)
    outputs = []
    for module in (moe, block):
        torch.manual_seed(5)
        outputs.append(module(x.clone()))  # transformers jitters its input in place
    assert error(outputs[0], outputs[1]) < 1e-6
    assert error(moe(x), outputs[0]) > 1e-3
    assert torch.equal(moe.eval()(x), moe(x))


def test_scaled_input_is_llama4s(place: tuple[str, torch.dtype]) -> None:
    """The sum over experts of each one applied to the weighted token."""
    device, dtype = place
    small = 1e-6 if dtype == torch.float32 else 2**-7
    for top_k in (1, 2):
        moe = mk.MoE(H, I, E, top_k, routing="llama4", scale_input=True).to(device, dtype)
        x = torch.randn(9, H, device=device, dtype=dtype, requires_grad=True)
        weights, ids = mk.route(moe.gate(x), top_k, method="llama4")
        expected = torch.zeros_like(x)
        for k in range(top_k):
            scaled = x * weights[:, k : k + 1].to(dtype)
            expected = expected + mk.experts(scaled, ids[:, k : k + 1], None, *moe.experts.projections)
        assert error(moe(x), expected) < small
        leaves = (x, *moe.parameters())
        dout = torch.randn_like(x)
        ours = torch.autograd.grad(moe(x), leaves, dout)
        for value, wanted in zip(ours, torch.autograd.grad(expected, leaves, dout), strict=True):
            assert error(value, wanted) < 10 * small


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_names_and_copies_of_a_shared_expert(place: tuple[str, torch.dtype], activation: str) -> None:
    device, dtype = place
    moe = mk.MoE(H, I, E, K, activation=activation, shared_intermediate_size=S, shared_gate=True).to(device, dtype)
    gate = {"shared_expert.gate_proj.weight"} if activation == "swiglu" else set()
    assert set(moe.state_dict()) == gate | {
        "gate.weight", "experts.gate_up_proj", "experts.down_proj", "shared_expert.up_proj.weight",
        "shared_expert.down_proj.weight", "shared_expert_gate.weight",
    }  # fmt: skip
    x = torch.randn(5, H, device=device, dtype=dtype)
    routed = mk.MoE(H, I, E, K, activation=activation).to(device, dtype)
    routed.load_state_dict(moe.state_dict(), strict=False)
    shared = torch.sigmoid(moe.shared_expert_gate(x)) * moe.shared_expert(x)
    assert torch.equal(moe(x), routed(x) + shared)
    before = moe(x)
    moe.reset_parameters()
    assert not torch.equal(moe(x), before)


def test_logits_are_float32_under_autocast_and_in_half_precision(device: str) -> None:
    moe = mk.MoE(H, I, E, K).to(device)
    x = torch.randn(50, H, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = moe.gate(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, moe.gate(x))
    half = mk.MoE(H, I, E, K, router_bias=True, dtype=torch.bfloat16, device=device)
    rows = x.to(torch.bfloat16)
    exact = rows.double() @ half.gate.weight.double().T + half.gate.bias.double()
    assert error(half.gate(rows), exact) < 1e-5
    half(rows).sum().backward()
    assert half.gate.weight.grad.dtype == torch.bfloat16


def fused_and_separate(
    device: str = "cpu", dtype: torch.dtype = torch.float32, n: int = 2, **options: Any
) -> tuple[mk.MoE, mk.MoE]:
    """The same layer twice, with a fused and with a separate shared expert."""
    options = {"norm_topk_prob": False, "shared_intermediate_size": n * I, "shared_gate": True, **options}
    fused, separate = (mk.MoE(H, I, E, K, fuse_shared_expert=f, **options).to(device, dtype) for f in (True, False))
    separate.load_state_dict(fused.state_dict())
    return fused, separate


def gradients_by_name(moe: mk.MoE) -> dict[str, torch.Tensor]:
    """The parameters' gradients, under the names of the state dict."""
    other = copy.deepcopy(moe)
    for p, q in zip(moe.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        q.data = p.grad
    return other.state_dict()


def step(moe: mk.MoE, x: torch.Tensor, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    moe.zero_grad()
    leaf = x.clone().requires_grad_()
    out = moe(leaf)
    loss = 0.01 * mk.aux_loss(moe)
    (loss + (out * dout).sum().float()).backward()
    return {"out": out.detach(), "loss": loss.detach(), "x": leaf.grad, **gradients_by_name(moe)}


FUSED = {
    "n=1": {"n": 1},
    "n=3, no gate": {"n": 3, "shared_gate": False},
    "relu2": {"activation": "relu2"},
    "deepseek": {"routing": "deepseek_v3", "n_group": 4, "topk_group": 2, "selection_bias": True},
    "capacity": {"capacity_factor": 0.5},
    "rounded down": {"round_tokens_to": 8, "rounding": "down"},
    "rounded up": {"round_tokens_to": 8, "rounding": "up"},
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("tokens", [40, 1, 0])
def test_fused_is_the_same_as_beside(place: tuple[str, torch.dtype], options: dict[str, Any], tokens: int) -> None:
    """Value, loss and all gradients; limits on routed experts' tokens do not drop or add tokens of the shared one."""
    device, dtype = place
    fused, separate = fused_and_separate(device, dtype, **options)
    x = torch.randn(tokens, H, device=device, dtype=dtype)
    dout = torch.randn_like(x)
    got, wanted = step(fused, x, dout), step(separate, x, dout)
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.dtype == wanted[name].dtype
        assert value.shape == wanted[name].shape
        cancels = tokens == 1 and name == "shared_expert_gate.weight"  # a single sum
        if tokens and not cancels:
            assert error(value, wanted[name]) < (1e-5 if dtype == torch.float32 else 2**-6), name
    ours, theirs = fused.latest_routing, separate.latest_routing
    for field in ("logits", "tokens_per_expert", "topk_ids"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    if "selection_bias" in options:
        assert torch.equal(fused.gate.tokens_since_update, separate.gate.tokens_since_update)
    with torch.no_grad():
        out, expected = fused.eval()(x), separate.eval()(x)
    assert tokens == 0 or error(out, expected) < (1e-5 if dtype == torch.float32 else 2**-6)


def test_fused_under_autocast(device: str) -> None:
    fused, separate = fused_and_separate(device)
    x = torch.randn(2, 20, H, device=device)
    dout = torch.randn_like(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        got, wanted = step(fused, x, dout), step(separate, x, dout)
    for name, value in got.items():
        assert value.dtype == wanted[name].dtype, name
        assert error(value, wanted[name]) < 2**-6, name


def test_state_dicts_of_fused_and_separate_are_interchangeable(place: tuple[str, torch.dtype]) -> None:
    for options in ({"n": 1}, {"n": 3}, {"shared_gate": False}, {"activation": "gelu"}):
        fused, separate = fused_and_separate(*place, **options)
        state = fused.state_dict()
        assert [(k, v.shape) for k, v in state.items()] == [(k, v.shape) for k, v in separate.state_dict().items()]
        other = fused_and_separate(*place, **options)[0]
        other.load_state_dict(separate.state_dict())
        for key, value in other.state_dict().items():
            assert torch.equal(value, state[key]), key
        for a, b in zip(other.parameters(), fused.parameters(), strict=True):
            assert torch.equal(a, b)
    # Within a model, and through a file.
    model, same = nn.Sequential(nn.Linear(H, H), fused), nn.Sequential(nn.Linear(H, H), other)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    with torch.no_grad():
        other.experts.gate_up_proj.zero_()
    file.seek(0)
    same.load_state_dict(torch.load(file))
    for key, value in model.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key


def test_fused_loads_joined_weights_too(device: str) -> None:
    """The names that a layer with parameters spread over ranks saves."""
    fused, other = fused_and_separate(device)[0], fused_and_separate(device)[0]
    other.load_state_dict(dict(fused.named_parameters()))
    for a, b in zip(other.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_into_a_fused_layer_reports_as_usual() -> None:
    fused, separate = fused_and_separate()
    up, down, routed = "shared_expert.up_proj.weight", "shared_expert.down_proj.weight", "experts.gate_up_proj"

    def missing(*names: str) -> dict[str, torch.Tensor]:
        return {k: v for k, v in separate.state_dict().items() if k not in names}

    extra = {"shared_expert.up_proj.bias": torch.zeros(2 * I)}
    for moe in (fused, separate):
        for names in ((up,), (routed,), (up, down), tuple(separate.state_dict())):
            with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
                moe.load_state_dict(missing(*names))
            keys = moe.load_state_dict(missing(*names), strict=False)
            assert set(keys.missing_keys) == set(names)
            assert not keys.unexpected_keys
        keys = moe.load_state_dict({**separate.state_dict(), **extra}, strict=False)
        assert keys.unexpected_keys == list(extra)
        assert not keys.missing_keys
        for name in (routed, up, down, "experts.down_proj"):
            small = {**separate.state_dict(), name: separate.state_dict()[name][:-1]}
            with pytest.raises(RuntimeError, match=f"size mismatch for {name}: copying") as caught:
                moe.load_state_dict(small)
            assert "Missing" not in str(caught.value)
        with pytest.raises(RuntimeError, match=f'parameter named "{up}"'):
            moe.load_state_dict({**separate.state_dict(), up: 1.0})


def test_what_a_state_dict_lacks_keeps_its_value() -> None:
    fused, other = fused_and_separate()[0], fused_and_separate()[0]
    wanted = {**fused.state_dict(), "shared_expert.up_proj.weight": torch.ones(2 * I, H)}
    assert not torch.equal(other.experts.down_proj, fused.experts.down_proj)
    other.load_state_dict(fused.state_dict())
    other.load_state_dict({"shared_expert.up_proj.weight": torch.ones(2 * I, H)}, strict=False)
    for key, value in other.state_dict().items():
        assert torch.equal(value, wanted[key]), key


def test_fused_from_meta_by_assignment() -> None:
    separate = fused_and_separate()[1].to(torch.bfloat16)
    fused = mk.MoE(H, I, E, K, norm_topk_prob=False, shared_intermediate_size=2 * I, shared_gate=True,
                   fuse_shared_expert=True, device="meta")  # fmt: skip
    assert fused(torch.empty(3, H, device="meta")).shape == (3, H)
    with pytest.warns(UserWarning, match="is a no-op"):
        fused.load_state_dict(separate.state_dict())
    fused.experts.down_proj.requires_grad_(False)
    mixed = {**separate.state_dict(), "shared_expert.down_proj.weight": torch.zeros(H, 2 * I)}
    with pytest.raises(RuntimeError, match=r"experts.down_proj: got .*float32 on cpu, expected one dtype and device"):
        fused.load_state_dict(mixed, assign=True)
    lacking = {k: v for k, v in separate.state_dict().items() if k != "shared_expert.up_proj.weight"}
    with pytest.raises(RuntimeError, match="Missing key"):
        fused.load_state_dict(lacking, assign=True)
    fused.load_state_dict(separate.state_dict(), assign=True)
    assert [p.requires_grad for p in fused.parameters()] == [True, True, False, True]
    x = torch.randn(9, H, dtype=torch.bfloat16)
    assert error(fused(x), separate(x)) < 2**-6
    fresh = fused_and_separate(device="meta")[0].to_empty(device="cpu")
    fresh.reset_parameters()
    assert torch.isfinite(fresh(torch.randn(3, H))).all()


def model_of_transformers(**options: Any) -> Any:
    """A model that contains a fused layer, in evaluation mode."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "of_a_test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.first = nn.Linear(H, H)
            sizes = {"shared_intermediate_size": 2 * I, "shared_gate": True, **options}
            self.mlp = mk.MoE(H, I, E, K, fuse_shared_expert=True, **sizes)
            self.post_init()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.first(x))

    return Model(Config()).eval()


def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


@pytest.mark.parametrize("options", [{}, {"shared_gate": False}, {"activation": "relu2"}], ids=str)
def test_fused_through_from_pretrained(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = model_of_transformers(**options), torch.randn(9, H)
    want, state = model(x), model.state_dict()
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(loaded(x), want)
        assert shapes(loaded) == shapes(model)
        loaded.save_pretrained(folder)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    loaded.train()(x).sum().backward()
    assert loaded.mlp.experts.down_proj.grad[E:].abs().max() > 0
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert shapes(half) == shapes(model)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_what_from_pretrained_lacks_of_a_fused_layer_is_drawn(tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    model = model_of_transformers()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = files.load_file(file)
    lacking = {name for name in state if "shared_expert.up" in name or "shared_expert.down" in name}
    kept = {name: value for name, value in state.items() if name not in lacking}
    files.save_file(kept, file, metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lacking
    assert shapes(loaded) == shapes(model)
    for name, value in loaded.state_dict().items():
        if name in lacking:
            assert 0.01 < value.std() < 0.04  # transformers' own
        else:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("place", [{"": "cpu"}, {"first": "cpu", "mlp": "disk"}], ids=str)
def test_fused_filled_by_accelerate(place: dict[str, str], tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("safetensors", reason="needs safetensors")
    model, x = model_of_transformers(), torch.randn(9, H)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = type(model)(model.config).eval()
    empty.mlp.state_dict()  # of a layer without values, which may ask for nothing
    file, folder = str(tmp_path / "model.safetensors"), str(tmp_path / "offloaded")
    filled = accelerate.load_checkpoint_and_dispatch(empty, file, device_map=place, offload_folder=folder)
    before = {id(parameter) for parameter in filled.parameters()}
    with torch.no_grad():
        for _ in range(2):
            assert error(filled(x), model(x)) < 1e-6
    assert {id(parameter) for parameter in filled.train().parameters()} == before or "disk" in place.values()


def test_fused_without_values_is_joined_when_it_gets_memory() -> None:
    def without_values() -> mk.MoE:
        return mk.MoE(H, I, E, K, norm_topk_prob=False, shared_intermediate_size=2 * I, shared_gate=True,
                      fuse_shared_expert=True, device="meta")  # fmt: skip

    fused = fused_and_separate()[0]
    names = shapes(fused)
    empty = without_values()
    assert shapes(empty) == names
    state = empty.state_dict()
    assert [(name, value.shape) for name, value in state.items()] == shapes(fused_and_separate()[1])
    assert shapes(empty.eval()) == shapes(fused_and_separate()[1])
    assert list(empty.state_dict()) == list(state)
    assert empty(torch.empty(3, H, device="meta")).shape == (3, H)
    for other in (copy.deepcopy(empty), empty):
        assert shapes(other.to_empty(device="cpu")) == names
    empty.load_state_dict(fused.state_dict())
    x = torch.randn(5, H)
    assert torch.equal(empty(x), fused.eval()(x))
    again = without_values()
    again.load_state_dict({**again.state_dict(), **fused.state_dict()}, assign=True)
    assert shapes(again) == names
    assert torch.equal(again.eval()(x), fused(x))


def test_fused_starts_as_beside() -> None:
    """The same bound on the shared expert's weights, whose down projection is n times as wide as an expert's."""
    fused, separate = fused_and_separate(n=4)
    separate.reset_parameters()
    for name, value in fused.state_dict().items():
        assert value.abs().max() == pytest.approx(separate.state_dict()[name].abs().max().item(), rel=0.15), name


def test_copies_and_pickles_of_a_fused_layer() -> None:
    fused = fused_and_separate()[0]
    x = torch.randn(5, H)
    y, state = fused(x), fused.state_dict()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with torch.no_grad():
            other.experts.down_proj.zero_()
        assert not other.state_dict()["shared_expert.down_proj.weight"].any()
        other.load_state_dict(state)
        assert torch.equal(other(x), y)
    assert torch.equal(fused(x), y)


def test_repr_of_a_fused_layer() -> None:
    assert f"num_experts={E}, fused=2, hidden_size={H}" in repr(fused_and_separate()[0])
