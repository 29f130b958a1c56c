"""Few rows: PyTorch's ``aten._weight_int4pack_mm_for_cpu``, kept within its 32-bit offsets.

It reads the 4-bit weight once for every 4 rows of the activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torchao_int4cpu.kernels.packed import PackedInt4
from torchao_int4cpu.layout import NibbleLayout

#: PyTorch's op computes offsets up to M·N, M·K and N·K/2 in 32-bit signed integers.
OP_INDEX_LIMIT = 2**31 - 1


def decode(x: Tensor, weight: PackedInt4) -> Tensor:
    """PyTorch's op. ``x`` ``[M, K]``, M >= 1; returns ``[M, N]`` in the dtype of ``x``.

    float16 and float32 activations are rounded to bfloat16 first, because the op has vector code for
    bfloat16 only (4096 x 4096, one row: 29 and 15 ms against 0.7).
    """
    padded_n, padded_k = weight.qdata.shape[0], weight.qdata.shape[1] * 2
    activation = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
    if padded_k != weight.k:
        activation = F.pad(activation, (0, padded_k - weight.k))
    activation = activation.contiguous()
    y = _op_in_pieces(activation, weight, OP_INDEX_LIMIT)
    if padded_n != weight.n:
        y = y[:, : weight.n].clone(memory_format=torch.contiguous_format)  # never a view: see ops
    return y if x.dtype == torch.bfloat16 else y.to(x.dtype)


def _op_in_pieces(x: Tensor, weight: PackedInt4, limit: int) -> Tensor:
    op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    qdata, scale_and_zero = weight.qdata, weight.scale_and_zero
    n, k = qdata.shape[0], qdata.shape[1] * 2
    rows, columns = op_piece(n, k, weight.layout, limit)
    if columns >= n and statically_known_true(x.shape[0] <= rows):
        y: Tensor = op(x, qdata, weight.group_size, scale_and_zero)
        return y
    return torch.cat(
        [
            torch.cat(
                [
                    op(
                        x_rows,
                        qdata[start : start + columns],
                        weight.group_size,
                        scale_and_zero[:, start : start + columns].contiguous(),
                    )
                    for start in range(0, n, columns)
                ],
                dim=1,
            )
            for x_rows in x.split(rows)
        ]
    )


def op_piece(n: int, k: int, layout: NibbleLayout, limit: int) -> tuple[int, int]:
    """Largest (rows of x, rows of W) the op may be given at once so that no index passes ``limit``.

    The rows of W are whole blocks of the layout, whose bytes are consecutive, or all ``n`` of them.
    """
    block = layout.rows_per_block
    columns = n
    if n * (k // 2) > limit:
        columns = max(block, limit // (k // 2) // block * block)
    return max(1, limit // max(columns, k)), columns
