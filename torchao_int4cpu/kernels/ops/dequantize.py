"""Rows of a packed weight as ops that torch can trace, without gradients.

- ``torchao_int4cpu::int4_embedding`` is `embedding`.
- ``torchao_int4cpu::int4_dequantize`` is `dequantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.format.checks import check_one_device, check_packed
from torchao_int4cpu.format.layout import layout_named
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.ops.register import define, is_eager
from torchao_int4cpu.kernels.portable.dequantize import dequantize, embedding

ops = torch.ops.torchao_int4cpu


def traceable_embedding(indices: Tensor, weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`embedding` as one op."""
    if is_eager(indices, weight.qdata, weight.scale_and_zero):
        return embedding(indices, weight, dtype)
    rows: Tensor = ops.int4_embedding.default(indices, *_arguments(weight), dtype)
    return rows


def traceable_dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`dequantize` as one op."""
    if is_eager(weight.qdata, weight.scale_and_zero):
        return dequantize(weight, dtype)
    dense: Tensor = ops.int4_dequantize.default(*_arguments(weight), dtype)
    return dense


def _arguments(weight: PackedInt4) -> tuple[object, ...]:
    """In the order of the schema."""
    return weight._replace(layout=weight.layout.name)  # type: ignore[arg-type]  # of ops: a str


def _weight_of(arguments: Sequence[Any]) -> PackedInt4:
    """The weight that the arguments of an op stand for, as they come: see `_WEIGHT`."""
    qdata, scale_and_zero, group_size, layout, rows, columns = arguments
    return PackedInt4(qdata, scale_and_zero, group_size, layout_named(layout), rows, columns)


def _embedding_kernel(indices: Tensor, *arguments: Any) -> Tensor:
    *of_weight, dtype = arguments
    weight = _weight_of(of_weight)
    check_packed(weight, 2, indices)
    return embedding(indices, weight, dtype)


def _embedding_fake(indices: Tensor, *arguments: Any) -> Tensor:
    qdata, scale_and_zero, *_, columns, dtype = arguments
    check_one_device(indices=indices, qdata=qdata, scale_and_zero=scale_and_zero)
    return indices.new_empty(*indices.shape, columns, dtype=dtype)


def _dequantize_kernel(*arguments: Any) -> Tensor:
    *of_weight, dtype = arguments
    weight = _weight_of(of_weight)
    check_packed(weight, 2)
    return dequantize(weight, dtype)


def _dequantize_fake(*arguments: Any) -> Tensor:
    qdata, scale_and_zero, *_, rows, columns, dtype = arguments
    check_one_device(qdata=qdata, scale_and_zero=scale_and_zero)
    dense: Tensor = qdata.new_empty(rows, columns, dtype=dtype)
    return dense


_WEIGHT = "Tensor qdata, Tensor scale_and_zero, int group_size, str layout, int rows, int columns"
define(
    "int4_embedding",
    f"(Tensor indices, {_WEIGHT}, ScalarType dtype) -> Tensor",
    _embedding_kernel,
    _embedding_fake,
)
define(
    "int4_dequantize", f"({_WEIGHT}, ScalarType dtype) -> Tensor", _dequantize_kernel, _dequantize_fake
)
