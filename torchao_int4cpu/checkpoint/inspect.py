"""What a checkpoint holds, read from its headers: 4-bit weights, other tensors, and what is wrong.

Tensors are not read, but for `inspect`'s ``verify``. Needs the ``hf`` extra for safetensors. Nothing
here prints.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.checkpoint.safetensors import (
    TYPE_NAME,
    Source,
    crc32,
    from_safetensors,
    part_key,
    read_header,
)
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.tensor.transposed import Int4Weight, weight_of


@dataclass(frozen=True)
class Weight:
    """A 4-bit weight as the file describes it.

    Attributes:
        name: of the parameter.
        shape: ``[N, K]``, of a stack ``[E, N, K]``, or those of a transposed view.
        group_size: codes that share a scale.
        qdata_layout: how the bytes lie in the file; loading repacks them for the CPU that loads.
        dtype: the logical one.
        qparams_dtype: of scales and zeros.
        nbytes: of all parts in the file.
    """

    name: str
    shape: tuple[int, ...]
    group_size: int
    qdata_layout: str
    dtype: str
    qparams_dtype: str
    nbytes: int


@dataclass
class Contents:
    """What was found.

    Attributes:
        files: that were read.
        quantization: ``quantization_config`` of the directory's config.json, if there is one.
        weights: the 4-bit weights that are whole.
        others: every other tensor.
        problems: what is wrong, a line each; empty for a good checkpoint.
        verified: parts (records in a file of `torch.save`) whose checksum was compared and agreed.
        unverified: parts that have no checksum.
    """

    files: list[Path]
    quantization: dict[str, Any] | None = None
    weights: list[Weight] = field(default_factory=list)
    others: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    verified: int = 0
    unverified: int = 0


def inspect(path: Path, *, verify: bool = False) -> Contents:
    """Read what a file or a Hugging Face directory holds.

    Args:
        path: a safetensors file, a directory with such files, or a file of `torch.save`.
        verify: also read the parts of 4-bit weights and compare their checksums; those of all its
            records in a file of `torch.save`.

    Raises:
        MissingExtra: safetensors is not installed.
        ValueError: there is no such file, or it cannot be read as one.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        return _inspect_torch_file(path, verify)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"{str(path)!r} has no safetensors file; give one, a directory that holds some, or a file "
            "of torch.save"
        )
    contents = Contents(files, _quantization(path))
    stored = {source.key: source for file in files for source in read_header(file)}
    used: set[str] = set()
    entries = {name: entry for file in files for name, entry in int4_entries(file).items()}
    others = names_in_files(entries, stored)
    for name, entry in entries.items():
        if name not in others:
            used.update(_weight(name, entry, stored, contents))
    contents.others = [source for key, source in stored.items() if key not in used]
    if verify:
        for file in files:
            _verify(file, stored, contents)
    return contents


def _inspect_torch_file(path: Path, verify: bool) -> Contents:
    contents = Contents([path])
    try:
        with torch.serialization.skip_data():  # memory for the tensors, which nothing is read into
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError) as error:
        contents.problems.append(
            f"it cannot be loaded: {str(error).splitlines()[0]} (a checkpoint of torchao's prototype "
            "is read by torchao_int4cpu.load_torchao_checkpoint; of a whole model, save the state dict)"
        )
        loaded = None
    for name, tensor in _tensors(loaded, ""):
        if isinstance(tensor, Int4Weight):
            size = sum(part.nbytes for part in tensor.parts().values())
            weight = weight_of(tensor)
            contents.weights.append(_described(name, tensor, weight.qdata_layout, size))
        else:
            contents.others.append(Source(name, path, tuple(tensor.shape), tensor.dtype))
    if verify:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            contents.verified = len(file.namelist()) if damaged is None else 0
        if damaged is not None:
            contents.problems.append(f"{damaged}: the checksum differs, so its bytes are damaged")
    return contents


def _tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested mappings and sequences, by their keys with dots between."""
    if isinstance(value, Tensor):
        yield name.removeprefix("."), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}.{index}")


def _quantization(path: Path) -> dict[str, Any] | None:
    config = path / "config.json"
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text()).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(config)!r} is no JSON object ({error}); fetch it again") from None
    return found if isinstance(found, dict) else None


def _metadata(file: Path) -> dict[str, str]:
    with import_extra("safetensors", "hf").safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def int4_entries(file: Path) -> dict[str, dict[str, Any]]:
    """What the metadata of a file says of 4-bit weights, those of other files too, by their names."""
    entries = {}
    for name, text in _metadata(file).items():
        try:
            entry = json.loads(text)
        except ValueError:
            continue  # metadata may hold anything, "format": "pt" for one
        if isinstance(entry, dict) and entry.get("_type") == TYPE_NAME:
            entries[name] = entry
    return entries


def names_in_files(entries: Mapping[str, dict[str, Any]], stored: Container[str]) -> dict[str, str]:
    """What weights are called in files, by the names that a model has for them.

    A weight that transformers calls otherwise than its files do is named twice, with one checksum.

    Args:
        entries: see `int4_entries`.
        stored: the keys of all files.
    """
    missing = {}
    unclaimed: dict[str, list[str]] = {}
    for name, entry in entries.items():
        data = entry.get("_data")
        if "." not in name or not isinstance(data, dict) or not data.get("crc32"):
            continue  # an older file's, in which nothing is named twice, or no entry at all
        if part_key(name, "qdata") in stored:
            unclaimed.setdefault(json.dumps(entry), []).append(name)
        else:
            missing[name] = json.dumps(entry)
    return {name: unclaimed[entry].pop(0) for name, entry in missing.items() if unclaimed.get(entry)}


def _weight(
    name: str, entry: dict[str, Any], stored: dict[str, Source], contents: Contents
) -> list[str]:
    """Check one weight as loading would, on parts without data; return the keys of its parts."""
    try:
        data = dict(entry["_data"])
        keys = {part: part_key(name, part) for part in entry["_tensor_data_names"]}
        missing = [key for key in keys.values() if key not in stored]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing; the checkpoint is not complete")
        data["dtype"] = _dtype(data.get("dtype"))
        layout = str(data.get("qdata_layout"))
        checked = from_safetensors(**data | {part: _empty(stored[key]) for part, key in keys.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        contents.problems.append(f"{name}: {error}")
        return []
    size = sum(stored[key].nbytes for key in keys.values())
    contents.weights.append(_described(name, checked, layout, size))
    return list(keys.values())


def _described(name: str, t: Int4Weight, layout: str, size: int) -> Weight:
    weight = weight_of(t)
    dtype, qparams_dtype = (
        str(part.dtype).removeprefix("torch.") for part in (t, weight.scale_and_zero)
    )
    return Weight(name, tuple(t.shape), weight.group_size, layout, dtype, qparams_dtype, size)


def _dtype(entry: Any) -> object:
    """As torchao reads it: ``{"_type": "torch.dtype", "_data": "bfloat16"}``."""
    return getattr(torch, entry["_data"]) if isinstance(entry, dict) else entry


def _empty(source: Source) -> Tensor:
    return torch.empty(source.shape, dtype=source.dtype, device="meta")


def _verify(file: Path, stored: dict[str, Source], contents: Contents) -> None:
    """Compare the checksums that a file gives for its own parts of good weights."""
    good = {weight.name for weight in contents.weights}
    entries = {name: entry for name, entry in int4_entries(file).items() if name in good}
    with import_extra("safetensors", "hf").safe_open(file, framework="pt") as opened:
        for key, expected in _checksums(entries):
            if stored[key].file != file:
                continue
            if expected is None:
                contents.unverified += 1
            elif crc32(opened.get_tensor(key)) == expected:
                contents.verified += 1
            else:
                contents.problems.append(
                    f"{key}: the checksum differs, so its bytes are damaged; fetch {file.name} again"
                )


def _checksums(entries: dict[str, dict[str, Any]]) -> Iterator[tuple[str, object]]:
    """The key of each part, and its checksum or None."""
    for name, entry in entries.items():
        checksums = entry["_data"].get("crc32")
        for part in entry["_tensor_data_names"]:
            yield part_key(name, part), checksums.get(part) if isinstance(checksums, dict) else None
