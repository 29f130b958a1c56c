"""A 4-bit directory of this package in the format of another tool, weight by weight.

Codes are exact. Zeros of these formats are whole numbers of scales, as those of a weight are that came
from such a tool; one that was quantized here moves, and the report says how far. Nothing here prints.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchao_int4cpu.checkpoint.inspect import int4_entries, names_in_files
from torchao_int4cpu.checkpoint.safetensors import (
    Source,
    from_safetensors,
    part_key,
    read_header,
)
from torchao_int4cpu.convert.directory import copy_other_files, read
from torchao_int4cpu.convert.plan import dtype_of_model, empty_model
from torchao_int4cpu.convert.shards import Item, Progress, Report, settings_of, write_directory
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.groupwise import GroupwiseInt4
from torchao_int4cpu.importers.compressed_tensors import compressed_tensors_of_groupwise
from torchao_int4cpu.importers.gptq import gptq_of_groupwise
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: Why a tensor is written as it is.
DENSE, EXPANDED = "dense", "a 4-bit embedding, which this format has dense"


class Int4Source(NamedTuple):
    """A 4-bit weight of a directory: what the metadata says, and its parts."""

    data: dict[str, Any]
    parts: dict[str, Source]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        size: int = self.data["block_size"][-1]
        return size

    def load(self) -> Int4OpaqueTensor:
        """Read it."""
        dtype = getattr(torch, self.data["dtype"]["_data"])
        parts = {name: read(source) for name, source in self.parts.items()}
        loaded: Any = from_safetensors(**self.data | {"dtype": dtype} | parts)
        weight: Int4OpaqueTensor = loaded
        return weight


#: What makes the tensors of an item.
_Make = Callable[[], tuple[dict[str, Tensor], float]]


class _Format(NamedTuple):
    """What writes a weight, and ``quantization_config`` of a model."""

    write: Callable[[GroupwiseInt4], tuple[dict[str, Tensor], GroupwiseInt4]]
    config: Callable[[dict[str, int], list[str], bool], dict[str, Any]]


def export_directory(folder: Path, out: Path, format: str, progress: Progress) -> Report:
    """Write a 4-bit directory of ours in the format of another tool.

    Args:
        folder: as `quantize_directory`, `convert_directory` or ``save_pretrained`` make it.
        out: the directory to make, see `write_directory`.
        format: one of `FORMATS`.
        progress: told of each tensor.

    Raises:
        MissingExtra: transformers or safetensors is not installed.
        ValueError: it is no such directory, has experts, or a weight that the format cannot hold.
    """
    transformers = import_extra("transformers", "hf")
    files = sorted(folder.glob("*.safetensors"))
    weights = int4_sources(files)
    check_exportable(folder, weights, format)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    model_config = transformers.AutoConfig.for_model(**config)
    sources = [source for file in files for source in read_header(file)]
    model = empty_model(transformers, model_config, dtype_of_model(model_config, sources))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {name.removesuffix(".weight"): weight.group_size for name, weight in weights.items()}
    groups = {name: groups[name] for name in linear if name in groups}
    if not groups:
        raise ValueError(
            f"{str(folder)!r} has no linear layer in 4 bits, only embeddings, which {format} has "
            "dense; quantize the layers, too"
        )
    dense = [name for name in linear if name not in groups]
    how = FORMATS[format]
    ordered = any("act_order" in weight.parts for weight in weights.values())
    quantization = how.config(groups, dense, ordered)

    def finish(made: Path, entries: dict[str, Any]) -> None:
        text = json.dumps(config | {"quantization_config": quantization}, indent=2) + "\n"
        (made / "config.json").write_text(text)
        if format == "gptq":
            (made / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")
        copy_other_files(folder, made)

    items = _items(sources, weights, set(groups), how)
    largest = max(source.nbytes for source in sources)
    settings = settings_of(files, format=format)
    return write_directory(items, out, settings, finish, progress, largest=largest)


def check_exportable(folder: Path, weights: dict[str, Int4Source], format: str) -> None:
    """Check that other tools can have the weights of a directory.

    Raises:
        ValueError: there are none, or some are not those of linear layers.
    """
    if not (folder / "config.json").is_file() or not weights:
        raise ValueError(
            f"{str(folder)!r} is no Hugging Face directory with 4-bit weights of this package; make "
            "one with the command quantize or convert"
        )
    for name, weight in weights.items():
        if len(weight.data["shape"]) != 2 or weight.data.get("transposed"):
            raise ValueError(
                f"{name} is a stack of experts, or a transposed weight, which {format} has one by one "
                "under other names; only linear layers are exported"
            )


def int4_sources(files: list[Path]) -> dict[str, Int4Source]:
    """The 4-bit weights of safetensors files, by their names in the model.

    Raises:
        ValueError: a part is missing.
    """
    stored = {source.key: source for file in files for source in read_header(file)}
    entries = {name: entry for file in files for name, entry in int4_entries(file).items()}
    others = names_in_files(entries, stored)
    found = {}
    for name, entry in entries.items():
        if name in others.values():
            continue
        parts = {p: part_key(others.get(name, name), p) for p in entry["_tensor_data_names"]}
        missing = [key for key in parts.values() if key not in stored]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing; fetch the files again")
        sources = {part: stored[key] for part, key in parts.items()}
        found[name] = Int4Source(dict(entry["_data"]), sources)
    return found


def _items(
    sources: list[Source], weights: dict[str, Int4Source], linear: set[str], how: _Format
) -> Iterator[Item]:
    owner = {s.key: name for name, weight in weights.items() for s in weight.parts.values()}
    for source in sources:
        name = owner.get(source.key)
        if name is None:
            yield Item(source.key, source.nbytes, source.nbytes, DENSE, _dense(source))
        elif source.key == part_key(name, "qdata"):
            weight = weights[name]
            size = sum(part.nbytes for part in weight.parts.values())
            if name.removesuffix(".weight") in linear:
                yield Item(name, size, size, "", _written(name, weight, how))
            else:
                yield Item(name, size, 4 * size, EXPANDED, _expanded(name, weight))


def _dense(source: Source) -> _Make:
    return lambda: ({source.key: read(source)}, math.inf)


def _expanded(name: str, weight: Int4Source) -> _Make:
    return lambda: ({name: weight.load().dequantize()}, math.inf)


def _written(name: str, weight: Int4Source, how: _Format) -> _Make:
    def make() -> tuple[dict[str, Tensor], float]:
        t = weight.load()
        if t.act_pre_scale is not None:
            raise ValueError(
                f"{name} has act_pre_scale (AWQ, SmoothQuant of torchao), which the other tool does "
                "not apply; quantize the model without it"
            )
        value = t.to_groupwise()
        try:
            parts, stands_for = how.write(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stem = name.removesuffix("weight")
        return {f"{stem}{part}": tensor for part, tensor in parts.items()}, sqnr_of(value, stands_for)

    return make


def sqnr_of(value: GroupwiseInt4, stands_for: GroupwiseInt4) -> float:
    """Of what a format makes of a weight, in dB."""
    exact = value.dequantize()
    noise = float((stands_for.dequantize() - exact).square().sum())
    signal = float(exact.square().sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def _gptq_config(groups: dict[str, int], dense: list[str], ordered: bool) -> dict[str, Any]:
    """Of GPTQModel: layers with groups of their own, and dense ones, are said by ``dynamic``."""
    size = _most(groups)
    own = {f"+:^{re.escape(n)}$": {"group_size": s} for n, s in groups.items() if s != size}
    left: dict[str, dict[str, int]] = {f"-:^{re.escape(n)}$": {} for n in dense if n != "lm_head"}
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": size,
        "desc_act": ordered,
        "sym": False,
        "lm_head": "lm_head" in groups,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
    } | ({"dynamic": own | left} if own or left else {})


def _compressed_tensors_config(
    groups: dict[str, int], dense: list[str], ordered: bool
) -> dict[str, Any]:
    sizes = sorted(set(groups.values()))
    config_groups = {}
    for number, size in enumerate(sizes):
        names = [name for name, other in groups.items() if other == size]
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": size,
            "dynamic": False,
        }
        targets = ["Linear"] if len(sizes) == 1 else names
        config_groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": dense,
        "kv_cache_scheme": None,
    }


def _most(groups: dict[str, int]) -> int:
    """The group size that most layers have."""
    sizes = list(groups.values())
    return max(sorted(set(sizes)), key=sizes.count)


#: By their names for the command ``export``.
FORMATS = {
    "gptq": _Format(gptq_of_groupwise, _gptq_config),
    "compressed-tensors": _Format(compressed_tensors_of_groupwise, _compressed_tensors_config),
}
