"""Handlers that take some rows, columns or experts of a weight: slices, splits, indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.cuts import cut, follow, like, pad_rows
from torchao_int4cpu.dispatch.dims import dim_of, on_the_weight, turned_dim
from torchao_int4cpu.dispatch.table import Args, Kwargs, Weight, implements
from torchao_int4cpu.layout import LAYOUTS
from torchao_int4cpu.parts import legal_pieces
from torchao_int4cpu.slicing import Rows, check_index, traceable_join_rows
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor, weight_of

aten = torch.ops.aten


@implements([aten.slice.Tensor])
def handle_slice(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``t[a:b]``, ``narrow``: see `cuts`. A step is refused."""

    def read(
        t: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> tuple[int, int, int, int]:
        dim = dim_of(t, dim)
        return dim, *slice(start, end, step).indices(t.shape[dim])

    dim, start, stop, step = read(*args, **kwargs)
    if step != 1:
        raise ValueError(
            f"cannot cut a 4-bit weight of shape {list(args[0].shape)} with a step of {step}; "
            "index it with a tensor (weight[torch.arange(...)]), or call .dequantize()"
        )
    return _cut(args[0], dim, start, stop)


@implements([aten.split.Tensor])
def handle_split(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> tuple[Weight, ...]:
    """``split``, ``chunk``: pieces of one size.

    Raises:
        ValueError: a cut along K is not at the border of a group.
    """
    t, size = args[0], args[1]
    dim = dim_of(t, args[2] if len(args) > 2 else kwargs.get("dim", 0))
    if size < 1:
        raise ValueError(
            f"split got size {size} for dimension {dim} of a 4-bit weight of shape {list(t.shape)}; "
            "every piece must have at least one, so give 1 or more"
        )
    total = t.shape[dim]
    gathered = getattr(t, "gathered", None)
    if gathered is not None and dim == 0 and size * len(gathered) == total:
        return tuple(gathered)
    _check_split_of_k(t, size, dim)
    pieces = [_cut(t, dim, start, min(total, start + size)) for start in range(0, total, size)]
    pieces[0].split_from = (dim, total)
    return tuple(pieces)


@implements([aten.split_with_sizes.default])
def handle_split_with_sizes(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> tuple[Weight, ...]:
    """``split``, ``chunk``: pieces of given sizes."""
    t, sizes = args[0], args[1]
    dim = dim_of(t, args[2] if len(args) > 2 else kwargs.get("dim", 0))
    if sum(sizes) != t.shape[dim]:
        raise ValueError(
            f"split got sizes {list(sizes)} for dimension {dim} of a 4-bit weight of shape "
            f"{list(t.shape)}; they must add up to {t.shape[dim]}"
        )
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(_cut(t, dim, stop - size, stop) for size, stop in zip(sizes, stops))


def _check_split_of_k(t: Weight, size: int, dim: int) -> None:
    weight = weight_of(t)
    group_size, k = weight.group_size, weight.shape[-1]
    along_k = dim == (t.ndim - 2 if isinstance(t, Int4TransposedTensor) else t.ndim - 1)
    if not along_k or size % group_size == 0 or size >= k:
        return
    pieces = -(-k // size)
    raise ValueError(
        f"cannot cut a 4-bit weight of shape {list(weight.shape)} along K into {pieces} pieces of "
        f"{size}; its groups of {group_size} share a scale, so use {legal_pieces(k, group_size)} "
        "pieces (processes), or quantize in smaller groups"
    )


@implements([aten.select.int])
def handle_select(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``stack[e]``: a view of one matrix of a stack."""
    t, index = args[0], args[2]
    if t.ndim != 3 or dim_of(t, args[1]) != 0:
        raise ValueError(
            f"cannot take one row or column of a 4-bit weight of shape {list(t.shape)}; only a matrix "
            "of a stack [E, N, K] can be selected, so write weight[i:i + 1], or dequantize that"
        )
    if not -t.shape[0] <= index < t.shape[0]:
        raise IndexError(
            f"index {index} is out of range for a stack of {t.shape[0]} 4-bit weights; "
            f"choose {-t.shape[0]} to {t.shape[0] - 1}"
        )
    return on_the_weight(t, lambda weight: _selected(weight, index))


@implements([aten.unbind.int])
def handle_unbind(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> tuple[Weight, ...]:
    """``unbind``, and iterating over a stack: views of its matrices."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return tuple(
        handle_select(func, types, (args[0], dim, i), {})
        for i in range(args[0].shape[dim_of(args[0], dim)])
    )


def _selected(weight: Int4OpaqueTensor, index: int) -> Int4OpaqueTensor:
    new = like(
        weight,
        weight.qdata[index],
        weight.scale_and_zero[index],
        tuple(weight.shape[1:]),
        weight.read_only,
    )
    return follow(new, weight)


def _cut(t: Weight, dim: int, start: int, stop: int) -> Weight:
    if isinstance(t, Int4TransposedTensor):
        return Int4TransposedTensor(cut(t.back(), turned_dim(t, dim), start, stop))
    return cut(t, dim, start, stop)


# --- chosen matrices and rows -------------------------------------------------------------------


@implements([aten.index.Tensor])
def handle_index(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``weight[tensor]``: a copy of the chosen matrices of a stack, or rows of a matrix."""
    t, indices = args[0], args[1]
    index = indices[0] if len(indices) == 1 else None
    if index is None or index.ndim != 1:
        shapes = [None if i is None else list(i.shape) for i in indices]
        raise ValueError(
            f"cannot index a 4-bit weight of shape {list(t.shape)} with tensors of shapes {shapes}; "
            "only the first dimension can be indexed, with one dimension"
        )
    if index.dtype == torch.bool:
        if len(index) != t.shape[0]:
            raise IndexError(
                f"a mask of {len(index)} does not fit a 4-bit weight of shape {list(t.shape)}; "
                f"give {t.shape[0]} of them"
            )
        index = index.nonzero().flatten()
    return _taken(t, 0, index)


@implements([aten.index_select.default])
def handle_index_select(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """``index_select`` along the first dimension, as `handle_index`."""
    return _taken(args[0], dim_of(args[0], args[1]), args[2])


def _taken(t: Weight, dim: int, index: Tensor) -> Weight:
    """Matrices of a stack, or rows of a matrix, in the order of ``index``."""
    if isinstance(t, Int4TransposedTensor) and t.ndim == 2:
        dim = 1 - dim
    if dim != 0:
        raise ValueError(
            f"cannot choose columns of a 4-bit weight of shape {list(t.shape)}; "
            "its groups share a scale, so call .dequantize()"
        )
    return on_the_weight(t, lambda weight: _taken_from(weight, index.to(torch.int64)))


def _taken_from(weight: Int4OpaqueTensor, index: Tensor) -> Int4OpaqueTensor:
    n, count = weight.shape[0], index.shape[0]
    if count == 0:
        raise ValueError(
            f"got an empty index into a 4-bit weight of shape {list(weight.shape)}; "
            "it must choose at least one, so leave such a call out"
        )
    if not torch.compiler.is_compiling() and type(index) is Tensor and index.is_cpu:
        check_index(index, n)  # else the ops do so, when they run
    forward = torch.where(index < 0, index + n, index)
    shape = (count, *weight.shape[1:])
    scale = None if weight.act_pre_scale is None else weight.act_pre_scale.clone()
    if weight.ndim == 3:
        # Not qdata[index]: 8 of 128 experts of 1536 x 2048 took 4.1 ms so, and 0.84 by index_select.
        qdata, qparams = (t.index_select(0, forward) for t in (weight.qdata, weight.scale_and_zero))
        return like(weight, qdata, qparams, shape, act_pre_scale=scale)
    layout = LAYOUTS[weight.qdata_layout]
    rows = traceable_join_rows([Rows(weight.qdata, layout, n, 0, n, index)], layout)
    qparams = pad_rows(weight.scale_and_zero.index_select(1, forward))
    return like(weight, rows, qparams, shape, act_pre_scale=scale)
