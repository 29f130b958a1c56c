"""Handlers that join weights along a dimension: cat, stack, pad. All give copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.conversions import zeros_like
from torchao_int4cpu.dispatch.cuts import same_numbers
from torchao_int4cpu.dispatch.table import implements, on_weight
from torchao_int4cpu.dispatch.transposition import dim_of, weight_dim
from torchao_int4cpu.dispatch.views import handle_unsqueeze
from torchao_int4cpu.format.checks import check_same_qparams
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, native_layout, padded_rows
from torchao_int4cpu.format.packed import Part
from torchao_int4cpu.format.slicing import PackedRows, join_columns, stacked
from torchao_int4cpu.kernels.ops.slicing import traceable_join_rows, traceable_repack
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

aten = torch.ops.aten


@implements(aten.cat.default)
def handle_cat(tensors: Sequence[Int4Weight], dim: int = 0) -> Int4Weight:
    """``cat`` along any dimension: a copy.

    Raises:
        TypeError: one of them is no 4-bit weight, or is not the same way round as the others.
        ValueError: they do not fit together, or one but the last along K ends within a group.
    """
    first = tensors[0]
    dim = dim_of(first, dim)
    _check_same_class("cat", tensors)
    joined = _joined([weight_of(t) for t in tensors], weight_dim(first, dim))
    return Int4TransposedTensor(joined) if isinstance(first, Int4TransposedTensor) else joined


@implements(aten.stack.default)
def handle_stack(tensors: Sequence[Int4Weight], dim: int = 0) -> Int4Weight:
    """``stack`` of matrices in front: a copy ``[E, N, K]``."""
    _check_same_class("stack", tensors)
    return handle_cat([handle_unsqueeze(t, dim) for t in tensors])


def _check_same_class(name: str, tensors: Sequence[Any]) -> None:
    for t in tensors:
        if type(t) is not type(tensors[0]) or not isinstance(t, Int4Weight):
            classes = " and a ".join(sorted({type(each).__name__ for each in tensors}))
            raise TypeError(
                f"{name} got a {classes}; all must be 4-bit "
                "weights the same way round, so call .dequantize() or .t() on the others"
            )


def _joined(weights: list[Int4OpaqueTensor], dim: int) -> Int4OpaqueTensor:
    first = weights[0]
    _check_fit(weights, dim)
    names = {weight.qdata_layout for weight in weights}
    layout = LAYOUTS[first.qdata_layout] if len(names) == 1 else native_layout() or LAYOUTS["default"]
    shape = list(first.shape)
    shape[dim] = sum(weight.shape[dim] for weight in weights)
    parts = {}
    for part in first.PARTS:
        if all(getattr(weight, part.name) is None for weight in weights):
            continue
        if dim == first.ndim - 2 and part.n_dim is not None:
            parts[part.name] = _joined_rows(part, weights, layout)
        elif dim == first.ndim - 1:
            parts[part.name] = _joined_columns(part, weights, layout)
        elif dim == 0 and part.stacked:
            parts[part.name] = _joined_stacks(part, weights, layout)
        else:
            # Shared by all. Of its own: what is copied into a copy must not change where it came from.
            parts[part.name] = getattr(first, part.name).clone()
    return first.with_parts(parts, shape, layout=layout.name)


def _joined_rows(part: Part, weights: list[Int4OpaqueTensor], layout: NibbleLayout) -> Tensor:
    if part.packed:
        pieces = (
            traceable_join_rows([PackedRows(m.qdata, m.layout, m.n, 0, m.n) for m in matrices], layout)
            for matrices in zip(*(weight.matrices() for weight in weights))
        )
        return stacked(pieces, weights[0].shape[:-2])
    assert part.n_dim is not None
    rows = [getattr(w, part.name).narrow(part.n_dim, 0, w.shape[-2]) for w in weights]
    n = sum(w.shape[-2] for w in weights)
    if padded_rows(n) > n:  # by zeros, and no second copy
        shape = list(rows[0].shape)
        shape[part.n_dim] = padded_rows(n) - n
        rows.append(rows[0].new_zeros(shape))
    return torch.cat(rows, dim=part.n_dim).contiguous()


def _joined_stacks(part: Part, weights: list[Int4OpaqueTensor], layout: NibbleLayout) -> Tensor:
    if part.packed:
        count = sum(weight.shape[0] for weight in weights)
        return stacked((m for weight in weights for m in _in_layout(weight, layout)), [count])
    return torch.cat([getattr(weight, part.name) for weight in weights])


def _joined_columns(part: Part, weights: list[Int4OpaqueTensor], layout: NibbleLayout) -> Tensor:
    if part.k_dim is None:
        raise ValueError(
            f"cat along K got 4-bit weights with {part.name}, which is about all columns together; "
            "call .dequantize()"
        )
    if part.packed:
        stacks = zip(*(_in_layout(weight, layout) for weight in weights))
        columns = (join_columns(matrices, layout) for matrices in stacks)
        return stacked(columns, weights[0].shape[:-2])
    pieces = [getattr(weight, part.name) for weight in weights]
    if part.optional:
        pieces = _filled(part, pieces, [weight.shape[-1] for weight in weights])
    return torch.cat(pieces, dim=part.k_dim).contiguous()


def _filled(part: Part, pieces: list[Tensor | None], widths: list[int]) -> list[Tensor]:
    """An optional part of each weight with an entry for each column: the default where one has none."""
    found = [piece for piece in pieces if piece is not None]
    dtype, device = found[0].dtype, found[0].device
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    like = torch.empty(0, dtype=dtype)
    return [
        part.missing(like, [width], device)
        if piece is None
        else piece.reshape(-1).to(dtype).expand(width)
        for piece, width in zip(pieces, widths)
    ]


def _in_layout(weight: Int4OpaqueTensor, layout: NibbleLayout) -> Iterator[Tensor]:
    """``qdata`` of each matrix, repacked if it is in another layout."""
    for matrix in weight.matrices():
        yield traceable_repack(matrix.qdata, matrix.layout, layout)


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
        check_same_qparams("cat", first.scale_and_zero, weight.scale_and_zero)
        if along_k and i < len(weights) - 1 and weight.shape[-1] % size:
            raise ValueError(
                f"cat along K got a 4-bit weight of shape {list(weight.shape)} before the last; its "
                f"last group of {size} is not full, so put it last, or call .dequantize()"
            )
        if not along_k:
            for part in first.PARTS:
                if part.optional:
                    _check_shared(part.name, getattr(first, part.name), getattr(weight, part.name))


def _check_shared(name: str, a: Tensor | None, b: Tensor | None) -> None:
    message = (
        f"cat got 4-bit weights with different {name}; along N, and in a stack, they share the "
        "activation, so all must have the same, or call .dequantize()"
    )
    if (
        torch.compiler.is_compiling()
        and (a is not None and b is not None)
        and (a.shape, a.dtype) == (b.shape, b.dtype)
    ):
        if a is not b:  # numbers are not known before the graph runs
            torch.ops.aten._assert_async.msg((a == b).all(), message)
    elif not same_numbers(a, b):
        raise ValueError(message)


@implements(aten.constant_pad_nd.default)
def handle_pad(t: Int4Weight, pad: Sequence[int], value: float = 0) -> Int4Weight:
    """`torch.nn.functional.pad` with zeros at the end of one dimension, as `distribute_tensor` does.

    Raises:
        ValueError: another value or place, or the zeros would have to share a group with other numbers.
    """
    padding = list(pad)
    after = padding[1::2] + [0] * (t.ndim - len(padding[1::2]))
    amounts = after[::-1]  # by dimension
    padded = [dim for dim, amount in enumerate(amounts) if amount]
    if value != 0 or any(padding[::2]) or min(amounts) < 0 or len(padded) > 1:
        raise ValueError(
            f"cannot pad a 4-bit weight of shape {list(t.shape)} by {padding} with {value}; "
            "only zeros at the end of one dimension can be added, so call .dequantize()"
        )
    if not padded:
        clone: Int4Weight = aten.clone.default(t)
        return clone
    dim, amount = weight_dim(t, padded[0]), amounts[padded[0]]
    longer: Int4Weight = on_weight(t, lambda weight: _padded(weight, dim, amount))
    return longer


def _padded(weight: Int4OpaqueTensor, dim: int, amount: int) -> Int4OpaqueTensor:
    along_k = dim == weight.ndim - 1
    if along_k and weight.shape[-1] % weight.group_size:
        raise ValueError(
            f"cannot pad a 4-bit weight of shape {list(weight.shape)} along K: zeros would share a "
            f"group of {weight.group_size} with its last columns; K must be a multiple of the group "
            "size, so cut it without padding (distribute_tensor(..., src_data_rank=None))"
        )
    shape = list(weight.shape)
    shape[dim] = amount
    zeros = zeros_like(weight, shape, None, weight.device)
    if not along_k:
        shared = {part.name: getattr(weight, part.name) for part in weight.PARTS if part.optional}
        zeros = zeros.with_parts(zeros.parts() | shared, shape)
    return _joined([weight, zeros], dim)
