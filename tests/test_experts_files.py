"""4-bit experts in the files of Hugging Face."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
)

import torchao_int4cpu.quantize.config
from tests.moe_models import (
    FAMILIES,
    IMPLEMENTATIONS,
    ROUNDING,
    Stack,
    dequantized_into,
    from_file,
    logits,
    quantized,
    stacks,
    typical,
    written,
)
from tests.test_isa import CAPABILITIES, SUPPORTED, _param, run
from torchao_int4cpu.quantize.parameter import quantize_parameter

# --- Hugging Face files ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_loading_quantizes_the_merged_stack_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has each expert alone, transformers merges them; no dense stack outlives it."""
    source = written(family, tmp_path)
    with safe_open(source / "model.safetensors", "pt") as file:
        alone = [key for key in file.keys() if ".experts.0." in key]  # noqa: SIM118
    assert (alone == []) == (family == "gpt_oss")
    calls: list[str] = []
    dense: list[weakref.ref[Tensor]] = []

    def watching(module: nn.Module, parameter_name: str, *options: Any) -> bool:
        assert not any(weight() is not None for weight in dense), "a dense stack is alive still"
        dense.append(weakref.ref(getattr(module, parameter_name)))
        calls.append(parameter_name)
        return quantize_parameter(module, parameter_name, *options)

    monkeypatch.setattr(torchao_int4cpu.quantize.config, "quantize_parameter", watching)
    model = from_file(source)
    assert sorted(calls) == ["down_proj"] * 2 + ["gate_up_proj"] * 2
    assert not any(weight() is not None for weight in dense)
    monkeypatch.undo()
    expected = stacks(quantized(AutoModelForCausalLM.from_pretrained(source)))
    assert expected.keys() == stacks(model).keys()
    for name, weight in stacks(model).items():
        assert torch.equal(weight.qdata, expected[name].qdata)
        assert torch.equal(weight.scale_and_zero, expected[name].scale_and_zero)


@pytest.mark.slow
def test_quantize_save_and_load_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for family in FAMILIES:
        for dtype in ROUNDING:
            model = from_file(written(family, tmp_path / f"{family}-{dtype}", dtype))
            out = tmp_path / f"out-{family}-{dtype}"
            model.save_pretrained(out)
            results = {}
            for implementation in IMPLEMENTATIONS:
                model.set_experts_implementation(implementation)
                results[implementation] = logits(model)
            expected[str(out)] = results
    done = subprocess.run(
        [sys.executable, "-m", "tests.children.load_experts", *expected], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, results in expected.items():
        found, count = torch.load(f"{folder}.logits.pt")
        assert count == 4
        for implementation, y in results.items():
            assert torch.equal(found[implementation], y), (folder, implementation)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_bytes_on_disk(family: str, tmp_path: Path) -> None:
    """Experts take 4 bits and, in groups of 128, a quarter of a bit for scale and zero."""
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    sizes: dict[str, Any] = {"hidden_size": 256, width: 384, "num_hidden_layers": 1, "vocab_size": 32}
    source = written(family, tmp_path / "source", **sizes)
    model = from_file(source, 128)
    model.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["model.layers.0.mlp.experts.down_proj"])["_data"]
    assert (said["format_version"], said.get("transposed", False)) == (2, family == "gpt_oss")
    elements = sum(weight.numel() for weight in stacks(model).values())
    packed = [part for key, part in stored.items() if "_proj_qdata" in key or "_scale_and_zero" in key]
    assert len(packed) == 4
    assert sum(part.nbytes for part in packed) * 8 == elements * (4 + 0.25)
    files = [tmp_path / name / "model.safetensors" for name in ("out", "source")]
    others = sum(p.nbytes for p in model.parameters() if not isinstance(p, Stack))
    quantized_size, dense_size = (file.stat().st_size - others for file in files)
    assert quantized_size < 0.27 * dense_size


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_sharded(family: str, tmp_path: Path) -> None:
    model = from_file(written(family, tmp_path / "source"))
    model.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stacks(back).keys() == stacks(model).keys()
    assert torch.equal(logits(back), logits(model))
    back.save_pretrained(tmp_path / "again", save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


@pytest.fixture(scope="module")
def by_capability(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    sources = [str(written(family, folder / family)) for family in ("qwen3_moe", "gpt_oss")]
    for writer in [name for name in CAPABILITIES if SUPPORTED[name]]:
        run(
            writer,
            "-m",
            "tests.children.save_experts",
            str(folder / writer),
            *sources,
            PYTHONPATH=os.getcwd(),
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_saved_under_one_instruction_set_loaded_under_another(reader: str, by_capability: Path) -> None:
    """The same codes and scales whoever wrote them, so the reader's logits agree bit for bit."""
    writers = [name for name in CAPABILITIES if SUPPORTED[name]]
    for family in ("qwen3_moe", "gpt_oss"):
        folders = [str(by_capability / writer / family) for writer in writers]
        run(reader, "-m", "tests.children.load_experts", *folders)
        results = [torch.load(f"{folder}.logits.pt")[0] for folder in folders]
        model = AutoModelForCausalLM.from_pretrained(folders[0])
        dense = dequantized_into(AutoModelForCausalLM.from_pretrained(by_capability / family), model)
        for implementation, y in results[0].items():
            assert all(torch.equal(result[implementation], y) for result in results)
            dense.set_experts_implementation(implementation)
            assert 2.0**-20 < typical(y, logits(dense)) < ROUNDING[torch.bfloat16]
