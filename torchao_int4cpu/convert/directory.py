"""Quantize a Hugging Face directory into another, with one shard in memory at a time, not the model."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.checkpoint.safetensors import Source
from torchao_int4cpu.convert.plan import Plan, Planned
from torchao_int4cpu.convert.shards import Item, Progress, Report, settings_of, write_directory
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.format.packed import packed_bytes
from torchao_int4cpu.format.packing import pack_into, unpacked
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

#: Elements whose error is measured at once, so that no float32 copy of a weight is made.
ERROR_ELEMENTS = 2**22

#: Files of the source that hold weights; every other file and folder is copied.
WEIGHT_FILES = (
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
)


#: Gives a 4-bit weight of a name, if it was calibrated.
Calibrated = Callable[[str], Int4Weight | None]


def quantize_directory(
    plan: Plan, out: Path, progress: Progress, calibrated: Calibrated = lambda name: None
) -> Report:
    """Carry a plan out.

    Args:
        plan: see `make_plan`.
        out: the directory to make: ``config.json``, the shards with their index, and a copy of every
            other file of the source. `from_pretrained` of it equals, bit for bit, `from_pretrained` of
            the source with the same config.
        progress: told of each tensor.
        calibrated: weights that are not to be rounded by the config's algorithm.

    Raises:
        ValueError: as `write_directory`, or a weight has NaN or infinite values, or an expert another
            shape than the model's.
    """

    def finish(folder: Path, entries: dict[str, Any]) -> None:
        plan.model_config.save_pretrained(folder)
        copy_other_files(plan.folder, folder)

    config = plan.model_config.to_dict()
    config["quantization_config"] = plan.model_config.quantization_config.to_dict()
    sources = [source for tensor in plan.tensors for parts in tensor.sources for source in parts]
    files = sorted({source.file for source in sources})
    largest = max(source.nbytes for source in sources)
    settings = settings_of(files, config=config, tensors=[tensor.name for tensor in plan.tensors])
    return write_directory(_items(plan, calibrated), out, settings, finish, progress, largest=largest)


def sqnr(w: Tensor, value: GroupwiseInt4) -> float:
    """Signal to quantization noise of a weight ``[N, K]``, in dB: ``10 log10(sum w² / sum error²)``."""
    return _decibels(*_signal_and_noise(w, value))


def _signal_and_noise(w: Tensor, value: GroupwiseInt4) -> tuple[float, float]:
    n, k = w.shape
    rows = max(1, ERROR_ELEMENTS // k)
    signal = noise = 0.0
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        stored = GroupwiseInt4(value.codes[part], value.scale[part], value.zero[part], value.group_size)
        exact = w[part].float()
        signal += float(exact.square().sum())
        noise += float(stored.dequantize().sub_(exact).square_().sum())
    return signal, noise


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _items(plan: Plan, calibrated: Calibrated) -> Iterator[Item]:
    for tensor in plan.tensors:
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if not tensor.kept:
            size = packed_bytes(tensor.shape, plan.group_size(tensor.name))
        make = functools.partial(_make, plan, tensor, calibrated)
        yield Item(tensor.name, tensor.nbytes, size, tensor.kept, make, tensor.key)


def _make(plan: Plan, tensor: Planned, calibrated: Calibrated) -> tuple[Tensor, float]:
    if tensor.kept:
        return read(tensor.source).to(tensor.dtype), math.inf
    group_size = plan.group_size(tensor.name)
    known = calibrated(tensor.name)
    done = None if known is None else weight_of(known).matrices()
    packed = Int4OpaqueTensor.empty(tensor.shape, group_size, tensor.dtype)
    signal = noise = 0.0
    for i, (matrix, place) in enumerate(zip(_matrices(tensor), packed.matrices(), strict=True)):
        if matrix.shape != tensor.shape[-2:]:
            raise ValueError(
                f"{tensor.name}: an expert has shape {list(matrix.shape)} where the model has "
                f"{list(tensor.shape[-2:])}; config.json and the weights are of two models"
            )
        w = matrix.to(tensor.dtype)
        if done is None:
            value = _quantize(plan, tensor, w)
        else:
            value = GroupwiseInt4(*unpacked(done[i]), group_size)
        pack_into(place, value)
        powers = _signal_and_noise(w, value)
        signal, noise = signal + powers[0], noise + powers[1]
    made = Int4TransposedTensor(packed) if tensor.is_input_first else packed
    return made, _decibels(signal, noise)


def _matrices(tensor: Planned) -> Iterator[Tensor]:
    """``[N, K]``, one after the other: the weight, or each expert of a stack."""
    if tensor.is_apart:
        for parts in tensor.sources:
            yield torch.cat([read(part) for part in parts])
    elif len(tensor.shape) == 2:
        yield read(tensor.source)
    else:
        for i in range(tensor.shape[0]):
            matrix = read(tensor.source, i)
            yield matrix.T.contiguous() if tensor.is_input_first else matrix


def read(source: Source, index: int | None = None) -> Tensor:
    """One tensor, or what it has at an index of its first dimension.

    The file is opened for each: pages of a mapping stay in memory as long as it does.
    """
    safetensors = import_extra("safetensors", "hf")
    with safetensors.safe_open(source.file, framework="pt") as file:
        data: Tensor = (
            file.get_tensor(source.key) if index is None else file.get_slice(source.key)[index]
        )
        return data


def _quantize(plan: Plan, tensor: Planned, w: Tensor) -> GroupwiseInt4:
    algorithm = plan.config.int4_choose_qparams_algorithm
    try:
        return choose_qparams(w, plan.group_size(tensor.name), algorithm)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{tensor.name}: {error}") from error


def copy_other_files(source: Path, out: Path) -> None:
    """Tokenizer, licence, folders with other parts: everything but weights and config.json."""
    for path in sorted(source.iterdir()):
        if path.name == "config.json" or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif not any(path.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copy2(path, out / path.name)
