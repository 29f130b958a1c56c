"""Many rows: expand the weight panel by panel and multiply each with an ordinary dense product.

A panel is expanded in the order in which its bytes lie, so that every step runs over consecutive
memory. Also here, because it needs the same panels: the product from the other side.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, GROUP_SIZES
from torchao_int4cpu.format.layout import Segment, segments
from torchao_int4cpu.format.packed import PackedInt4

#: Extra memory that one `prefill` may take.
PREFILL_MAX_BYTES = 48 * 2**20

#: Size of a panel, where memory allows: the buffers of a pair are to stay in the last cache. K=4096:
#: panels of 2^20 / 2^21 / 2^22 weights took 31.7 / 29.2 / 28.3 ms for M=256, 107 / 100 / 101 for 1024.
PANEL_ELEMENTS = 2**21
PANEL_MIN_COLUMNS = 128
PANEL_MAX_COLUMNS = 1024

#: Weights that are expanded at a time. Fewer stay in a smaller cache but call torch more often: 2^17 /
#: 2^18 / 2^19 / 2^20 took 14.7 / 13.2 / 12.2 / 11.9 ms in the same run.
EXPAND_ELEMENTS = 2**19

#: A scratch memory that is no larger is kept between calls, one for each thread that multiplies.
SCRATCH_MAX_BYTES = 24 * 2**20


def _dense_dtype() -> torch.dtype:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and _onednn_multiplies_bfloat16() else torch.float32


def _onednn_multiplies_bfloat16() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


#: The dtype in which this CPU multiplies dense matrices fastest: bfloat16 only where it has the
#: instructions. A 64 x 4096 x 512 product took 0.7 ms with them; with oneDNN held to AVX-512 without
#: them 3.7 ms in bfloat16 and 1.9 in float32; without oneDNN 171 and 1.7 (2 cores of an EPYC 9004).
DENSE_DTYPE = _dense_dtype()


class PrefillPlan(NamedTuple):
    """How a product is cut: at most ``rows`` of x, ``columns`` of a panel, ``depth`` of K at once."""

    rows: int
    columns: int
    depth: int


def plan_prefill(
    m: int,
    k: int,
    *,
    group_size: int,
    half_block: int,
    copies_x: bool,
    itemsize: int,
    budget: int = PREFILL_MAX_BYTES,
) -> PrefillPlan:
    """Cut a product so that its temporaries stay within ``budget`` bytes.

    Args:
        m: rows of x.
        k: K' (padded), a multiple of ``group_size``.
        group_size: ``depth`` is a multiple of it.
        half_block: ``columns`` is a multiple of it: a panel holds either the low or the high nibbles
            of whole blocks.
        copies_x: whether x must be converted or made contiguous (each chunk of rows is, once).
        itemsize: bytes of an element of the dense product.
        budget: bytes. `plan_bytes` of the result is at most that, unless a single row of x, or a
            single block and group, is larger.
    """

    def fits(rows: int, columns: int, depth: int) -> bool:
        plan = PrefillPlan(rows, columns, depth)
        return plan_bytes(plan, k, copies_x=copies_x, itemsize=itemsize) <= budget

    wanted = min(PANEL_MAX_COLUMNS, max(PANEL_MIN_COLUMNS, PANEL_ELEMENTS // k))
    columns = max(half_block, wanted // half_block * half_block)
    rows, depth = m, k
    while columns > half_block and not fits(rows, columns, depth):
        columns = max(half_block, columns // 2 // half_block * half_block)
    while rows > 1024 and not fits(rows, columns, depth):
        rows = -(-rows // 2)
    while depth > group_size and not fits(rows, columns, depth):
        depth = max(group_size, depth // 2 // group_size * group_size)
    while rows > 1 and not fits(rows, columns, depth):
        rows = -(-rows // 2)
    return PrefillPlan(rows, columns, depth)


def plan_bytes(plan: PrefillPlan, k: int, *, copies_x: bool, itemsize: int) -> int:
    """Upper bound of the temporary memory of a plan, in bytes."""
    rows, columns, depth = plan
    panels = 2 * depth * columns * itemsize
    steps = max(EXPAND_ELEMENTS, columns * max(GROUP_SIZES)) * (1 + 1 + 4)
    product = rows * columns * (4 + 2 * 4 + 2 * 4)  # one, two sums over K, both if N is padded
    return panels + steps + product + (rows * k * itemsize if copies_x else 0)


def prefill(x: Tensor, weight: PackedInt4) -> Tensor:
    """Expand the weight panel by panel and multiply. Any layout; ``[M, K]`` to ``[M, N]``.

    x and the expanded weight are rounded to `DENSE_DTYPE`. Extra memory is at most
    `PREFILL_MAX_BYTES`, whatever the shape; no dense copy of the weight is kept.
    """
    dtype = _dense_dtype_now()
    out = x.new_empty(x.shape[0], weight.n)
    for seg in segments(weight.qdata.shape[0], weight.layout):
        copies_x = x.dtype != dtype or not x.is_contiguous()
        plan = _plan_for(x.shape[0], weight, seg, dtype, copies_x=copies_x)
        for x_rows, out_rows in zip(x.split(plan.rows), out.split(plan.rows)):
            _prefill_segment(x_rows.to(dtype).contiguous(), weight, seg, plan, out_rows)
    return out


def _dense_dtype_now() -> torch.dtype:
    return DENSE_DTYPE if torch.backends.mkldnn.enabled else torch.float32


def _plan_for(
    m: int,
    weight: PackedInt4,
    seg: Segment,
    dtype: torch.dtype,
    *,
    copies_x: bool,
    budget: int = PREFILL_MAX_BYTES,
) -> PrefillPlan:
    return plan_prefill(
        m,
        weight.qdata.shape[1] * 2,
        group_size=weight.group_size,
        half_block=seg.rows // 2,
        copies_x=copies_x,
        itemsize=dtype.itemsize,
        budget=budget,
    )


def _prefill_segment(
    x: Tensor, weight: PackedInt4, seg: Segment, plan: PrefillPlan, out: Tensor
) -> None:
    for panels in _panels(weight, seg, plan, x.dtype, products=len(x)):
        wide = out[:, panels.start : panels.stop]
        padded = wide.shape[1] < panels.stop - panels.start
        target = out.new_empty(len(x), panels.stop - panels.start) if padded else wide
        halves = target.unflatten(1, (-1, 2, seg.distance))
        in_pieces = plan.depth < weight.k
        totals = [torch.zeros(panels.product.shape) for _ in range(2)] if in_pieces else []  # float32
        for columns, pair in panels.expand():
            for nibble, panel in enumerate(pair):
                product = torch.mm(x[:, columns], panel, out=panels.product)
                if in_pieces:
                    product = totals[nibble].add_(product)
                if columns.stop == weight.k:
                    halves[:, :, nibble].copy_(product.view(len(x), -1, seg.distance))
        if padded:
            wide.copy_(target[:, : wide.shape[1]])


def _panels(
    weight: PackedInt4, seg: Segment, plan: PrefillPlan, dtype: torch.dtype, *, products: int
) -> Iterator[_Panels]:
    """Cut a segment into panels; they share buffers, with a product of ``products`` rows."""
    half_block = seg.rows // 2
    blocks = min(seg.blocks, plan.columns // half_block)
    for start in range(0, seg.blocks, blocks):
        chosen = slice(start, min(seg.blocks, start + blocks))
        yield _Panels(weight, seg, chosen, plan.depth, dtype, products)


class _Panels:
    """Rows ``start:stop`` of the weight (whole blocks), expanded on demand.

    Attributes:
        start, stop: rows of the weight.
        product: a buffer for the product of ``products`` rows with one panel.
    """

    def __init__(
        self,
        weight: PackedInt4,
        seg: Segment,
        blocks: slice,
        depth: int,
        dtype: torch.dtype,
        products: int,
    ) -> None:
        self.start = seg.start + blocks.start * seg.rows
        self.stop = seg.start + blocks.stop * seg.rows
        self._weight = weight
        self._bytes = seg.byte_view(weight.qdata)[blocks]
        self._distance = seg.distance
        self._depth = depth
        width = (self.stop - self.start) // 2
        group_size = weight.group_size
        self._step = min(depth, max(1, EXPAND_ELEMENTS // (width * group_size)) * group_size)
        self._pair, self._joined, self._nibbles, self._exact, self.product = _scratch.take(
            ((2, depth, width), dtype),
            ((self._step, width), torch.uint8),
            ((self._step, width), torch.uint8),
            ((self._step, width), torch.float32),
            ((products, width), dtype),
        )

    def expand(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns of W, pair of panels ``[2, columns, rows]``) until K is covered.

        The first of a pair holds the rows in the low nibbles, the second those in the high ones. It
        is a buffer that the next pair overwrites.
        """
        k, padded_k = self._weight.k, self._bytes.shape[1]
        qparams = self._qparams()
        for start in range(0, k, self._depth):
            stop = min(padded_k, start + self._depth)
            for column in range(start, stop, self._step):
                columns = slice(column, min(stop, column + self._step))
                self._expand_into(self._pair[:, column - start :], columns, qparams)
            yield slice(start, min(stop, k)), self._pair[:, : min(stop, k) - start]

    def _expand_into(self, pair: Tensor, columns: slice, qparams: tuple[Tensor, Tensor]) -> None:
        """Expand a few columns, so that the intermediate steps stay in a cache."""
        group_size = self._weight.group_size
        depth = columns.stop - columns.start
        groups = slice(columns.start // group_size, columns.stop // group_size)
        bytes_first = self._bytes[:, columns].transpose(0, 1)  # [columns, blocks, bytes]
        joined, nibbles, exact = (t[:depth] for t in (self._joined, self._nibbles, self._exact))
        joined.view(bytes_first.shape).copy_(bytes_first)
        grouped = exact.unflatten(0, (-1, group_size))
        for panel, mask, (scale, offset) in zip(pair, (0x0F, 0xF0), zip(*qparams)):
            torch.bitwise_and(joined, mask, out=nibbles)
            exact.copy_(nibbles)
            torch.addcmul(offset[groups], grouped, scale[groups], out=grouped)
            panel[:depth].copy_(exact)

    def _qparams(self) -> tuple[Tensor, Tensor]:
        """Float32 (scale, offset), ``[2, groups, 1, rows]``, so that w = scale * nibble + offset."""
        rows = self._weight.scale_and_zero[:, self.start : self.stop]
        rows = rows.unflatten(1, (-1, 2, self._distance)).permute(4, 2, 0, 1, 3)
        scale, offset = rows.float().flatten(3).unsqueeze(3).contiguous()
        offset.sub_(scale, alpha=CODE_OFFSET)
        # The high nibble is left where it is in its byte, which makes its code 16 times as large.
        scale[1] /= 16
        return scale, offset


class _Scratch(threading.local):
    """Memory in which this thread builds its panels, kept between calls.

    Fresh memory is mapped page by page as it is first written. Kept or fresh, medians of 3 processes,
    a 4096 x 4096 weight on 2 cores of an EPYC 9004: 96 rows 18.8 or 24.0 ms, 256 rows 32.4 or 38.3.
    """

    def __init__(self) -> None:
        self._arena = torch.empty(0, dtype=torch.uint8)

    def take(self, *requests: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        """Return one buffer for each (shape, dtype); they are valid until the next call."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in requests]
        offsets = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]
        arena = self._arena
        if arena.nbytes < offsets[-1]:
            with torch.inference_mode(False):  # else it could not be written outside that mode
                arena = torch.empty(offsets[-1], dtype=torch.uint8)
            if arena.nbytes <= SCRATCH_MAX_BYTES:
                self._arena = arena
        return [
            arena[offset : offset + size].view(dtype).view(shape)
            for offset, size, (shape, dtype) in zip(offsets, sizes, requests)
        ]


_scratch = _Scratch()


def prefill_transposed(x: Tensor, weight: PackedInt4) -> Tensor:
    """``x · W``, ``[M, N]`` to ``[M, K]``, in the dtype of x; any layout.

    x and the expanded weight are rounded to `DENSE_DTYPE`, panels are summed in float32.
    """
    dtype = _dense_dtype_now()
    out = x.new_empty(x.shape[0], weight.k)
    budget = PREFILL_MAX_BYTES // 2  # half for panels, half for the sum and one product
    rows = max(1, budget // (weight.k * (4 + 4)))
    for x_rows, out_rows in zip(x.split(rows), out.split(rows)):
        total = torch.zeros(out_rows.shape, dtype=torch.float32)
        for seg in segments(weight.qdata.shape[0], weight.layout):
            plan = _plan_for(rows, weight, seg, dtype, copies_x=False, budget=budget)
            for panels in _panels(weight, seg, plan, dtype, products=0):
                wide = x_rows[:, panels.start : panels.stop].to(dtype)
                wide = F.pad(wide, (0, panels.stop - panels.start - wide.shape[1]))
                halves = wide.unflatten(1, (-1, 2, seg.distance))
                for columns, pair in panels.expand():
                    for nibble, panel in enumerate(pair):
                        chosen = halves[:, :, nibble].reshape(len(wide), panel.shape[1])
                        total[:, columns] += torch.mm(chosen, panel.t())
        out_rows.copy_(total)
    return out
