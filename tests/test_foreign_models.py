"""`from_pretrained` of GPTQ, AWQ and compressed-tensors checkpoints gives 4-bit weights of ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from tests.foreign_checkpoints import Foreign, save_foreign
from torchao_int4cpu import Int4OpaqueTensor, import_checkpoints
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.integrations import transformers_imports
from torchao_int4cpu.integrations.transformers_imports import PACKAGES

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
IDS = torch.tensor([[3, 141, 59, 26, 53, 58, 97, 93, 238]])


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False, dtype="float16")
    return LlamaForCausalLM(config).half().eval()


def tiny_experts() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 320}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
    config = Qwen3MoeConfig(**sizes, **heads, **experts, tie_word_embeddings=False, dtype="float16")
    return Qwen3MoeForCausalLM(config).half().eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def dense_twin(model: Any, weights: dict[str, Foreign]) -> Any:
    """The model in float32 with the weights that the file stands for."""
    state = model.float().state_dict() | {name: w.dense().float() for name, w in weights.items()}
    model.load_state_dict(state)
    return model


def assert_is(model: Any, weights: dict[str, Foreign]) -> None:
    """Each of these weights is a 4-bit one, with the codes of the file, and no other is."""
    found = {n: p for n, p in model.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    assert found.keys() == weights.keys()
    for name, weight in found.items():
        groupwise = weight.to_groupwise()
        columns = slice(None) if groupwise.act_order is None else groupwise.act_order.long()
        assert torch.equal(groupwise.codes, weights[name].codes[:, columns])
        error = groupwise.dequantize(torch.float64) - weights[name].dense()
        assert float(error.norm()) <= 1.5e-4 * float(weights[name].dense().norm())


def assert_loads_again(folder: Path, model: Any, weights: dict[str, Foreign]) -> None:
    """What was saved of a model is that model."""
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert_is(again, weights)
    assert torch.equal(logits(again), logits(model))


@pytest.fixture
def without_importers() -> Iterator[Callable[[], None]]:
    yield lambda: import_checkpoints(False)
    import_checkpoints(True)


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_read_exactly_and_saved_as_ours(
    format: str, symmetric: bool, tmp_path: Path, without_importers: Callable[[], None]
) -> None:
    dense = tiny_llama()
    weights = save_foreign(tmp_path / "foreign", dense, format, 32, symmetric)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign")
    assert_is(model, weights)
    expected = logits(dense_twin(dense, weights))
    # float16 activations in every layer: 2^-11 each time, 20 times in two layers.
    assert float((logits(model).float() - expected).norm() / expected.norm()) < 5e-3

    model.save_pretrained(tmp_path / "ours")
    without_importers()
    assert_loads_again(tmp_path / "ours", model, weights)
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_act_order(format: str, tmp_path: Path, without_importers: Callable[[], None]) -> None:
    """Kept by the model, its logits, and what is saved of it."""
    dense = tiny_llama()
    weights = save_foreign(tmp_path / "foreign", dense, format, 32, False, act_order=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign")
    assert_is(model, weights)
    weight: Any = model.model.layers[1].mlp.down_proj.weight
    assert weight.act_order.tolist() != list(range(320))
    expected = logits(dense_twin(dense, weights))
    assert float((logits(model).float() - expected).norm() / expected.norm()) < 5e-3

    model.save_pretrained(tmp_path / "ours")
    without_importers()
    assert_loads_again(tmp_path / "ours", model, weights)


def test_act_order_of_experts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stack has one order, and each expert its own."""
    save_foreign(tmp_path, tiny_experts(), "gptq", 32, False, act_order=True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError):  # transformers' own, whose report has the reason
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "in orders of their own (desc_act), and a stack has one" in caplog.text


@pytest.mark.parametrize("group_size", [64, 320, -1])
def test_groups_of_other_sizes(group_size: int, tmp_path: Path) -> None:
    """One group a row among them; and layers with groups of their own, as by ``dynamic``."""
    own = {"down_proj": 160, "o_proj": 32}
    weights = save_foreign(tmp_path / "a", tiny_llama(), "gptq", group_size, False, own_groups=own)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert_is(model, weights)
    model.save_pretrained(tmp_path / "ours")
    assert_is(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), weights)


def test_activations_that_awq_scales_are_refused(tmp_path: Path) -> None:
    config = FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    save_foreign(tmp_path, FalconForCausalLM(config), "awq")
    with pytest.raises(ValueError, match="AWQ scales the activations of falcon"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_head_in_4_bits(tmp_path: Path) -> None:
    dense = tiny_llama()
    weights = save_foreign(tmp_path, dense, "gptq", 32, True, head=True)
    assert "lm_head.weight" in weights
    assert_is(AutoModelForCausalLM.from_pretrained(tmp_path), weights)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_become_stacks(format: str, tmp_path: Path, without_importers: Any) -> None:
    weights = save_foreign(tmp_path / "foreign", tiny_experts(), format, 32, False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, Int4OpaqueTensor)
    stem = "model.layers.0.mlp.experts"
    for e in range(4):
        gate, up = (weights[f"{stem}.{e}.{half}_proj.weight"].codes for half in ("gate", "up"))
        assert torch.equal(experts.gate_up_proj[e].to_groupwise().codes, torch.cat([gate, up]))
        down = weights[f"{stem}.{e}.down_proj.weight"].codes
        assert torch.equal(experts.down_proj[e].to_groupwise().codes, down)
    model.save_pretrained(tmp_path / "ours")
    without_importers()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(tmp_path: Path) -> None:
    save_foreign(tmp_path, tiny_llama(), "gptq", 32, True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    compiled = torch.compile(model, fullgraph=True)
    assert float((logits(compiled) - logits(model)).abs().max()) <= 4e-3 * float(
        logits(model).abs().max()
    )


# --- where it is not ----------------------------------------------------------------------------


def test_everything_is_as_before_if_asked(tmp_path: Path, without_importers: Any) -> None:
    save_foreign(tmp_path, tiny_llama(), "gptq", 32, True)
    without_importers()
    with pytest.raises(ImportError, match=r"gptq|optimum"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("device_map", "accelerator", "ours"),
    [
        (None, False, True),
        ("auto", False, True),
        ("cpu", True, True),
        ({"": "cpu"}, True, True),
        (None, True, False),
        ("auto", True, False),
        ({"": torch.device("cuda")}, True, False),
        ({"": "disk"}, False, False),
    ],
)
def test_only_for_the_cpu(
    device_map: Any, accelerator: bool, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPTQConfig
    from transformers.quantizers.auto import get_hf_quantizer

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(AUTO_QUANTIZER_MAPPING["gptq"], "theirs", Theirs)
    config = LlamaConfig(quantization_config=GPTQConfig(bits=4).to_dict())
    found, *_ = get_hf_quantizer(config, None, device_map, True, {})
    assert isinstance(found, Theirs) is not ours


class Theirs:
    """In the place of transformers' own quantizer."""

    def __init__(self, config: Any, pre_quantized: bool) -> None:
        self.quantization_config = config

    def validate_environment(self, **others: Any) -> None:
        pass

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        return config


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("gptq", {"bits": 8}, "weights of 8 bits; only those of 4"),
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin'; 'gptq' and",
        ),
        ("awq", {"version": "gemv"}, "version 'gemv'; only 'gemm'"),
        ("compressed-tensors", {"format": "float-quantized"}, "format 'float-quantized'"),
        ("compressed-tensors", {"config_groups": None}, "config_groups .* is a NoneType"),
        (
            "compressed-tensors",
            {"config_groups": {"a": {"weights": {"num_bits": 8}}}},
            "weights of 8 bits",
        ),
        (
            "compressed-tensors",
            {
                "config_groups": {
                    "a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}
                }
            },
            "rounds activations",
        ),
    ],
)
def test_what_the_config_says_is_refused_at_once(
    format: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_foreign(tmp_path, tiny_llama(), format)
    change_config(tmp_path, **changes)
    monkeypatch.setattr(transformers_imports, "PACKAGES", dict.fromkeys(PACKAGES, "not_installed"))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_other_bits_are_left_to_a_package_that_reads_them(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, get_hf_quantizer

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if it were there
    monkeypatch.setattr(AUTO_QUANTIZER_MAPPING[method], "theirs", Theirs)
    if method == "compressed-tensors":
        monkeypatch.setattr(AUTO_QUANTIZATION_CONFIG_MAPPING[method], "theirs", TheirConfig)
    config = {"quant_method": method, "bits": 8, "format": "float-quantized", "config_groups": {}}
    found, *_ = get_hf_quantizer(LlamaConfig(quantization_config=config), None, None, True, {})
    assert isinstance(found, Theirs)


class TheirConfig:
    """In the place of compressed-tensors' config."""

    quant_method = "compressed-tensors"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TheirConfig:
        return cls()


def test_a_damaged_file_is_no_model(tmp_path: Path) -> None:
    """transformers names each weight that could not be made, and why."""
    save_foreign(tmp_path, tiny_llama(), "gptq")
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.qzeros"
    state[name] = state[name][:, :1].contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_inspect_promises_nothing_of_other_bits(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_foreign(tmp_path, tiny_llama(), format)
    change_config(tmp_path, bits=8, config_groups={"a": {"weights": {"num_bits": 8}}})
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "from_pretrained" not in capsys.readouterr().out


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("format", [*FORMATS, "mlx"])
def test_inspect_says_what_becomes_4_bit(
    format: str, symmetric: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_foreign(tmp_path, tiny_llama(), format, 32, symmetric)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    name = {"gptq_v2": "gptq", "mlx": "MLX"}.get(format, format)
    assert f"format         {name}, read by the command convert" in printed
    assert ("and by transformers' from_pretrained" in printed) == (format != "mlx")
    assert "4-bit weights  14, once it is converted or loaded\nother tensors  7 dense\n" in printed
    exact = symmetric and format in ("gptq", "gptq_v2", "compressed-tensors")
    assert ("lost           nothing: codes" in printed) == exact
    assert ("lost           zeros are rounded to float16, which moves weights" in printed) != exact


def test_inspect_says_that_keys_and_values_are_not_rounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_foreign(tmp_path, tiny_llama(), "compressed-tensors", 32, True)
    change_config(tmp_path, kv_cache_scheme={"num_bits": 8})
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "lost           kv_cache_scheme: keys and values" in capsys.readouterr().out
