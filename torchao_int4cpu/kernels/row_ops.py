"""Rows of a packed weight as ops that torch can trace, without gradients.

- ``torchao_int4cpu::int4_embedding`` is `embedding`.
- ``torchao_int4cpu::int4_dequantize`` is `dequantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.kernels.checks import check_one_device, check_weight
from torchao_int4cpu.kernels.ops import runs_at_once
from torchao_int4cpu.kernels.packed import PackedInt4
from torchao_int4cpu.kernels.rows import dequantize, embedding
from torchao_int4cpu.layout import layout_named

ops = torch.ops.torchao_int4cpu


def traceable_embedding(indices: Tensor, weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`embedding` as one op."""
    if runs_at_once(indices, weight.qdata, weight.scale_and_zero):
        return embedding(indices, weight, dtype)
    qdata, scale_and_zero, group_size, layout, n, k = weight
    rows: Tensor = ops.int4_embedding.default(
        indices, qdata, scale_and_zero, group_size, layout.name, n, k, dtype
    )
    return rows


def traceable_dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """`dequantize` as one op."""
    if runs_at_once(weight.qdata, weight.scale_and_zero):
        return dequantize(weight, dtype)
    qdata, scale_and_zero, group_size, layout, n, k = weight
    dense: Tensor = ops.int4_dequantize.default(
        qdata, scale_and_zero, group_size, layout.name, n, k, dtype
    )
    return dense


def _embedding_op(
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
    check_weight(weight, indices)
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


def _dequantize_op(
    qdata: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    layout: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = PackedInt4(qdata, scale_and_zero, group_size, layout_named(layout), rows, columns)
    check_weight(weight)
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


_library = torch.library.Library("torchao_int4cpu", "FRAGMENT")
_PARTS = "Tensor qdata, Tensor scale_and_zero"
_REST = "int group_size, str layout, int rows, int columns, ScalarType dtype"
for _name, _indices, _op, _fake in (
    ("int4_embedding", "Tensor indices, ", _embedding_op, _embedding_fake),
    ("int4_dequantize", "", _dequantize_op, _dequantize_fake),
):
    _library.define(f"{_name}({_indices}{_PARTS}, {_REST}) -> Tensor")
    _library.impl(_name, _op, "CPU")
    torch.library.register_fake(f"torchao_int4cpu::{_name}", _fake, lib=_library)
