"""The product as ops that torch can trace and differentiate.

``torchao_int4cpu::int4_mm`` is `int4_mm`; ``torchao_int4cpu::int4_mm_grad`` its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torchao_int4cpu.kernels.choice import decode_max_rows, int4_mm
from torchao_int4cpu.kernels.decode import decode
from torchao_int4cpu.kernels.packed import PackedInt4
from torchao_int4cpu.kernels.prefill import int4_mm_grad
from torchao_int4cpu.layout import layout_named, native_layout


def traceable_int4_mm(x: Tensor, weight: PackedInt4) -> Tensor:
    """`int4_mm` for autograd, `torch.compile` and `torch.export`: one op with a known shape.

    A call that is certain to be a `decode` shows PyTorch's own op in the graph. Otherwise the choice
    is made inside the op ``torchao_int4cpu::int4_mm``, when it runs, so that the number of rows is
    never guarded on: one graph serves every M >= 2.
    """
    m = x.shape[0]
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    if not wants_grad and statically_known_true(m > 0) and _certainly_decode(m, weight):
        return decode(x, weight)
    y: Tensor = torch.ops.torchao_int4cpu.int4_mm(
        x, weight.qdata, weight.scale_and_zero, weight.group_size, weight.layout.name, weight.n
    )
    return y


def _certainly_decode(m: int, weight: PackedInt4) -> bool:
    """Whether `choose_kernel` gives decode for every value that a symbolic ``m`` can have."""
    return weight.layout == native_layout() and statically_known_true(m <= decode_max_rows(weight))


_SCHEMA = (
    "(Tensor x, Tensor qdata, Tensor scale_and_zero, int group_size, str layout, int columns) -> Tensor"
)


@torch.library.custom_op(
    "torchao_int4cpu::int4_mm", mutates_args=(), device_types="cpu", schema=_SCHEMA
)
def _int4_mm_op(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, group_size: int, layout: str, columns: int
) -> Tensor:
    weight = PackedInt4(
        qdata, scale_and_zero, group_size, layout_named(layout), n=columns, k=x.shape[1]
    )
    return int4_mm(x, weight)


@torch.library.custom_op(
    "torchao_int4cpu::int4_mm_grad", mutates_args=(), device_types="cpu", schema=_SCHEMA
)
def _int4_mm_grad_op(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, group_size: int, layout: str, columns: int
) -> Tensor:
    weight = PackedInt4(
        qdata, scale_and_zero, group_size, layout_named(layout), n=x.shape[1], k=columns
    )
    return int4_mm_grad(x, weight)


@_int4_mm_op.register_fake
@_int4_mm_grad_op.register_fake
def _fake(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, group_size: int, layout: str, columns: int
) -> Tensor:
    return x.new_empty(x.shape[0], columns)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qdata, scale_and_zero, group_size, layout, _ = inputs
    ctx.save_for_backward(qdata, scale_and_zero)
    ctx.constants = (group_size, layout, x.shape[1])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qdata, scale_and_zero = ctx.saved_tensors
    group_size, layout, k = ctx.constants
    grad_x = torch.ops.torchao_int4cpu.int4_mm_grad(grad, qdata, scale_and_zero, group_size, layout, k)
    return grad_x, None, None, None, None, None


_int4_mm_op.register_autograd(_gradient, setup_context=_save_for_gradient)
