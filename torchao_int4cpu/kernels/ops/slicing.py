"""Joining and repacking rows as an op, so that `torch.compile` traces one node, not every chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchao_int4cpu.format.layout import ROW_MULTIPLE, NibbleLayout, layout_named, padded_rows
from torchao_int4cpu.format.slicing import PackedRows, check_index, join_rows
from torchao_int4cpu.kernels.ops.register import define, is_eager


def traceable_join_rows(pieces: Sequence[PackedRows], layout: NibbleLayout) -> Tensor:
    """`join_rows` for eager calls, traces and meta tensors alike."""
    qdata = [piece.qdata for piece in pieces]
    if is_eager(*qdata):
        return join_rows(pieces, layout)
    rows = [number for piece in pieces for number in (piece.n, piece.start, piece.stop)]
    names = [piece.layout.name for piece in pieces]
    index = [piece.chosen for piece in pieces]
    joined: Tensor = torch.ops.torchao_int4cpu.join_rows(qdata, names, rows, index, layout.name)
    return joined


def traceable_repack(qdata: Tensor, source: NibbleLayout, target: NibbleLayout) -> Tensor:
    """`repack` for eager calls, traces and meta tensors alike."""
    if source == target:
        return qdata
    n = qdata.shape[0]
    return traceable_join_rows([PackedRows(qdata, source, n, 0, n)], target)


def _kernel(
    qdata: list[Tensor], layouts: list[str], rows: list[int], index: list[Tensor | None], layout: str
) -> Tensor:
    pieces = [
        PackedRows(part, layout_named(name), rows[3 * i], rows[3 * i + 1], rows[3 * i + 2], chosen)
        for i, (part, name, chosen) in enumerate(zip(qdata, layouts, index))
    ]
    for piece in pieces:
        part = piece.qdata
        fits = part.dtype == torch.uint8 and part.ndim == 2 and part.is_contiguous()
        if (
            not fits
            or part.shape[0] % ROW_MULTIPLE
            or part.shape[1] != qdata[0].shape[1]
            or not 0 <= piece.start < piece.stop <= piece.n <= part.shape[0]
        ):
            raise ValueError(
                f"join_rows got {part.dtype} {list(part.shape)} and rows {piece.start}:{piece.stop} "
                f"of {piece.n}; it takes contiguous uint8 [N', K'/2] of one K' and rows within, so "
                "take the parts from an Int4OpaqueTensor"
            )
        if piece.chosen is not None:
            check_index(piece.chosen, piece.stop - piece.start)
    return join_rows(pieces, layout_named(layout))


def _fake(
    qdata: list[Tensor], layouts: list[str], rows: list[int], index: list[Tensor | None], layout: str
) -> Tensor:
    n = sum(
        rows[3 * i + 2] - rows[3 * i + 1] if chosen is None else chosen.shape[0]
        for i, chosen in enumerate(index)
    )
    return qdata[0].new_empty(padded_rows(n), qdata[0].shape[1])


define(
    "join_rows",
    "(Tensor[] qdata, str[] layouts, int[] rows, Tensor?[] index, str layout) -> Tensor",
    _kernel,
    _fake,
)
