"""What the ops share: the library they are defined in, and when a call needs no op.

An op has three parts: the kernel for real tensors, which checks its arguments because they may come
from a file; a fake kernel that gives the shape of the result; and a function that calls the op, or in a
plain eager call what the op does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling

from torchao_int4cpu.format.checks import check_activation, check_one_device, check_packed
from torchao_int4cpu.format.layout import layout_named
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.version import replace_call_of_op

#: ``torch.ops.torchao_int4cpu``. Exported programs name its ops, so no schema may change.
LIBRARY = torch.library.Library("torchao_int4cpu", "DEF")


def is_eager(*tensors: Tensor) -> bool:
    """Whether a call with these arguments is a plain eager one on CPU tensors, which needs no op.

    Not while something watches or transforms what torch does, and so must see an op: a tracer, a mode,
    a transform of `torch.func`, a level of forward-mode differentiation. And not for a tensor whose
    numbers do not lie in its memory.
    """
    return not is_watched() and all(map(is_plain, tensors))


def is_watched() -> bool:
    """Whether a compiler, a tracer, a mode or a transform sees what torch is called with."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() != 0
        or _len_torch_function_stack() != 0
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None  # `is_transformed`, a call less
        or forward_ad._current_level >= 0
    )


def _is_watched_or_profiled() -> bool:
    """`is_watched`, or a profiler is to show the op."""
    return profiler._is_profiler_enabled or is_watched()


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is going on."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers lie in the memory of the CPU, and it has no behaviour of its own."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def define(name: str, schema: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define ``torchao_int4cpu::name`` with its kernel for the CPU and its fake kernel."""
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"torchao_int4cpu::{name}", fake, lib=LIBRARY)


def define_product(
    name: str,
    multiply: Callable[..., Tensor],
    *,
    ndim: int,
    transposed: bool = False,
    grouped: bool = False,
    function: Callable[..., Callable[..., Tensor]] = lambda otherwise, is_watched=None: otherwise,
) -> Callable[..., Tensor]:
    """Define a product of an activation with a weight or a stack, and return what calls it.

    Args:
        name: of the op.
        multiply: ``(x, weight)``, or ``(x, weight, offs)`` of a grouped product. It checks ``offs``.
        ndim: dimensions of the weight: 2, or 3 for a stack.
        transposed: whether it is ``x · W``, of x ``[..., N]``, and not ``x · Wᵀ``, of x ``[..., K]``.
        grouped: whether rows of x are sorted by expert, as ``offs`` says.
        function: of ``(otherwise, is_watched)``, makes a function that does what ``otherwise`` does in
            less time, where ``is_watched``, if given, is false. It is used for the kernel of the op,
            and for calls of the op from Python: a call through torch's dispatcher takes 3 microseconds.

    Returns:
        ``(x, weight)``, or ``(x, weight, offs)``: calls ``multiply``, as an op where one is needed.
    """
    x_ndim = 2 if grouped else ndim
    offs_schema = "Tensor offs, " if grouped else ""

    def kernel(x: Tensor, qdata: Tensor, scale_and_zero: Tensor, *rest: Any) -> Tensor:
        *offs, group_size, layout, columns = rest
        check_activation(x, *[None] * x_ndim)
        n, k = (x.shape[-1], columns) if transposed else (columns, x.shape[-1])
        weight = PackedInt4(qdata, scale_and_zero, group_size, layout_named(layout), n, k)
        check_packed(weight, ndim, x, *offs)
        return multiply(x, weight, *offs)

    def fake(x: Tensor, qdata: Tensor, scale_and_zero: Tensor, *rest: Any) -> Tensor:
        offs = dict(zip(("offs",), rest)) if grouped else {}
        check_one_device(x=x, qdata=qdata, scale_and_zero=scale_and_zero, **offs)
        return x.new_empty(*x.shape[:-1], rest[-1])  # the columns

    define(
        name,
        f"(Tensor x, Tensor qdata, Tensor scale_and_zero, {offs_schema}"
        "int group_size, str layout, int columns) -> Tensor",
        function(kernel),
        fake,
    )
    op = getattr(torch.ops.torchao_int4cpu, name).default
    replace_call_of_op(op, lambda dispatch: function(dispatch, _is_watched_or_profiled))

    def call(x: Tensor, weight: PackedInt4, *offs: Tensor) -> Tensor:
        qdata, scale_and_zero, group_size, layout, n, k = weight
        if is_eager(x, qdata, scale_and_zero, *offs):
            return multiply(x, weight, *offs)
        y: Tensor = op(x, qdata, scale_and_zero, *offs, group_size, layout.name, k if transposed else n)
        return y

    call.__name__ = call.__qualname__ = f"traceable_{name}"
    call.__doc__ = f"`{multiply.__name__}`, as ``torchao_int4cpu::{name}`` where an op is needed."
    return call
