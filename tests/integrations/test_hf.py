"""transformers' models with experts_implementation="moekern" against "eager", on tiny random configurations."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.integrations import moe as interface  # noqa: E402

import moekern as mk  # noqa: E402
import moekern.hf  # noqa: E402
from problems import error, forbid_torch_path  # noqa: E402

COMMON = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6, "output_router_logits": True},
    "Qwen2Moe": {
        "num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
        "output_router_logits": True,
    },
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 6},
    "DeepseekV3": {
        **DEEPSEEK, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "GptOss": {"num_local_experts": 6, "head_dim": 8},
    "Glm4Moe": {**DEEPSEEK, "head_dim": 8},
    "MiniMax": {"num_local_experts": 6, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "GraniteMoe": {"num_local_experts": 6},
    "Jamba": {
        "num_experts": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1,
        "expert_layer_offset": 0, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
}  # fmt: skip


def model_of(family: str, device: str, **options: Any) -> Any:
    """The same random model at every call."""
    torch.manual_seed(0)
    config_class = "Llama4TextConfig" if family == "Llama4" else f"{family}Config"
    config = getattr(transformers, config_class)(**{**COMMON, **FAMILIES.get(family, {}), **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "bias" in name:  # those of routers and experts start at zero and would not be seen
            nn.init.normal_(tensor, std=0.2)
    return model.to(device)


def on_interface(model: nn.Module) -> bool:
    return any(mk.hf._uses_interface(module) for module in model.modules())


def use_moekern(model: Any) -> None:
    """One line; the other one for a family that is not on the interface in this release (Granite before 5.17)."""
    if on_interface(model):
        model.set_experts_implementation("moekern")
    else:
        mk.hf.replace(model)


def tokens(device: str) -> torch.Tensor:
    return torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)


def run(model: Any, device: str) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    out = model(input_ids=tokens(device), labels=tokens(device))
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


def check_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert error(value, theirs[name]) < bound, name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(device: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, device)
    model.set_experts_implementation("eager")
    theirs = run(model, device)
    use_moekern(model)
    calls = []
    kernel = mk.hf.experts
    for module in (mk.hf, mk.hf.blocks):
        monkeypatch.setattr(module, "experts", lambda *a, **k: calls.append(k["activation"]) or kernel(*a, **k))
    check_same(run(model, device), theirs)
    assert set(calls) == {"swiglu_oai" if family == "GptOss" else "swiglu"}  # fused, not around the module's gate
    assert any("experts" in name or "_linear" in name for name in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(device: str, family: str) -> None:
    # Before 5.20 the loss on the router's logits takes the mask of the whole text for the one new token.
    model = model_of(family, device, output_router_logits=False)
    prompt = {"input_ids": tokens(device), "attention_mask": torch.ones_like(tokens(device))}
    texts = []
    model.set_experts_implementation("eager")
    for switch in (lambda model: None, use_moekern):
        switch(model)
        texts.append(model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=True))
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(device: str, family: str, tmp_path: Path) -> None:
    model = model_of(family, device)
    use_moekern(model)
    model.save_pretrained(tmp_path)
    if on_interface(model):
        again = type(model).from_pretrained(tmp_path, experts_implementation="moekern")
        assert again.config._experts_implementation == "moekern"
    else:
        again = type(model).from_pretrained(tmp_path)
        use_moekern(again)
    again.to(device).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens(device)).logits, model(tokens(device)).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in Jamba's state space layer
@pytest.mark.parametrize("family", FAMILIES)
def test_compile_fullgraph(device: str, family: str) -> None:
    if family == "Jamba" and transformers.__version__.startswith("5.0."):
        pytest.skip("Jamba's state space layer branches on data in transformers 5.0")
    if device == "cuda" and family not in ("Mixtral", "GptOss"):
        pytest.skip("compiled on the CPU; on the GPU one family without biases and one with them will do")
    torch.compiler.reset()
    one_layer: dict[str, Any] = {"num_hidden_layers": 2 if family == "Jamba" else 1}  # Jamba counts on attention
    if "first_k_dense_replace" in FAMILIES[family]:
        one_layer["first_k_dense_replace"] = 0
    if "layer_types" in FAMILIES[family]:
        one_layer["layer_types"] = FAMILIES[family]["layer_types"][:1]
    model = model_of(family, device, output_router_logits=False, **one_layer)
    use_moekern(model)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = run(model, device)
    assert error(compiled(tokens(device)).logits, expected["logits"]) < 1e-5
    check_same(
        run(compiled, device), {f"_orig_mod.{k}" if k not in ("logits", "loss") else k: v for k, v in expected.items()}
    )


@pytest.mark.filterwarnings("default::FutureWarning")  # peft reads a property that transformers is renaming
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_the_experts(device: str, family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    if not on_interface(model_of(family, device)):
        pytest.skip(f"transformers {transformers.__version__} has {family} not on the experts interface")
    results = []
    for implementation in ("eager", "moekern"):
        model = model_of(family, device)
        model.set_experts_implementation(implementation)
        config = peft.LoraConfig(
            r=3, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            init_lora_weights=False,
        )  # fmt: skip
        torch.manual_seed(7)
        adapted = peft.get_peft_model(model, config)
        results.append(run(adapted, device))
    assert all("lora_" in name for name in results[0] if name not in ("logits", "loss"))
    layers = sum(mk.hf._uses_interface(module) for module in model.modules())
    assert len(results[0]) == 2 + layers * 2 * 2  # two matrices per layer, with two parameters each
    check_same(results[1], results[0])


@pytest.mark.filterwarnings("default::FutureWarning")  # the newest versions have another name for the method
def test_gradient_checkpointing(device: str) -> None:
    model = model_of("Mixtral", device).train()
    model.set_experts_implementation("moekern")
    expected = run(model, device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_same(run(model, device), expected)


class Routing:
    """Records the chosen experts and their weights in a model's first pass, and imposes them on every later pass.

    A rounding that sends a token elsewhere would hide the errors of the arithmetic, which are compared here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.recorded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, module in model.named_modules():
            if mk.hf._uses_interface(module):
                module.register_forward_pre_hook(partial(self.impose, name))

    def impose(self, name: str, module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, ids, weights = given
        ids, weights = self.recorded.setdefault(name, (ids, weights.detach()))
        return x, ids, weights.to(x.dtype)


def flat(results: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([results[name].flatten().float() for name in sorted(results) if name not in ("logits", "loss")])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(device: str, family: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and the gradients taken together are at most twice as far from float32 as those of eager; one gradient
    alone, which small differences upstream can change much, four times."""
    model = model_of(family, device, output_router_logits=False)
    if not on_interface(model):
        pytest.skip(f"transformers {transformers.__version__} has {family} not on the experts interface")
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        forbid_torch_path(monkeypatch)
    Routing(model)
    model.set_experts_implementation("eager")
    truth = run(model, device)
    model.to(torch.float32 if autocast else torch.bfloat16)
    errors = []
    for implementation in ("eager", "moekern"):
        model.set_experts_implementation(implementation)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            result = run(model, device)
        errors.append({name: error(value, truth[name]) for name, value in result.items()})
        errors[-1]["all gradients"] = error(flat(result), flat(truth))
    for name, value in errors[1].items():
        factor = 2 if name in ("logits", "all gradients") else 4
        assert value <= max(factor * errors[0][name], 2**-7), name


class Decorated(nn.Module):
    """Like a decorated class of a model file; ``forward`` is the eager one, expert by expert."""

    gated = True
    transposed = False
    biased = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        E, H, I = self.num_experts, self.hidden, self.inter = 5, 12, 8
        up = (H, (1 + self.gated) * I) if self.transposed else ((1 + self.gated) * I, H)
        name = "gate_up_proj" if self.gated else "up_proj"
        self.names = (name, f"{name}_bias")
        self.register_parameter(name, nn.Parameter(torch.randn(E, *up) * 0.3))
        self.down_proj = nn.Parameter(torch.randn(E, *((I, H) if self.transposed else (H, I))) * 0.3)
        if self.biased:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, (1 + self.gated) * I)))
            self.down_proj_bias = nn.Parameter(torch.randn(E, H))
        self.act_fn: Any = nn.SiLU() if self.gated else transformers.activations.ACT2FN["relu2"]

    def linear(self, x: torch.Tensor, name: str, e: int) -> torch.Tensor:
        weight, bias = getattr(self, name)[e], getattr(self, f"{name}_bias")[e] if self.biased else 0
        return x @ (weight if self.transposed else weight.T) + bias

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for t, k in ((t, k) for t in range(len(x)) for k in range(ids.shape[1])):
            e = int(ids[t, k])
            if e < self.num_experts:
                pre = self.linear(x[t], self.names[0], e)
                a = self._apply_gate(pre) if self.gated else self.act_fn(pre)
                y = self.linear(a, "down_proj", e)
                y = self.post_expert_norm(y) if hasattr(self, "post_expert_norm") else y
                out[t] += weights[t, k] * y
        return out


class OwnGate(Decorated):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.sigmoid(gate.clamp(max=1)) * (up + 2)


class OwnGateBiased(OwnGate):
    transposed = biased = True


class UnknownActivation(Decorated):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.act_fn = nn.Mish()


class SiLU(nn.Module):
    """Another function under a known name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x).clamp(max=0.5)


class KnownNameOnly(Decorated):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.act_fn = SiLU()


class HookedActivation(Decorated):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.act_fn = nn.SiLU()
        self.act_fn.register_forward_hook(lambda module, args, out: out * 2)


class GateOfTheInstance(Decorated):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]


class NoGate(Decorated):
    gated = False


class NoGateUnknown(NoGate):
    biased = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.act_fn = nn.Hardswish()


class DefaultGateBiased(Decorated):
    transposed = biased = True


class PostNorm(Decorated):
    biased = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_expert_norm = nn.LayerNorm(self.hidden)
        nn.init.normal_(self.post_expert_norm.bias)


EVERY_FORM = [
    Decorated, OwnGate, OwnGateBiased, UnknownActivation, KnownNameOnly, HookedActivation, GateOfTheInstance, NoGate,
    NoGateUnknown, DefaultGateBiased, PostNorm,
]  # fmt: skip


def decorated(cls: type[Decorated], implementation: str) -> Decorated:
    """An instance whose class carries transformers' decorator; skips flags that this release does not know."""
    flags: dict[str, Any] = {"has_bias": cls.biased, "is_transposed": cls.transposed, "has_gate": cls.gated}
    flags["has_post_expert_norm"] = cls is PostNorm
    accepted = inspect.signature(interface.use_experts_implementation).parameters
    for name in [n for n in flags if n not in accepted]:
        if flags[name] != (name == "has_gate"):
            pytest.skip(f"this version of transformers has no {name}")
        del flags[name]
    with_decorator = interface.use_experts_implementation(type(cls.__name__, (cls,), {}), **flags)
    return with_decorator(SimpleNamespace(_experts_implementation=implementation))


@pytest.mark.parametrize("cls", EVERY_FORM)
def test_the_decorators_flags(device: str, cls: type[Decorated]) -> None:
    """Every form of experts class, with sentinels among the ids, value and gradient."""
    experts = decorated(cls, "eager").to(device)
    x = torch.randn(9, 12, device=device, requires_grad=True)
    ids = torch.rand(9, 6, device=device).argsort(1)[:, :3]  # 5 is a sentinel
    weights = torch.rand(9, 3, device=device, requires_grad=True)
    leaves = (x, weights, *experts.parameters())
    dout = torch.randn(9, 12, device=device)
    fused = cls in (Decorated, NoGate, DefaultGateBiased)
    results = []
    for implementation in ("eager", "moekern"):
        experts.config._experts_implementation = implementation
        told = implementation == "moekern" and not fused
        with pytest.warns(UserWarning, match=f"{cls.__name__} has a") if told else nullcontext():
            out = experts(x, ids, weights)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    experts(x, ids, weights)  # warned once
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs) < 1e-5
    assert not results[1][2][ids == 5].any()


@pytest.mark.filterwarnings("ignore:moekern. .* has a:UserWarning")
@pytest.mark.parametrize("cls", EVERY_FORM)
def test_no_tokens(device: str, cls: type[Decorated]) -> None:
    """A rank of expert parallelism that no token reached makes such a call, and its backward."""
    experts = decorated(cls, "moekern").to(device)
    x, weights = (torch.zeros(0, n, device=device, requires_grad=True) for n in (12, 3))
    out = experts(x, torch.zeros(0, 3, dtype=torch.int64, device=device), weights)
    assert out.shape == (0, 12)
    out.sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_quantised_weights_are_refused() -> None:
    experts = decorated(type("Quantised", (Decorated,), {}), "moekern")
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"Quantised.down_proj: got dtype float8_e4m3fn, expected float32, bfloat16"):
        experts(torch.randn(2, 12), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def llama4(device: str) -> Any:
    return model_of("Llama4", device, num_local_experts=4, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=24)


def dbrx(device: str) -> Any:
    if transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 cannot run DBRX: it takes the experts' width for the model's")
    torch.manual_seed(0)
    config = transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=48, initializer_range=0.2,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.DbrxForCausalLM(config).eval().to(device)


@pytest.mark.parametrize("make_model", [llama4, dbrx])
def test_replaced_blocks(device: str, make_model: Any, tmp_path: Path) -> None:
    """Logits, loss, every gradient that kept its name, generated tokens, and files that transformers reads."""
    model = make_model(device)
    theirs = run(model, device)
    names = mk.hf.replace(model)
    assert len(names) == 2
    state = model.state_dict()
    ours = run(model, device)
    check_same({k: v for k, v in ours.items() if k in theirs}, {k: v for k, v in theirs.items() if k in ours})
    assert len(theirs.keys() - ours.keys()) == (6 if make_model is dbrx else 0)
    original = make_model(device)
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in state.items())
    model.load_state_dict({name: value.clone() for name, value in state.items()})
    prompt = {"input_ids": tokens(device), "attention_mask": torch.ones_like(tokens(device))}
    texts = [m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (model, original)]
    assert torch.equal(*texts)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).to(device).eval()
    with torch.no_grad():
        assert error(again(tokens(device)).logits, theirs["logits"]) < 2e-5


def test_gradient_of_dbrx_matrices(device: str) -> None:
    model = dbrx(device)
    theirs = run(model, device)
    mk.hf.replace(model)
    ours = run(model, device)
    for layer in range(2):
        prefix = f"transformer.blocks.{layer}.ffn.experts."
        gate, up, down = (theirs[f"{prefix}mlp.{n}"].unflatten(0, (4, -1)) for n in ("w1", "v1", "w2"))
        assert error(ours[f"{prefix}gate_up_proj"], torch.cat((gate, up), 1)) < 2e-5
        assert error(ours[f"{prefix}down_proj"], down.mT) < 2e-5


def test_replace_switches_models_with_the_interface() -> None:
    model = model_of("Mixtral", "cpu")
    names = mk.hf.replace(model)
    assert names == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert model.config._experts_implementation == "moekern"


def test_models_not_on_the_interface() -> None:
    """transformers 5.0 would take any registered name for them and change nothing; later ones ignore it."""
    models = [llama4("cpu"), model_of("GraniteMoe", "cpu")]
    refuses = transformers.__version__.startswith("5.0.")
    for model in [m for m in models if not on_interface(m)]:
        with pytest.raises(ValueError, match=r"call moekern.hf.replace\(model\)") if refuses else nullcontext():
            model.set_experts_implementation("moekern")
        assert model.config._experts_implementation != "moekern"


def test_replace_says_what_it_cannot() -> None:
    with pytest.raises(ValueError, match="Linear has no block that moekern can replace; it has no MoE modules"):
        mk.hf.replace(nn.Linear(2, 2))
    config = transformers.SwitchTransformersConfig(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=8)
    with pytest.raises(ValueError, match="it has SwitchTransformersExperts"):
        mk.hf.replace(transformers.SwitchTransformersModel(config))
    with pytest.raises(TypeError, match="model: got str"):
        mk.hf.replace("mixtral")
