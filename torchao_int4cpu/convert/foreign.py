"""Directories of other tools (GPTQ, AWQ, compressed-tensors, MLX) to ours, weight by weight.

The result loads as any 4-bit directory of this package does, and is the model that `from_pretrained`
makes of the source. Codes are exact. Nothing here prints.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchao_int4cpu.checkpoint.safetensors import TYPE_NAME, Source, read_header
from torchao_int4cpu.convert.directory import copy_other_files, read
from torchao_int4cpu.convert.names import Names, Stacks
from torchao_int4cpu.convert.plan import MERGED, NOT_IN_MODEL, dtype_of_model, empty_model, set_dtype
from torchao_int4cpu.convert.shards import Item, Progress, Report, settings_of, write_directory
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.importers.mlx import groupwise_of_mlx
from torchao_int4cpu.importers.weight import as_weight, common_order
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: Why a tensor of such a checkpoint stays dense.
DENSE = "dense in the file"

#: The parts of a weight by their names in the file, and its K: to the value.
_Read = Callable[[dict[str, Tensor], int], GroupwiseInt4]


class _Format(NamedTuple):
    """How a directory has its weights: the names of their parts, of the codes first, and what reads."""

    name: str
    parts: tuple[str, ...]
    read: _Read


def convert_directory(
    folder: Path, out: Path, progress: Progress, dtype: torch.dtype | None = None
) -> Report:
    """Write a directory of another tool as one of ours.

    Args:
        folder: with ``config.json`` and safetensors files, of GPTQ, AWQ, compressed-tensors or MLX.
        out: the directory to make, see `write_directory`.
        progress: told of each tensor.
        dtype: of the model; None for what its config says.

    Raises:
        MissingExtra: transformers or safetensors is not installed.
        ValueError: it is no such directory, is not in 4 bits, or is damaged.
    """
    transformers = import_extra("transformers", "hf")
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(
            f"{str(folder)!r} is not a Hugging Face directory with a config.json and *.safetensors "
            "files; give one of GPTQ, AWQ, compressed-tensors or MLX, or a .gguf or .onnx file"
        )
    model_config = transformers.AutoConfig.from_pretrained(folder)
    format = _format_of(folder, model_config)
    for name in ("quantization_config", "quantization"):
        if hasattr(model_config, name):
            delattr(model_config, name)
    sources = [source for file in files for source in read_header(file)]
    dtype = dtype or dtype_of_model(model_config, sources)
    set_dtype(model_config, dtype)
    model = empty_model(transformers, model_config, dtype)
    items = list(_items(model, format, sources, dtype))
    if all(item.kept for item in items):
        raise ValueError(
            f"{str(folder)!r} has no 4-bit weight of {format.name}, although its config.json says so; "
            "fetch its files again"
        )

    def finish(made: Path, entries: dict[str, Any]) -> None:
        write_config(model, model_config, entries, made)
        copy_other_files(folder, made)
        (made / "quantize_config.json").unlink(missing_ok=True)  # of GPTQ, which it is no more

    settings = settings_of(files, format=format.name, dtype=dtype)
    largest = max(source.nbytes for source in sources)
    return write_directory(items, out, settings, finish, progress, largest=largest)


def _format_of(folder: Path, model_config: Any) -> _Format:
    """As config.json says.

    Raises:
        ValueError: it says nothing, or of a format, bits or a model that are not read.
    """
    config = json.loads((folder / "config.json").read_text())
    said = config.get("quantization_config") or config.get("quantization")
    if not isinstance(said, dict):
        raise ValueError(
            f"{str(folder)!r} is not quantized, its config.json says; make it 4-bit with the command "
            "quantize"
        )
    from torchao_int4cpu.integrations.transformers_quantizers import QUANTIZERS

    method = said.get("quant_method")
    if method is None and {"bits", "group_size"} <= said.keys():
        if said["bits"] != 4 or said.get("mode", "affine") != "affine":
            raise ValueError(
                f"the MLX checkpoint has {said['bits']} bits, mode {said.get('mode', 'affine')!r}; "
                "only 'affine' in 4 bits is read, so quantize the original model so"
            )
        reader = functools.partial(_read_mlx, said["group_size"])
        return _Format("MLX", ("weight", "scales", "biases"), reader)
    if method not in QUANTIZERS:
        known = ", ".join([*QUANTIZERS, "MLX"])
        raise ValueError(
            f"{str(folder)!r} is quantized by {method!r}; these are converted: {known}, and .gguf and "
            ".onnx files"
        )
    quantizer = QUANTIZERS[method](_config_of(method, said), pre_quantized=True)
    quantizer.check_config()
    quantizer.check_model(model_config)
    return _Format(method, quantizer.names, quantizer.read)


def _config_of(method: str, said: dict[str, Any]) -> Any:
    """As transformers has it, but for compressed-tensors, whose config needs its package."""
    from transformers.utils.quantization_config import AwqConfig, GPTQConfig

    from torchao_int4cpu.integrations.transformers_quantizers import CompressedTensorsConfig

    classes = {"gptq": GPTQConfig, "awq": AwqConfig, "compressed-tensors": CompressedTensorsConfig}
    return classes[method].from_dict(said)


def _read_mlx(group_size: int, parts: dict[str, Tensor], k: int) -> GroupwiseInt4:
    return groupwise_of_mlx(**parts, k=k, group_size=group_size)


def _items(model: Any, format: _Format, sources: list[Source], dtype: torch.dtype) -> Iterator[Item]:
    names = Names(model, None, dtype)
    weights: dict[str, dict[str, Source]] = {}
    for source in sources:
        stem, _, last = source.key.rpartition(".")
        if last in format.parts:
            weights.setdefault(stem, {})[last] = source
    needed = {format.parts[0], format.parts[1]}  # a dense weight has one name in common with MLX
    weights = {stem: parts for stem, parts in weights.items() if needed <= parts.keys()}
    stacks: Stacks[dict[str, Source]] = Stacks(names)
    written: dict[str, str] = {}
    for source in sources:
        stem, _, last = source.key.rpartition(".")
        parts = weights.get(stem, {})
        if parts.get(last) is not source:
            yield _dense_item(names, source)
        elif last == format.parts[0]:
            key = f"{stem}.weight"
            name, pattern = names.find(key)
            if pattern is None:
                item = _int4_item(model, names.held, format, key, name, parts, dtype)
                yield item._replace(key=names.written(name, key))
            else:
                written[name] = names.written(name, key, pattern)
                stacks.add(name, pattern, key, parts)
    for name in stacks:
        item = _stack_item(format, name, stacks.of(name), names.held[name].shape, dtype)
        yield item._replace(key=written[name])


def _dense_item(names: Names, source: Source) -> Item:
    name, converter = names.find(source.key)
    if converter is not None:
        name, dtype, why = source.key, source.dtype, MERGED
    elif name not in names.held:
        name, dtype, why = source.key, source.dtype, NOT_IN_MODEL
    else:
        dtype, why = names.dtype_of(name), DENSE

    def make() -> tuple[Tensor, float]:
        return read(source).to(dtype), math.inf

    size = math.prod(source.shape) * dtype.itemsize
    return Item(name, source.nbytes, size, why, make, names.written(name, source.key))


def _int4_item(
    model: Any,
    held: dict[str, Tensor],
    format: _Format,
    key: str,
    name: str,
    parts: dict[str, Source],
    dtype: torch.dtype,
) -> Item:
    module = model.get_submodule(name.rpartition(".")[0]) if name in held else None
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise ValueError(
            f"{key} is 4-bit, and in {type(model).__name__} there is no linear layer or embedding of "
            "that name; config.json and the weights are of two models"
        )
    shape = held[name].shape

    def make() -> tuple[Tensor, float]:
        try:
            groupwise = _groupwise(format, parts, shape[-1])
            if groupwise.shape != shape:
                raise ValueError(
                    f"the file has shape {list(groupwise.shape)} where the model has {list(shape)}; "
                    "config.json and the weights are of two models"
                )
            return as_weight(groupwise, dtype), math.inf
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from error

    size = sum(source.nbytes for source in parts.values())
    return Item(name, size, size, "", make)


def _groupwise(format: _Format, parts: dict[str, Source], k: int) -> GroupwiseInt4:
    return format.read({part: read(source) for part, source in parts.items()}, k)


def _stack_item(
    format: _Format,
    name: str,
    experts: list[list[dict[str, Source]]],
    shape: torch.Size,
    dtype: torch.dtype,
) -> Item:
    """The experts of a layer as transformers has them: ``[E, N, K]``, a gate and its up joined."""

    def make() -> tuple[Tensor, float]:
        try:
            matrices = [
                _combined([_groupwise(format, part, shape[-1]) for part in parts], torch.cat)
                for parts in experts
            ]
            stack = _combined(matrices, torch.stack)
            if stack.shape != shape:
                raise ValueError(
                    f"the file has shape {list(stack.shape)} where the model has {list(shape)}; "
                    "config.json and the weights are of two models"
                )
            return as_weight(stack, dtype), math.inf
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error

    size = sum(source.nbytes for parts in experts for part in parts for source in part.values())
    return Item(name, size, size, "", make)


def _combined(
    matrices: list[GroupwiseInt4], combine: Callable[[list[Tensor]], Tensor]
) -> GroupwiseInt4:
    """Experts, or parts of one, as one value.

    Raises:
        ValueError: their columns are in two orders.
    """
    order = common_order([matrix.act_order for matrix in matrices])
    codes, scale, zero = (
        combine([getattr(matrix, part) for matrix in matrices]) for part in ("codes", "scale", "zero")
    )
    return GroupwiseInt4(codes, scale, zero, matrices[0].group_size, order)


def write_config(model: Any, model_config: Any, entries: dict[str, Any], folder: Path) -> None:
    """``config.json`` of a model with the 4-bit weights that the metadata names."""
    from torchao_int4cpu.integrations.transformers_saving import config_of

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, entry in entries.items():
        if entry["_type"] == TYPE_NAME and name in parameters:
            data = entry["_data"]
            module, _, parameter = name.rpartition(".")
            dtype = getattr(torch, data["dtype"]["_data"])
            empty = Int4OpaqueTensor.empty(data["shape"], data["block_size"][-1], dtype, device="meta")
            setattr(model.get_submodule(module), parameter, nn.Parameter(empty, requires_grad=False))
    model_config.quantization_config = config_of(model)
    model_config.save_pretrained(folder)
