"""What vLLM's layers are by the config of a checkpoint, and what the files that we write say to it."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.hugging_face_models import llama
from tests.numerics import random_groupwise
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig, register
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.checkpoint.safetensors import read_header
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.integrations import vllm as patch
from torchao_int4cpu.integrations import vllm_configs
from torchao_int4cpu.integrations.transformers_saving import config_of, dense_matrices
from torchao_int4cpu.quantize.run import uninitialized_weights

G32, G64 = Int4WeightOnlyConfig(group_size=32), Int4WeightOnlyConfig(group_size=64)
JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.1.self_attn"


class TorchAOConfig:
    """vLLM's class, as far as it is asked; the module that it is in has ``should_skip``."""

    packed_modules_mapping = JOINED

    def __init__(
        self, torchao_config: Any, skip: list[str] | None = None, serialized: bool = True
    ) -> None:
        self.torchao_config = torchao_config
        self.skip_modules = skip or []
        self.is_checkpoint_torchao_serialized = serialized

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TorchAOConfig:
        return cls(config["type"], config.get("modules_to_not_convert"))

    def get_quant_method(self, layer: Any, prefix: str) -> str:
        return f"vLLM's own for {prefix}"


def should_skip(prefix: str, skip_modules: list[str]) -> bool:
    return any(prefix == each or f".{each}." in f".{prefix}." for each in skip_modules)


@pytest.mark.parametrize(
    "config",
    [
        FqnToConfig({r"re:model\.layers\.\d+\.self_attn\.[qkv]_proj\.weight": G32}),
        FqnToConfig({f"{ATTENTION}.{name}.weight": G32 for name in JOINED["qkv_proj"]}),
        FqnToConfig({f"{ATTENTION}.{name}": G32 for name in JOINED["qkv_proj"]}),
        FqnToConfig({"_default": G32}),
        G32,
    ],
)
def test_joined_layers_are_known_by_their_parts(config: Any) -> None:
    found = vllm_configs.of_linear(TorchAOConfig(config), f"{ATTENTION}.qkv_proj")
    assert found is not None
    assert found.group_size == 32


def test_whole_names_go_before_patterns_and_parameters_before_modules() -> None:
    named: dict[str, Any] = {"re:.*": G64, "a.b": None, "a.b.weight": G32, "c": None}
    config = TorchAOConfig(FqnToConfig(named))
    assert vllm_configs.of_linear(config, "a.b") is G32
    assert vllm_configs.of_linear(config, "c") is None
    assert vllm_configs.of_linear(config, "d") is G64
    assert vllm_configs.of_linear(TorchAOConfig(config.torchao_config, ["d"]), "d") is None


def test_joined_layers_have_the_smallest_group_size_of_their_parts() -> None:
    named = {f"{ATTENTION}.q_proj.weight": G64, f"{ATTENTION}.k_proj.weight": G32}
    config = TorchAOConfig(FqnToConfig(named | {f"{ATTENTION}.v_proj.weight": G64}))
    assert vllm_configs.of_linear(config, f"{ATTENTION}.qkv_proj") is G32


@pytest.mark.parametrize(
    "config",
    [
        TorchAOConfig(G32, [f"{ATTENTION}.q_proj"]),
        TorchAOConfig(FqnToConfig({rf"re:{ATTENTION}\.[kv]_proj\.weight": G32})),
        TorchAOConfig(FqnToConfig({f"{ATTENTION}.q_proj": Int8WeightOnlyConfig(), "_default": G32})),
    ],
)
def test_parts_that_are_not_4_bit_are_refused(config: Any) -> None:
    message = (
        "vLLM joins q_proj, k_proj, v_proj of model.layers.1.self_attn into one weight, and in this "
        "checkpoint q_proj is not 4-bit as the others are; quantize the model again, with a --skip"
    )
    with pytest.raises(ValueError, match=message):
        vllm_configs.of_linear(config, f"{ATTENTION}.qkv_proj")
    skipped = TorchAOConfig(G32, [f"{ATTENTION}.{name}" for name in JOINED["qkv_proj"]])
    assert vllm_configs.of_linear(skipped, f"{ATTENTION}.qkv_proj") is None


def test_embeddings_and_heads() -> None:
    by_name = FqnToConfig({"model.embed_tokens.weight": G64, "lm_head.weight": G32})
    config = TorchAOConfig(by_name)
    assert vllm_configs.of_vocabulary(config, "lm_head", True) is G32
    assert vllm_configs.of_vocabulary(config, "model.embed_tokens", False) is G64
    assert vllm_configs.of_vocabulary(config, "", False) is G64  # as Llama's is called
    assert vllm_configs.of_vocabulary(TorchAOConfig(by_name, serialized=False), "lm_head", True) is None
    assert vllm_configs.of_vocabulary(TorchAOConfig(G32), "lm_head", True) is None


def test_experts() -> None:
    experts = "model.layers.0.mlp.experts"
    both = {f"{experts}.gate_up_proj": G32, f"{experts}.down_proj": G64}
    assert vllm_configs.of_experts(TorchAOConfig(FqnToConfig(both)), experts) is G32
    assert vllm_configs.of_experts(TorchAOConfig(G32), experts) is None  # linear layers alone
    mixtral = "model.layers.0.block_sparse_moe"
    assert vllm_configs.of_experts(TorchAOConfig(FqnToConfig(both)), f"{mixtral}.experts") is G32
    named = TorchAOConfig(G32, ["model.layers.0.mlp.gate"])
    assert vllm_configs.of_linear(named, f"{mixtral}.gate") is None
    del both[f"{experts}.down_proj"]
    with pytest.raises(ValueError, match="has one of gate_up_proj and down_proj in 4 bits"):
        vllm_configs.of_experts(TorchAOConfig(FqnToConfig(both)), experts)


def test_the_plugin_patches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType(patch.MODULE)
    module.TorchAOConfig = type("TorchAOConfig", (TorchAOConfig,), {})
    monkeypatch.setitem(sys.modules, patch.MODULE, module)
    register()
    patch._patch(module)
    once = module.TorchAOConfig.get_quant_method
    patch._patch(module)
    assert module.TorchAOConfig.get_quant_method is once
    others = module.TorchAOConfig(Int8WeightOnlyConfig())
    assert others.get_quant_method(None, "a.b") == "vLLM's own for a.b"
    for skip, head in ((None, False), ([], True), (["a"], True)):
        made = module.TorchAOConfig.from_config({"type": G32, "modules_to_not_convert": skip})
        assert made.has_quantized_head is head
    ends = {"type": G32, "include_input_output_embeddings": True}
    assert module.TorchAOConfig.from_config(ends).has_quantized_head


# --- what files say -----------------------------------------------------------------------------


def experts() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    counts = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=96, **sizes, **heads, **counts))


def test_routers_are_named_where_they_stay_dense(tmp_path: Path) -> None:
    """By save_pretrained and by the command; vLLM has them in linear layers."""

    routers = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    experts().save_pretrained(tmp_path)
    planned = make_plan(tmp_path, G32).model_config.quantization_config
    assert planned.modules_to_not_convert == ["lm_head", *routers]
    model = experts()
    quantize_(model, G32)
    assert config_of(model).modules_to_not_convert == routers
    assert dense_matrices(model, {"lm_head.weight", "model.layers.0.mlp.gate_proj.weight"}) >= {
        "model.layers.1.mlp.gate"
    }
    assert "model.layers.0.mlp.gate" not in dense_matrices(
        model, {"model.layers.0.mlp.gate_proj.weight"}
    )
    llama().save_pretrained(tmp_path / "llama")
    plain = make_plan(tmp_path / "llama", G32).model_config.quantization_config
    assert plain.modules_to_not_convert is None


def test_every_tensor_of_a_file_is_in_its_metadata(tmp_path: Path) -> None:
    """transformers writes dense experts one by one; vLLM takes what is named, and nothing else."""
    import json

    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    model = experts()
    quantize_(model, G32)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert len(tensors) == len(read_header(file))
    names = json.loads(metadata["tensor_names"])
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names
    assert len(names) == len(set(names))
    loaded, left = unflatten_tensor_state_dict(tensors, metadata)
    assert left == {}
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in loaded
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        other = again.get_parameter(name)
        assert type(other) is type(parameter), name
        assert torch.equal(other, parameter), name


def test_the_command_says_what_vllm_will_not_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama().save_pretrained(tmp_path / "source")
    command = ["quantize", str(tmp_path / "source"), "--group-size", "32"]
    assert cli.main([*command, str(tmp_path / "a"), "--skip", "k_proj"]) == 0
    printed = capsys.readouterr().out
    assert "k_proj is dense and its neighbours q_proj, v_proj are not (and so for 2 in all)" in printed
    skip = [word for name in JOINED["qkv_proj"] for word in ("--skip", name)]
    assert cli.main([*command, str(tmp_path / "b"), *skip]) == 0
    assert "vLLM" not in capsys.readouterr().out


# --- joined weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [256, 200, 96])
def test_larger_groups_are_copied_into_what_was_allocated(k: int) -> None:
    """The same numbers, bit for bit; into other weights they are not."""
    value = random_groupwise(24, k, 128)
    weight = Int4OpaqueTensor.from_groupwise(value, dtype=torch.bfloat16)
    smaller = value.in_groups_of(32)
    assert torch.equal(smaller.dequantize(), value.dequantize())
    assert list(smaller.scale.shape) == [24, -(-k // 32)]
    with uninitialized_weights():
        model: Any = torch.nn.Sequential(torch.nn.Linear(k, 48, bias=False).bfloat16())

        quantize_(model, G32)
    model[0].weight.data.narrow(0, 24, 24).copy_(weight)
    found = model[0].weight.dequantize()
    assert torch.equal(found[24:], weight.dequantize())
    assert not bool(found[:24].any())
    other = Int4OpaqueTensor.from_groupwise(random_groupwise(24, k, 32), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"copy_ got block_size \[1, 128\]"):
        other.copy_(weight)


def test_groups_that_do_not_fit_are_refused() -> None:
    value: GroupwiseInt4 = random_groupwise(4, 64, 32)
    with pytest.raises(ValueError, match="group_size=64 does not divide 32, so a group would have"):
        value.in_groups_of(64)
