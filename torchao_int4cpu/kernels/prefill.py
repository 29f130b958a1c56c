"""Many rows: expand the weight panel by panel and multiply each with an ordinary dense product.

A panel is expanded in the order in which its bytes lie, so that every step runs over consecutive
memory. Also here, because it needs the same panels: the gradient with respect to the activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.groupwise import CODE_OFFSET
from torchao_int4cpu.kernels.packed import PackedInt4
from torchao_int4cpu.layout import Segment, segments

#: Extra memory that one `prefill` may take.
PREFILL_MAX_BYTES = 48 * 2**20

#: Size of a panel, where memory allows: its buffers are to stay in the last cache. With K=4096, M=64
#: panels of 128 / 256 / 512 columns took 14.7 / 11.8 / 12.2 ms, with K=14336 43.7 / 53.9 / 62.4.
PANEL_ELEMENTS = 2**20
PANEL_MIN_COLUMNS = 128
PANEL_MAX_COLUMNS = 1024


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
    budget: int = PREFILL_MAX_BYTES,
) -> PrefillPlan:
    """Cut a product so that its temporaries stay within ``budget`` bytes.

    Args:
        m: rows of x.
        k: K' (padded), a multiple of ``group_size``.
        group_size: ``depth`` is a multiple of it.
        half_block: ``columns`` is a multiple of it: a panel holds either the low or the high nibbles
            of whole blocks.
        copies_x: whether x must be converted (each chunk of rows is, once).
        budget: bytes. `plan_bytes` of the result is at most that, unless a single row of x, or a
            single block and group, is larger.
    """

    def fits(rows: int, columns: int, depth: int) -> bool:
        plan = PrefillPlan(rows, columns, depth)
        return plan_bytes(plan, k, copies_x=copies_x) <= budget

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


def plan_bytes(plan: PrefillPlan, k: int, *, copies_x: bool) -> int:
    """Upper bound of the temporary memory of a plan, in bytes."""
    rows, columns, depth = plan
    panel = depth * columns * (1 + 1 + 4 + 2)  # as in _Buffers
    product = rows * columns * (4 + 4 + 2 * 4)  # both halves, a piece of K, padded columns
    return panel + product + (rows * k * 4 if copies_x else 0)


def prefill(x: Tensor, weight: PackedInt4) -> Tensor:
    """Expand the weight panel by panel and multiply. Any layout; ``[M, K]`` to ``[M, N]``.

    x and the expanded weight are rounded to `DENSE_DTYPE`. Extra memory is at most
    `PREFILL_MAX_BYTES`, whatever the shape; no dense copy of the weight is kept.
    """
    dtype = _dense_dtype_now()
    out = x.new_empty(x.shape[0], weight.n)
    for seg in segments(weight.qdata.shape[0], weight.layout):
        plan = _plan_for(x.shape[0], weight, seg, copies_x=x.dtype != dtype)
        for x_rows, out_rows in zip(x.split(plan.rows), out.split(plan.rows)):
            _prefill_segment(x_rows.to(dtype), weight, seg, plan, out_rows)
    return out


def _dense_dtype_now() -> torch.dtype:
    return DENSE_DTYPE if torch.backends.mkldnn.enabled else torch.float32


def _plan_for(
    m: int, weight: PackedInt4, seg: Segment, *, copies_x: bool, budget: int = PREFILL_MAX_BYTES
) -> PrefillPlan:
    return plan_prefill(
        m,
        weight.qdata.shape[1] * 2,
        group_size=weight.group_size,
        half_block=seg.rows // 2,
        copies_x=copies_x,
        budget=budget,
    )


def _prefill_segment(
    x: Tensor, weight: PackedInt4, seg: Segment, plan: PrefillPlan, out: Tensor
) -> None:
    for panels in _panels(weight, seg, plan, x.dtype):
        wide = out[:, panels.start : panels.stop]
        padded = wide.shape[1] < panels.stop - panels.start
        target = out.new_empty(len(x), panels.stop - panels.start) if padded else wide
        halves = target.unflatten(1, (-1, 2, seg.distance))
        products: dict[int, Tensor] = {}
        for columns, nibble, panel in panels.expand():
            part = torch.mm(x[:, columns], panel)
            if columns.stop < weight.k or columns.start:  # K in pieces: add them up in float32
                part = part.float()
            products[nibble] = part if columns.start == 0 else products[nibble].add_(part)
        for nibble, product in products.items():
            halves[:, :, nibble].copy_(product.view(len(x), -1, seg.distance))
        if padded:
            wide.copy_(target[:, : wide.shape[1]])


class _Buffers(NamedTuple):
    """Memory in which every panel of a product is built, ``[depth, columns]`` each."""

    joined: Tensor  # uint8, the bytes of a panel; both of its halves are expanded from them
    nibbles: Tensor  # uint8
    exact: Tensor  # float32
    panel: Tensor  # dtype of the product; the same memory as `exact` if that is float32

    @classmethod
    def allocate(cls, depth: int, columns: int, dtype: torch.dtype) -> _Buffers:
        exact = torch.empty(depth, columns, dtype=torch.float32)
        return cls(
            torch.empty(depth, columns, dtype=torch.uint8),
            torch.empty(depth, columns, dtype=torch.uint8),
            exact,
            exact if dtype == torch.float32 else torch.empty(depth, columns, dtype=dtype),
        )

    def part(self, depth: int, columns: int) -> _Buffers:
        return _Buffers(*(t.view(-1)[: depth * columns].view(depth, columns) for t in self))


class _Panels:
    """Rows ``start:stop`` of the weight (whole blocks), expanded on demand."""

    def __init__(
        self, weight: PackedInt4, seg: Segment, blocks: slice, depth: int, buffers: _Buffers
    ) -> None:
        self.start = seg.start + blocks.start * seg.rows
        self.stop = seg.start + blocks.stop * seg.rows
        self._weight = weight
        self._bytes = seg.byte_view(weight.qdata)[blocks]
        self._distance = seg.distance
        self._depth = depth
        self._buffers = buffers

    def expand(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield (columns of W, nibble, panel ``[columns, rows of W in that nibble]``).

        Each panel is a buffer that the next one overwrites.
        """
        k, group_size = self._weight.k, self._weight.group_size
        padded_k = self._bytes.shape[1]
        qparams = self._qparams(0), self._qparams(1)
        for start in range(0, k, self._depth):
            stop = min(padded_k, start + self._depth)
            columns = slice(start, min(stop, k))
            groups = slice(start // group_size, stop // group_size)
            joined = self._bytes[:, start:stop].transpose(0, 1)  # [columns, blocks, bytes]
            buffers = self._buffers.part(stop - start, (self.stop - self.start) // 2)
            buffers.joined.view(joined.shape).copy_(joined)
            for nibble, (scale, offset) in enumerate(qparams):
                torch.bitwise_and(buffers.joined, 0xF0 if nibble else 0x0F, out=buffers.nibbles)
                exact = buffers.exact.copy_(buffers.nibbles).unflatten(0, (-1, group_size))
                torch.addcmul(offset[groups], exact, scale[groups], out=exact)
                if buffers.panel.dtype != torch.float32:
                    buffers.panel.copy_(buffers.exact)
                yield columns, nibble, buffers.panel[: columns.stop - start]

    def _qparams(self, nibble: int) -> tuple[Tensor, Tensor]:
        """Float32 (scale, offset), ``[groups, 1, rows]``, so that w = scale * nibble + offset."""
        rows = self._weight.scale_and_zero[:, self.start : self.stop].float()
        rows = rows.unflatten(1, (-1, 2, self._distance))[:, :, nibble]
        scale, zero = rows.reshape(len(rows), 1, -1, 2).unbind(-1)
        # The high nibble is left where it is in its byte, which makes its code 16 times as large.
        return (scale / 16 if nibble else scale).contiguous(), zero - CODE_OFFSET * scale


def _panels(
    weight: PackedInt4, seg: Segment, plan: PrefillPlan, dtype: torch.dtype
) -> Iterator[_Panels]:
    half_block = seg.rows // 2
    blocks = min(seg.blocks, plan.columns // half_block)
    buffers = _Buffers.allocate(plan.depth, blocks * half_block, dtype)
    for start in range(0, seg.blocks, blocks):
        chosen = slice(start, min(seg.blocks, start + blocks))
        yield _Panels(weight, seg, chosen, plan.depth, buffers)


def int4_mm_grad(grad: Tensor, weight: PackedInt4) -> Tensor:
    """Gradient of `int4_mm` with respect to x: ``grad · W``, ``[M, N]`` to ``[M, K]``.

    Panels are summed in float32; the result has the dtype of ``grad``.
    """
    dtype = _dense_dtype_now()
    out = grad.new_empty(grad.shape[0], weight.k)
    budget = PREFILL_MAX_BYTES // 2  # half for panels, half for the sum and one product
    rows = max(1, budget // (weight.k * (4 + 4)))
    for grad_rows, out_rows in zip(grad.split(rows), out.split(rows)):
        total = torch.zeros(out_rows.shape, dtype=torch.float32)
        for seg in segments(weight.qdata.shape[0], weight.layout):
            plan = _plan_for(rows, weight, seg, copies_x=False, budget=budget)
            for panels in _panels(weight, seg, plan, dtype):
                wide = grad_rows[:, panels.start : panels.stop].to(dtype)
                wide = F.pad(wide, (0, panels.stop - panels.start - wide.shape[1]))
                halves = wide.unflatten(1, (-1, 2, seg.distance))
                for columns, nibble, panel in panels.expand():
                    chosen = halves[:, :, nibble].reshape(len(wide), -1)
                    total[:, columns] += torch.mm(chosen, panel.t())
        out_rows.copy_(total)
    return out
