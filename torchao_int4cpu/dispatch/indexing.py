"""Handlers that take some rows, columns or experts of a weight: slices, splits, indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.cuts import cut, pad_rows, view_of
from torchao_int4cpu.dispatch.table import implements, on_weight
from torchao_int4cpu.dispatch.transposition import dim_of, weight_dim
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.format.slicing import PackedRows, check_index, legal_pieces
from torchao_int4cpu.kernels.ops.register import is_eager
from torchao_int4cpu.kernels.ops.slicing import traceable_join_rows
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

aten = torch.ops.aten


@implements(aten.slice.Tensor)
def handle_slice(
    t: Int4Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Int4Weight:
    """``t[a:b]``, ``narrow``: see `cuts`. A step is refused."""
    dim = dim_of(t, dim)
    start, stop, step = slice(start, end, step).indices(t.shape[dim])
    if step != 1:
        raise ValueError(
            f"cannot cut a 4-bit weight of shape {list(t.shape)} with a step of {step}; "
            "index it with a tensor (weight[torch.arange(...)]), or call .dequantize()"
        )
    return _cut(t, dim, start, stop)


@implements(aten.split.Tensor)
def handle_split(t: Int4Weight, split_size: int, dim: int = 0) -> tuple[Int4Weight, ...]:
    """``split``, ``chunk``: pieces of one size.

    Raises:
        ValueError: a cut along K is not at the border of a group.
    """
    dim = dim_of(t, dim)
    if split_size < 1:
        raise ValueError(
            f"split got size {split_size} for dimension {dim} of a 4-bit weight of shape "
            f"{list(t.shape)}; every piece must have at least one, so give 1 or more"
        )
    total = t.shape[dim]
    gathered = None if isinstance(t, Int4TransposedTensor) else t.provenance.gathered
    if gathered is not None and dim == 0 and split_size * len(gathered) == total:
        return tuple(gathered)  # type: ignore[arg-type]
    _check_split_of_k(t, split_size, dim)
    pieces = [
        _cut(t, dim, start, min(total, start + split_size)) for start in range(0, total, split_size)
    ]
    first = pieces[0]
    if isinstance(first, Int4TransposedTensor):
        first.split_from = (dim, total)
    else:
        first.provenance = replace(first.provenance, split_from=(dim, total))
    return tuple(pieces)


@implements(aten.split_with_sizes.default)
def handle_split_with_sizes(
    t: Int4Weight, split_sizes: Sequence[int], dim: int = 0
) -> tuple[Int4Weight, ...]:
    """``split``, ``chunk``: pieces of given sizes."""
    dim = dim_of(t, dim)
    if sum(split_sizes) != t.shape[dim]:
        raise ValueError(
            f"split got sizes {list(split_sizes)} for dimension {dim} of a 4-bit weight of shape "
            f"{list(t.shape)}; they must add up to {t.shape[dim]}"
        )
    stops = [sum(split_sizes[: i + 1]) for i in range(len(split_sizes))]
    return tuple(_cut(t, dim, stop - size, stop) for size, stop in zip(split_sizes, stops))


def _check_split_of_k(t: Int4Weight, size: int, dim: int) -> None:
    weight = weight_of(t)
    group_size, k = weight.group_size, weight.shape[-1]
    if weight_dim(t, dim) != t.ndim - 1 or size % group_size == 0 or size >= k:
        return
    pieces = -(-k // size)
    raise ValueError(
        f"cannot cut a 4-bit weight of shape {list(weight.shape)} along K into {pieces} pieces of "
        f"{size}; its groups of {group_size} share a scale, so use {legal_pieces(k, group_size)} "
        "pieces (processes), or quantize in smaller groups"
    )


@implements(aten.select.int)
def handle_select(t: Int4Weight, dim: int, index: int) -> Int4Weight:
    """``stack[e]``: a view of one matrix of a stack."""
    if t.ndim != 3 or dim_of(t, dim) != 0:
        raise ValueError(
            f"cannot take one row or column of a 4-bit weight of shape {list(t.shape)}; only a matrix "
            "of a stack [E, N, K] can be selected, so write weight[i:i + 1], or dequantize that"
        )
    if not -t.shape[0] <= index < t.shape[0]:
        raise IndexError(
            f"index {index} is out of range for a stack of {t.shape[0]} 4-bit weights; "
            f"choose {-t.shape[0]} to {t.shape[0] - 1}"
        )
    selected: Int4Weight = on_weight(t, lambda weight: _selected(weight, index))
    return selected


@implements(aten.unbind.int)
def handle_unbind(t: Int4Weight, dim: int = 0) -> tuple[Int4Weight, ...]:
    """``unbind``, and iterating over a stack: views of its matrices."""
    return tuple(handle_select(t, dim, i) for i in range(t.shape[dim_of(t, dim)]))


def _selected(weight: Int4OpaqueTensor, index: int) -> Int4OpaqueTensor:
    return view_of(weight, lambda part: part[index], tuple(weight.shape[1:]))


def _cut(t: Int4Weight, dim: int, start: int, stop: int) -> Int4Weight:
    along = weight_dim(t, dim)
    piece: Int4Weight = on_weight(t, lambda weight: cut(weight, along, start, stop))
    return piece


# --- chosen matrices and rows -------------------------------------------------------------------


@implements(aten.index.Tensor)
def handle_index(t: Int4Weight, indices: Sequence[Tensor | None]) -> Int4Weight:
    """``weight[tensor]``: a copy of the chosen matrices of a stack, or rows of a matrix."""
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


@implements(aten.index_select.default)
def handle_index_select(t: Int4Weight, dim: int, index: Tensor) -> Int4Weight:
    """``index_select`` along the first dimension, as `handle_index`."""
    return _taken(t, dim_of(t, dim), index)


def _taken(t: Int4Weight, dim: int, index: Tensor) -> Int4Weight:
    """Matrices of a stack, or rows of a matrix, in the order of ``index``."""
    if weight_dim(t, dim) != 0:
        raise ValueError(
            f"cannot choose columns of a 4-bit weight of shape {list(t.shape)}; "
            "its groups share a scale, so call .dequantize()"
        )
    taken: Int4Weight = on_weight(t, lambda weight: _taken_from(weight, index.to(torch.int64)))
    return taken


def _taken_from(weight: Int4OpaqueTensor, index: Tensor) -> Int4OpaqueTensor:
    n, count = weight.shape[0], index.shape[0]
    if count == 0:
        raise ValueError(
            f"got an empty index into a 4-bit weight of shape {list(weight.shape)}; "
            "it must choose at least one, so leave such a call out"
        )
    if is_eager(index):
        check_index(index, n)  # else the ops do so, when they run
    forward = torch.where(index < 0, index + n, index)
    parts = weight.parts()
    for part in weight.PARTS:
        if part.name not in parts:
            continue
        of_weight = parts[part.name]
        if weight.ndim == 3 and part.stacked:
            # Not part[index]: 8 of 128 experts of 1536 x 2048 took 4.1 ms so, and 0.84 by index_select.
            parts[part.name] = of_weight.index_select(0, forward)
        elif part.packed:
            layout = LAYOUTS[weight.qdata_layout]
            rows = PackedRows(of_weight, layout, n, 0, n, index)
            parts[part.name] = traceable_join_rows([rows], layout)
        elif weight.ndim == 2 and part.n_dim is not None:
            chosen = of_weight.index_select(of_weight.ndim + part.n_dim, forward)
            parts[part.name] = pad_rows(chosen, part.n_dim)
        else:
            parts[part.name] = of_weight.clone()
    return weight.with_parts(parts, (count, *weight.shape[1:]))
