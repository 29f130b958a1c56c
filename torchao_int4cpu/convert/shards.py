"""Writes tensors into a directory of safetensors files, one file in memory at a time; it can go on.

While it works, everything is in ``OUT.unfinished``, which becomes ``OUT`` at the end. A file there is
whole as soon as it has its name, so an interrupted run goes on after the last one. Nothing here prints.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from torchao_int4cpu.checkpoint.safetensors import metadata_of, part_key, read_header
from torchao_int4cpu.format.layout import LAYOUTS, native_layout
from torchao_int4cpu.tensor.transposed import Int4Weight
from torchao_int4cpu.version import __version__

#: The most bytes that a file holds, unless the largest tensor of the source has more.
SHARD_BYTES = 64 * 2**20

#: In the unfinished directory: what the run was asked for, and what it did so far.
STATE_FILE = "torchao_int4cpu.unfinished.json"

#: Told of each tensor and its bytes in the source: before it is read (0 bytes), and when it is done.
Progress = Callable[[str, int], None]


class Item(NamedTuple):
    """A tensor to write.

    Attributes:
        name: in the result.
        bytes_before: in the source.
        bytes_after: in the result, about.
        kept: why it is not 4-bit; empty if it is.
        make: gives it, and the SQNR in dB of a 4-bit weight that was rounded (else infinite). Or, in
            the format of another tool, several tensors by name, of which our metadata says nothing.
        key: in the files, where that is another; the metadata has both.
    """

    name: str
    bytes_before: int
    bytes_after: int
    kept: str
    make: Callable[[], tuple[Tensor | dict[str, Tensor], float]]
    key: str = ""


@dataclass(frozen=True)
class Done:
    """A tensor that is written: bytes before and after; SQNR in dB, or else why it is kept."""

    name: str
    bytes_before: int
    bytes_after: int
    sqnr: float
    kept: str


@dataclass(frozen=True)
class Report:
    """What was done: all tensors, in order. ``resumed`` of the ``shards`` are from an earlier run."""

    tensors: list[Done]
    shards: int
    resumed: int

    @property
    def quantized(self) -> list[Done]:
        """The 4-bit weights."""
        return [tensor for tensor in self.tensors if not tensor.kept]

    @property
    def kept(self) -> dict[str, list[Done]]:
        """The other tensors, by the reason."""
        reasons: dict[str, list[Done]] = {}
        for tensor in self.tensors:
            if tensor.kept:
                reasons.setdefault(tensor.kept, []).append(tensor)
        return reasons

    @property
    def worst(self) -> Done:
        """The 4-bit weight with the lowest SQNR."""
        return min(self.quantized, key=lambda tensor: tensor.sqnr)

    @property
    def median_sqnr(self) -> float:
        """In dB, over the 4-bit weights."""
        return statistics.median(tensor.sqnr for tensor in self.quantized)


@dataclass
class _State:
    """Of an unfinished run, as its file has it.

    Attributes:
        settings: all that two runs must agree in, for one to go on with what the other began.
        shards: the tensors of each whole file.
        entries: what the metadata says of them, by their names.
    """

    settings: dict[str, Any]
    shards: list[list[Done]] = field(default_factory=list)
    entries: dict[str, Any] = field(default_factory=dict)


def settings_of(files: Iterable[Path], **others: Any) -> dict[str, Any]:
    """What a run is asked for, so that another one can go on with it; ``others`` become JSON."""
    settings = {
        "version": __version__,
        "layout": (native_layout() or LAYOUTS["default"]).name,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        **others,
    }
    readable: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return readable


def write_directory(
    items: Iterable[Item],
    out: Path,
    settings: dict[str, Any],
    finish: Callable[[Path, dict[str, Any]], None],
    progress: Progress,
    *,
    largest: int = 0,
) -> Report:
    """Write tensors to ``out``.

    Args:
        items: in the same order each time. Those that an earlier run wrote are not made again.
        out: the directory to make: the files with their index, and what ``finish`` adds.
        settings: see `settings_of`.
        finish: given the directory and the metadata of each tensor by its name, adds other files.
        progress: told of each tensor.
        largest: the bytes of the largest tensor of the source, which a file may have.

    Raises:
        ValueError: ``out`` is there already, an unfinished run had other settings, or what making a
            tensor raises. What was finished stays in ``out.unfinished``.
    """
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; give a directory that is not, or remove it")
    unfinished = out.with_name(out.name + ".unfinished")
    state = _begin(unfinished, settings)
    resumed = len(state.shards)
    written = {tensor.name for shard in state.shards for tensor in shard}
    limit = max(SHARD_BYTES, largest)
    shard: list[Item] = []
    filled = 0
    for item in items:
        if item.name in written:
            progress(item.name, item.bytes_before)
            continue
        if shard and filled + item.bytes_after > limit:
            _write_shard(unfinished, state, shard, progress)
            shard, filled = [], 0
        shard.append(item)
        filled += item.bytes_after
    if shard:
        _write_shard(unfinished, state, shard, progress)
    _finish_shards(unfinished, state)
    finish(unfinished, state.entries)
    (unfinished / STATE_FILE).unlink()
    unfinished.rename(out)
    done = [tensor for shard in state.shards for tensor in shard]
    return Report(done, len(state.shards), resumed)


def _begin(unfinished: Path, settings: dict[str, Any]) -> _State:
    """Make the directory, or find it from an earlier run with what that did."""
    unfinished.mkdir(parents=True, exist_ok=True)
    file = unfinished / STATE_FILE
    if not file.exists():
        _save_state(unfinished, _State(settings))
    found = json.loads(file.read_text())
    if found["settings"] != settings:
        raise ValueError(
            f"{str(unfinished)!r} is from a run with other settings or another source; "
            "repeat that run to go on with it, or remove the directory"
        )
    shards = [[Done(**tensor) for tensor in shard] for shard in found["shards"]]
    count = len(shards)
    if count and not any(path.exists() for path in _paths(unfinished, count - 1, count)):
        shards.pop()  # it was about to get its name
    return _State(settings, shards, found["entries"])


def _save_state(unfinished: Path, state: _State) -> None:
    file = unfinished / STATE_FILE
    new = file.with_suffix(".part")
    new.write_text(json.dumps(asdict(state)))
    new.replace(file)


def _paths(folder: Path, number: int, count: int) -> tuple[Path, Path]:
    """A file before it is known how many there are, and after, as Hugging Face names it."""
    last = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
    return folder / f"unfinished-{number + 1:05}.safetensors", folder / last


def _write_shard(unfinished: Path, state: _State, shard: list[Item], progress: Progress) -> None:
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    done = []
    for item in shard:
        progress(item.name, 0)
        tensor, quality = item.make()
        size = 0
        if isinstance(tensor, dict):
            parts = tensor
        else:
            key = item.key or item.name
            if isinstance(tensor, Int4Weight):
                entry = metadata_of(tensor)
                parts = {part_key(key, part): value for part, value in tensor.parts().items()}
            else:
                entry, parts = {"_type": "Tensor"}, {key: tensor}
            state.entries |= {item.name: entry, key: entry}
        for key, part in parts.items():
            stored[key] = part.contiguous()
            size += part.nbytes
        done.append(Done(item.name, item.bytes_before, size, quality, item.kept))
        progress(item.name, item.bytes_before)
    path, _ = _paths(unfinished, len(state.shards), 0)
    save_file(stored, path.with_suffix(".part"), {"format": "pt"})
    state.shards.append(done)
    _save_state(unfinished, state)
    path.with_suffix(".part").rename(path)


def _finish_shards(folder: Path, state: _State) -> None:
    """Give the files their names and the metadata of all tensors: transformers and vLLM look in any."""
    from safetensors.torch import load_file, save_file

    metadata = {name: json.dumps(entry) for name, entry in state.entries.items()} | {"format": "pt"}
    if state.entries:
        metadata["tensor_names"] = json.dumps(list(state.entries))
    count = len(state.shards)
    weight_map, total = {}, 0
    for number in range(count):
        path, last = _paths(folder, number, count)
        if not last.exists():
            save_file(load_file(path), last.with_suffix(".part"), metadata)
            last.with_suffix(".part").rename(last)
        path.unlink(missing_ok=True)
        for stored in read_header(last):
            weight_map[stored.key] = last.name
            total += stored.nbytes
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
