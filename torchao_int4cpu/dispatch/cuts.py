"""Cutting a weight along one dimension: a view where its bytes allow one, else a repacked copy.

Along N a cut between blocks of the layout is a view; along K, and inside a block, it is a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.format.layout import LAYOUTS, padded_rows, padded_shape
from torchao_int4cpu.format.slicing import (
    PackedRows,
    at_border,
    cut_columns,
    stacked,
    write_columns,
    write_rows,
)
from torchao_int4cpu.kernels.ops.slicing import traceable_join_rows
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.provenance import Cut, Provenance


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
        parts, aliases = _columns(t, start, stop)
    elif dim == t.ndim - 2:
        parts, aliases = _rows(t, start, stop)
    else:
        parts, aliases = _of_matrices(t, lambda part: part[start:stop]), True
    shape = (*t.shape[:dim], stop - start, *t.shape[dim + 1 :])
    provenance = Provenance(read_only=t.read_only or not aliases)
    if t.provenance.filled_by_cuts and not torch.compiler.is_compiling():
        provenance = Provenance(
            read_only=t.read_only,
            filled_by_cuts=True,
            filling=t.provenance.filling,
            cut_from=Cut(t, dim, start, stop, aliases),
        )
    return t.with_parts(parts, shape, provenance=provenance)


def _rows(t: Int4OpaqueTensor, start: int, stop: int) -> tuple[dict[str, Tensor], bool]:
    """The parts of some rows, and whether they are views."""
    n, layout = t.shape[-2], LAYOUTS[t.qdata_layout]
    parts = t.parts()
    followers = [part for part in t.PARTS if part.n_dim is not None and part.name in parts]
    if at_border(start, n, layout) and at_border(stop, n, layout):
        padded_stop = stop if stop < n else padded_rows(n)
        for part in followers:
            parts[part.name] = parts[part.name].narrow(part.n_dim, start, padded_stop - start)  # type: ignore[arg-type]
        return parts, True
    for part in followers:
        if part.packed:
            pieces = (
                traceable_join_rows([PackedRows(matrix.qdata, layout, n, start, stop)], layout)
                for matrix in t.matrices()
            )
            parts[part.name] = stacked(pieces, t.shape[:-2])
        else:
            assert part.n_dim is not None
            some = parts[part.name].narrow(part.n_dim, start, stop - start)
            parts[part.name] = pad_rows(some, part.n_dim)
    return parts, False


def _columns(t: Int4OpaqueTensor, start: int, stop: int) -> tuple[dict[str, Tensor], bool]:
    """The parts of some columns, and whether they are those of ``t``."""
    k, size = t.shape[-1], t.group_size
    parts = t.parts()
    if (start, stop) == (0, k):
        return parts, True
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
    for part in t.PARTS:
        if part.name not in parts:
            continue
        of_weight = parts[part.name]
        if part.k_dim is None:
            raise ValueError(
                f"cannot cut a 4-bit weight of shape {list(t.shape)} with {part.name} along K, which "
                "is about all columns together; cut it along N, or call .dequantize()"
            )
        if part.packed:
            pieces = (cut_columns(matrix.qdata, layout, columns) for matrix in t.matrices())
            parts[part.name] = stacked(pieces, t.shape[:-2])
        elif part.optional and of_weight.numel() == 1:
            parts[part.name] = of_weight.clone()
        else:
            # A copy, as the rest: in a file it must not keep all of its source alive.
            entries = part.k_slice(start, stop, size)
            some = of_weight.narrow(part.k_dim, entries.start, entries.stop - entries.start)
            parts[part.name] = some.clone(memory_format=torch.contiguous_format)
    return parts, False


def view_of(
    t: Int4OpaqueTensor, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> Int4OpaqueTensor:
    """A view of all of ``t``, or of one of its matrices: ``change`` is applied to the stacked parts.

    What is copied into a view of a weight that is filled by cuts goes on to what that was cut from.
    """
    provenance = Provenance(read_only=t.read_only)
    if t.provenance.filled_by_cuts and not torch.compiler.is_compiling():
        whole = Cut(t, 0, 0, t.shape[0], aliases=True)
        cut_from = whole if t.provenance.cut_from is not None else None
        provenance = replace(
            provenance, filled_by_cuts=True, filling=t.provenance.filling, cut_from=cut_from
        )
    return t.with_parts(_of_matrices(t, change), shape, provenance=provenance)


def _of_matrices(t: Int4OpaqueTensor, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The parts, those changed of which each matrix of a stack has its own."""
    own = {part.name for part in t.PARTS if part.stacked}
    return {name: change(part) if name in own else part for name, part in t.parts().items()}


def write_back(target: Cut, source: Int4OpaqueTensor) -> None:
    """Write ``source``, a cut, where it was cut from. Both are in one layout."""
    t, dim, start, stop, aliases = target
    if not aliases:  # else it is there already
        if dim == t.ndim - 2:
            _write_rows(t, start, stop, source)
        else:
            _write_columns(t, start, stop, source)
    if t.provenance.cut_from is not None:
        write_back(t.provenance.cut_from, t)


def _write_rows(t: Int4OpaqueTensor, start: int, stop: int, source: Int4OpaqueTensor) -> None:
    layout = LAYOUTS[t.qdata_layout]
    targets, sources = t.parts(), source.parts()
    for part in t.PARTS:
        if part.packed:
            for mine, other in zip(t.matrices(), source.matrices()):
                write_rows(mine.qdata, layout, start, stop, other.qdata)
        elif part.n_dim is not None and part.name in targets:
            length = stop - start
            mine_some = targets[part.name].narrow(part.n_dim, start, length)
            mine_some.copy_(sources[part.name].narrow(part.n_dim, 0, length))


def _write_columns(t: Int4OpaqueTensor, start: int, stop: int, source: Int4OpaqueTensor) -> None:
    layout = LAYOUTS[t.qdata_layout]
    columns = slice(start, start + source.qdata.shape[-1] * 2)
    targets, sources = t.parts(), source.parts()
    for part in t.PARTS:
        if part.packed:
            for mine, other in zip(t.matrices(), source.matrices()):
                write_columns(mine.qdata, layout, columns, other.qdata)
        elif part.k_dim is not None and part.name in targets:
            of_target = targets[part.name]
            if not (part.optional and of_target.numel() == 1):
                entries = part.k_slice(start, stop, t.group_size)
                of_target = of_target.narrow(part.k_dim, entries.start, entries.stop - entries.start)
            of_target.copy_(sources[part.name])


def same_numbers(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two parts are the same numbers in the same dtype, or both None."""
    if a is None or b is None or a is b:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def pad_rows(part: Tensor, n_dim: int = -2) -> Tensor:
    """A contiguous copy with N, which is along ``n_dim``, rounded up to a multiple of 16 by zeros."""
    missing = padded_rows(part.shape[n_dim]) - part.shape[n_dim]
    if missing:
        return F.pad(part, [0, 0] * (-1 - n_dim) + [0, missing])
    return part.clone(memory_format=torch.contiguous_format)
