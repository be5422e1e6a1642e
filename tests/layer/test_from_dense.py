"""mk.MoE.from_dense checks a module's names against its outputs, and leaves the module as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moekern as mk
from problems import error

H, I = 32, 24


class Mlp(nn.Module):
    """An MLP that keeps its projections under known names; `compute` is its forward."""

    def __init__(self, compute: Callable[[Mlp, Tensor], Tensor], gated: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, I, bias=bias) if gated else None
        self.up_proj = nn.Linear(H, I, bias=bias)
        self.down_proj = nn.Linear(I, H, bias=bias)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def gated(function: Callable[[Tensor], Tensor]) -> Callable[[Mlp, Tensor], Tensor]:
    return lambda m, x: m.down_proj(function(m.gate_proj(x)) * m.up_proj(x))


def plain(function: Callable[[Tensor], Tensor]) -> Callable[[Mlp, Tensor], Tensor]:
    return lambda m, x: m.down_proj(function(m.up_proj(x)))


def swiglu() -> Mlp:
    return Mlp(gated(F.silu))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def test_a_gated_mlp_that_names_no_activation_is_compared() -> None:
    dense = swiglu()
    moe = mk.MoE.from_dense(dense, 4, 2)
    x = torch.randn(9, H)
    assert moe.activation == "swiglu"
    assert error(moe(x), dense(x)) < 1e-6


@pytest.mark.parametrize(
    ("function", "name"), [(F.gelu, "geglu"), (gelu_tanh, "geglu_tanh"), (F.relu, "reglu")], ids=lambda v: str(v)[:12]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_activation_that_computes_the_same_is_named(
    function: Callable[[Tensor], Tensor], name: str, dtype: torch.dtype
) -> None:
    dense = Mlp(gated(function), bias=True).to(dtype)
    with pytest.raises(ValueError, match=f"forward is not its projections .* activation='{name}' computes the same"):
        mk.MoE.from_dense(dense, 4, 2)
    others = {"swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai"} - {name}
    for other in others:  # also tanh's GELU for erf's, also in half precision
        with pytest.raises(ValueError, match=f"with activation '{other}'"):
            mk.MoE.from_dense(dense, 4, 2, activation=other)
    moe = mk.MoE.from_dense(dense, 4, 2, activation=name)
    x = torch.randn(9, H, dtype=dtype)
    assert error(moe(x), dense(x)) < 8 * torch.finfo(dtype).eps


def test_an_activation_that_no_attribute_names_is_found() -> None:
    dense = Mlp(plain(lambda x: torch.relu(x) ** 2), gated=False)
    with pytest.raises(ValueError, match="is not named by an attribute; activation='relu2' computes the same"):
        mk.MoE.from_dense(dense, 4, 2)
    dense = Mlp(plain(torch.tanh), gated=False)
    dense.act = torch.tanh
    with pytest.raises(ValueError, match="activation 'tanh' is not recognised; pass one of swiglu"):
        mk.MoE.from_dense(dense, 4, 2)


OTHER_FUNCTIONS: dict[str, Callable[[Mlp, Tensor], Tensor]] = {
    "scaled output": lambda m, x: 0.5 * gated(F.silu)(m, x),
    "scaled gate": lambda m, x: m.down_proj(F.silu(1.1 * m.gate_proj(x)) * m.up_proj(x)),
    "residual": lambda m, x: x + gated(F.silu)(m, x),
    "normed input": lambda m, x: gated(F.silu)(m, F.rms_norm(x, (H,))),
    "clamp at ten": lambda m, x: m.down_proj(F.silu(m.gate_proj(x).clamp(max=10)) * m.up_proj(x).clamp(-10, 10)),
    "gate and up exchanged": lambda m, x: m.down_proj(F.silu(m.up_proj(x)) * m.gate_proj(x)),
    "no activation": lambda m, x: m.down_proj(m.gate_proj(x) * m.up_proj(x)),
    "tokens mixed": lambda m, x: gated(F.silu)(m, x - x.mean(-2, keepdim=True)),
    "not a number": lambda m, x: gated(F.silu)(m, x) * float("nan"),
}


@pytest.mark.parametrize("name", OTHER_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_does_something_else_is_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"Mlp's forward is not its projections .*no scaling, norm, residual or hook"):
        mk.MoE.from_dense(Mlp(OTHER_FUNCTIONS[name]).to(dtype), 4, 2)


@pytest.mark.parametrize("zero", ["down_proj", "up_proj", "gate_proj"])
def test_a_projection_of_zeros_hides_nothing(zero: str) -> None:
    for function, fits in ((F.silu, True), (F.gelu, False)):
        dense = Mlp(gated(function))
        nn.init.zeros_(getattr(dense, zero).weight)
        if fits:
            assert not mk.MoE.from_dense(dense, 4, 2)(torch.randn(5, H)).any()
            assert not getattr(dense, zero).weight.any()
        else:
            with pytest.raises(ValueError, match="activation='geglu' computes the same"):
                mk.MoE.from_dense(dense, 4, 2)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_the_comparison_follows_the_scale_of_the_weights(scale: float) -> None:
    for function, fits in ((F.silu, True), (F.gelu, False)):
        dense = Mlp(gated(function), bias=True)
        with torch.no_grad():
            dense.gate_proj.weight.mul_(scale)
        if fits:
            mk.MoE.from_dense(dense, 4, 2)
        else:
            with pytest.raises(ValueError, match="activation='geglu'"):
                mk.MoE.from_dense(dense, 4, 2)


def test_the_dense_module_is_left_as_it_was() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def compute(m: Mlp, x: Tensor) -> Tensor:
        seen.append((m.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        m.calls += 1
        m.latest = x
        m.steps.add_(1)
        m.rebound = m.rebound + 1
        torch.rand(3)
        return m.dropout(gated(F.silu)(m, x))

    dense = Mlp(compute).bfloat16()
    dense.dropout = nn.Dropout(0.5)
    dense.calls = 0
    dense.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    dense.register_buffer("rebound", torch.zeros(3))
    dense.train()
    dense.up_proj.eval()
    dense.gate_proj.weight.requires_grad_(False)
    dense.down_proj.weight.grad = torch.ones_like(dense.down_proj.weight)
    kept = dict(dense.named_parameters()) | dict(dense.named_buffers())
    values = {name: t.detach().clone() for name, t in kept.items()}
    versions = {name: t._version for name, t in kept.items()}
    flags = [m.training for m in dense.modules()]
    attributes = set(vars(dense))

    quiet = swiglu().bfloat16()
    torch.manual_seed(7)
    mk.MoE.from_dense(quiet, 4, 2)
    expected = torch.rand(5)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        moe = mk.MoE.from_dense(dense, 4, 2)
    assert torch.equal(torch.rand(5), expected)
    assert seen == [(False, False, False)]
    assert [m.training for m in dense.modules()] == flags
    assert moe.training
    assert dense.calls == 0
    assert set(vars(dense)) == attributes
    after = dict(dense.named_parameters()) | dict(dense.named_buffers())
    for name, tensor in kept.items():
        assert after[name] is tensor, name
        assert tensor._version == versions[name], name
        assert torch.equal(tensor, values[name]), name
    assert torch.equal(dense.down_proj.weight.grad, torch.ones(H, I, dtype=torch.bfloat16))
    assert dense.gate_proj.weight.grad is None
    assert not dense.gate_proj.weight.requires_grad


def test_a_module_that_fails_is_left_as_it_was() -> None:
    def compute(m: Mlp, x: Tensor) -> Tensor:
        m.steps.add_(1)
        raise RuntimeError("not today")

    dense = Mlp(compute)
    dense.register_buffer("steps", torch.zeros(()))
    weight = dense.gate_proj.weight
    with pytest.raises(ValueError, match=r"could not be run on \[2, 8, 32\] hidden states .*RuntimeError: not today"):
        mk.MoE.from_dense(dense, 4, 2)
    assert dense.training
    assert dense.steps == 0
    assert dense.gate_proj.weight is weight


def test_a_forward_of_more_arguments_is_refused_by_name() -> None:
    class Residual(Mlp):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return residual + self.compute(self, x)

    with pytest.raises(ValueError, match=r"Residual's forward could not be run .*'residual'.* alone"):
        mk.MoE.from_dense(Residual(gated(F.silu)), 4, 2)
    with pytest.raises(ValueError, match="it returned tuple for"):
        mk.MoE.from_dense(Mlp(lambda m, x: (gated(F.silu)(m, x), None)), 4, 2)
    with pytest.raises(ValueError, match=r"it returned torch.float32 \[2, 8, 24\]"):
        mk.MoE.from_dense(Mlp(lambda m, x: m.up_proj(x)), 4, 2)


def test_forwards_of_some_shapes_and_dtypes_only() -> None:
    def tokens(m: Mlp, x: Tensor) -> Tensor:
        _, _ = x.shape
        return gated(F.silu)(m, x)

    def sequences(m: Mlp, x: Tensor) -> Tensor:
        _, _, _ = x.shape
        return gated(F.silu)(m, x)

    def half(m: Mlp, x: Tensor) -> Tensor:
        return F.linear(F.silu(m.gate_proj(x.bfloat16())) * m.up_proj(x), m.down_proj.weight)

    def wide(m: Mlp, x: Tensor) -> Tensor:
        return m.down_proj((F.silu(m.gate_proj(x).float()) * m.up_proj(x).float()).to(x.dtype))

    for compute in (tokens, sequences, half, wide):
        assert mk.MoE.from_dense(Mlp(compute).bfloat16(), 4, 2).activation == "swiglu"
    with pytest.raises(ValueError, match="forward is not its projections"):
        mk.MoE.from_dense(Mlp(lambda m, x: half(m, x) * 1.1).bfloat16(), 4, 2)


def test_hooks_belong_to_what_the_module_computes() -> None:
    dense = swiglu()
    calls: list[int] = []
    dense.register_forward_hook(lambda m, args, out: calls.append(1))
    mk.MoE.from_dense(dense, 4, 2)  # a hook that only observes
    assert calls == [1]
    dense.up_proj.register_forward_hook(lambda m, args, out: out * 2)
    with pytest.raises(ValueError, match="no scaling, norm, residual or hook"):
        mk.MoE.from_dense(dense, 4, 2)


def test_pruned_weights_are_read_as_they_are_used() -> None:
    from torch.nn.utils import prune

    dense = swiglu()
    prune.l1_unstructured(dense.up_proj, "weight", 0.5)
    x = torch.randn(7, H)
    assert error(mk.MoE.from_dense(dense, 4, 2)(x), dense(x)) < 1e-6
    assert (dense.up_proj.weight == 0).float().mean() == 0.5


def test_compiled_modules_are_not_compiled_for_the_comparison() -> None:
    compiled: list[object] = []
    dense = torch.compile(swiglu(), backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    assert mk.MoE.from_dense(dense, 4, 2).activation == "swiglu"
    inner = swiglu()
    inner.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    assert mk.MoE.from_dense(inner, 4, 2).activation == "swiglu"
    assert not compiled


def test_weights_without_values_are_taken_by_their_names() -> None:
    with torch.device("meta"):
        dense = Mlp(gated(F.gelu))
    with pytest.raises(ValueError, match="activation is not named by an attribute; pass one of"):
        mk.MoE.from_dense(dense, 4, 2)  # a guess without confirmation
    moe = mk.MoE.from_dense(dense, 4, 2, activation="geglu")
    assert moe.experts.down_proj.is_meta
    dense.act_fn = nn.GELU()
    assert mk.MoE.from_dense(dense, 4, 2).activation == "geglu"
    with torch.device("meta"):  # a context that must not reach the rows
        assert not mk.MoE.from_dense(swiglu_on_cpu(), 4, 2).gate.weight.is_meta


def swiglu_on_cpu() -> Mlp:
    with torch.device("cpu"):
        return swiglu()


def test_fake_weights_are_taken_by_their_names() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        dense = swiglu()
        dense.act_fn = nn.SiLU()
        assert mk.MoE.from_dense(dense, 4, 2).activation == "swiglu"


def test_inference_mode_and_default_device_do_not_matter() -> None:
    with torch.inference_mode():
        assert mk.MoE.from_dense(swiglu(), 4, 2).activation == "swiglu"


class Adapted(nn.Linear):
    """Like peft's layers: an original layer, to which something is added."""

    def __init__(self, base: nn.Linear, merged: bool) -> None:
        super().__init__(H, I, bias=False)
        self.base_layer, self.merged = base, merged
        self.weight = base.weight


class Quantised(nn.Module):
    """Like bitsandbytes' 4-bit layers: packed bytes under the name of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Wrapped(torch.Tensor):
    """Like torchao's weights: a subclass that claims a floating dtype."""


def _offloaded(dense: Mlp) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.cpu_offload(dense)


UNREADABLE: dict[str, tuple[Callable[[Mlp], object], str]] = {
    "adapters": (lambda m: setattr(m, "up_proj", Adapted(m.up_proj, False)), r"up_proj \(Adapted\) has LoRA .* merge"),
    "parametrised": (
        lambda m: nn.utils.parametrizations.weight_norm(m.up_proj),
        r"up_proj \(ParametrizedLinear\) is parametrised",
    ),
    "packed": (
        lambda m: setattr(m, "up_proj", Quantised(torch.zeros(H * I // 2, 1, dtype=torch.uint8))),
        r"up_proj \(Quantised\) keeps a Parameter of torch.uint8, a quantised one.* dequantise",
    ),
    "float8": (
        lambda m: setattr(m, "up_proj", Quantised(torch.zeros(I, H).to(torch.float8_e4m3fn))),
        "a quantised one",
    ),
    "subclass": (
        lambda m: setattr(m.up_proj, "weight", nn.Parameter(torch.zeros(I, H).as_subclass(Wrapped))),
        r"up_proj \(Linear\) keeps a Wrapped of torch.float32, a quantised one",
    ),
    "no weight": (lambda m: setattr(m, "up_proj", nn.Identity()), r"up_proj \(Identity\) has no tensor 'weight'"),
    "flat": (
        lambda m: setattr(m, "up_proj", Quantised(torch.zeros(0))),
        r"has a weight of shape \(0,\), .* summon_full_params",
    ),
    "offloaded": (_offloaded, "has its weights offloaded by accelerate"),
    "mixed dtypes": (lambda m: m.down_proj.bfloat16(), "its weights have the dtypes float32, bfloat16, expected one"),
    "mixed devices": (lambda m: m.down_proj.to("meta"), "its weights have the devices cpu, meta, expected one"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_weights_that_cannot_be_read_are_named(name: str) -> None:
    spoil, message = UNREADABLE[name]
    dense = swiglu()
    spoil(dense)
    with pytest.raises(ValueError, match=message):
        mk.MoE.from_dense(dense, 4, 2)


def test_peft_adapters_are_read_once_merged() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Module()
    model.mlp = swiglu()
    model.forward = lambda x: model.mlp(x)
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    dense = adapted.base_model.model.mlp
    with pytest.raises(ValueError, match=r"gate_proj .* has LoRA adapters .*merge_and_unload"):
        mk.MoE.from_dense(dense, 4, 2)
    base = copy.deepcopy(swiglu())
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in dense.state_dict().items() if "lora" not in k})
    x = torch.randn(6, H)
    with adapted.disable_adapter():
        assert error(mk.MoE.from_dense(dense, 4, 2)(x), base(x)) < 1e-6
    adapted.merge_adapter()
    moe = mk.MoE.from_dense(dense, 4, 2)
    assert error(moe(x), dense(x)) < 1e-6
    assert error(base(x), dense(x)) > 0.01


def test_dtensors_are_named() -> None:
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        dense = swiglu()
        whole = DTensor.from_local(dense.up_proj.weight.detach(), mesh, [Replicate()], run_check=False)
        dense.up_proj.weight = nn.Parameter(whole)
        with pytest.raises(ValueError, match=r"up_proj \(Linear\) has a DTensor for a weight.*full_tensor"):
            mk.MoE.from_dense(dense, 4, 2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tf32_does_not_hide_a_difference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    dense = Mlp(gated(gelu_tanh)).to("cuda", dtype)
    with pytest.raises(ValueError, match="activation='geglu_tanh' computes the same"):
        mk.MoE.from_dense(dense, 4, 2, activation="geglu")
    assert mk.MoE.from_dense(dense, 4, 2, activation="geglu_tanh").gate.weight.is_cuda
