"""What of a checkpoint of another tool becomes 4-bit weights here, and what is lost, by its headers."""

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

#: Codes are never changed. A zero is a product of scale and zero point there and one float16 number
#: here. What that moves was measured on normal numbers (1e-4, also in tests/test_foreign_weights.py),
#: normal numbers around another mean (Q4_1; those of SmolLM2 move by 1.6e-5 at most) and Gemma 3 270M
#: (Q4_K).
_ZEROS_ROUNDED = "zeros are rounded to float16, which moves weights by {} in the mean"


class Survey(NamedTuple):
    """Of a checkpoint.

    Attributes:
        format: as its tool calls it.
        read: the number of weights that become 4-bit ones.
        others: the number of other tensors, by what they are.
        lost: what the result has not of the source, a line each; empty if it is exactly the same.
    """

    format: str
    read: int
    others: dict[str, int]
    lost: list[str]


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
    return Survey(method, len(modules), {"dense": len(rest)}, _lost(method, config))


def _lost(method: str, config: Mapping[str, Any]) -> list[str]:
    """Of a directory, as its config says."""
    groups = config.get("config_groups")
    weights = [group["weights"] for group in groups.values()] if isinstance(groups, Mapping) else []
    symmetric = {
        "gptq": config.get("sym") is True,
        "awq": config.get("zero_point") is False,
        "compressed-tensors": all(each.get("symmetric", True) for each in weights),
    }
    lost = [] if symmetric.get(method) else [_ZEROS_ROUNDED.format("1e-4")]
    if config.get("kv_cache_scheme") is not None:
        lost.append("kv_cache_scheme: keys and values are cached as the model computes them")
    return lost


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
    try:
        tensors = reader(file).tensors
    except Exception as error:  # of any class, as the file is damaged in any way
        raise ValueError(f"{str(file)!r} is no whole GGUF file ({error}); fetch it again") from error
    read: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for tensor in tensors:
        kind = tensor.tensor_type.name
        four = kind in KINDS and len(tensor.shape) == 2 and not tensor.name.startswith("token_embd")
        (read if four else others)[kind] += 1
    moved = {"Q4_1": "5e-5", "Q4_K": "2.4e-4"}
    lost = [f"{kind}: {_ZEROS_ROUNDED.format(moved[kind])}" for kind in sorted(read) if kind in moved]
    return Survey("GGUF", read.total(), dict(sorted(others.items())), lost)


def survey_of_onnx(file: Path) -> Survey:
    """Of an ONNX file, whose external data are not read.

    Raises:
        MissingExtra: onnx is not installed.
        ValueError: it is no ONNX file.
    """
    onnx = import_extra("onnx", "onnx")
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError and others
        raise ValueError(f"{str(file)!r} cannot be read as ONNX ({error}); fetch it again") from error
    read = 0
    used: set[str] = set()
    lost: list[str] = []
    for node in graph.node:
        if node.op_type != "MatMulNBits" or node.domain != "com.microsoft":
            continue
        bits = {each.name: each.i for each in node.attribute}.get("bits", 4)
        if bits != 4:
            raise ValueError(
                f"{str(file)!r} has a MatMulNBits of {bits} bits; only those of 4 are read, so "
                "quantize the original model in 4 bits"
            )
        read += 1
        used.update(node.input)
        if len(node.input) > 3 and node.input[3] and not lost:
            lost.append(_ZEROS_ROUNDED.format("1e-4"))
    left_out = sum(each.name not in used for each in graph.initializer)
    if left_out:
        lost.append("the graph and its dense tensors: the result is a file of weights by name")
    return Survey("ONNX", read, {"dense": left_out} if left_out else {}, lost)
