"""A 4-bit table, and the smallest language model: an embedding and a head with one weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

from tests.numerics import assert_int4
from torchao_int4cpu import Int4WeightOnlyConfig

N, K = 100, 70
CONFIG = Int4WeightOnlyConfig(group_size=32)


def linear_and_embedding(module: nn.Module, name: str) -> bool:
    """What the README tells to give as ``filter_fn``."""
    return isinstance(module, (nn.Linear, nn.Embedding))


def embedding(config: Int4WeightOnlyConfig = CONFIG, **options: Any) -> nn.Embedding:
    table = nn.Embedding(N, K, **options)
    quantize_(table, config, filter_fn=linear_and_embedding)
    assert_int4(table.weight, (N, K), config.group_size)
    return table


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, N, shape, dtype=dtype)


def expected(table: nn.Embedding, idx: Tensor) -> Tensor:
    """Rows of the whole weight, expanded."""
    weight: Any = table.weight
    dense: Tensor = weight.dequantize()
    return dense[idx.long()]


class Tied(nn.Module):
    """An embedding and a head with one weight, the smallest language model."""

    embed: nn.Embedding
    head: nn.Linear

    def __init__(self, head_first: bool = False) -> None:
        super().__init__()
        for name in ("head", "embed") if head_first else ("embed", "head"):
            made = nn.Embedding(N, K) if name == "embed" else nn.Linear(K, N, bias=False)
            setattr(self, name, made)
        self.inner = nn.Linear(K, K)
        self.head.weight = self.embed.weight

    def forward(self, idx: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(self.embed(idx)))
        return y


def tied(head_first: bool = False) -> Tied:
    model = Tied(head_first)
    quantize_(model, CONFIG, filter_fn=linear_and_embedding)
    return model


def assert_tied(model: Tied) -> None:
    assert_int4(model.embed.weight, (N, K), 32)
    assert model.head.weight is model.embed.weight
