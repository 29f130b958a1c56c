"""Models with experts, dense and in 4 bits, and how far their logits may lie apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TorchAoConfig,
)

from tests.numerics import assert_int4
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
IDS = torch.arange(24).view(2, 12)
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 120}
Stack = Int4OpaqueTensor | Int4TransposedTensor

#: By family: the class of the model, its config, and sizes. K is 64 or more and 48, 80, 72 and 104: in
#: groups of 32 the last is short.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"hidden_size": 64, "intermediate_size": 80, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"hidden_size": 72, "intermediate_size": 104, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def build(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model with random weights, biases and routers."""
    cls, config, sizes = FAMILIES[family]
    model = cls(config(**(SIZES | {"num_hidden_layers": 2} | sizes | changes))).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "sinks" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def config_for_experts(group_size: int = 32) -> FqnToConfig:
    return FqnToConfig(
        {r"re:.*\.experts\.(gate_up|down)_proj": Int4WeightOnlyConfig(group_size=group_size)}
    )


def quantized(model: Any, group_size: int = 32) -> Any:
    """The same model with 4-bit experts; every other weight stays."""
    quantize_(model, config_for_experts(group_size), filter_fn=None)
    return model


def stacks(model: nn.Module) -> dict[str, Stack]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, Stack)}


def dequantized_into(dense: Any, model: Any) -> Any:
    """``dense`` with the numbers that the 4-bit experts of ``model`` stand for."""
    for name, stack in stacks(model).items():
        dense.get_parameter(name).data.copy_(stack.dequantize())
    return dense


def pair(family: str, dtype: torch.dtype, group_size: int = 32, **changes: Any) -> tuple[Any, Any]:
    """A model with 4-bit experts, and the dense one that it must agree with."""
    model = build(family, dtype, **changes)
    dense = copy.deepcopy(model)
    return quantized(model, group_size), dequantized_into(dense, model)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def typical(a: Tensor, b: Tensor) -> float:
    """The `distance` of the median token: near ties between experts may fall either way for some."""
    distances = [distance(*both) for both in zip(a.flatten(0, 1), b.flatten(0, 1))]
    return float(torch.tensor(distances).median())


def assert_stack(
    weight: object, shape: tuple[int, int, int], group_size: int, *, turned: bool
) -> Int4OpaqueTensor:
    """The guard: a stack of matrices ``[N, K]`` in 4 bits, or the transposed view of one."""
    assert isinstance(weight, Int4TransposedTensor if turned else Int4OpaqueTensor)
    e, n, k = shape
    assert tuple(weight.shape) == ((e, k, n) if turned else shape)
    stack = weight.untransposed() if isinstance(weight, Int4TransposedTensor) else weight
    assert stack.block_size == [1, 1, group_size]
    one = [assert_int4(stack[i], (n, k), group_size) for i in range(e)]
    assert stack.qdata.nbytes == e * one[0].qdata.nbytes
    assert stack.scale_and_zero.nbytes == e * one[0].scale_and_zero.nbytes
    return stack


def written(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    build(family, dtype, **changes).save_pretrained(folder)
    return folder


def from_file(folder: Path, group_size: int = 32) -> Any:
    quantization = TorchAoConfig(config_for_experts(group_size))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)


#: Products that follow each other in a model of two layers: q or v, o, router, gate_up and down in
#: each, and the head.
PRODUCTS = 11

#: How far two such models may be apart, by dtype: in bfloat16 each product rounds, on either side, by
#: 2^-9 at the root mean square; in float32 only our four round, what they get and what they give.
ROUNDING = {torch.bfloat16: 2 * PRODUCTS * 2.0**-9, torch.float32: 8 * 2.0**-9}
