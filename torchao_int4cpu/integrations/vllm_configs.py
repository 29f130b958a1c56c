"""Which weights of a checkpoint are 4-bit, asked of vLLM's ``TorchAOConfig`` by vLLM's names of layers.

vLLM joins layers (q, k and v; gate and up) into one weight, and names layers and not parameters.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from torchao.quantization import FqnToConfig

from torchao_int4cpu.quantize.run import makes_ours

#: Layers that vLLM joins in most of its models; a model's own are in ``packed_modules_mapping``.
USUALLY_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))

#: What transformers 5 calls otherwise than the files of its models and vLLM do: Mixtral's experts.
OTHER_NAMES = ((".block_sparse_moe.", ".mlp."),)

#: vLLM's Llama does not say what its embedding is called.
UNNAMED_EMBEDDING = "model.embed_tokens"


def is_ours(config: Any) -> bool:
    """Whether it has 4-bit weights of this package."""
    torchaos = config.torchao_config
    found = torchaos.fqn_to_config.values() if isinstance(torchaos, FqnToConfig) else [torchaos]
    return any(each is not None and makes_ours(each) for each in found)


def of_parameter(config: Any, name: str, parameter: str = "weight") -> Any:
    """torchao's config of a parameter, by the checkpoint's name of its module; None if it is dense.

    A config by name is read as transformers reads it: a parameter's name before its module's, whole
    names before patterns.
    """
    modules = [name, *(name.replace(vllms, ours) for vllms, ours in OTHER_NAMES if vllms in name)]
    should_skip = sys.modules[type(config).__module__].should_skip
    if any(should_skip(module, config.skip_modules) for module in modules):
        return None
    torchaos = config.torchao_config
    if not isinstance(torchaos, FqnToConfig):
        return torchaos
    by_name = torchaos.fqn_to_config
    names = [each for module in modules for each in (f"{module}.{parameter}", module)]
    for each in names:
        if each in by_name:
            return by_name[each]
    for pattern, found in by_name.items():
        if pattern.startswith("re:") and any(re.fullmatch(pattern[3:], each) for each in names):
            return found
    return by_name.get("_default")


def of_linear(config: Any, prefix: str) -> Any:
    """torchao's config of a linear layer of vLLM, which may be several layers in the checkpoint.

    Of several group sizes it is the smallest: weights of larger groups are copied into it as they are.

    Raises:
        ValueError: the checkpoint has some of them in 4 bits and others not.
    """
    module, dot, last = prefix.rpartition(".")
    parts = config.packed_modules_mapping.get(last, [last])
    found = [of_parameter(config, f"{module}{dot}{part}") for part in parts]
    four_bit = [each for each in found if each is not None and makes_ours(each)]
    if not four_bit:
        return found[0]
    if len(four_bit) < len(parts):
        dense = [part for part, each in zip(parts, found) if each not in four_bit]
        raise ValueError(
            f"vLLM joins {', '.join(parts)} of {module} into one weight, and in this checkpoint "
            f"{', '.join(dense)} is not 4-bit as the others are; quantize the model again, with a "
            "--skip that keeps all of them or none"
        )
    return min(four_bit, key=lambda each: int(each.group_size))


def torn(four_bit: Iterable[str], dense: Iterable[str]) -> str:
    """What vLLM could not load, if these modules are 4-bit and those are not; empty if it could all."""
    names = set(four_bit)
    found = {}
    for name in dense:
        module, _, last = name.rpartition(".")
        for joined in USUALLY_JOINED:
            others = [each for each in joined if each != last and f"{module}.{each}" in names]
            if last in joined and others:
                found[name] = others
    if not found:
        return ""
    name, others = next(iter(found.items()))
    return (
        f"{name} is dense and its neighbours {', '.join(others)} are not (and so for {len(found)} in "
        "all): vLLM joins them and will not load this model; --skip all of them to serve it there"
    )


def of_vocabulary(config: Any, prefix: str, is_head: bool) -> Any:
    """torchao's config of an input embedding or a head, if the checkpoint has it in 4 bits.

    As transformers quantizes them: a config for all is one for linear layers, and the head is among
    them if the checkpoint says so, or says which are not.
    """
    if not config.is_checkpoint_torchao_serialized:
        return None  # vLLM itself quantizes linear layers alone
    by_name = isinstance(config.torchao_config, FqnToConfig)
    if not by_name and not (is_head and getattr(config, "has_quantized_head", False)):
        return None
    found = of_parameter(config, prefix or UNNAMED_EMBEDDING)
    return found if found is not None and makes_ours(found) else None


def of_experts(config: Any, prefix: str) -> Any:
    """torchao's config of the experts of a layer, if they are 4-bit stacks.

    Raises:
        ValueError: only some of their weights are.
    """
    if not isinstance(config.torchao_config, FqnToConfig):
        return None
    found = [of_parameter(config, prefix, name) for name in ("gate_up_proj", "down_proj")]
    four_bit = [each for each in found if each is not None and makes_ours(each)]
    if four_bit and len(four_bit) < 2:
        raise ValueError(
            f"{prefix} has one of gate_up_proj and down_proj in 4 bits; vLLM runs both in one way, so "
            "quantize both or none"
        )
    return min(four_bit, key=lambda each: int(each.group_size)) if four_bit else None
