"""Products with stacks of experts as ops that torch can trace, without gradients.

- ``torchao_int4cpu::int4_grouped_mm`` and ``int4_grouped_mm_transposed``: rows sorted by expert.
- ``torchao_int4cpu::int4_bmm`` and ``int4_bmm_transposed``: as many rows for every expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.kernels.checks import check_activation, check_one_device, check_weight
from torchao_int4cpu.kernels.experts import bmm, bmm_transposed, grouped_mm, grouped_mm_transposed
from torchao_int4cpu.kernels.ops import runs_at_once
from torchao_int4cpu.kernels.packed import PackedExperts
from torchao_int4cpu.layout import layout_named

ops = torch.ops.torchao_int4cpu


def traceable_grouped_mm(x: Tensor, experts: PackedExperts, offs: Tensor) -> Tensor:
    """`grouped_mm` as one op."""
    if runs_at_once(x, offs, experts.qdata, experts.scale_and_zero):
        return grouped_mm(x, experts, offs)
    qdata, scale_and_zero, group_size, layout, n, _ = experts
    y: Tensor = ops.int4_grouped_mm.default(x, qdata, scale_and_zero, offs, group_size, layout.name, n)
    return y


def traceable_grouped_mm_transposed(x: Tensor, experts: PackedExperts, offs: Tensor) -> Tensor:
    """`grouped_mm_transposed` as one op."""
    if runs_at_once(x, offs, experts.qdata, experts.scale_and_zero):
        return grouped_mm_transposed(x, experts, offs)
    qdata, scale_and_zero, group_size, layout, _, k = experts
    y: Tensor = ops.int4_grouped_mm_transposed.default(
        x, qdata, scale_and_zero, offs, group_size, layout.name, k
    )
    return y


def traceable_bmm(x: Tensor, experts: PackedExperts) -> Tensor:
    """`bmm` as one op."""
    if runs_at_once(x, experts.qdata, experts.scale_and_zero):
        return bmm(x, experts)
    qdata, scale_and_zero, group_size, layout, n, _ = experts
    y: Tensor = ops.int4_bmm.default(x, qdata, scale_and_zero, group_size, layout.name, n)
    return y


def traceable_bmm_transposed(x: Tensor, experts: PackedExperts) -> Tensor:
    """`bmm_transposed` as one op."""
    if runs_at_once(x, experts.qdata, experts.scale_and_zero):
        return bmm_transposed(x, experts)
    qdata, scale_and_zero, group_size, layout, _, k = experts
    y: Tensor = ops.int4_bmm_transposed.default(x, qdata, scale_and_zero, group_size, layout.name, k)
    return y


def _grouped_op(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    offs: Tensor,
    group_size: int,
    layout: str,
    columns: int,
) -> Tensor:
    check_activation(x, None, None)
    experts = PackedExperts(
        qdata, scale_and_zero, group_size, layout_named(layout), columns, x.shape[1]
    )
    check_weight(experts, x, offs)
    return grouped_mm(x, experts, offs)


def _grouped_transposed_op(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    offs: Tensor,
    group_size: int,
    layout: str,
    columns: int,
) -> Tensor:
    check_activation(x, None, None)
    experts = PackedExperts(
        qdata, scale_and_zero, group_size, layout_named(layout), x.shape[1], columns
    )
    check_weight(experts, x, offs)
    return grouped_mm_transposed(x, experts, offs)


def _grouped_fake(
    x: Tensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    offs: Tensor,
    group_size: int,
    layout: str,
    columns: int,
) -> Tensor:
    check_one_device(x=x, qdata=qdata, scale_and_zero=scale_and_zero, offs=offs)
    return x.new_empty(x.shape[0], columns)


def _bmm_op(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, group_size: int, layout: str, columns: int
) -> Tensor:
    check_activation(x, None, None, None)
    experts = PackedExperts(
        qdata, scale_and_zero, group_size, layout_named(layout), columns, x.shape[2]
    )
    check_weight(experts, x)
    return bmm(x, experts)


def _bmm_transposed_op(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, group_size: int, layout: str, columns: int
) -> Tensor:
    check_activation(x, None, None, None)
    experts = PackedExperts(
        qdata, scale_and_zero, group_size, layout_named(layout), x.shape[2], columns
    )
    check_weight(experts, x)
    return bmm_transposed(x, experts)


def _bmm_fake(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, group_size: int, layout: str, columns: int
) -> Tensor:
    check_one_device(x=x, qdata=qdata, scale_and_zero=scale_and_zero)
    return x.new_empty(x.shape[0], x.shape[1], columns)


_library = torch.library.Library("torchao_int4cpu", "FRAGMENT")
_PARTS = "Tensor x, Tensor qdata, Tensor scale_and_zero"
_REST = "int group_size, str layout, int columns"
for _name, _offs, _op, _fake in (
    ("int4_grouped_mm", "Tensor offs, ", _grouped_op, _grouped_fake),
    ("int4_grouped_mm_transposed", "Tensor offs, ", _grouped_transposed_op, _grouped_fake),
    ("int4_bmm", "", _bmm_op, _bmm_fake),
    ("int4_bmm_transposed", "", _bmm_transposed_op, _bmm_fake),
):
    _library.define(f"{_name}({_PARTS}, {_offs}{_REST}) -> Tensor")
    _library.impl(_name, _op, "CPU")
    torch.library.register_fake(f"torchao_int4cpu::{_name}", _fake, lib=_library)
