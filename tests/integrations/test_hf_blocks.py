"""Blocks that mk.hf.replace changes keep what others hook onto: peft, accelerate, hooks, pruning, recorded outputs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import moekern as mk  # noqa: E402
import moekern.hf  # noqa: E402
from problems import error  # noqa: E402
from test_hf import check_same, dbrx, llama4, model_of, on_interface, run, tokens  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default::FutureWarning")  # peft reads a property that transformers renames


def block_of(model: Any) -> Any:
    """The first layer's block; its experts and router are submodules of these names in both families."""
    model = getattr(model, "base_model", model)
    model = getattr(model, "model", model) if hasattr(model, "peft_config") else model
    return next(module for name, module in model.named_modules() if name.endswith(("layers.0.feed_forward", "0.ffn")))


def adapted(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(7)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))


def both_orders(make_model: Any, **options: Any) -> list[Any]:
    """replace then get_peft_model, and the other way round."""
    first = make_model("cpu")
    mk.hf.replace(first)
    second = adapted(make_model("cpu"), **options)
    mk.hf.replace(second)
    return [adapted(first, **options), second]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"]},
        {"target_modules": ["q_proj"], "target_parameters": ["router.weight"]},
        {"target_modules": "all-linear", "exclude_modules": ["router"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["experts", "router"]},
    ],
    ids=lambda options: "+".join(options.get("target_parameters", options.get("modules_to_save", ["all linear"]))),
)
def test_peft_on_llama4_in_both_orders(options: dict[str, Any]) -> None:
    """As on transformers' own blocks: logits, loss, and a gradient for every matrix of the adapters."""
    expected = run(adapted(llama4("cpu"), **options), "cpu")
    for model in both_orders(llama4, **options):
        check_same(run(model, "cpu"), expected)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert any(isinstance(m, mk.hf.blocks.Llama4Experts) for m in model.modules())


def test_lora_around_the_router_of_llama4_is_refused_by_name() -> None:
    """peft cannot call transformers' own there either: the router returns two tensors."""
    for model in both_orders(llama4, target_modules="all-linear"):
        with pytest.raises(TypeError, match=r"target_parameters=\['router.weight'\]"):
            model(tokens("cpu"))


@pytest.mark.parametrize("options", [{"target_modules": ["layer"]}, {"target_modules": "all-linear"}])
def test_peft_on_dbrx_in_both_orders(options: dict[str, Any]) -> None:
    expected = run(adapted(dbrx("cpu"), **options), "cpu")
    for model in both_orders(dbrx, **options):
        check_same(run(model, "cpu"), expected)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_of_the_experts_of_dbrx() -> None:
    plain, model = dbrx("cpu"), dbrx("cpu")
    mk.hf.replace(model)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(model, target_modules=["Wqkv"], target_parameters=names)
    run(model, "cpu")
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        out = model(tokens("cpu")).logits
        assert error(out, plain(tokens("cpu")).logits) > 1e-3
        merged = model.merge_and_unload()
        assert error(merged(tokens("cpu")).logits, out) < 1e-5
    plain.load_state_dict(merged.state_dict())  # back in transformers' three matrices
    with torch.no_grad():
        assert error(plain(tokens("cpu")).logits, out) < 1e-5


def test_what_holds_the_matrices_of_dbrx_is_not_taken_away() -> None:
    """A named refusal, after which the model is as before."""

    def hooked(model: Any) -> Any:
        block_of(model).experts.mlp.register_forward_hook(lambda *_: None)
        return model

    def own_forward(model: Any) -> Any:
        block_of(model).experts.forward = lambda *_: None
        return model

    def wrapped(model: Any) -> Any:
        return adapted(model, target_modules=["Wqkv"], target_parameters=["mlp.w1"])

    for change, message in ((hooked, "hooked onto"), (own_forward, "forward of its own"), (wrapped, "ParamWrapper")):
        model = change(dbrx("cpu"))
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            mk.hf.replace(model)
        assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("make_model", [llama4, dbrx])
def test_router_logits_are_recorded(make_model: Any) -> None:
    model, expected = make_model("cpu"), make_model("cpu")
    if getattr(expected(tokens("cpu"), output_router_logits=True), "router_logits", None) is None:
        pytest.skip(f"transformers {transformers.__version__} does not return this model's router logits")
    model(tokens("cpu"), output_router_logits=True)  # transformers puts its recorders in place
    mk.hf.replace(model)
    fresh = make_model("cpu")
    mk.hf.replace(fresh)
    theirs = expected(tokens("cpu"), output_router_logits=True).router_logits
    for ours in (m(tokens("cpu"), output_router_logits=True).router_logits for m in (model, fresh)):
        assert len(ours) == len(theirs) == 2
        assert all(error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("make_model", [llama4, dbrx])
@pytest.mark.parametrize("replaced_first", [True, False])
def test_hooks_see_every_call(make_model: Any, replaced_first: bool) -> None:
    model = make_model("cpu")
    if replaced_first:
        mk.hf.replace(model)
    block, seen = block_of(model), []
    parts = {"block": block, "experts": block.experts, "router": block.router}
    if make_model is llama4:
        parts["shared expert"] = block.shared_expert
    for name, module in parts.items():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.append(f"before {name}"))
        module.register_forward_hook(lambda module, args, out, name=name: seen.append(f"after {name}"))
        module.register_full_backward_hook(lambda module, up, down, name=name: seen.append(f"backward {name}"))
    if not replaced_first:
        mk.hf.replace(model)
    model(tokens("cpu"), labels=tokens("cpu")).loss.backward()
    assert sorted(seen) == sorted(f"{when} {name}" for name in parts for when in ("before", "after", "backward"))


@pytest.mark.parametrize("make_model", [llama4, dbrx])
def test_pruned_and_parametrized_experts(make_model: Any) -> None:
    """The weights are those of the moment, not those of the time of pruning."""
    model = make_model("cpu")
    mk.hf.replace(model)
    for module in [block.experts for block in model.modules() if hasattr(block, "router")]:
        prune.l1_unstructured(module, "gate_up_proj", amount=0.5)
        module.gate_up_proj_orig.data.zero_()
    experts = block_of(model).experts
    outputs = []
    experts.register_forward_hook(lambda module, args, out: outputs.append(out))
    for _ in range(2):
        model(tokens("cpu"), labels=tokens("cpu")).loss.backward()
    assert not any(out.any() for out in outputs)
    parametrizations.weight_norm(experts, "down_proj")
    model(tokens("cpu"), labels=tokens("cpu")).loss.backward()
    assert experts.parametrizations.down_proj.original1.grad is not None
    assert any("gate_up_proj_mask" in name for name in model.state_dict())


def test_experts_parametrized_before_replace() -> None:
    expected, model = llama4("cpu"), llama4("cpu")
    for m in (expected, model):
        torch.manual_seed(3)
        parametrizations.weight_norm(block_of(m).experts, "down_proj")
        block_of(m).experts.parametrizations.down_proj.original0.data.mul_(1.5)
    theirs = run(expected, "cpu")
    mk.hf.replace(model)
    check_same(run(model, "cpu"), theirs)
    nn.utils.parametrize.remove_parametrizations(block_of(model).experts, "down_proj")
    assert type(block_of(model).experts) is mk.hf.blocks.Llama4Experts


@pytest.mark.parametrize("replaced_first", [True, False])
def test_offloaded_by_accelerate(replaced_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = llama4("cpu")
    with torch.no_grad():
        expected = model(tokens("cpu")).logits
    changes = [mk.hf.replace, lambda model: accelerate.cpu_offload(block_of(model), torch.device("cpu"))]
    for change in changes if replaced_first else reversed(changes):
        change(model)
    assert all(p.is_meta for p in block_of(model).parameters())
    with torch.no_grad():
        assert error(model(tokens("cpu")).logits, expected) < 2e-5
    assert all(p.is_meta for p in block_of(model).parameters())  # away again


def test_dbrx_offloaded_before_replace_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = dbrx("cpu")
    accelerate.cpu_offload(block_of(model), torch.device("cpu"))
    with pytest.raises(ValueError, match="DBRX's matrices are offloaded"):
        mk.hf.replace(model)


@pytest.mark.parametrize("make_model", [llama4, dbrx])
def test_copies_pickles_and_no_tokens(make_model: Any) -> None:
    model = make_model("cpu")
    mk.hf.replace(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(again(tokens("cpu")).logits, model(tokens("cpu")).logits)
    block = block_of(model)
    x = torch.zeros(2, 0, 32, requires_grad=True)
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    assert out.numel() == 0
    out.sum().backward()
    assert x.grad is not None


def test_granite_of_an_older_release_runs_as_written_under_hooks() -> None:
    model = model_of("GraniteMoe", "cpu")
    if on_interface(model):
        pytest.skip(f"transformers {transformers.__version__} has Granite on the experts interface")
    expected = run(model, "cpu")
    mk.hf.replace(model)
    check_same(run(model, "cpu"), expected)
    block, seen = model.model.layers[0].block_sparse_moe, []
    for part in (block.router, block.input_linear, block.output_linear):
        part.register_forward_hook(lambda *_: seen.append(1))
    check_same(run(model, "cpu"), expected)
    assert len(seen) == 3
    plain = copy.deepcopy(model)
    lora = adapted(model, target_modules=[], target_parameters=["input_linear.weight", "output_linear.weight"])
    run(lora, "cpu")
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)
    with torch.no_grad():
        assert error(lora(tokens("cpu")).logits, plain(tokens("cpu")).logits) > 1e-4
