"""Handlers that put weights beside or below each other: cat, stack, pad. All give copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.conversions import handle_clone, handle_new_zeros
from torchao_int4cpu.dispatch.cuts import same_scale, stacked
from torchao_int4cpu.dispatch.dims import dim_of, turned_dim
from torchao_int4cpu.dispatch.table import Args, Kwargs, Weight, implements
from torchao_int4cpu.dispatch.views import handle_unsqueeze
from torchao_int4cpu.layout import LAYOUTS, native_layout
from torchao_int4cpu.slicing import Rows, join_columns, traceable_join_rows
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor, weight_of

aten = torch.ops.aten


@implements([aten.cat.default])
def handle_cat(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``cat`` along any dimension: a copy.

    Raises:
        TypeError: one of them is no 4-bit weight, or is turned the other way.
        ValueError: they do not fit together, or one but the last along K ends within a group.
    """
    tensors: Sequence[Weight] = args[0]
    dim = dim_of(tensors[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
    _check_same_class("cat", tensors)
    if isinstance(tensors[0], Int4TransposedTensor):
        dim = turned_dim(tensors[0], dim)
        return Int4TransposedTensor(_joined([weight_of(t) for t in tensors], dim))
    return _joined([weight_of(t) for t in tensors], dim)


@implements([aten.stack.default])
def handle_stack(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``stack`` of matrices in front: a copy ``[E, N, K]``."""
    tensors: Sequence[Weight] = args[0]
    _check_same_class("stack", tensors)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    ones = [handle_unsqueeze(func, types, (t, dim), {}) for t in tensors]
    return handle_cat(func, types, (ones, 0), {})


def _check_same_class(name: str, tensors: Sequence[Any]) -> None:
    for t in tensors:
        if type(t) is not type(tensors[0]) or not isinstance(t, Weight):
            raise TypeError(
                f"{name} got a {type(tensors[0]).__name__} and a {type(t).__name__}; all must be 4-bit "
                "weights turned the same way, so call .dequantize() or .t() on the others"
            )


def _joined(weights: list[Int4OpaqueTensor], dim: int) -> Int4OpaqueTensor:
    first = weights[0]
    _check_fit(weights, dim)
    names = {weight.qdata_layout for weight in weights}
    layout = LAYOUTS[first.qdata_layout] if len(names) == 1 else native_layout() or LAYOUTS["default"]
    shape = list(first.shape)
    shape[dim] = sum(weight.shape[dim] for weight in weights)
    # Of its own, as all parts of a copy: what is copied into it must not change where it came from.
    scale = None if first.act_pre_scale is None else first.act_pre_scale.clone()
    if dim == first.ndim - 2:
        pieces = (
            traceable_join_rows([Rows(m.qdata, m.layout, m.n, 0, m.n) for m in matrices], layout)
            for matrices in zip(*(weight.matrices() for weight in weights))
        )
        rows = [weight.scale_and_zero[..., : weight.shape[-2], :] for weight in weights]
        qdata = stacked(pieces, first.shape[:-2])
        if qdata.shape[-2] > shape[-2]:  # the rows that pad have scale 0
            padding = list(rows[0].shape)
            padding[-2] = qdata.shape[-2] - shape[-2]
            rows.append(rows[0].new_zeros(padding))
        qparams = torch.cat(rows, dim=-2)
    elif dim == 0:  # of stacks
        qdata = stacked((m for weight in weights for m in _in_layout(weight, layout.name)), shape[:1])
        qparams = torch.cat([weight.scale_and_zero for weight in weights])
    else:
        stacks = zip(*(_in_layout(weight, layout.name) for weight in weights))
        qdata = stacked((join_columns(matrices, layout) for matrices in stacks), first.shape[:-2])
        qparams = torch.cat([weight.scale_and_zero for weight in weights], dim=-3)
        scale = _joined_scale(weights)
    block_size = [1] * (len(shape) - 1) + [first.group_size]
    return Int4OpaqueTensor(
        qdata, qparams.contiguous(), block_size, shape, layout.name, first.dtype, scale
    )


def _in_layout(weight: Int4OpaqueTensor, name: str) -> Iterator[Tensor]:
    """``qdata`` of each matrix, repacked if it is in another layout."""
    for m in weight.matrices():
        if weight.qdata_layout == name:
            yield m.qdata
        else:
            yield traceable_join_rows([Rows(m.qdata, m.layout, m.n, 0, m.n)], LAYOUTS[name])


def _check_fit(weights: list[Int4OpaqueTensor], dim: int) -> None:
    first, size = weights[0], weights[0].group_size
    along_k = dim == first.ndim - 1
    for i, weight in enumerate(weights):
        others = [s for d, s in enumerate(weight.shape) if d != dim]
        expected = [s for d, s in enumerate(first.shape) if d != dim]
        mine = (others, weight.group_size, weight.dtype)
        if weight.ndim != first.ndim or mine != (expected, size, first.dtype):
            raise ValueError(
                f"cat got 4-bit weights {first._quantization_type()} and "
                f"{weight._quantization_type()}; all must agree in group_size, dtype and every "
                f"dimension but {dim}"
            )
        if along_k and i < len(weights) - 1 and weight.shape[-1] % size:
            raise ValueError(
                f"cat along K got a 4-bit weight of shape {list(weight.shape)} before the last; its "
                f"last group of {size} is not full, so put it last, or call .dequantize()"
            )
        if not along_k:
            _check_same_scale(first.act_pre_scale, weight.act_pre_scale)


def _check_same_scale(a: Tensor | None, b: Tensor | None) -> None:
    message = (
        "cat got 4-bit weights with different act_pre_scale; along N, and in a stack, they share the "
        "activation, so all must have the same, or call .dequantize()"
    )
    if (
        torch.compiler.is_compiling()
        and (a is not None and b is not None)
        and (a.shape, a.dtype) == (b.shape, b.dtype)
    ):
        if a is not b:  # numbers are not known before the graph runs
            torch.ops.aten._assert_async.msg((a == b).all(), message)
    elif not same_scale(a, b):
        raise ValueError(message)


def _joined_scale(weights: list[Int4OpaqueTensor]) -> Tensor | None:
    """Along K each brings its own; one without brings ones, which change no number."""
    scales = [weight.act_pre_scale for weight in weights]
    dtypes = [scale.dtype for scale in scales if scale is not None]
    if not dtypes:
        return None
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return torch.cat(
        [
            torch.ones(weight.shape[-1], dtype=dtype, device=weight.qdata.device)
            if scale is None
            else scale.reshape(-1).to(dtype).expand(weight.shape[-1])
            for weight, scale in zip(weights, scales)
        ]
    )


@implements([aten.constant_pad_nd.default])
def handle_pad(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """`torch.nn.functional.pad` with zeros at the end of one dimension, as `distribute_tensor` does.

    Raises:
        ValueError: another value or place, or the zeros would have to share a group with other numbers.
    """
    t, padding = args[0], list(args[1])
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    after = padding[1::2] + [0] * (t.ndim - len(padding[1::2]))
    amounts = after[::-1]  # by dimension
    padded = [dim for dim, amount in enumerate(amounts) if amount]
    if value != 0 or any(padding[::2]) or min(amounts) < 0 or len(padded) > 1:
        raise ValueError(
            f"cannot pad a 4-bit weight of shape {list(t.shape)} by {padding} with {value}; "
            "only zeros at the end of one dimension can be added, so call .dequantize()"
        )
    if not padded:
        return handle_clone(aten.clone.default, types, (t,), {})
    weight = weight_of(t)
    dim = turned_dim(t, padded[0]) if isinstance(t, Int4TransposedTensor) else padded[0]
    size = list(weight.shape)
    size[dim] = amounts[padded[0]]
    if dim == t.ndim - 1 and weight.shape[-1] % weight.group_size:
        raise ValueError(
            f"cannot pad a 4-bit weight of shape {list(weight.shape)} along K: zeros would share a "
            f"group of {weight.group_size} with its last columns; K must be a multiple of the group "
            "size, so cut it without padding (distribute_tensor(..., src_data_rank=None))"
        )
    zeros = weight_of(handle_new_zeros(func, types, (weight, size), {}))
    if dim != t.ndim - 1:
        zeros.act_pre_scale = weight.act_pre_scale
    joined = _joined([weight, zeros], dim)
    return Int4TransposedTensor(joined) if isinstance(t, Int4TransposedTensor) else joined
