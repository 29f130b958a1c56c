"""How large transformers and accelerate take a 4-bit model to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import calculate_maximum_sizes, compute_module_sizes
from torch import nn
from torchao.quantization import quantize_

from tests import moe_models
from tests.hugging_face_models import MODELS, llama
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

CONFIG = Int4WeightOnlyConfig(group_size=32)


def quantized(model: Any) -> Any:
    quantize_(model, CONFIG, lambda module, name: isinstance(module, nn.Linear | nn.Embedding))
    return model


def real_bytes(module: nn.Module, buffers: bool = True) -> int:
    """Of the tensors that hold the numbers, each once."""
    tensors = [*module.parameters(), *(module.buffers() if buffers else ())]
    parts = [
        part
        for t in tensors
        for part in (
            t.parts().values() if isinstance(t, Int4OpaqueTensor | Int4TransposedTensor) else [t]
        )
    ]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
@pytest.mark.parametrize("buffers", [True, False])
def test_the_memory_footprint(family: str, buffers: bool) -> None:
    """By hand for one layer: 160 rows of 64 codes, two to a byte, in two groups with 4 bytes each."""
    dense, model = MODELS[family](), quantized(MODELS[family]())
    assert dense.get_memory_footprint(buffers) == real_bytes(dense, buffers)
    assert model.get_memory_footprint(buffers) == real_bytes(model, buffers)
    assert model.get_memory_footprint(return_buffers=buffers) < 0.35 * dense.get_memory_footprint()
    if family == "llama":
        weight = model.model.layers[0].mlp.up_proj.weight
        assert real_bytes(nn.ParameterList([weight])) == 160 * 32 + 160 * 2 * 2 * 2


def test_experts_count_too() -> None:
    for family in moe_models.FAMILIES:
        model = moe_models.quantized(moe_models.build(family))
        assert model.get_memory_footprint() == real_bytes(model)
        assert compute_module_sizes(model)[""] == real_bytes(model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_accelerate_sizes_of_modules(dtype: torch.dtype | None) -> None:
    """With a dtype it counts what a float tensor takes in that; a 4-bit weight does not change."""
    model = quantized(llama()).to(torch.bfloat16)
    sizes = compute_module_sizes(model, dtype=dtype)
    for name, module in model.named_modules():
        if any(True for _ in (*module.parameters(), *module.buffers())):
            assert sizes[name] == real_bytes(module), name
    assert sizes["lm_head.weight"] == real_bytes(model.lm_head)
    assert calculate_maximum_sizes(model)[0] == real_bytes(model)


def test_accelerate_places_a_4_bit_model_by_its_real_size() -> None:
    """Where it fits as it is and would not if it were dense."""
    model = quantized(llama(hidden_size=256, intermediate_size=512)).to(torch.bfloat16)
    limit = {"cpu": 2 * real_bytes(model), "disk": 2**40}
    assert infer_auto_device_map(model, max_memory=limit) == {"": "cpu"}
    dense = llama(hidden_size=256, intermediate_size=512).to(torch.bfloat16)
    assert "disk" in infer_auto_device_map(dense, max_memory=limit).values()


def test_others_see_the_weights_themselves() -> None:
    from accelerate.utils import named_module_tensors

    found = dict(named_module_tensors(quantized(llama()), recurse=True))
    assert type(found["lm_head.weight"]) is Int4OpaqueTensor
