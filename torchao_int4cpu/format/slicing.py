"""Cutting, joining and repacking bytes: whatever is done to ``qdata`` equals doing it to the codes.

Along K every column of a block is a run of bytes of its own, so columns are moved as bytes. Along N
whole blocks are moved as bytes, too (a cut between two blocks is a view); a cut inside a block, and a
change of layout, shuffle nibbles a few columns at a time, so that no more than `SHUFFLE_CODES` codes
are ever unpacked.

Everything here is uint8 ``[N', K'/2]`` in one of the layouts of `layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET
from torchao_int4cpu.format.huge_pages import prefer_huge_pages
from torchao_int4cpu.format.layout import (
    NibbleLayout,
    pack,
    padded_rows,
    segments,
    unpack,
)

#: Codes that are unpacked at a time, one byte each, while rows are shuffled.
SHUFFLE_CODES = 1 << 21


class PackedRows(NamedTuple):
    """Rows ``start:stop`` of a packed weight, and which of them: all in order, or those of ``chosen``.

    Attributes:
        qdata: uint8 ``[N', K'/2]`` in the order of ``layout``.
        layout: of ``qdata``.
        n: N, the rows of ``qdata`` that are no padding.
        start, stop: ``0 <= start < stop <= N``.
        chosen: int64 ``[R]``, rows counted from ``start``, or from ``stop`` if negative; None for all.
    """

    qdata: Tensor
    layout: NibbleLayout
    n: int
    start: int
    stop: int
    chosen: Tensor | None = None

    @property
    def height(self) -> int:
        """The number of rows these are."""
        return self.stop - self.start if self.chosen is None else len(self.chosen)


def at_border(row: int, n: int, layout: NibbleLayout) -> bool:
    """Whether a weight of ``n`` rows can be cut before ``row`` without touching a byte."""
    return row % layout.rows_per_block == 0 or row == n


def join_rows(pieces: Sequence[PackedRows], layout: NibbleLayout) -> Tensor:
    """Join rows along N: uint8 ``[N', K'/2]`` in the order of ``layout``, a copy.

    The rows that pad N to N' hold code 8.
    """
    if _whole_blocks(pieces, layout):
        rows = [piece.qdata[piece.start : padded_rows(piece.stop)] for piece in pieces]
        return torch.cat(rows) if len(rows) > 1 else rows[0].clone()
    n, columns = sum(piece.height for piece in pieces), pieces[0].qdata.shape[1] * 2
    out = torch.empty(padded_rows(n), columns // 2, dtype=torch.uint8, device=pieces[0].qdata.device)
    prefer_huge_pages(out)
    around = [_blocks_around(p.start, p.stop, p.qdata.shape[0], p.layout) for p in pieces]
    tallest = max(len(out), *(last - first for first, last in around))
    for some in _column_chunks(columns, tallest):
        codes = torch.cat([_codes(piece, some) for piece in pieces])
        if len(codes) < len(out):
            codes = F.pad(codes, (0, 0, 0, len(out) - len(codes)), value=CODE_OFFSET)
        write_columns(out, layout, some, pack(codes, layout))
    return out


def repack(qdata: Tensor, source: NibbleLayout, target: NibbleLayout) -> Tensor:
    """Return ``qdata`` ``[N', K'/2]`` in the order of ``target``; the very same tensor if it is."""
    if source == target:
        return qdata
    n = qdata.shape[0]
    return join_rows([PackedRows(qdata, source, n, 0, n)], target)


def write_rows(target: Tensor, layout: NibbleLayout, start: int, stop: int, source: Tensor) -> None:
    """Replace rows ``start:stop`` of ``target`` by the first rows of ``source``, both in ``layout``."""
    first, last = _blocks_around(start, stop, target.shape[0], layout)
    blocks = target[first:last]
    inserted = PackedRows(source, layout, stop - start, 0, stop - start)
    for some in _column_chunks(target.shape[1] * 2, last - first):
        codes = unpack(cut_columns(blocks, layout, some), layout)
        codes[start - first : stop - first] = _codes(inserted, some)
        write_columns(blocks, layout, some, pack(codes, layout))


def cut_columns(qdata: Tensor, layout: NibbleLayout, columns: slice) -> Tensor:
    """Copy columns of the codes (borders even): uint8 ``[N', (stop - start) / 2]``."""
    out = qdata.new_empty(qdata.shape[0], (columns.stop - columns.start) // 2)
    for segment in segments(qdata.shape[0], layout):
        segment.byte_view(out).copy_(segment.byte_view(qdata)[:, columns])
    return out


def write_columns(target: Tensor, layout: NibbleLayout, columns: slice, source: Tensor) -> None:
    """Replace columns (borders even) of ``target`` by ``source``, both in ``layout``."""
    for segment in segments(target.shape[0], layout):
        segment.byte_view(target)[:, columns].copy_(segment.byte_view(source))


def join_columns(parts: Sequence[Tensor], layout: NibbleLayout) -> Tensor:
    """Put columns beside each other: a copy, all in ``layout`` and with the same rows."""
    widths = [part.shape[1] * 2 for part in parts]
    out = parts[0].new_empty(parts[0].shape[0], sum(widths) // 2)
    start = 0
    for part, width in zip(parts, widths):
        write_columns(out, layout, slice(start, start + width), part)
        start += width
    return out


def _codes(piece: PackedRows, columns: slice) -> Tensor:
    """The codes of some columns, uint8 ``[rows, columns]``; only blocks they lie in are unpacked."""
    first, last = _blocks_around(piece.start, piece.stop, piece.qdata.shape[0], piece.layout)
    blocks = cut_columns(piece.qdata[first:last], piece.layout, columns)
    codes = unpack(blocks, piece.layout)[piece.start - first : piece.stop - first]
    return codes if piece.chosen is None else codes[piece.chosen]


def check_index(index: Tensor, count: int) -> None:
    """Check that each of ``index`` is one of ``count`` rows, counted from the first or the last.

    Raises:
        IndexError: it is not.
    """
    low, high = (int(bound) for bound in index.aminmax())
    if low < -count or high >= count:
        raise IndexError(
            f"index {low if low < -count else high} is out of range; the first dimension of the 4-bit "
            f"weight has {count}, so choose {-count} to {count - 1}"
        )


def _blocks_around(start: int, stop: int, padded_n: int, layout: NibbleLayout) -> tuple[int, int]:
    """The rows of the blocks that hold rows ``start:stop``."""
    block = layout.rows_per_block
    return start // block * block, min(padded_n, -(-stop // block) * block)


def _whole_blocks(pieces: Sequence[PackedRows], layout: NibbleLayout) -> bool:
    """Whether the rows are whole blocks in that layout, with a short block at most at the very end."""
    return all(
        piece.layout == layout
        and piece.chosen is None
        and piece.start % layout.rows_per_block == 0
        and (
            piece.stop % layout.rows_per_block == 0 or (i == len(pieces) - 1 and piece.stop == piece.n)
        )
        for i, piece in enumerate(pieces)
    )


def _column_chunks(columns: int, rows: int) -> Iterator[slice]:
    step = max(2, SHUFFLE_CODES // rows // 2 * 2)
    for start in range(0, columns, step):
        yield slice(start, min(columns, start + step))


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


def legal_pieces(total: int, unit: int = 1) -> str:
    """For a message: for which numbers of processes `torch.chunk` cuts ``total`` into pieces.

    None of them is empty, and every border is a multiple of ``unit``.
    """
    sizes = [(count, -(-total // count)) for count in range(1, 257)]
    legal = [
        str(count)
        for count, size in sizes
        if count == 1 or (size % unit == 0 and -(-total // size) == count)
    ]
    return ", ".join(legal[:12] + ["..."] * (len(legal) > 12))
