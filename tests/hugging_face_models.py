"""Small Hugging Face models: how to make, quantize, save and compare them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchao.quantization import FqnToConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TorchAoConfig,
)

from tests.processes import run_child
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig

IDS = torch.arange(24).view(2, 12)
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 120}
    options: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(**(sizes | options | changes))


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(llama_config(**changes))


#: Small models of several families; each has something that a 4-bit weight might stumble over.
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    # K = 72 and 104 are no multiples of a group; embedding and head are one parameter
    "qwen3-tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SIZES, hidden_size=72, intermediate_size=104, vocab_size=120, tie_word_embeddings=True
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, hidden_size=64, intermediate_size=96, vocab_size=130)
    ),
    # GPT-2's vocabulary: the head's 50257 rows are no multiple of 16
    "llama-50257": lambda: llama(vocab_size=50257),
}


def written(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


def quantized(folder: Path, config: Any = None, **options: Any) -> Any:
    config = config or Int4WeightOnlyConfig(group_size=32)
    arguments = {"include_input_output_embeddings", "modules_to_not_convert"} & set(options)
    torchao = TorchAoConfig(config, **{name: options.pop(name) for name in arguments})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao, **options)


def int4_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, Int4OpaqueTensor)}


def linear_names(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def int4_items(model: nn.Module) -> list[tuple[str, Int4OpaqueTensor]]:
    return [(n, p) for n, p in model.named_parameters() if isinstance(p, Int4OpaqueTensor)]


def keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def embeddings_too(group_size: int = 32) -> dict[str, Any]:
    """As the README has it."""
    config = Int4WeightOnlyConfig(group_size=group_size)
    by_name = FqnToConfig({r"re:.*(embed_tokens|lm_head|_proj)\.weight": config})
    return {"config": by_name, "include_input_output_embeddings": True}


EMBEDDING = "model.embed_tokens.weight"

TIED: dict[str, Callable[[], Any]] = {
    "qwen3": MODELS["qwen3-tied"],
    "gemma3": MODELS["gemma3"],
    "llama": lambda: llama(tie_word_embeddings=True),
}


def assert_equal_in_a_fresh_process(expected: dict[str, tuple[Tensor, int]]) -> None:
    """Check logits and the number of 4-bit weights of each folder."""
    done = run_child("saved_logits", *expected)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (y, count) in expected.items():
        assert torch.isfinite(y).all()
        back, found = torch.load(f"{folder}.logits.pt")
        assert torch.equal(back, y), folder
        assert found == count
