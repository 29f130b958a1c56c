"""The numbers of a weight some rows at a time, for what reads all and must not copy it whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from torchao_int4cpu.dispatch.cuts import cut
from torchao_int4cpu.format.groupwise import GROUP_SIZES
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

#: Numbers that are expanded at a time.
PIECE_ELEMENTS = 1 << 20

MAX_GROUP_SIZE = max(GROUP_SIZES)


def pieces(shape: Sequence[int]) -> Iterator[tuple[int | None, int, int]]:
    """The matrix of a stack, and the first and last row of a piece."""
    *stack, n, k = shape
    # Whole blocks of every layout, and, where the rows are the columns of a weight, whole groups.
    rows = max(MAX_GROUP_SIZE, PIECE_ELEMENTS // k // MAX_GROUP_SIZE * MAX_GROUP_SIZE)
    for index in range(stack[0]) if stack else (None,):
        for start in range(0, n, rows):
            yield index, start, min(n, start + rows)


def expanded(t: Tensor, index: int | None, start: int, stop: int) -> Tensor:
    """A piece as plain numbers ``[stop - start, columns]``, of a weight, a view of one, or a tensor."""
    matrix = t if index is None else t.select(0, index)
    if isinstance(matrix, Int4TransposedTensor):
        weight = matrix.untransposed()
        if weight.act_order is not None:  # columns that are neighbours lie anywhere
            return matrix.dense()[start:stop]
        return cut(weight, 1, start, stop).dense().t()
    if isinstance(matrix, Int4OpaqueTensor):
        return cut(matrix, 0, start, stop).dense()
    return matrix[start:stop]
