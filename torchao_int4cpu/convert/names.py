"""What transformers calls the tensors of a model's files, and which of them it puts together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

from torchao_int4cpu.checkpoint.safetensors import part_key

T = TypeVar("T")


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

    def written(self, name: str, key: str, pattern: str | None = None) -> str:
        """What a tensor is called in files that are made: as those that were read call it.

        vLLM goes by the names of the original files (Mixtral's, which transformers renames). Where
        transformers would not find the parts of a 4-bit weight under such a name, it is the model's.

        Args:
            name: of the parameter.
            key: in the files that were read; of a stack that they have apart, that of any part.
            pattern: as `find` gives it.
        """
        if pattern is not None:
            stem = key[: _expert(pattern, key).start(1)]
            key = f"{stem}{name.rpartition('.')[2]}"
        if key == name or "." not in key or "." not in name:
            return name
        return key if self.find(part_key(key, "qdata"))[0] == part_key(name, "qdata") else name

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
    return int(_expert(pattern, key)[1])


def _expert(pattern: str, key: str) -> re.Match[str]:
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    if found is None or not found.groups():
        raise ValueError(
            f"{key} is put together with other tensors by transformers, and is no expert by its name; "
            "load the model with from_pretrained beside this package, and save_pretrained it"
        )
    return found


class Stacks(Generic[T]):
    """What the files have of experts, each by itself, and the model as a stack ``[E, N, K]``.

    Args:
        names: of the model.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._found: dict[str, dict[str, dict[int, T]]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def add(self, name: str, pattern: str, key: str, part: T) -> None:
        """Note what the file has under a key, with what `Names.find` says of it.

        Raises:
            ValueError: it is no expert, by its key.
        """
        self._found.setdefault(name, {}).setdefault(pattern, {})[expert_number(pattern, key)] = part

    def of(self, name: str) -> list[list[T]]:
        """For each expert of a stack its parts, in the order of their rows.

        Raises:
            ValueError: some are missing, or the model has them otherwise than as a stack.
        """
        found = self._found[name]
        patterns = self._names.stacked_by(next(iter(found)))
        count = self._names.held[name].shape[0]
        numbers = list(range(count))
        if any(sorted(found.get(pattern, {})) != numbers for pattern in patterns):
            raise ValueError(f"the file has not all of the {count} experts of {name}; fetch it again")
        return [[found[pattern][number] for pattern in patterns] for number in numbers]
