"""What is to become of each tensor of a Hugging Face directory, asked of transformers.

Which weights turn 4-bit, in which dtype and under which name: as `from_pretrained` would have it with
the same config. It is asked on a model without data. Needs the ``hf`` extra.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torchao.quantization import FqnToConfig

from torchao_int4cpu.checkpoint.safetensors import Source, read_header
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.groupwise import FLOAT_DTYPES
from torchao_int4cpu.format.packed import packed_bytes
from torchao_int4cpu.integrations.transformers_saving import dense_matrices, entries
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

#: Why tensors are kept under the names that they have.
MERGED, NOT_IN_MODEL = "put together with others by transformers", "not in the model"


class Planned(NamedTuple):
    """What becomes of a tensor.

    Attributes:
        source: the tensor.
        name: of the parameter; the key of the source where transformers changes more than the name.
        dtype: that the model holds it in.
        kept: why it is not quantized; empty if it is.
    """

    source: Source
    name: str
    dtype: torch.dtype
    kept: str


@dataclass(frozen=True)
class Plan:
    """What is to be done with a directory.

    Attributes:
        folder: the source.
        config: of the 4-bit weights.
        model_config: transformers' config of the result, with its dtype and ``quantization_config``.
        tensors: of all files, in the order of their bytes.
        group_sizes: of weights that have another than the config's, by their names.
    """

    folder: Path
    config: Int4WeightOnlyConfig
    model_config: Any
    tensors: list[Planned]
    group_sizes: Mapping[str, int]

    def group_size(self, name: str) -> int:
        """Of a weight."""
        return self.group_sizes.get(name, self.config.group_size)

    def modules(self) -> tuple[list[str], list[str]]:
        """The names of those whose weight becomes 4-bit, and of those whose does not."""
        found: tuple[list[str], list[str]] = ([], [])
        for tensor in self.tensors:
            if tensor.name.endswith(".weight"):
                found[bool(tensor.kept)].append(tensor.name.removesuffix(".weight"))
        return found


def make_plan(
    folder: Path,
    config: Int4WeightOnlyConfig,
    *,
    skip: Sequence[str] = (),
    head: bool = False,
    embeddings: bool = False,
    dtype: torch.dtype | None = None,
    group_sizes: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Decide about every tensor.

    Args:
        folder: a Hugging Face directory with ``config.json`` and safetensors files.
        config: of the 4-bit weights.
        skip: modules to keep dense, read as transformers' ``modules_to_not_convert``: the start of a
            module's name, its end, or a regular expression for the start.
        head: also quantize the linear layer that makes the logits.
        embeddings: also quantize the input embedding; with a tied model that is the head, too.
        dtype: of the model; None for what its config says, or else its first floating tensor.
        group_sizes: of weights that are to have another than the config's, by their names.

    Raises:
        MissingExtra: transformers or safetensors is not installed.
        ValueError: the folder is no such directory, its model is quantized already, is of a class that
            transformers does not have, or has nothing to quantize; or a pattern is wrong, or what
            ``head`` or ``embeddings`` asks for cannot be done.
    """
    transformers = import_extra("transformers", "hf")
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(
            f"{str(folder)!r} is not a Hugging Face directory with a config.json and *.safetensors "
            "files; save the model there with save_pretrained first"
        )
    for pattern in skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"skip pattern {pattern!r} is no regular expression ({error}); "
                "give the name of a module, or correct the pattern"
            ) from None
    model_config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(model_config, "quantization_config", None) is not None:
        raise ValueError(
            f"{str(folder)!r} is quantized already, its config.json says; give the original model"
        )
    sources = [source for file in files for source in read_header(file)]
    dtype = dtype or dtype_of_model(model_config, sources)
    set_dtype(model_config, dtype)
    model = empty_model(transformers, model_config, dtype)
    included = _included(model, head, embeddings)
    chosen = {name for name in included if not _is_skipped(name, skip)}
    skipped = included - chosen
    quantization, quantizer = _quantizer(transformers, model, config, skipped, chosen, group_sizes)

    def size_of(name: str) -> int:
        return group_sizes.get(name, config.group_size)

    tensors = list(_planned(model, quantizer, sources, dtype, skip, included, size_of))
    if all(tensor.kept for tensor in tensors):
        raise ValueError(
            f"{str(folder)!r} has no weight to quantize: {type(model).__name__} has no torch.nn.Linear "
            "that is not kept; give another model, or skip less"
        )
    kept = set(quantizer.modules_to_not_convert)
    dense = dense_matrices(model, {tensor.name for tensor in tensors if not tensor.kept})
    if not dense <= kept:
        quantization.modules_to_not_convert = sorted(kept | dense)
    model_config.quantization_config = quantization
    return Plan(folder, config, model_config, tensors, group_sizes)


def dtype_of_model(model_config: Any, sources: list[Source]) -> torch.dtype:
    """As transformers' ``dtype="auto"``."""
    dtype = getattr(model_config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if dtype is None:
        dtype = next((source.dtype for source in sources if source.dtype.is_floating_point), None)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"the model is in {dtype}; 4-bit models run in bfloat16, float16 or float32, "
            "so choose one of these as dtype"
        )
    return dtype


def set_dtype(model_config: Any, dtype: torch.dtype) -> None:
    model_config.dtype = dtype
    for name in model_config.sub_configs:
        if getattr(model_config, name) is not None:
            getattr(model_config, name).dtype = dtype


def empty_model(transformers: Any, model_config: Any, dtype: torch.dtype) -> Any:
    names = getattr(model_config, "architectures", None) or [""]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(
            f"config.json names the class {names[0]!r}, which transformers {transformers.__version__} "
            "does not have; install one that does, or quantize the model in memory"
        )
    with torch.device("meta"):
        return model_class._from_config(model_config, dtype=dtype)


def _included(model: Any, head: bool, embeddings: bool) -> set[str]:
    """Names of the modules to quantize, before ``skip``: linear layers, and what is asked for."""
    source, output = ends(model)
    tied = output is not None and output.weight is getattr(source, "weight", None)
    if head and tied and not embeddings:
        raise ValueError(
            f"the output head of {type(model).__name__} is tied to its input embedding, which is not "
            "asked for; quantize both with --embeddings (embeddings=True), or leave out --head"
        )
    if embeddings and not isinstance(source, nn.Embedding):
        raise ValueError(
            f"the input embedding of {type(model).__name__} is a {type(source).__name__}; only "
            "torch.nn.Embedding can be quantized, so leave out --embeddings (embeddings=True)"
        )

    def is_included(module: nn.Module) -> bool:
        if module is output:
            return isinstance(module, nn.Linear) and (head or (embeddings and tied))
        return isinstance(module, nn.Linear) or (embeddings and module is source)

    return {name for name, module in model.named_modules() if is_included(module)}


def ends(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output head; None where the model has none or cannot tell."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return None, None


def _is_skipped(name: str, skip: Sequence[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(skip) and not should_convert_module(name, list(skip))


def _quantizer(
    transformers: Any,
    model: Any,
    config: Int4WeightOnlyConfig,
    skipped: set[str],
    chosen: set[str],
    group_sizes: Mapping[str, int],
) -> tuple[Any, Any]:
    """transformers' config and its quantizer, set up for the model; both sets are of modules."""
    from transformers.quantizers.auto import AutoHfQuantizer

    source, output = ends(model)
    modules = [model.get_submodule(name) for name in chosen]
    embeddings = any(module is source for module in modules)
    # transformers applies a plain config to linear layers only. One by name reaches the embedding, but
    # a tied one only with the flag; and what has no entry then stays dense, without "_default".
    by_name = embeddings or bool(group_sizes)
    quant_type = _by_name(model, config, chosen, group_sizes) if by_name else config

    def set_up(kept: list[str] | None) -> tuple[Any, Any]:
        quantization = transformers.TorchAoConfig(
            quant_type,
            modules_to_not_convert=kept,
            include_input_output_embeddings=embeddings or any(module is output for module in modules),
        )
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model)
        return quantization, quantizer

    quantization, quantizer = set_up(None)
    if skipped:
        # A list replaces what transformers keeps by itself (the output head), so it has to say both. It
        # has whole names: transformers 5.24 compares the end of a pattern with that of ``name.weight``.
        quantization, quantizer = set_up(sorted({*quantizer.modules_to_not_convert, *skipped}))
    return quantization, quantizer


def _by_name(
    model: Any, config: Int4WeightOnlyConfig, modules: set[str], group_sizes: Mapping[str, int]
) -> FqnToConfig:
    """The config for the weights of these modules, each in its own group size, and for nothing else.

    A bias is no weight; and ``"_default"``, which would be shorter, is dropped by torchao.
    """
    weights = [f"{name}.weight" for name in sorted(modules)]
    sizes = {weight: group_sizes.get(weight, config.group_size) for weight in weights}
    configs = {size: copy.copy(config) for size in sizes.values()}
    for size, each in configs.items():
        each.group_size = size
    return FqnToConfig({key: configs[size] for key, size in entries(model, sizes)})


class Names:
    """What a model calls the tensors of its files, and which dtype it holds them in.

    Args:
        model: without data.
        quantizer: transformers' own, whose conversions take part; or None.
        dtype: of the model.
    """

    def __init__(self, model: Any, quantizer: Any, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        conversions = get_model_conversion_mapping(model, None, quantizer)
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._in_float32 = [
            re.compile(rf"(^|\.){re.escape(module)}($|\.)") for module in model._get_dtype_plan(dtype)
        ]
        self.held = model.state_dict()

    def find(self, key: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of a converter that puts several tensors together."""
        from transformers.core_model_loading import rename_source_key

        options = {"base_model_prefix": self._prefix, "meta_state_dict": self.held}
        name, converter = rename_source_key(key, self._renamings, self._converters, **options)
        if name not in self.held and key in self.held:
            name, converter = rename_source_key(key, [], [], **options)
        return name, converter

    def stacked_by(self, pattern: str) -> list[str]:
        """The patterns whose tensors a converter stacks, joined along their rows in this order.

        Raises:
            ValueError: it does something else to them.
        """
        (converter,) = (each for each in self._converters if pattern in each.source_patterns)
        steps = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
        if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            raise ValueError(
                f"transformers changes the tensors {pattern} by "
                f"{', '.join(name for name, _ in steps)}, which 4-bit ones cannot follow; convert "
                "another checkpoint, or quantize the original model"
            )
        patterns: list[str] = list(converter.source_patterns)
        return patterns

    def dtype_of(self, name: str, dtype: torch.dtype | None = None) -> torch.dtype:
        """That of a tensor in the model; ``dtype`` in place of the model's, if given."""
        if any(pattern.search(name) for pattern in self._in_float32):
            return torch.float32
        found: torch.dtype = dtype or self.held[name].dtype
        return found


def expert_number(pattern: str, key: str) -> int:
    """The number for which a pattern of transformers has a star.

    Raises:
        ValueError: the name has none there.
    """
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    if found is None or not found.groups():
        raise ValueError(
            f"{key} is put together with other tensors by transformers, and is no expert by its name; "
            "load the model with from_pretrained beside this package, and save_pretrained it"
        )
    return int(found[1])


def _planned(
    model: Any,
    quantizer: Any,
    sources: list[Source],
    dtype: torch.dtype,
    skip: Sequence[str],
    included: set[str],
    group_size: Callable[[str], int],
) -> Iterator[Planned]:
    names = Names(model, quantizer, dtype)

    def kept(name: str, found: torch.dtype, shape: Sequence[int]) -> str:
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or not (
            module in included or isinstance(model.get_submodule(module), nn.Linear)
        ):
            return "not the weight of a linear layer"
        if _is_skipped(module, skip):
            return "skipped, as asked for"
        if module not in included or not quantizer.param_needs_quantization(model, name):
            return "kept by transformers, as the output head is"
        if found not in FLOAT_DTYPES:
            return f"its dtype is {found}"
        grows = packed_bytes(shape, group_size(name)) > math.prod(shape) * dtype.itemsize
        return "larger in 4 bits, because of padding" if grows else ""

    for source in sources:
        name, converter = names.find(source.key)
        if converter is not None:
            yield Planned(source, source.key, source.dtype, MERGED)
        elif name not in names.held:
            yield Planned(source, source.key, source.dtype, NOT_IN_MODEL)
        else:
            why = kept(name, source.dtype, source.shape)
            yield Planned(source, name, names.dtype_of(name, None if why else dtype), why)
