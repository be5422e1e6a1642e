"""The code in docs/*.md runs, each page in order, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import moekern as mk

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


def run_page(name: str) -> dict[str, Any]:
    """Execute a page's python blocks one after the other; gives their names."""
    page = next(p for p in PAGES if p.stem == name)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    return names


def test_routing() -> None:
    names = run_page("routing")
    assert names["y"].shape == names["x"].shape
    assert names["chosen"].shape == (8, 4)
    assert names["out"].shape == (16, 32)
    rows = mk.plan(names["rounded"].topk_ids, 8).counts + (names["rounded"].extra_tokens >= 0).sum(1)
    assert not (rows % 4).any()
    assert int(mk.plan(names["limited"], 8).counts.max()) <= 5
    assert int(names["mlp"].latest_routing.tokens_per_expert.sum()) == 16 * 2


def test_balance() -> None:
    names = run_page("balance")
    assert names["loss"].requires_grad
    assert names["model"].gate.e_score_correction_bias.any()


def test_shared_experts() -> None:
    names = run_page("shared-experts")
    assert names["y"].shape == (2, 5, 32)
    assert {"shared_expert.gate_proj.weight", "shared_expert_gate.weight"} <= set(names["names"])
    x, w_gate_up, w_down = names["x"], names["w_gate_up"], names["w_down"]
    gate, up = (x @ w_gate_up[8].T).chunk(2, 1)
    separate = mk.experts(x, names["ids"][:, :2], names["weights"][:, :2], w_gate_up[:8], w_down[:8])
    separate = separate + (torch.nn.functional.silu(gate) * up) @ w_down[8].T
    torch.testing.assert_close(names["out"], separate, rtol=1e-4, atol=1e-2)
    assert names["parameters"]["experts.gate_up_proj"] == (8 + 3, 32, 32)
    torch.testing.assert_close(names["fused"](x), names["mlp"](x))


def test_upcycling() -> None:
    names = run_page("upcycling")
    x = names["x"]
    for layer in ("copies", "shards", "part", "half"):
        torch.testing.assert_close(names[layer](x), names["dense"](x), rtol=1e-4, atol=1e-5)
    assert (names["shards"].intermediate_size, names["part"].intermediate_size) == (24, 16)
    assert names["part"].shared_expert.up_proj.weight.shape == (32, 32)
    assert names["dropped"].num_experts == 4


def test_dispatched_rows() -> None:
    names = run_page("dispatched-rows")
    assert not names["y"][9:].any()
    assert not names["buffer"].grad[9:].any()
    assert names["w_down"].grad.isfinite().all()
    whole = mk.experts(names["x"], names["ids"], names["weights"], names["w_gate_up"], names["w_down"])
    torch.testing.assert_close(names["out"], whole)


def test_every_page_is_run() -> None:
    """No page without a test of its own above."""
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    assert {page.stem for page in PAGES if "```python" in page.read_text()} <= tested


def test_index_and_site_have_every_page() -> None:
    index = (PAGES[0].parent / "README.md").read_text()
    site = (PAGES[0].parents[1] / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"({page.name})" in index, page
        assert f"docs/{page.name}\n" in site, page


def test_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    names = run_page("transformers")
    assert names["logits"].shape == (1, 8, 64)
    assert names["names"] == ["model.layers.0.feed_forward", "model.layers.1.feed_forward"]
    assert names["model"](torch.tensor([[5, 6]])).logits.shape == (1, 2, 64)


def test_benchmarks() -> None:
    rows = run_page("benchmarks")["rows"]
    assert {(row.verb, row.implementation) for row in rows} == {
        (verb, name) for verb in ("forward", "forward+backward") for name in ("ceiling", "moekern", "grouped_mm")
    }
    assert {row.status for row in rows} == {"ok"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_training() -> None:
    """The page's GroupedExperts computes what torchtitan's loop over experts does, value and gradient."""
    names = run_page("training")
    assert names["x"].grad is not None
    experts = names["GroupedExperts"](32, 16, 4)
    for w in experts.parameters():
        torch.nn.init.normal_(w, std=0.2)
    counts = torch.tensor([3, 0, 5, 1])
    x = torch.randn(11, 32)
    parts = [
        (torch.nn.functional.silu(rows @ w1.T) * (rows @ w3.T)) @ w2.T
        for rows, w1, w2, w3 in zip(x[:9].split(counts.tolist()), *experts.parameters(), strict=True)
    ]
    expected = torch.nn.functional.pad(torch.cat(parts), (0, 0, 0, 2))
    out = experts(x, counts)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, list(experts.parameters()), dout)
    theirs = torch.autograd.grad(expected, list(experts.parameters()), dout)
    for value, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, wanted)
