"""How the codes of a weight lie in ``qdata``: the table of layouts, `pack` and `unpack`.

PyTorch's CPU op wants the codes shuffled in an order that depends on the instruction set it was
dispatched to. Two integers describe each order:

    rows_per_block   the number of consecutive rows that form a block; blocks follow each other
    nibble_distance  the number of rows between the two codes that share a byte

Inside a block bytes run along K first: all bytes of column 0, then all of column 1, and so on.
The low nibble holds the smaller row. With ``d = nibble_distance``, byte ``i`` of a column holds
rows ``lo(i) = (i // d) * 2d + i % d`` (low nibble) and ``lo(i) + d`` (high nibble) of its block.
A block at the end with fewer rows always uses distance 1.

The first bytes of a weight whose code at row r, column k is written ``r.k``, low nibble first:

    avx512    0.0|32.0   1.0|33.0   2.0|34.0   ...   31.0|63.0    0.1|32.1   ...
    avx2      0.0|16.0   1.0|17.0   2.0|18.0   ...   15.0|31.0    0.1|16.1   ...
    default   0.0|1.0    2.0|3.0    4.0|5.0    ...   30.0|31.0    0.1|1.1    ...

Source: PyTorch's aten/src/ATen/native/cpu/int4mm_kernel.cpp (``weight_to_int4pack_kernel``),
whose own comment on the AVX-512 order mislabels the rows; this table is compared bit for bit
with the op under every instruction set by ``tests/test_layout.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: PyTorch's op takes only weights whose row count is a multiple of this.
ROW_MULTIPLE = 16


def padded_rows(n: int) -> int:
    """N': ``n`` rounded up to a multiple of `ROW_MULTIPLE`."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def padded_shape(n: int, k: int, group_size: int) -> tuple[int, int]:
    """``(N', K')``: N rounded up to a multiple of 16, K to a multiple of ``group_size``."""
    return padded_rows(n), -(-k // group_size) * group_size


class NibbleLayout(NamedTuple):
    """One order of the codes. See the module's docstring for the two integers.

    ``number`` stands for the layout where a weight travels between processes; it never changes.
    """

    name: str
    rows_per_block: int
    nibble_distance: int
    number: int


class Segment(NamedTuple):
    """Consecutive rows of equal blocks: ``blocks`` blocks of ``rows`` rows from row ``start`` on."""

    start: int
    blocks: int
    rows: int
    distance: int

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.blocks * self.rows

    def byte_view(self, qdata: Tensor) -> Tensor:
        """The bytes of these rows as ``[blocks, K', rows / 2]``, a view of ``qdata``."""
        half = self.rows // 2
        return qdata[self.start : self.stop].view(self.blocks, -1, half)


LAYOUTS: dict[str, NibbleLayout] = {
    layout.name: layout
    for layout in (
        NibbleLayout("avx512", 64, 32, number=0),
        NibbleLayout("avx2", 32, 16, number=1),
        NibbleLayout("default", 32, 1, number=2),
    )
}


def layout_named(name: object) -> NibbleLayout:
    """Return the layout of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is not known; choose {', '.join(map(repr, LAYOUTS))}")
    return LAYOUTS[name]


def layout_numbered(number: int) -> NibbleLayout:
    """Return the layout with that `NibbleLayout.number`, which another process sent."""
    return next(layout for layout in LAYOUTS.values() if layout.number == number)


def segments(n: int, layout: NibbleLayout) -> Iterator[Segment]:
    """Split ``n`` rows into the full blocks and, if rows remain, the short last block."""
    full, rest = n // layout.rows_per_block, n % layout.rows_per_block  # a SymInt has no divmod
    if full:
        yield Segment(0, full, layout.rows_per_block, layout.nibble_distance)
    if rest:
        yield Segment(n - rest, 1, rest, 1)


def pack(codes: Tensor, layout: NibbleLayout) -> Tensor:
    """Shuffle and pack codes.

    Args:
        codes: uint8 ``[N', K']``, values 0..15, N' a multiple of 16, K' even.
        layout: the order to write.

    Returns:
        uint8 ``[N', K'/2]``; what ``aten._convert_weight_to_int4pack_for_cpu`` gives on a
        machine with that layout.

    Raises:
        ValueError: N' or K' does not fit.
    """
    n, k = codes.shape
    if n % ROW_MULTIPLE or k % 2:
        raise ValueError(
            f"codes have shape {[n, k]}; pad the rows to a multiple of {ROW_MULTIPLE} "
            "and the columns to an even number"
        )
    qdata = torch.empty(n, k // 2, dtype=torch.uint8, device=codes.device)
    for seg in segments(n, layout):
        pairs = codes[seg.start : seg.stop].view(seg.blocks, -1, 2, seg.distance, k)
        # One byte tensor per column order first, so that the transposition moves bytes, not codes.
        joined = torch.add(pairs[:, :, 0], pairs[:, :, 1], alpha=16)
        joined = joined.view(seg.blocks, seg.rows // 2, k)
        seg.byte_view(qdata).copy_(joined.transpose(1, 2))
    return qdata


def unpack(qdata: Tensor, layout: NibbleLayout) -> Tensor:
    """Undo `pack`: uint8 ``[N', K'/2]`` to codes, uint8 ``[N', K']``, values 0..15."""
    n, k = qdata.shape[0], qdata.shape[1] * 2
    codes = torch.empty(n, k, dtype=torch.uint8, device=qdata.device)
    for seg in segments(n, layout):
        joined = seg.byte_view(qdata).transpose(1, 2).contiguous()
        joined = joined.view(seg.blocks, -1, seg.distance, k)
        pairs = codes[seg.start : seg.stop].view(seg.blocks, -1, 2, seg.distance, k)
        torch.bitwise_and(joined, 0x0F, out=pairs[:, :, 0])
        torch.bitwise_right_shift(joined, 4, out=pairs[:, :, 1])
    return codes


def _ask_the_op() -> NibbleLayout | None:
    # Values without a period, so that no two layouts can give the same bytes.
    codes = (torch.arange(64 * 2, device="cpu").view(64, 2) * 40503 // 256 % 16).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    except (RuntimeError, AttributeError):  # an architecture or build without the op
        return None
    for layout in LAYOUTS.values():
        if torch.equal(packed, pack(codes, layout)):
            return layout
    return None


# Asked once, at import: later calls may come from inside a trace, where no op really runs.
_NATIVE = _ask_the_op()


def native_layout() -> NibbleLayout | None:
    """The layout that PyTorch's op reads in this process, or None if it is none of `LAYOUTS`.

    Found by asking the op to pack a small known matrix, because the dispatched instruction set
    depends on the CPU, the build and ``ATEN_CPU_CAPABILITY`` alike.
    """
    return _NATIVE
