"""The README's code runs, its commands exist and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import moekern as mk

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


class DenseMLP(torch.nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def tiny_transformer() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, vocab_size=64, num_experts=16))


def test_code_runs() -> None:
    tokens, hidden, inter, experts = 5, 32, 16, 16
    dense = DenseMLP(hidden, 2 * inter)
    names = {
        "dense_mlp": dense,
        "model": tiny_transformer(),
        "logits": torch.randn(tokens, experts),
        "x": torch.randn(tokens, hidden),
        "w_gate_up": torch.randn(experts, 2 * inter, hidden),
        "w_down": torch.randn(experts, hidden, inter),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)

    x = names["x"]
    assert names["Block"](hidden)(x).shape == x.shape
    assert isinstance(names["mlp"], mk.MoE)
    torch.testing.assert_close(names["mlp"](x), dense(x))
    assert names["y"].shape == x.shape
    assert names["model"].config._experts_implementation == "moekern"
    assert names["model"](torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", " ".join(re.findall(r"^    .*|`[^`]*`", README, re.MULTILINE))))
    assert {"demo", "test"} <= named <= targets


def test_ci_runs_the_test_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()
    assert "    make test" in README.splitlines()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).exists()
