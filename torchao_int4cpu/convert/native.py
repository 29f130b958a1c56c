"""Rewrites the 4-bit weights of a directory in the layout of this CPU, in place.

Loading does that too, but into memory that each process has for itself, where a file that is in the
layout of the CPU is mapped, and shared by all processes that load it.
"""

from __future__ import annotations

import json
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
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.tensor.transposed import Int4Weight

#: Of a file that takes the place of another when all of them are written.
ENDING = ".native"


def to_native_layout(folder: Path, progress: Progress) -> tuple[int, int]:
    """Repack what is in the layout of another CPU; the numbers stay as they are.

    All files are written beside the old ones first, one in memory at a time, and then take their names.
    A call that is stopped before that has changed nothing. One that is stopped among the names, an
    instant, leaves files that disagree: do not load the model before another call has made it good.

    Args:
        folder: with safetensors files of this package's weights.
        progress: told of each tensor.

    Returns:
        How many weights were repacked, and how many there are.

    Raises:
        ValueError: there are no 4-bit weights of this package, or this CPU has no layout.
    """
    layout = native_layout()
    if layout is None:
        raise ValueError(
            "PyTorch's int4 op does not run on this CPU, so no layout is its own; call this where the "
            "model is served"
        )
    files = sorted(folder.glob("*.safetensors"))
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
    if stale or any(_disagrees(_metadata(file), final) for file in files):
        for file in files:
            names = [name for name in stale if sources[part_key(name, "qdata")].file == file]
            mine = {name: _weight(name, entries[name], sources) for name in names}
            _write(file, mine, final, progress)
        for file in files:
            file.with_suffix(ENDING).rename(file)
    return len(stale), len(stored)


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


def _disagrees(metadata: dict[str, str], final: dict[str, dict[str, Any]]) -> bool:
    """Whether a file says something else of a weight that is in another file, which was renamed."""
    return any(
        name in metadata and json.loads(metadata[name]) != entry for name, entry in final.items()
    )


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
    file: Path, weights: dict[str, Int4Weight], final: dict[str, dict[str, Any]], progress: Progress
) -> None:
    """The file that takes the place of another."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors |= {part_key(name, "qdata"): weight.parts()["qdata"] for name, weight in weights.items()}
    metadata = _metadata(file)
    metadata |= {name: json.dumps(entry) for name, entry in final.items() if name in metadata}
    save_file(tensors, file.with_suffix(ENDING), metadata)
    progress(file.name, sum(tensor.nbytes for tensor in tensors.values()))
