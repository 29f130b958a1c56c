"""Whole models of transformers as ONNX files, beside the dense twin in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization import quantize_

from tests import moe_models
from tests.hugging_face_models import llama
from tests.numerics import UNIT, assert_int4
from tests.onnx_files import OnnxFile
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Logits(nn.Module):
    """Of a language model, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def assert_near(file: OnnxFile, twin: Any, ids: Tensor) -> None:
    """``twin`` is dense and float64. The file computes in float32: a linear layer is within 2 K + 8
    roundings of exact (`assert_product`), a norm or a softmax within fewer; K is 160 at most, and no
    more than 20 of them follow each other. One code that is off by 1 is off by a fifteenth.
    """
    with torch.no_grad():
        exact = twin(input_ids=ids, use_cache=False).logits
    distance = float((file(ids)[0].double() - exact).norm() / exact.norm())
    assert distance < 20 * (2 * 160 + 8) * UNIT[torch.float32]


@pytest.mark.parametrize("embeddings", [False, True])
def test_llama(embeddings: bool, tmp_path: Path) -> None:
    """Any batch and length; with a tied embedding in 4 bits, or every linear layer."""
    model = llama(tie_word_embeddings=embeddings).float().eval()
    twin = copy.deepcopy(model).double()

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Linear, nn.Embedding) if embeddings else nn.Linear)

    quantize_(model, Int4WeightOnlyConfig(group_size=32), filter_fn=chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, Int4OpaqueTensor):
                assert_int4(parameter, tuple(parameter.shape), 32)
                twin.get_parameter(name).copy_(parameter.dequantize())
    shapes = ({0: Dim("batch", max=64), 1: Dim("length", max=64)},)
    ids = torch.randint(0, model.config.vocab_size, (2, 7))
    file = OnnxFile(tmp_path, Logits(model), (ids,), dynamic_shapes=shapes)
    assert file.operators["com.microsoft.MatMulNBits"] == 7 * model.config.num_hidden_layers + 1
    for shape in ((1, 3), (3, 12)):
        assert_near(file, twin, torch.randint(0, model.config.vocab_size, shape))


@pytest.mark.parametrize("family", moe_models.FAMILIES)
def test_experts(family: str, tmp_path: Path) -> None:
    """In groups, which torch cannot export of a dense model: it has no function for them."""
    model = moe_models.build(family, torch.float32)
    twin = copy.deepcopy(model).double()
    twin.set_experts_implementation("eager")
    twin = moe_models.dequantized_into(twin, moe_models.quantized(model))
    model.set_experts_implementation("grouped_mm")
    ids = moe_models.IDS
    file = OnnxFile(tmp_path, Logits(model), (ids,))
    experts = sum(stack.shape[0] for stack in moe_models.stacks(model).values())
    assert file.operators["com.microsoft.MatMulNBits"] == experts
    assert_near(file, twin, ids.flip(0, 1))
