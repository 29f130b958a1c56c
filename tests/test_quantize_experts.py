"""``quantize --experts``: stacks of experts from files that have them apart, or as stacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers import (
    AutoModelForCausalLM,
)

from tests.hugging_face_models import llama
from tests.moe_models import FAMILIES, build
from tests.test_calibrated_directory import gptq, saved, text
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig, calibrate
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.checkpoint.safetensors import read_header
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.export import int4_sources
from torchao_int4cpu.convert.plan import NOT_ASKED_FOR, Plan, make_plan
from torchao_int4cpu.convert.shards import Report
from torchao_int4cpu.convert.text import batches_of, read_text, token_ids, tokenizer_of
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

EXPERTS = {"qwen3_moe": 8, "mixtral": 4, "gpt_oss": 4}
CONFIG = Int4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm="mse")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    (tmp_path / "calibration.txt").write_text(text(4000).replace(" lazy ", "\n"))
    return tmp_path / "calibration.txt"


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return build(family, dtype, vocab_size=320, max_position_embeddings=64)


def stacks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 3}


def quantized(source: Path, out: Path, **options: Any) -> tuple[Plan, Report]:
    plan = make_plan(source, CONFIG, experts=True, **options)
    return plan, quantize_directory(plan, out, lambda name, done: None)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, 4-bit weights by what they store."""
    other = dict(expected.named_parameters())
    assert dict(found.named_parameters()).keys() == other.keys()
    for name, weight in found.named_parameters():
        assert type(weight) is type(other[name]), name
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_quantizing_in_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(model_of(name, dtype), tmp_path / "source")
    plan, report = quantized(source, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    memory = AutoModelForCausalLM.from_pretrained(source)
    quantize_(memory, plan.by_name(), filter_fn=None)
    assert_same(found, memory)
    stacks = stacks_of(found)
    assert len(stacks) == 2 * 2
    assert all(isinstance(stack, Int4Weight) for stack in stacks.values())
    kind = Int4TransposedTensor if name == "gpt_oss" else Int4OpaqueTensor
    assert {type(stack.data) for stack in stacks.values()} == {kind}
    assert {tensor.name for tensor in report.quantized} == {
        name for name, p in found.named_parameters() if isinstance(p, Int4Weight)
    }
    again = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=plan.model_config.quantization_config
    )
    assert_same(again, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_codes_are_those_of_each_expert(name: str, tmp_path: Path) -> None:
    """By hand, from the float model; the bytes are those of 4 bits, and the SQNR is theirs."""
    model = model_of(name)
    source = saved(model, tmp_path / "source")
    _, report = quantized(source, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    done = {tensor.name: tensor for tensor in report.quantized}
    for key, stack in stacks_of(found).items():
        assert isinstance(stack, Int4Weight)
        w = model.get_parameter(key).detach()
        w = w.transpose(-2, -1) if name == "gpt_oss" else w
        codes = weight_of(stack).to_groupwise().codes
        expected = [choose_qparams(expert, 32, "mse") for expert in w]
        assert torch.equal(codes, torch.stack([each.codes for each in expected]))
        noise = sum(float((e.dequantize() - x).square().sum()) for e, x in zip(expected, w))
        assert 10 ** (done[key].sqnr / 10) == pytest.approx(float(w.square().sum()) / noise, rel=1e-4)
        assert done[key].bytes_before == w.numel() * 4
        assert 0.5 <= done[key].bytes_after / w.numel() < 1  # these are padded


@pytest.mark.parametrize("experts", [True, False])
def test_files_keep_the_names_of_the_original(experts: bool, tmp_path: Path) -> None:
    """transformers renames Mixtral's, and vLLM goes by the files; the metadata has both names."""
    source = saved(model_of("mixtral"), tmp_path / "source")
    plan = make_plan(source, CONFIG, experts=experts)
    quantize_directory(plan, tmp_path / "out", lambda name, done: None)
    before = {tensor.key for tensor in read_header(source / "model.safetensors")}
    after = {tensor.key for tensor in read_header(tmp_path / "out" / "model.safetensors")}
    assert {key for key in after if "_weight_" not in key and "_proj_" not in key} < before
    layer = "model.layers.1.block_sparse_moe"
    assert f"{layer}.gate.weight" in after
    assert (f"{layer}.experts._down_proj_qdata" in after) == experts
    assert not [key for key in after if ".mlp." in key]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = json.loads(file.metadata()["tensor_names"])
    assert {f"{layer}.gate.weight", "model.layers.1.mlp.gate.weight"} < set(names)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    memory = AutoModelForCausalLM.from_pretrained(source)
    quantize_(memory, plan.by_name(), filter_fn=None)
    assert_same(found, memory)
    assert cli.main(["inspect", str(tmp_path / "out"), "--verify"]) == 0
    four_bit = {name for name, p in found.named_parameters() if isinstance(p, Int4Weight)}
    assert int4_sources([tmp_path / "out" / "model.safetensors"]).keys() == four_bit


def test_without_it_they_are_kept_and_the_report_says_so(tmp_path: Path) -> None:
    source = saved(model_of("qwen3_moe"), tmp_path / "source")
    plan = make_plan(source, CONFIG)
    kept = [tensor.name for tensor in plan.tensors if tensor.kept == NOT_ASKED_FOR]
    assert len(kept) == 2 * 8 * 3  # layers, experts, matrices: as the file has them
    assert {tensor.key for tensor in read_header(source / "model.safetensors")} > set(kept)


def test_skipping_some_of_them(tmp_path: Path) -> None:
    source = saved(model_of("qwen3_moe"), tmp_path / "source")
    quantized(source, tmp_path / "out", skip=["model.layers.0.mlp", "down_proj"])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    four_bit = [name for name, stack in stacks_of(found).items() if isinstance(stack, Int4Weight)]
    assert four_bit == ["model.layers.1.mlp.experts.gate_up_proj"]
    original = AutoModelForCausalLM.from_pretrained(source)
    for name, stack in stacks_of(found).items():
        if name not in four_bit:
            assert torch.equal(stack, original.get_parameter(name))


def without_an_expert(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_experts_of_another_model(tmp_path: Path) -> None:
    source = saved(model_of("qwen3_moe"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"an expert has shape \[\d+, \d+\] where the model"):
        quantized(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done(tmp_path: Path) -> None:
    source = saved(llama(vocab_size=320), tmp_path / "llama")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no experts .* leave out --experts"):
        make_plan(source, CONFIG, experts=True)
    make_plan(source, CONFIG)
    source = saved(model_of("qwen3_moe"), tmp_path / "qwen")
    without_an_expert(source)
    with pytest.raises(ValueError, match="not all of the 8 experts of"):
        make_plan(source, CONFIG, experts=True)
    make_plan(source, CONFIG)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow), "gpt_oss"]
)
def test_for_the_inputs_of_each_expert(
    name: str, tmp_path: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `calibrate` in memory, bit for bit in float32; what no token reaches is named."""
    source = saved(model_of(name), tmp_path / "source")
    assert gptq(source, tmp_path / "out", calibration, "--experts") == 0
    assert "matrices are quantized for their inputs" in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = token_ids(read_text(calibration), tokenizer_of(source), 2048, model.config)
    config = make_plan(source, CONFIG, experts=True).by_name()
    told = calibrate(model, batches_of(ids, model.config), config, progress=False)
    assert_same(found, model)
    assert len([weight for weight in told.weights if "experts" in weight.name]) == 2 * 2 * EXPERTS[name]


def test_a_number_of_bits(
    tmp_path: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stack has one group size."""
    source = saved(model_of("qwen3_moe"), tmp_path / "source")
    assert gptq(source, tmp_path / "out", calibration, "--experts", "--target-bits", "5.2") == 0
    assert "group sizes: " in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = [weight_of(p.data) for p in found.parameters() if isinstance(p, Int4Weight)]
    assert len({weight.group_size for weight in weights}) > 1
    assert len([weight for weight in weights if weight.ndim == 3]) == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(model_of("qwen3_moe"), tmp_path / "source")
    assert cli.main(["quantize", str(source), str(tmp_path / "a"), "--group-size", "32"]) == 0
    assert NOT_ASKED_FOR in capsys.readouterr().out
    arguments = [str(source), str(tmp_path / "b"), "--group-size", "32", "--experts"]
    assert cli.main(["quantize", *arguments]) == 0
    assert NOT_ASKED_FOR not in capsys.readouterr().out
    nbytes = [
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in "ab"
    ]
    assert nbytes[1] < nbytes[0]
