"""Weights of ONNX files: the operator ``com.microsoft.MatMulNBits``, 4 bits.

A group of a row of W is a row of bytes::

    B            uint8  [N, G, group_size / 2]   byte j holds columns 2 j (low) and 2 j + 1 (high)
    scales       float  [N, G], or flat
    zero_points  uint8  [N, ceil(G / 2)], or flat: byte j holds groups 2 j (low) and 2 j + 1 (high);
                        left out, all are 8
    g_idx        int32  [K]                      the group of each column; left out, in order

    W[n, k] = scales[n, g] * (code - zero point)

A sketch of this layout was compared with what onnxruntime multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES, GroupwiseInt4
from torchao_int4cpu.importers.gptq import act_order_of
from torchao_int4cpu.importers.groups import in_our_groups
from torchao_int4cpu.importers.words import check_part


def groupwise_of_onnx(
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    *,
    n: int,
    k: int,
    bits: int,
    group_size: int,
) -> GroupwiseInt4:
    """A weight of a ``MatMulNBits``, codes exact; scale and zero float32.

    Args:
        b: uint8 ``[N, G, group_size / 2]``.
        scales: float16, bfloat16 or float32, N * G of them.
        zero_points: uint8, N * ceil(G / 2) of them; or None for zero points 8.
        g_idx: int32 ``[K]``, or None for groups in order.
        n, k, bits, group_size: attributes of the operator; its ``block_size`` is the group size.

    Raises:
        TypeError: a part has the wrong dtype; zero points that are floats, for one.
        ValueError: not 4 bits, parts that do not fit together, or groups of a size that there is not
            here.
    """
    if bits != 4 or group_size < 2 or group_size % 2 or min(n, k) < 1:
        raise ValueError(
            f"MatMulNBits has bits={bits}, block_size={group_size}, N={n}, K={k}; only 4 bits are "
            "read, in blocks of an even number, so quantize the model in 4 bits"
        )
    groups = -(-k // group_size)
    check_part("B", b, (torch.uint8,), (n, groups, group_size // 2))
    check_part("scales", scales.flatten(), FLOAT_DTYPES, (n * groups,))
    codes = torch.stack([b & 15, b >> 4], dim=-1).view(n, groups * group_size)[:, :k]
    scale = scales.reshape(n, groups).float()
    points = torch.full_like(scale, CODE_OFFSET)
    if zero_points is not None:
        check_part("zero_points", zero_points.flatten(), (torch.uint8,), (n * -(-groups // 2),))
        pairs = zero_points.reshape(n, -1)
        points = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(n, -1)[:, :groups].float()
    act_order = act_order_of(g_idx, k, groups, group_size)
    return in_our_groups(codes, scale, (CODE_OFFSET - points) * scale, group_size, act_order)
