"""Quantize a Hugging Face directory into another, with one shard in memory at a time, not the model.

While it works, everything is in ``OUT.unfinished``, which becomes ``OUT`` at the end. A shard there is
whole as soon as it has its name, so an interrupted run goes on after the last one. Nothing here prints.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.checkpoint.safetensors import metadata_of, part_key, read_header
from torchao_int4cpu.convert.plan import Plan, Planned
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.format.layout import LAYOUTS, native_layout
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.version import __version__

#: The most bytes that a shard holds, unless the largest tensor of the source has more.
SHARD_BYTES = 64 * 2**20

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

#: In the unfinished directory: what the run was asked for, and what it did so far.
STATE_FILE = "torchao_int4cpu.unfinished.json"

#: Told of each tensor and its bytes in the source: before it is read (0 bytes), and when it is done.
Progress = Callable[[str, int], None]


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


def quantize_directory(plan: Plan, out: Path, progress: Progress) -> Report:
    """Carry a plan out.

    Args:
        plan: see `directory_plan.make_plan`.
        out: the directory to make: ``config.json``, the shards with their index, and a copy of every
            other file of the source. `from_pretrained` of it equals, bit for bit, `from_pretrained` of
            the source with the same config.
        progress: told of each tensor.

    Raises:
        ValueError: ``out`` is there already, an unfinished run had other settings, or a weight has NaN
            or infinite values. What was finished stays in ``out.unfinished``.
    """
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; give a directory that is not, or remove it")
    unfinished = out.with_name(out.name + ".unfinished")
    shards = list(_shards(plan))
    done = _begin(unfinished, _settings(plan, shards))
    resumed = 0
    metadata = {name: json.dumps(entry) for name, entry in _metadata(plan).items()}
    for number, shard in enumerate(shards):
        path = unfinished / _shard_name(number, len(shards))
        if path.exists():
            resumed += 1
            for tensor in shard:
                progress(tensor.name, tensor.source.nbytes)
            continue
        written = _write_shard(plan, shard, path, metadata, progress)
        names = {tensor.name for tensor in written}
        done = [tensor for tensor in done if tensor.name not in names] + written
        _save_state(unfinished, _settings(plan, shards), done)
        path.with_suffix(".part").rename(path)
    _write_index(unfinished, shards)
    plan.model_config.save_pretrained(unfinished)
    _copy_other_files(plan.folder, unfinished)
    (unfinished / STATE_FILE).unlink()
    unfinished.rename(out)
    return Report(done, len(shards), resumed)


def sqnr(w: Tensor, value: GroupwiseInt4) -> float:
    """Signal to quantization noise of a weight ``[N, K]``, in dB: ``10 log10(sum w² / sum error²)``."""
    n, k = w.shape
    rows = max(1, ERROR_ELEMENTS // k)
    signal = noise = 0.0
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        stored = GroupwiseInt4(value.codes[part], value.scale[part], value.zero[part], value.group_size)
        exact = w[part].float()
        signal += float(exact.square().sum())
        noise += float(stored.dequantize().sub_(exact).square_().sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _empty_weight(plan: Plan, tensor: Planned) -> Int4OpaqueTensor:
    """What a weight becomes, without data: for its bytes and its metadata."""
    shape, dtype = tensor.source.shape, tensor.dtype
    return Int4OpaqueTensor.empty(shape, plan.config.group_size, dtype, device="meta")


def _bytes_after(plan: Plan, tensor: Planned) -> int:
    if tensor.kept:
        return math.prod(tensor.source.shape) * tensor.dtype.itemsize
    return sum(part.nbytes for part in _empty_weight(plan, tensor).parts().values())


def _shards(plan: Plan) -> Iterator[list[Planned]]:
    limit = max(SHARD_BYTES, *(tensor.source.nbytes for tensor in plan.tensors))
    shard: list[Planned] = []
    filled = 0
    for tensor in plan.tensors:
        size = _bytes_after(plan, tensor)
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += size
    yield shard


def _shard_name(number: int, count: int) -> str:
    """As Hugging Face names them."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _metadata(plan: Plan) -> dict[str, Any]:
    """Of all tensors, for every shard: transformers and vLLM look for them in any. No checksums yet."""
    entries: dict[str, Any] = {
        tensor.name: {"_type": "Tensor"} if tensor.kept else metadata_of(_empty_weight(plan, tensor))
        for tensor in plan.tensors
    }
    return entries | {"tensor_names": [tensor.name for tensor in plan.tensors]}


def _settings(plan: Plan, shards: list[list[Planned]]) -> dict[str, Any]:
    """All that two runs must agree in, for one to go on with what the other began."""
    files = sorted({tensor.source.file for tensor in plan.tensors})
    settings = {
        "version": __version__,
        "layout": (native_layout() or LAYOUTS["default"]).name,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config": plan.model_config.to_dict(),
        "shards": [[tensor.name for tensor in shard] for shard in shards],
    }
    settings["config"]["quantization_config"] = plan.model_config.quantization_config.to_dict()
    readable: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return readable


def _begin(unfinished: Path, settings: dict[str, Any]) -> list[Done]:
    """Make the directory, or find it from an earlier run; return what that did."""
    unfinished.mkdir(parents=True, exist_ok=True)
    state = unfinished / STATE_FILE
    if not state.exists():
        _save_state(unfinished, settings, [])
    found = json.loads(state.read_text())
    if found["settings"] != settings:
        raise ValueError(
            f"{str(unfinished)!r} is from a run with other settings or another source; "
            "repeat that run to go on with it, or remove the directory"
        )
    return [Done(**tensor) for tensor in found["done"]]


def _save_state(unfinished: Path, settings: dict[str, Any], done: list[Done]) -> None:
    state = unfinished / STATE_FILE
    new = state.with_suffix(".part")
    new.write_text(json.dumps({"settings": settings, "done": [asdict(tensor) for tensor in done]}))
    new.replace(state)


def _write_shard(
    plan: Plan, shard: list[Planned], path: Path, metadata: dict[str, str], progress: Progress
) -> list[Done]:
    """Write a shard to ``path`` with the ending ``.part``."""
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    own = {}
    done = []
    for tensor in shard:
        progress(tensor.name, 0)
        data = _read(tensor)
        if tensor.kept:
            stored[tensor.name] = data
            done.append(Done(tensor.name, tensor.source.nbytes, data.nbytes, math.inf, tensor.kept))
        else:
            weight, quality = _quantize(plan, tensor, data)
            parts = weight.parts()
            stored.update({part_key(tensor.name, part): value for part, value in parts.items()})
            own[tensor.name] = json.dumps(metadata_of(weight))
            size = sum(part.nbytes for part in parts.values())
            done.append(Done(tensor.name, tensor.source.nbytes, size, quality, ""))
        progress(tensor.name, tensor.source.nbytes)
    save_file(stored, path.with_suffix(".part"), {"format": "pt"} | metadata | own)
    return done


def _read(tensor: Planned) -> Tensor:
    """One tensor. The file is opened for each: pages of a mapping stay in memory as long as it does."""
    safetensors = import_extra("safetensors", "hf")
    with safetensors.safe_open(tensor.source.file, framework="pt") as file:
        data: Tensor = file.get_tensor(tensor.source.key)
        return data.to(tensor.dtype)


def _quantize(plan: Plan, tensor: Planned, w: Tensor) -> tuple[Int4OpaqueTensor, float]:
    algorithm = plan.config.int4_choose_qparams_algorithm
    try:
        value = choose_qparams(w, plan.config.group_size, algorithm)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{tensor.name}: {error}") from error
    return Int4OpaqueTensor.from_groupwise(value, dtype=tensor.dtype), sqnr(w, value)


def _write_index(folder: Path, shards: list[list[Planned]]) -> None:
    """The index of several shards, as Hugging Face writes it."""
    if len(shards) == 1:
        return
    weight_map = {}
    total = 0
    for number in range(len(shards)):
        name = _shard_name(number, len(shards))
        for stored in read_header(folder / name):
            weight_map[stored.key] = name
            total += stored.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_other_files(source: Path, out: Path) -> None:
    """Tokenizer, licence, folders with other parts: everything but weights and config.json."""
    for path in sorted(source.iterdir()):
        if path.name == "config.json" or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif not any(path.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copy2(path, out / path.name)
