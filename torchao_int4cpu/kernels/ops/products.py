"""The product with one weight as ops that torch can trace and differentiate.

- ``torchao_int4cpu::int4_mm`` is `int4_mm`, for inference.
- ``torchao_int4cpu::int4_mm_differentiable`` is the same with a gradient for x. It is an op of its own
  because torch spends 6 microseconds a call on the machinery of one, needed or not.
- ``torchao_int4cpu::int4_mm_grad`` is that gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.flop_counter import register_flop_formula

from torchao_int4cpu.format.checks import check_activation
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, native_layout, pack
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.ops.register import LIBRARY, define_product, is_eager
from torchao_int4cpu.kernels.portable.decode import decode
from torchao_int4cpu.kernels.selection import (
    decode_max_rows,
    get_kernel,
    int4_mm,
    int4_mm_transposed,
    native_kernel,
    op_function,
)


def traceable_int4_mm(x: Tensor, weight: PackedInt4) -> Tensor:
    """`int4_mm`, as one op with a known shape for autograd, `torch.compile` and `torch.export`.

    A plain eager call runs the kernel at once. In a trace, a call that is certain to be a `decode`
    shows PyTorch's own op in the graph. Otherwise the choice is made inside our op, when it runs, so
    that the number of rows is never guarded on: one graph serves every M >= 2. An exported program may
    run elsewhere, where PyTorch's op reads another layout, so it shows that op only if `set_kernel`
    asked for it, together with a check.
    """
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    if not wants_grad and is_eager(x):
        return int4_mm(x, weight)
    m = x.shape[0]
    if (
        not wants_grad
        and torch.compiler.is_compiling()  # else it is a mode that watches, and can count our op
        and statically_known_true(m > 0)
        and _certainly_decode(m, weight)
    ):
        if torch.compiler.is_exporting():
            _assert_layout(weight.layout)
        return decode(x, weight)
    ops = torch.ops.torchao_int4cpu
    op = ops.int4_mm_differentiable if wants_grad else ops.int4_mm
    qdata, scale_and_zero, group_size, layout, n, _ = weight
    y: Tensor = op.default(x, qdata, scale_and_zero, group_size, layout.name, n)
    return y


def _certainly_decode(m: int, weight: PackedInt4) -> bool:
    """Whether `choose_kernel` gives decode for every value that a symbolic ``m`` can have."""
    if native_kernel(weight.layout) is not None:
        return False
    if weight.scale_and_zero.dtype != torch.bfloat16:
        return False  # decode calls PyTorch's op on halves of them, which a compiler may round away
    if not weight.scale_and_zero.is_contiguous():
        return False  # decode would copy it, and inductor cannot hand such a copy to PyTorch's op
    if torch.compiler.is_exporting() and get_kernel() != "aten":
        return False  # our op reads every layout, wherever the program runs
    return weight.layout == native_layout() and statically_known_true(m <= decode_max_rows(weight))


def _assert_layout(layout: NibbleLayout) -> None:
    """Trace a check that PyTorch's op reads ``layout`` in the process that runs the program.

    There it packs a small known matrix, which is an ``arange``: a constant could be folded with all
    that is computed of it, so that the machine that compiles would do the packing.
    """
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_known_codes(), 1)
    torch.ops.aten._assert_async.msg(
        _checksum(packed) == _CHECKSUMS[layout.name],
        # No double quotes: inductor writes the message into C++ as it is.
        f"this program holds 4-bit weights packed for {layout.name!r}, and PyTorch's int4 op reads "
        "another layout in this process (other instruction set or ATEN_CPU_CAPABILITY); export it "
        "again here, or anywhere under torchao_int4cpu.set_kernel('auto')",
    )


def _known_codes() -> Tensor:
    """int32 ``[64, 2]``: a block of the largest layout, with a period that no layout has."""
    return torch.arange(128, dtype=torch.int32, device="cpu").view(64, 2) % 13


def _checksum(packed: Tensor) -> Tensor:
    """int64 scalar that depends on where each byte lies."""
    return (packed.view(-1) * torch.arange(packed.numel(), device="cpu")).sum()


_CHECKSUMS = {
    name: int(_checksum(pack(_known_codes().to(torch.uint8), layout)))
    for name, layout in LAYOUTS.items()
}


def _int4_mm_transposed(y: Tensor, weight: PackedInt4) -> Tensor:
    check_activation(y, None, weight.n)
    return int4_mm_transposed(y, weight)


define_product("int4_mm", int4_mm, ndim=2, function=op_function)
define_product("int4_mm_differentiable", int4_mm, ndim=2, function=op_function)

#: ``y · W``: ``(y [M, N], weight)`` to ``[M, K]``. It has no gradient.
traceable_int4_mm_transposed = define_product(
    "int4_mm_grad", _int4_mm_transposed, ndim=2, transposed=True
)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qdata, scale_and_zero, group_size, layout, _ = inputs
    ctx.save_for_backward(qdata, scale_and_zero)
    ctx.constants = (group_size, layout, x.shape[1])


def _gradient_by(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """Both products are linear in their activation, so each is the gradient of the other."""

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op = getattr(torch.ops.torchao_int4cpu, name)
        return op(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None, None

    return gradient


for _name, _other in (
    ("int4_mm_differentiable", "int4_mm_grad"),
    ("int4_mm_grad", "int4_mm_differentiable"),
):
    torch.library.register_autograd(
        f"torchao_int4cpu::{_name}", _gradient_by(_other), setup_context=_save_weight, lib=LIBRARY
    )


def _count_operations(
    x: Sequence[int],
    qdata: object,
    scale_and_zero: object,
    group: int,
    layout: str,
    columns: int,
    **_: Any,
) -> int:
    """For `torch.utils.flop_counter`: a multiplication and an addition for each pair of numbers."""
    return 2 * math.prod(x) * columns


for _name in ("int4_mm", "int4_mm_differentiable", "int4_mm_grad"):
    register_flop_formula(getattr(torch.ops.torchao_int4cpu, _name))(_count_operations)
