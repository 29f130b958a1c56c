"""What is to become of each tensor of a Hugging Face directory, asked of transformers.

Which weights turn 4-bit, in which dtype and under which name: as `from_pretrained` would have it with
the same config. It is asked on a model without data. Needs the ``hf`` extra.
"""

from __future__ import annotations

import copy
import itertools
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
from torchao_int4cpu.convert.names import Names, Stacks
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.groupwise import FLOAT_DTYPES
from torchao_int4cpu.format.packed import packed_bytes
from torchao_int4cpu.integrations.transformers_saving import dense_matrices, entries
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

#: Why tensors are kept under the names that they have.
MERGED, NOT_IN_MODEL = "put together with others by transformers", "not in the model"

#: Why experts are kept.
NOT_ASKED_FOR = "experts, without --experts"


class Planned(NamedTuple):
    """What becomes of a tensor.

    Attributes:
        sources: the tensor; or of a stack that the files have apart, for each expert the parts of which
            it consists, in the order of their rows.
        name: of the parameter; the key of the source where transformers changes more than the name.
        key: in the files that are made, see `Names.written`.
        shape: in the model; of a 4-bit one ``[N, K]`` or ``[E, N, K]``.
        dtype: that the model holds it in.
        kept: why it is not quantized; empty if it is.
        is_input_first: whether the model has it as ``[E, K, N]``.
    """

    sources: list[list[Source]]
    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: str
    is_input_first: bool = False

    @property
    def source(self) -> Source:
        """The tensor, or the first part of it."""
        return self.sources[0][0]

    @property
    def is_apart(self) -> bool:
        """Whether each expert of a stack is by itself in the files."""
        return len(self.source.shape) < len(self.shape)

    @property
    def nbytes(self) -> int:
        """In the files."""
        return sum(source.nbytes for parts in self.sources for source in parts)


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

    def by_name(self) -> FqnToConfig:
        """torchao's config of the 4-bit weights, each by its whole name."""
        names = [tensor.name for tensor in self.tensors if not tensor.kept]
        return FqnToConfig({name: _in_groups(self.config, self.group_size(name)) for name in names})

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
    experts: bool = False,
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
        experts: also quantize the experts that transformers runs as stacks.
        dtype: of the model; None for what its config says, or else its first floating tensor.
        group_sizes: of weights that are to have another than the config's, by their names.

    Raises:
        MissingExtra: transformers or safetensors is not installed.
        ValueError: the folder is no such directory, its model is quantized already, is of a class that
            transformers does not have, or has nothing to quantize; or a pattern is wrong, or what
            ``head``, ``embeddings`` or ``experts`` asks for cannot be done.
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
    included = _included(model, head, embeddings, experts)
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


def _included(model: Any, head: bool, embeddings: bool, experts: bool) -> set[str]:
    """Names of the weights to quantize, before ``skip``: of linear layers, and what is asked for."""
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
    stacks = expert_stacks(model) if experts else {}
    if experts and not stacks:
        raise ValueError(
            f"{type(model).__name__} has no experts that transformers runs as stacks, with "
            "set_experts_implementation; leave out --experts (experts=True)"
        )

    def is_included(module: nn.Module) -> bool:
        if module is output:
            return isinstance(module, nn.Linear) and (head or (embeddings and tied))
        return isinstance(module, nn.Linear) or (embeddings and module is source)

    layers = {f"{name}.weight" for name, module in model.named_modules() if is_included(module)}
    return layers | stacks.keys()


def expert_stacks(model: nn.Module) -> dict[str, bool]:
    """The stacks of experts of a model by their names: whether they are ``[E, K, N]``."""
    return {
        f"{name}.{parameter}": module.is_transposed
        for name, module in model.named_modules()
        if isinstance(getattr(module, "is_transposed", None), bool)
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }


def ends(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output head; None where the model has none or cannot tell."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return None, None


def _is_skipped(name: str, skip: Sequence[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(skip) and not should_convert_module(name.removesuffix(".weight"), list(skip))


def _quantizer(
    transformers: Any,
    model: Any,
    config: Int4WeightOnlyConfig,
    skipped: set[str],
    chosen: set[str],
    group_sizes: Mapping[str, int],
) -> tuple[Any, Any]:
    """transformers' config and its quantizer, set up for the model; both sets are of weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    source, output = ends(model)
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in chosen]
    embeddings = any(module is source for module in modules)
    # transformers applies a plain config to linear layers only. One by name reaches experts, and the
    # embedding, but a tied one only with the flag; what has no entry stays dense without "_default".
    by_name = embeddings or bool(group_sizes) or not all(name.endswith(".weight") for name in chosen)
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
        kept = {name.removesuffix(".weight") for name in skipped}
        quantization, quantizer = set_up(sorted({*quantizer.modules_to_not_convert, *kept}))
    return quantization, quantizer


def _by_name(
    model: Any, config: Int4WeightOnlyConfig, weights: set[str], group_sizes: Mapping[str, int]
) -> FqnToConfig:
    """The config for these weights, each in its own group size, and for nothing else.

    A bias is no weight; and ``"_default"``, which would be shorter, is dropped by torchao.
    """
    sizes = {weight: group_sizes.get(weight, config.group_size) for weight in sorted(weights)}
    configs = {size: _in_groups(config, size) for size in sizes.values()}
    return FqnToConfig({key: configs[size] for key, size in entries(model, sizes)})


def _in_groups(config: Int4WeightOnlyConfig, group_size: int) -> Int4WeightOnlyConfig:
    made = copy.copy(config)
    made.group_size = group_size
    return made


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
    experts, stacks = expert_stacks(model), Stacks[Source](names)
    keys: dict[str, str] = {}

    def kept(name: str, found: torch.dtype, shape: Sequence[int]) -> str:
        module, _, parameter = name.rpartition(".")
        is_linear = parameter == "weight" and isinstance(model.get_submodule(module), nn.Linear)
        if name not in included and not is_linear:
            return NOT_ASKED_FOR if name in experts else "not the weight of a linear layer"
        if _is_skipped(name, skip):
            return "skipped, as asked for"
        if name not in included or not quantizer.param_needs_quantization(model, name):
            return "kept by transformers, as the output head is"
        if found not in FLOAT_DTYPES:
            return f"its dtype is {found}"
        grows = packed_bytes(shape, group_size(name)) > math.prod(shape) * dtype.itemsize
        return "larger in 4 bits, because of padding" if grows else ""

    def planned(
        name: str, key: str, sources: list[list[Source]], shape: tuple[int, ...]
    ) -> Iterator[Planned]:
        is_input_first = experts.get(name, False)
        rows_first = (*shape[:-2], shape[-1], shape[-2]) if is_input_first else shape
        why = kept(name, sources[0][0].dtype, rows_first)
        dtype_in_4_bits = names.dtype_of(name, dtype)
        made = Planned(sources, name, key, rows_first, dtype_in_4_bits, "", is_input_first)
        if not why:
            yield made
        elif made.is_apart:
            for source in itertools.chain(*sources):
                yield as_it_is(source, why)
        else:
            yield Planned(sources, name, key, shape, names.dtype_of(name), why)

    def as_it_is(source: Source, why: str) -> Planned:
        return Planned([[source]], source.key, source.key, source.shape, source.dtype, why)

    for source in sources:
        name, converter = names.find(source.key)
        if converter is not None and name in experts and name in included:
            keys[name] = names.written(name, source.key, converter)
            stacks.add(name, converter, source.key, source)
        elif converter is not None:
            yield as_it_is(source, NOT_ASKED_FOR if name in experts else MERGED)
        elif name not in names.held:
            yield as_it_is(source, NOT_IN_MODEL)
        else:
            yield from planned(name, names.written(name, source.key), [[source]], source.shape)
    for name in stacks:
        yield from planned(name, keys[name], stacks.of(name), tuple(names.held[name].shape))
