"""What other tools themselves read of our files, and we of theirs. A test skips where its tool is not.

``.ci/run slow`` installs compressed-tensors. llama-cpp-python and GPTQModel are compiled for minutes:
these run by hand (``pip install llama-cpp-python``, and `tests.by_hand.gptqmodel_checkpoints`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.foreign_checkpoints import foreign
from tests.test_convert import loaded, nothing
from tests.test_foreign_models import logits, tiny_llama
from tests.test_gguf_export import TEXT, model_of, quantized, tokenizer
from torchao_int4cpu import Int4OpaqueTensor, import_checkpoints
from torchao_int4cpu.convert.export import export_directory
from torchao_int4cpu.convert.gguf_export import export_gguf
from torchao_int4cpu.importers.compressed_tensors import groupwise_of_compressed_tensors

pytestmark = pytest.mark.slow


def arguments(group_size: int, symmetric: bool) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group_size
    )


def dequantized_by_compressed_tensors(parts: dict[str, Tensor], group_size: int) -> Tensor:
    """In float32, by its own functions."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    shape, scale = torch.Size(parts["weight_shape"].tolist()), parts["weight_scale"]
    codes = helpers.unpack_from_int32(parts["weight_packed"], 4, shape)
    points = helpers.unpack_from_int32(parts["weight_zero_point"], 4, scale.shape, packed_dim=0)
    found: Tensor = forward.dequantize(codes, scale.float(), points, arguments(group_size, False))
    return found


def test_compressed_tensors_reads_an_exported_directory(tmp_path: Path) -> None:
    """Its functions give the weights exactly; and the model that transformers makes with it is ours."""
    pytest.importorskip("compressed_tensors")
    quantized(tmp_path, model_of("llama"), 32)
    export_directory(tmp_path / "int4", tmp_path / "out", "compressed-tensors", nothing)
    state: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        state |= load_file(file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # by this package
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    assert len(weights) == 14
    for name, weight in weights.items():
        stem = name.removesuffix("weight")
        parts = {key.removeprefix(stem): state[key] for key in state if key.startswith(stem)}
        theirs = dequantized_by_compressed_tensors(parts, 32).double()
        # Zeros are whole numbers of scales there, and float16 here: see test_what_storing_it_costs.
        assert float(
            (weight.to_groupwise().dequantize(torch.float64) - theirs).norm()
        ) <= 1.5e-4 * float(theirs.norm())
    import_checkpoints(False)
    try:
        # Without it transformers 5.24 and compressed-tensors 0.20 refuse every file with zero points:
        # the model without data is made for unpacked ones.
        expanded = CompressedTensorsConfig(dequantize=True)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=expanded)
    finally:
        import_checkpoints(True)
    assert not any(isinstance(p, Int4OpaqueTensor) for p in dense.parameters())
    expected, found = logits(dense).double(), logits(model).double()
    # Both compute in bfloat16: 2^-8 each time, 20 times in two layers.
    assert float((found - expected).norm() / expected.norm()) < 20**0.5 * 2.0**-8


@pytest.mark.parametrize("k", [64, 96, 36])
def test_what_compressed_tensors_packs_is_read(k: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = foreign(torch.randn(24, k), 32, False)
    points = (weight.points - 8).to(torch.int8)
    parts = {
        "weight_packed": helpers.pack_to_int32((weight.codes.to(torch.int8) - 8), 4),
        "weight_scale": weight.scale,
        "weight_zero_point": helpers.pack_to_int32(points, 4, packed_dim=0).contiguous(),
        "weight_shape": torch.tensor([24, k]),
    }
    read = groupwise_of_compressed_tensors(**parts, group_size=32)
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.dequantize(torch.float64), weight.dense())
    if k % 32 == 0:
        assert torch.equal(dequantized_by_compressed_tensors(parts, 32).double(), weight.dense())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_reads_an_exported_directory(architecture: str, tmp_path: Path) -> None:
    """The same words, and logits as near as its rounding of activations to 8 bits lets them be."""
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = quantized(tmp_path, model_of(architecture), 32)
    export_gguf(folder, tmp_path / "model.gguf", nothing)
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, n_threads=2, verbose=False, logits_all=True
    )
    ids = tokenizer()(TEXT)["input_ids"]
    assert theirs.tokenize(TEXT.encode(), add_bos=False) == ids
    theirs.eval(ids)
    found = torch.from_numpy(np.array(theirs.scores[: len(ids)])).double()
    with torch.no_grad():
        expected = loaded(folder, torch.float32)(torch.tensor([ids])).logits[0].double()
    # 8 bits in groups of 32: 2^-8 of the largest each, 5e-3 of a product, 20 times in two layers.
    assert float((found[:, :320] - expected).norm() / expected.norm()) < 20**0.5 * 5e-3
    assert float((found[:, :320] - expected).norm()) > 0


def test_the_models_of_these_tests_differ() -> None:
    """Else equal logits would say nothing."""
    assert not torch.equal(logits(tiny_llama()), logits(model_of("llama")))
