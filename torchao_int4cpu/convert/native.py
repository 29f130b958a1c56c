"""Rewrites the 4-bit weights of a directory in the layout of this CPU, in place.

Loading does that too, but into memory that each process has for itself, where a file that is in the
layout of the CPU is mapped, and shared by all processes that load it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from torchao_int4cpu.checkpoint.safetensors import (
    TYPE_NAME,
    Source,
    from_safetensors,
    metadata_of,
    part_key,
    read_header,
)
from torchao_int4cpu.convert.directory import read
from torchao_int4cpu.convert.shards import Progress
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, native_layout
from torchao_int4cpu.tensor.transposed import Int4Weight

#: Which file has which tensor. What it does not name is not read by anybody who loads the model.
INDEX = "*.safetensors.index.json"

#: Of a file that is about to take the place of another.
PART = ".part"


def to_native_layout(folder: Path, progress: Progress) -> tuple[int, int]:
    """Repack what is in the layout of another CPU; the numbers stay as they are.

    One file is in memory at a time. A new file takes the place of an only one in an instant; several
    get new names, and the index then names these in an instant. So whoever loads the model finds the
    old one or the new one, and a call that is stopped leaves nothing but files that the next removes.

    Args:
        folder: with a safetensors file of this package's weights, or several and their index.
        progress: told of each tensor.

    Returns:
        How many weights were repacked, and how many there are.

    Raises:
        ValueError: there are no 4-bit weights of this package, or several files without an index, or
            this CPU has no layout.
    """
    layout = native_layout()
    if layout is None:
        raise ValueError(
            "PyTorch's int4 op does not run on this CPU, so no layout is its own; call this where the "
            "model is served"
        )
    index = next(iter(sorted(folder.glob(INDEX))), None)
    files = _files(folder, index)
    sources = {source.key: source for file in files for source in read_header(file)}
    entries = _entries(files, sources)
    if not entries:
        raise ValueError(
            f"{str(folder)!r} has no 4-bit weights of this package; quantize or convert a model first"
        )
    stored = [name for name in entries if part_key(name, "qdata") in sources]
    stale = [name for name in stored if entries[name]["_data"]["qdata_layout"] != layout.name]
    changed = {}  # a weight may be named twice, of which one name has no tensors
    for name in stale:
        changed[json.dumps(entries[name])] = metadata_of(_weight(name, entries[name], sources))
        progress(name, 0)
    final = {name: changed.get(json.dumps(entry), entry) for name, entry in entries.items()}
    if stale:
        made = {}
        for file in files:
            names = [name for name in stale if sources[part_key(name, "qdata")].file == file]
            mine = {name: _weight(name, entries[name], sources) for name in names}
            made[file] = file.with_suffix(PART) if index is None else _new_name(file, layout)
            _write(file, made[file], mine, final, progress)
        if index is None:
            made[files[0]].rename(files[0])
        else:
            _switch(index, {file.name: new.name for file, new in made.items()})
    if index is not None:
        _remove_unused(folder, {file.name for file in _files(folder, index)})
    return len(stale), len(stored)


def _files(folder: Path, index: Path | None) -> list[Path]:
    if index is not None:
        named = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / name for name in sorted(named)]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ValueError(
            f"{str(folder)!r} has {len(files)} safetensors files and no index that says which of them "
            "make the model; save it again with save_pretrained, or give a directory for each"
        )
    return files


def _switch(index: Path, made: dict[str, str]) -> None:
    """Have the index name the new files in place of the old ones."""
    said = json.loads(index.read_text())
    said["weight_map"] = {key: made[name] for key, name in said["weight_map"].items()}
    new = index.with_suffix(PART)
    new.write_text(json.dumps(said, indent=2) + "\n")
    new.rename(index)


def _remove_unused(folder: Path, used: set[str]) -> None:
    """Remove the old files, or new ones of a call that was stopped before it could switch."""
    stems = {_stem(name) for name in used}
    for file in folder.glob("*.safetensors"):
        if file.name not in used and _stem(file.name) in stems:
            file.unlink()


def _stem(name: str) -> str:
    """Of a file's name, without what `_new_name` has put there."""
    return re.sub(rf"(\.({'|'.join(LAYOUTS)})-\d+)?\.safetensors$", "", name)


def _new_name(file: Path, layout: NibbleLayout) -> Path:
    """Another one than the file has, which says what is in it."""
    names = (f"{_stem(file.name)}.{layout.name}-{number}.safetensors" for number in (1, 2))
    return next(file.with_name(name) for name in names if name != file.name)


def _entries(files: list[Path], sources: dict[str, Source]) -> dict[str, dict[str, Any]]:
    """What is said of each 4-bit weight by the file that has its bytes, or by any if none has."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        metadata = _metadata(file)
        for name in json.loads(metadata.get("tensor_names", "[]")):
            entry = json.loads(metadata[name])
            source = sources.get(part_key(name, "qdata"))
            if entry.get("_type") == TYPE_NAME and (source is None or source.file == file):
                found[name] = entry
    return found


def _metadata(file: Path) -> dict[str, str]:
    safetensors = import_extra("safetensors", "hf")
    with safetensors.safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata() or {}
        return found


def _weight(name: str, entry: dict[str, Any], sources: dict[str, Source]) -> Int4Weight:
    """A weight, checked, in the layout of this CPU."""
    data = dict(entry["_data"])
    data["dtype"] = getattr(torch, data["dtype"]["_data"])
    parts = {part: read(sources[part_key(name, part)]) for part in entry["_tensor_data_names"]}
    try:
        return from_safetensors(**data, **parts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _write(
    file: Path,
    new: Path,
    weights: dict[str, Int4Weight],
    final: dict[str, dict[str, Any]],
    progress: Progress,
) -> None:
    """The file that takes the place of another."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors |= {part_key(name, "qdata"): weight.parts()["qdata"] for name, weight in weights.items()}
    metadata = _metadata(file)
    metadata |= {name: json.dumps(entry) for name, entry in final.items() if name in metadata}
    save_file(tensors, new, metadata)
    progress(file.name, sum(tensor.nbytes for tensor in tensors.values()))
