"""The demo's language model: a small pre-norm transformer over bytes whose MLP is a parameter.

The two models of the demo differ only in this MLP: a dense SwiGLU of width `mlp_width`, or an `mk.MoE` of which
each token uses `top_k` experts of width `mlp_width / top_k`. Both do the same multiplications per token, the MoE also
those of its router.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moekern as mk

BYTES = 256
HEAD_WIDTH = 32
WIDTH_MULTIPLE = 8  # of an expert: keeps rows of all dtypes aligned to 16 bytes


@dataclass(frozen=True)
class Shape:
    """Sizes of both models. `mlp_width` is a multiple of top_k, so the active compute is equal, not about equal."""

    width: int = 128
    layers: int = 4
    context: int = 128
    experts: int = 16
    top_k: int = 2

    @property
    def expert_width(self) -> int:
        return max(WIDTH_MULTIPLE, round(4 * self.width / self.top_k / WIDTH_MULTIPLE) * WIDTH_MULTIPLE)

    @property
    def mlp_width(self) -> int:
        return self.expert_width * self.top_k


class DenseMLP(nn.Module):
    """SwiGLU MLP: x[..., H] -> [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
        angle = torch.outer(torch.arange(context), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        even, odd = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, width))
        return mixed


class Block(nn.Module):
    def __init__(self, shape: Shape, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape.width, shape.context)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class ByteModel(nn.Module):
    """Bytes int64[batch, length] -> logits[batch, length, 256] of the next byte."""

    def __init__(self, shape: Shape, make_mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, shape.width)
        self.blocks = nn.ModuleList(Block(shape, make_mlp()) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES, bias=False)
        # As large as a block's output: with the usual 0.02 the blocks drown the bytes, and 200 steps of learning are
        # worth 0.1 bits per byte less.
        nn.init.normal_(self.embedding.weight, std=0.3)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def build_dense(shape: Shape, seed: int) -> ByteModel:
    torch.manual_seed(seed)
    return ByteModel(shape, lambda: DenseMLP(shape.width, shape.mlp_width))


def build_moe(shape: Shape, seed: int) -> ByteModel:
    torch.manual_seed(seed)

    def make() -> nn.Module:
        return mk.MoE(
            hidden_size=shape.width,
            intermediate_size=shape.expert_width,
            num_experts=shape.experts,
            top_k=shape.top_k,
        )

    return ByteModel(shape, make)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those that one token uses). A token uses top_k / num_experts of a layer's expert weights."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, mk.MoE):
            experts = sum(p.numel() for p in layer.parameters() if p.dim() == 3)
            idle += experts - experts * layer.top_k // layer.num_experts
    return total, total - idle
