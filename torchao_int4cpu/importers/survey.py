"""What of a checkpoint of another tool becomes 4-bit weights here, by its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.importers.gguf import KINDS

#: By ``quant_method``: how the key of the codes of a weight ends; of MLX, whose codes are ``.weight``
#: as dense ones are, that of another part.
_CODES = {
    "gptq": ".qweight",
    "awq": ".qweight",
    "compressed-tensors": ".weight_packed",
    "MLX": ".biases",
}


class Survey(NamedTuple):
    """Of a checkpoint.

    Attributes:
        format: as its tool calls it.
        read: the number of weights that become 4-bit ones.
        others: the number of other tensors, by what they are.
    """

    format: str
    read: int
    others: dict[str, int]


def survey_of_directory(config: Mapping[str, Any] | None, keys: Sequence[str]) -> Survey | None:
    """Of a Hugging Face directory; None if no tool wrote it that is read here.

    Args:
        config: the ``quantization_config`` of its config.json.
        keys: of all its tensors.
    """
    if config is None:
        return None
    method = config.get("quant_method")
    if method is None and {"bits", "group_size"} <= config.keys():
        method = "MLX"
    if method not in _CODES or _bits(config) != {4}:
        return None
    modules = {key.removesuffix(_CODES[method]) for key in keys if key.endswith(_CODES[method])}
    rest = [key for key in keys if key.rpartition(".")[0] not in modules or key.endswith(".bias")]
    return Survey(method, len(modules), {"dense": len(rest)})


def _bits(config: Mapping[str, Any]) -> set[object]:
    """Of all weights, as far as the config says it."""
    if config.get("quant_method") != "compressed-tensors":
        return {config.get("bits")}
    groups = config.get("config_groups")
    if config.get("format") != "pack-quantized" or not isinstance(groups, Mapping):
        return set()
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    return {each.get("num_bits") if isinstance(each, Mapping) else None for each in weights}


def survey_of_gguf(file: Path) -> Survey:
    """Of a GGUF file. Embeddings in 4 bits are dense when it is loaded.

    Raises:
        MissingExtra: gguf is not installed.
        ValueError: it is no GGUF file.
    """
    reader = import_extra("gguf", "gguf").GGUFReader
    kinds: Counter[str] = Counter()
    read = 0
    try:
        tensors = reader(file).tensors
    except Exception as error:  # of any class, as the file is damaged in any way
        raise ValueError(f"{str(file)!r} is no whole GGUF file ({error}); fetch it again") from error
    for tensor in tensors:
        kind = tensor.tensor_type.name
        if kind in KINDS and len(tensor.shape) == 2 and not tensor.name.startswith("token_embd"):
            read += 1
        else:
            kinds[kind] += 1
    return Survey("GGUF", read, dict(sorted(kinds.items())))
