"""Handlers that give all of a weight in another shape, or turned."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from torchao_int4cpu.dispatch.choices import handle_select
from torchao_int4cpu.dispatch.conversions import same_parts
from torchao_int4cpu.dispatch.cuts import follow, like
from torchao_int4cpu.dispatch.dims import aliased, dim_of, on_the_weight
from torchao_int4cpu.dispatch.table import Args, Kwargs, Weight, implements
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor, weight_of

aten = torch.ops.aten


@implements([aten.t.default, aten.numpy_T.default])
def handle_t(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``t()``, ``.T``: the transposed view, or back."""
    if args[0].ndim != 2:
        raise ValueError(
            f"t got a 4-bit weight of shape {list(args[0].shape)}; it takes 2 dimensions, "
            "so write .transpose(-2, -1)"
        )
    return turned(args[0])


@implements([aten.transpose.int])
def handle_transpose(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``transpose`` of the last two dimensions, or of one with itself."""
    t = args[0]
    order = list(range(t.ndim))
    first, second = (dim_of(t, dim) for dim in args[1:3])
    order[first], order[second] = second, first
    return _permuted(func, args, kwargs, order)


@implements([aten.permute.default])
def handle_permute(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``permute``, as `handle_transpose`."""
    return _permuted(func, args, kwargs, [dim_of(args[0], dim) for dim in args[1]])


def turned(t: Weight) -> Weight:
    """The other of ``[N, K]`` and ``[K, N]``."""
    weight = same_parts(
        weight_of(t)
    )  # new either way: autograd marks the output of a view op as a view
    return weight if isinstance(t, Int4TransposedTensor) else Int4TransposedTensor(weight)


def _permuted(func: Any, args: Args, kwargs: Kwargs, order: list[int]) -> Weight:
    t = args[0]
    if order == list(range(t.ndim)):
        return aliased(func, args, kwargs)
    if order[:-2] == list(range(t.ndim - 2)) and order[-2:] == [t.ndim - 1, t.ndim - 2]:
        return turned(t)
    raise ValueError(
        f"cannot reorder the dimensions of a 4-bit weight of shape {list(t.shape)} as {order}; only "
        "the last two can change places, so call .dequantize() for anything else"
    )


# --- shapes -------------------------------------------------------------------------------------


@implements(
    [aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default]
)
def handle_view(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``view`` and ``reshape`` to the same shape, or with an additional 1 in front, or without it."""
    t, size = args[0], list(args[1])
    shape = list(t.shape)
    if size.count(-1) == 1:
        rest = -torch.Size(size).numel()
        if rest and t.numel() % rest == 0:
            size[size.index(-1)] = t.numel() // rest
    if size == shape or (size == [t.numel()] and _asked_by_fsdp()):
        return aliased(func, (t,), {})
    if size == [1, *shape] and t.ndim == 2:
        return _unsqueezed(t)
    if [1, *size] == shape:
        return handle_select(func, types, (t, 0, 0), {})
    raise ValueError(
        f"cannot view a 4-bit weight of shape {shape} as {list(args[1])}; its groups run along K, so "
        "only the same shape will do, with or without a 1 in front, or call .dequantize()"
    )


def _asked_by_fsdp() -> bool:
    """Whether FSDP2 asks for ``view(-1)``: it keeps what it gets, but only reads plain ones."""
    file = os.path.join("_fully_shard", "_fsdp_param.py")
    frames = itertools.islice(traceback.walk_stack(None), 12)
    return any(frame.f_code.co_filename.endswith(file) for frame, _ in frames)


@implements([aten.unsqueeze.default])
def handle_unsqueeze(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``unsqueeze(0)`` of a matrix: a stack of one."""
    t, dim = args[0], args[1]
    if t.ndim != 2 or dim not in (0, -3):
        raise ValueError(
            f"cannot add a dimension at {dim} to a 4-bit weight of shape {list(t.shape)}; "
            "only [N, K] can become [1, N, K], by unsqueeze(0)"
        )
    return _unsqueezed(t)


@implements([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims])
def handle_squeeze(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``squeeze`` of a stack of one; the last two dimensions stay, or it is refused."""
    t = args[0]
    dims = args[1] if len(args) > 1 else range(t.ndim)
    named = [dim_of(t, dim) for dim in ([dims] if isinstance(dims, int) else dims)]
    if any(t.shape[dim] == 1 for dim in named if dim >= t.ndim - 2):
        raise ValueError(
            f"cannot squeeze a 4-bit weight of shape {list(t.shape)}; it keeps its last two "
            "dimensions, so squeeze dimension 0 of a stack only, or call .dequantize() first"
        )
    if t.ndim == 3 and t.shape[0] == 1 and 0 in named:
        return handle_select(func, types, (t, 0, 0), {})
    return aliased(func, (t, *args[1:]), kwargs)


@implements([aten.expand.default])
def handle_expand(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``expand`` to the same shape, or of one matrix to a stack of it, as `torch.matmul` does."""
    t, size = args[0], list(args[1])
    shape = list(t.shape)
    wanted = [old if new == -1 else new for old, new in zip(shape[::-1], size[::-1])][::-1]
    if len(size) == t.ndim and wanted == shape:
        return aliased(func, args, kwargs)
    stack = t if t.ndim == 3 else _unsqueezed(t)
    if len(size) == 3 and wanted[-2:] == shape[-2:] and stack.shape[0] == 1 and size[0] >= 1:
        return on_the_weight(stack, lambda weight: _expanded(weight, size[0]))
    raise ValueError(
        f"cannot expand a 4-bit weight of shape {shape} to {size}; only one matrix can become a stack "
        "of it, so multiply with torch.matmul, which broadcasts, or call .dequantize()"
    )


def _expanded(weight: Int4OpaqueTensor, count: int) -> Int4OpaqueTensor:
    qdata = weight.qdata.expand(count, -1, -1)
    qparams = weight.scale_and_zero.expand(count, -1, -1, -1)
    return follow(like(weight, qdata, qparams, (count, *weight.shape[1:]), weight.read_only), weight)


@implements([aten.as_strided.default])
def handle_as_strided(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``as_strided`` to what it is already, as FSDP2 asks."""
    t, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if list(size) != list(t.shape) or list(stride) != list(t.stride()) or offset:
        raise ValueError(
            f"cannot view a 4-bit weight of shape {list(t.shape)} as {list(size)} with strides "
            f"{list(stride)}; it has no strides of its own, so cut it with narrow"
        )
    return aliased(func, args, kwargs)


def _unsqueezed(t: Weight) -> Weight:
    def change(weight: Int4OpaqueTensor) -> Int4OpaqueTensor:
        parts = weight.qdata[None], weight.scale_and_zero[None]
        return follow(like(weight, *parts, (1, *weight.shape), weight.read_only), weight)

    return on_the_weight(t, change)
