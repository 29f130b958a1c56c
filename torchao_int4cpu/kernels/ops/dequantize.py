"""Rows of a packed weight as ops that torch can trace, without gradients.

- ``torchao_int4cpu::int4_embedding`` is `embedding`.
- ``torchao_int4cpu::int4_dequantize`` is `dequantize`.
"""

from __future__ import annotations

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


def _embedding_kernel(
    indices: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = PackedInt4(qdata, scale_and_zero, group_size, layout_named(layout), rows, columns)
    check_packed(weight, 2, indices)
    return embedding(indices, weight, dtype)


def _embedding_fake(
    indices: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    check_one_device(indices=indices, qdata=qdata, scale_and_zero=scale_and_zero)
    return indices.new_empty(*indices.shape, columns, dtype=dtype)


def _dequantize_kernel(
    qdata: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = PackedInt4(qdata, scale_and_zero, group_size, layout_named(layout), rows, columns)
    check_packed(weight, 2)
    return dequantize(weight, dtype)


def _dequantize_fake(
    qdata: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    check_one_device(qdata=qdata, scale_and_zero=scale_and_zero)
    return qdata.new_empty(rows, columns, dtype=dtype)


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
