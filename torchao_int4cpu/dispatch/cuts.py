"""Cutting a weight along one dimension: a view where its bytes allow one, else a repacked copy.

Along N a cut between blocks of the layout is a view; along K, and inside a block, it is a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.layout import LAYOUTS
from torchao_int4cpu.parts import padded_shape
from torchao_int4cpu.slicing import (
    Rows,
    at_border,
    cut_columns,
    traceable_join_rows,
    write_columns,
    write_rows,
)
from torchao_int4cpu.tensor import Cut, Int4OpaqueTensor


def cut(t: Int4OpaqueTensor, dim: int, start: int, stop: int) -> Int4OpaqueTensor:
    """``t.narrow(dim, start, stop - start)`` for ``0 <= dim < t.ndim``.

    Raises:
        ValueError: nothing is left, or the cut is along K and not at the border of a group.
    """
    if start >= stop:
        raise ValueError(
            f"got an empty cut {start}:{stop} of dimension {dim} of a 4-bit weight of shape "
            f"{list(t.shape)}; every dimension must keep at least one, so leave such a cut out"
        )
    if dim == t.ndim - 1:
        new, aliases = _cut_columns(t, start, stop)
    elif dim == t.ndim - 2:
        new, aliases = _cut_rows(t, start, stop)
    else:
        parts = t.qdata[start:stop], t.scale_and_zero[start:stop]
        new, aliases = like(t, *parts, (stop - start, *t.shape[1:]), t.read_only), True
    if t.filled_by_cuts and not torch.compiler.is_compiling():
        new.filled_by_cuts, new.read_only = True, t.read_only
        new.cut_from = t.cut_from if new.shape == t.shape else Cut(t, dim, start, stop, aliases)
    return new


def follow(view: Int4OpaqueTensor, t: Int4OpaqueTensor) -> Int4OpaqueTensor:
    """Return ``view``, of all of ``t`` or of one of its matrices, with what `new_zeros` asks for.

    A view of a repacked copy shares the parts of the copy: what is written to it has to go further.
    """
    if t.filled_by_cuts and not torch.compiler.is_compiling():
        view.filled_by_cuts = True
        if t.cut_from is not None:
            view.cut_from = Cut(t, 0, 0, t.shape[0], aliases=True)
    return view


def write_back(target: Cut, source: Int4OpaqueTensor) -> None:
    """Write ``source``, a repacked copy, where it was cut from. Both are in one layout."""
    t, dim, start, stop, aliases = target
    layout = LAYOUTS[t.qdata_layout]
    matrices = zip(t.matrices(), source.matrices())
    if aliases:
        pass  # it is there already
    elif dim == t.ndim - 2:
        t.scale_and_zero[..., start:stop, :] = source.scale_and_zero[..., : stop - start, :]
        for mine, other in matrices:
            write_rows(mine.qdata, layout, start, stop, other.qdata)
    else:
        size = t.group_size
        columns = slice(start, start + source.qdata.shape[-1] * 2)
        groups = slice(columns.start // size, columns.stop // size)
        t.scale_and_zero[..., groups, :, :] = source.scale_and_zero
        for mine, other in matrices:
            write_columns(mine.qdata, layout, columns, other.qdata)
        if t.act_pre_scale is not None and source.act_pre_scale is not None:
            if t.act_pre_scale.numel() > 1:
                t.act_pre_scale[start:stop] = source.act_pre_scale
            else:
                t.act_pre_scale.copy_(source.act_pre_scale)
    if t.cut_from is not None:
        write_back(t.cut_from, t)


def like(
    t: Int4OpaqueTensor,
    qdata: Tensor,
    scale_and_zero: Tensor,
    shape: tuple[int, ...],
    read_only: bool = False,
    act_pre_scale: Tensor | None = None,
) -> Int4OpaqueTensor:
    """Other parts, of another shape, in the layout, the groups and the dtype of ``t``."""
    if act_pre_scale is None:
        act_pre_scale = t.act_pre_scale
    block_size = [1] * (len(shape) - 1) + [t.group_size]
    return Int4OpaqueTensor(
        qdata, scale_and_zero, block_size, shape, t.qdata_layout, t.dtype, act_pre_scale, read_only
    )


def _cut_rows(t: Int4OpaqueTensor, start: int, stop: int) -> tuple[Int4OpaqueTensor, bool]:
    """The cut, and whether it is a view."""
    n, layout = t.shape[-2], LAYOUTS[t.qdata_layout]
    shape = (*t.shape[:-2], stop - start, t.shape[-1])
    if at_border(start, n, layout) and at_border(stop, n, layout):
        rows = slice(start, stop if stop < n else t.qdata.shape[-2])
        return like(t, t.qdata[..., rows, :], t.scale_and_zero[..., rows, :], shape, t.read_only), True
    pieces = (
        traceable_join_rows([Rows(matrix.qdata, layout, n, start, stop)], layout)
        for matrix in t.matrices()
    )
    qparams = pad_rows(t.scale_and_zero[..., start:stop, :])
    return like(t, stacked(pieces, t.shape[:-2]), qparams, shape, read_only=True), False


def _cut_columns(t: Int4OpaqueTensor, start: int, stop: int) -> tuple[Int4OpaqueTensor, bool]:
    k, size = t.shape[-1], t.group_size
    if (start, stop) == (0, k):
        return like(t, t.qdata, t.scale_and_zero, tuple(t.shape), t.read_only), True
    for border in (start, stop):
        if border % size and border != k:
            below = border // size * size
            legal = [str(b) for b in (below, min(below + size, k)) if b not in (0, k)]
            raise ValueError(
                f"cannot cut a 4-bit weight of shape {list(t.shape)} along K at {border}; its groups "
                f"of {size} share a scale, so cut at a multiple of {size}"
                + (f" (the nearest: {' or '.join(legal)})" if legal else "")
                + ", or quantize in smaller groups"
            )
    layout = LAYOUTS[t.qdata_layout]
    columns = slice(start, padded_shape(1, stop, size)[1])
    pieces = (cut_columns(matrix.qdata, layout, columns) for matrix in t.matrices())
    groups = slice(start // size, columns.stop // size)
    qparams = t.scale_and_zero[..., groups, :, :].clone(memory_format=torch.contiguous_format)
    scale = t.act_pre_scale
    if scale is not None:
        # In a file of ours, or of DCP, it must not keep all of its source alive: a copy, as the rest.
        scale = (scale[start:stop] if scale.numel() > 1 else scale).clone()
    shape = (*t.shape[:-1], stop - start)
    return like(t, stacked(pieces, t.shape[:-2]), qparams, shape, True, scale), False


def same_scale(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two ``act_pre_scale`` are the same numbers in the same dtype, or both None."""
    if a is None or b is None or a is b:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def stacked(matrices: Iterable[Tensor], stack: Sequence[int]) -> Tensor:
    """The parts of the matrices of a weight in one tensor, for ``stack`` in front of their shape.

    Each is freed before the next is made, if ``matrices`` is a generator.
    """
    if not stack:
        (matrix,) = matrices
        return matrix
    if torch.compiler.is_compiling():  # fewer nodes
        return torch.stack(list(matrices))
    remaining = iter(matrices)
    matrix = next(remaining)
    whole = matrix.new_empty(*stack, *matrix.shape)
    whole[0] = matrix
    del matrix
    for index in range(1, stack[0]):
        whole[index] = next(remaining)  # no name, which would keep it while the next is made
    return whole


def pad_rows(scale_and_zero: Tensor) -> Tensor:
    """A contiguous copy of ``[..., G, N, 2]`` with N rounded up to a multiple of 16, zeros added."""
    n = scale_and_zero.shape[-2]
    padding = padded_shape(n, 1, 32)[0] - n
    if padding:
        return F.pad(scale_and_zero, (0, 0, 0, padding))
    return scale_and_zero.clone(memory_format=torch.contiguous_format)
