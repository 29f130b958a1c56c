"""Handlers that give all of a weight in another shape, or transposed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.cuts import view_of
from torchao_int4cpu.dispatch.indexing import handle_select
from torchao_int4cpu.dispatch.table import implements, on_weight
from torchao_int4cpu.dispatch.transposition import aliased, dim_of, transposed
from torchao_int4cpu.kernels.ops.register import is_transformed
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4Weight, weight_of

aten = torch.ops.aten


@implements(aten.t.default, aten.numpy_T.default)
def handle_t(t: Int4Weight) -> Int4Weight:
    """``t()``, ``.T``: the transposed view, or back."""
    if t.ndim != 2:
        raise ValueError(
            f"t got a 4-bit weight of shape {list(t.shape)}; it takes 2 dimensions, "
            "so write .transpose(-2, -1)"
        )
    return transposed(t)


@implements(aten.transpose.int)
def handle_transpose(t: Int4Weight, dim0: int, dim1: int) -> Int4Weight:
    """``transpose`` of the last two dimensions, or of one with itself."""
    order = list(range(t.ndim))
    first, second = dim_of(t, dim0), dim_of(t, dim1)
    order[first], order[second] = second, first
    return _permuted(t, order)


@implements(aten.permute.default)
def handle_permute(t: Int4Weight, dims: Sequence[int]) -> Int4Weight:
    """``permute``, as `handle_transpose`."""
    return _permuted(t, [dim_of(t, dim) for dim in dims])


def _permuted(t: Int4Weight, order: list[int]) -> Int4Weight:
    if order == list(range(t.ndim)):
        return aliased(t)
    if order[:-2] == list(range(t.ndim - 2)) and order[-2:] == [t.ndim - 1, t.ndim - 2]:
        return transposed(t)
    raise ValueError(
        f"cannot reorder the dimensions of a 4-bit weight of shape {list(t.shape)} as {order}; only "
        "the last two can change places, so call .dequantize() for anything else"
    )


# --- shapes -------------------------------------------------------------------------------------


@implements(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default
)
def handle_view(t: Int4Weight, size: Sequence[int], stride: Sequence[int] | None = None) -> Int4Weight:
    """``view`` and ``reshape`` to the same shape, or with an additional 1 in front, or without it.

    FSDP2 keeps ``view(-1)`` of what it made with ``new_zeros``, and only reads it if it is a plain
    tensor; so for such a weight that is the weight itself.
    """
    shape, wanted = list(t.shape), list(size)
    if wanted.count(-1) == 1:
        rest = -torch.Size(wanted).numel()
        if rest and t.numel() % rest == 0:
            wanted[wanted.index(-1)] = t.numel() // rest
    is_flat = wanted == [t.numel()]
    if wanted == shape or (is_flat and weight_of(t).provenance.filled_by_cuts):
        return aliased(t)
    if wanted == [1, *shape] and t.ndim == 2:
        return _unsqueezed(t)
    if [1, *wanted] == shape:
        return handle_select(t, 0, 0)
    raise ValueError(
        f"cannot view a 4-bit weight of shape {shape} as {list(size)}; its groups run along K, so "
        "only the same shape will do, with or without a 1 in front, or call .dequantize()"
        + ("; for FSDP2, load with assign=False after fully_shard" if is_flat else "")
    )


@implements(aten.unsqueeze.default)
def handle_unsqueeze(t: Int4Weight, dim: int) -> Int4Weight:
    """``unsqueeze(0)`` of a matrix: a stack of one."""
    if t.ndim != 2 or dim not in (0, -3):
        raise ValueError(
            f"cannot add a dimension at {dim} to a 4-bit weight of shape {list(t.shape)}; "
            "only [N, K] can become [1, N, K], by unsqueeze(0)"
        )
    return _unsqueezed(t)


@implements(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def handle_squeeze(t: Int4Weight, dim: int | Sequence[int] | None = None) -> Int4Weight:
    """``squeeze`` of a stack of one; the last two dimensions stay, or it is refused."""
    dims = range(t.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    named = [dim_of(t, each) for each in dims]
    if any(t.shape[each] == 1 for each in named if each >= t.ndim - 2):
        raise ValueError(
            f"cannot squeeze a 4-bit weight of shape {list(t.shape)}; it keeps its last two "
            "dimensions, so squeeze dimension 0 of a stack only, or call .dequantize() first"
        )
    if t.ndim == 3 and t.shape[0] == 1 and 0 in named:
        return handle_select(t, 0, 0)
    return aliased(t)


@implements(aten.expand.default)
def handle_expand(t: Int4Weight, size: Sequence[int], *, implicit: bool = False) -> Tensor:
    """``expand`` to the same shape, or of one matrix to a stack of it, as `torch.matmul` does.

    A derivative of a derivative may have more dimensions than a stack has. Then it is what `dequantize`
    gives that is expanded: torch's rules for batches multiply no other way.
    """
    shape, wanted = list(t.shape), list(size)
    filled = [old if new == -1 else new for old, new in zip(shape[::-1], wanted[::-1])][::-1]
    if len(wanted) == t.ndim and filled == shape:
        return aliased(t)
    stack = t if t.ndim == 3 else _unsqueezed(t)
    if len(wanted) == 3 and filled[-2:] == shape[-2:] and stack.shape[0] == 1 and wanted[0] >= 1:
        expanded: Int4Weight = on_weight(stack, lambda weight: _expanded(weight, wanted[0]))
        return expanded
    if is_transformed():
        return t.dense().expand(wanted)
    raise ValueError(
        f"cannot expand a 4-bit weight of shape {shape} to {wanted}; only one matrix can become a "
        "stack of it, so multiply with torch.matmul, which broadcasts, or call .dequantize()"
    )


def _expanded(weight: Int4OpaqueTensor, count: int) -> Int4OpaqueTensor:
    shape = (count, *weight.shape[1:])
    return view_of(weight, lambda part: part.expand(count, *part.shape[1:]), shape)


@implements(aten.as_strided.default)
def handle_as_strided(
    t: Int4Weight, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Int4Weight:
    """``as_strided`` to what it is already, as FSDP2 asks."""
    if list(size) != list(t.shape) or list(stride) != list(t.stride()) or storage_offset:
        raise ValueError(
            f"cannot view a 4-bit weight of shape {list(t.shape)} as {list(size)} with strides "
            f"{list(stride)}; it has no strides of its own, so cut it with narrow"
        )
    return aliased(t)


def _unsqueezed(t: Int4Weight) -> Int4Weight:
    view: Int4Weight = on_weight(
        t, lambda weight: view_of(weight, lambda part: part[None], (1, *weight.shape))
    )
    return view
