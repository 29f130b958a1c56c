"""A GGUF file to a directory of ours, weight by weight: the model that `from_pretrained` makes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.convert.directory import sqnr
from torchao_int4cpu.convert.foreign import DENSE, write_config
from torchao_int4cpu.convert.plan import set_dtype
from torchao_int4cpu.convert.shards import Item, Progress, Report, settings_of, write_directory
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.packed import packed_bytes
from torchao_int4cpu.importers.survey import survey_of_gguf
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


def convert_gguf(
    file: Path,
    out: Path,
    progress: Progress,
    dtype: torch.dtype | None = None,
    *,
    rest: Int4WeightOnlyConfig | None = None,
) -> Report:
    """Write a GGUF file as a directory of ours, with the tokenizer that is in it.

    Args:
        file: of an architecture that transformers reads.
        out: the directory to make, see `write_directory`.
        progress: told of each tensor.
        dtype: of the model; bfloat16 if None, as the file does not say.
        rest: how to quantize the linear layers and embeddings that the file has in more bits; None to
            keep them dense.

    Raises:
        MissingExtra: transformers or gguf is not installed.
        ValueError: the file is damaged, or has nothing in 4 bits.
    """
    transformers = import_extra("transformers", "hf")
    gguf = import_extra("gguf", "gguf")
    from torchao_int4cpu.integrations.transformers_gguf import Lazy, read_gguf

    dtype = dtype or torch.bfloat16
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is no file; give the path of a GGUF file")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if rest is None and survey_of_gguf(file).read == 0:
        raise ValueError(
            f"{str(file)!r} has no weight in Q4_0, Q4_1 or Q4_K; give --rest (rest=...) to quantize "
            "what it has, or another file"
        )
    with _damage_named(file):
        model_config = transformers.AutoConfig.from_pretrained(**where)
        set_dtype(model_config, dtype)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    model_config.architectures = [type(model).__name__]  # which the file does not say

    def found() -> Iterator[tuple[str, Any, int]]:
        with _damage_named(file):
            yield from read_gguf(str(file), model, dtype)

    def items() -> Iterator[Item]:
        for name, value, size in found():
            if isinstance(value, Lazy):
                yield Item(name, size, size, "", functools.partial(_lazily, value))
            elif rest is not None and _is_wide(model, name):
                after = packed_bytes(value.shape, rest.group_size)
                yield Item(name, size, after, "", functools.partial(_quantized, value, rest))
            else:
                yield Item(name, size, value.nbytes, DENSE, functools.partial(_made, value))

    def finish(made: Path, entries: dict[str, Any]) -> None:
        write_config(model, model_config, entries, made)
        if "tokenizer.ggml.tokens" in gguf.GGUFReader(file).fields:
            transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(made)

    settings = settings_of([file], format="gguf", dtype=dtype, rest=rest)
    return write_directory(items(), out, settings, finish, progress)


@contextlib.contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Name a damaged file: what gguf and transformers raise of one is of any class.

    Raises:
        ValueError: they raise anything.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{str(file)!r} cannot be read as a GGUF model ({type(error).__name__}: {error}); fetch it "
            "again, or convert one of an architecture that transformers reads"
        ) from error


def _is_wide(model: Any, name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last == "weight" and isinstance(model.get_submodule(module), (nn.Linear, nn.Embedding))


def _quantized(value: Tensor, config: Int4WeightOnlyConfig) -> tuple[Tensor, float]:
    groupwise = choose_qparams(value, config.group_size, config.int4_choose_qparams_algorithm)
    weight = Int4OpaqueTensor.from_groupwise(groupwise, dtype=value.dtype)
    return weight, sqnr(value, groupwise)


def _lazily(value: Any) -> tuple[Tensor, float]:
    return value[:], math.inf


def _made(value: Tensor) -> tuple[Tensor, float]:
    return value, math.inf
