"""How ``from_pretrained(..., gguf_file=...)`` keeps the 4-bit weights of a GGUF file.

transformers gives rows of some weights another order than the file has (Llama's queries and keys), by
the architecture. It is asked for that order on the numbers of the rows, so that codes can follow it.
Where it does more than that to a weight, and for the few architectures that it keeps in blocks itself,
it loads the weight as it does without this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from torchao_int4cpu.importers.gguf import KINDS, groupwise_of_gguf
from torchao_int4cpu.importers.weight import as_weight
from torchao_int4cpu.integrations.transformers_quantizers import hand_over
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


class Gguf(GgufHfQuantizer):  # type: ignore[misc]  # transformers has no annotations
    """transformers' quantizer, but 4-bit weights of linear layers stay as they are."""

    def update_dtype(self, dtype: torch.dtype | None) -> Any:
        if self.supported:
            return super().update_dtype(dtype)
        self.dtype = dtype or torch.get_default_dtype()  # any is fast: no kernel asks for float32
        return self.dtype

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Any]:
        if self.supported:
            state: dict[str, Any] = super().get_state_dict(checkpoint_file, model)
            return state
        return {name: value for name, value, _ in read_gguf(checkpoint_file, model, self.dtype)}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.supported:
            return super()._process_model_after_weight_loading(model, **kwargs)
        return hand_over(self, model, **kwargs)


class Lazy:
    """A 4-bit weight that is made when it is taken, so that no second copy of the file is held."""

    def __init__(self, make: Callable[[], Tensor], shape: tuple[int, ...]) -> None:
        self._make, self._shape = make, shape

    def get_dtype(self) -> str:
        return "U8"  # not to be cast

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: object) -> Tensor:
        return self._make()


def read_gguf(file: str, model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any, int]]:
    """The parameters of a model: their names, themselves (4-bit ones `Lazy`), their bytes in the file.

    Args:
        file: a GGUF file.
        model: of its architecture; only its names and classes are asked for.
        dtype: of the parameters.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    processor_class = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
    processor = processor_class(config=model.config.to_dict())
    names = legacy.get_gguf_hf_weights_map(model, processor)
    parsed: dict[str, Any] = {"tensors": {}}  # where some processors put what they split

    def process(name: str, weights: Any) -> tuple[str, Any]:
        done = processor.process(
            weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=parsed
        )
        return done.name, done.weights

    for tensor in reader.tensors:
        kind, name = tensor.tensor_type.name, names.get(tensor.name)
        if kind in KINDS and name is not None and _is_linear(model, name):
            k, n = (int(size) for size in tensor.shape)
            order = _order_of_rows(n, functools.partial(process, tensor.name))
            if order is not None:
                lazy = Lazy(_maker(tensor.data, kind, k, order, dtype), (n, k))
                yield name, lazy, int(tensor.n_bytes)
                continue
        changed, weights = process(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        if changed in names:
            dense = torch.from_numpy(np.copy(weights)).to(dtype)
            yield names[changed], dense, int(tensor.n_bytes)
    yield from ((name, value, value.nbytes) for name, value in parsed["tensors"].items())


def _is_linear(model: Any, name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last == "weight" and type(model.get_submodule(module)) is nn.Linear


def _order_of_rows(n: int, process: Callable[[Any], tuple[str, Any]]) -> Tensor | None:
    """The row of the file that each row of the parameter is; None if they become other rows."""
    numbers = np.repeat(np.arange(n, dtype=np.float64)[:, None], 2, axis=1)
    found = np.asarray(process(numbers)[1])
    if found.shape != numbers.shape or not np.array_equal(np.sort(found, axis=0), numbers):
        return None
    return torch.from_numpy(found[:, 0].astype(np.int64))


def _maker(
    data: Any, kind: str, k: int, order: Tensor, dtype: torch.dtype
) -> Callable[[], Int4OpaqueTensor]:
    def make() -> Int4OpaqueTensor:
        raw = torch.from_numpy(np.array(data))
        blocks = raw.reshape(len(order), raw.numel() // max(1, len(order)))[order]  # perhaps of no row
        return as_weight(groupwise_of_gguf(blocks, kind, k), dtype)

    return make
