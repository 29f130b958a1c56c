"""Weights of compressed-tensors checkpoints (llm-compressor's "pack-quantized"), 4 bits.

Codes are q + 8 of signed numbers q, in the order of rows; zero points are packed along the rows::

    weight_packed      int32  [N, ceil(K/8)]   nibble i of word c of row n is the code of W[n, 8 c + i]
    weight_scale       float  [N, G]
    weight_zero_point  int32  [ceil(N/8), G]   nibble i of word c is the zero point + 8 of row 8 c + i;
                                               absent in symmetric checkpoints
    weight_shape       int64  [2]              N, K
    weight_g_idx       int32  [K]              the group of each column, with actorder="group"

    W[n, k] = weight_scale[n, g] * (q - zero point)

Compared with what ``pack_to_int32`` of compressed-tensors 0.20 writes, K = 36 too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES, GroupwiseInt4
from torchao_int4cpu.importers.gptq import act_order_of
from torchao_int4cpu.importers.groups import group_size_of, in_our_groups
from torchao_int4cpu.importers.points import nearest_points
from torchao_int4cpu.importers.words import CODES, check_part, check_words, pack_words, unpack_words


def groupwise_of_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    group_size: int | None = None,
) -> GroupwiseInt4:
    """A weight of a compressed-tensors checkpoint, codes exact; scale and zero float32.

    Args:
        weight_packed: int32 ``[N, ceil(K/8)]``.
        weight_scale: float16, bfloat16 or float32 ``[N, G]``; ``[N, 1]`` for one group a row.
        weight_shape: two integers, N and K.
        weight_zero_point: int32 ``[ceil(N/8), G]``, or None for zero points 0.
        weight_g_idx: int32 ``[K]``, or None for groups in order.
        group_size: of the checkpoint, see `group_size_of`.

    Raises:
        TypeError: a part has the wrong dtype.
        ValueError: not 4 bits, parts that do not fit together, groups whose columns do not follow each
            other even when sorted, or of a size that there is not here.
    """
    if weight_shape.numel() != 2 or weight_packed.ndim != 2 or weight_scale.ndim != 2:
        raise ValueError(
            f"weight_shape, weight_packed and weight_scale are {list(weight_shape.shape)}, "
            f"{list(weight_packed.shape)} and {list(weight_scale.shape)}; they must be [2], "
            "[N, ceil(K/8)] and [N, G], so the file is damaged, or not pack-quantized in 4 bits"
        )
    n, k = (int(size) for size in weight_shape.flatten())
    groups = weight_scale.shape[1]
    if k < 1 or n < 1:
        raise ValueError(f"weight_shape is [{n}, {k}]; both must be 1 or more, so the file is damaged")
    check_words(weight_packed=(weight_packed, (n, -(-k // CODES))))
    check_part("weight_scale", weight_scale, FLOAT_DTYPES, (n, groups))
    group_size = group_size_of(k, groups, group_size)
    act_order = act_order_of(weight_g_idx, k, groups, group_size)
    scale = weight_scale.float()
    zero = torch.zeros_like(scale)
    if weight_zero_point is not None:
        check_words(weight_zero_point=(weight_zero_point, (-(-n // CODES), groups)))
        points = unpack_words(weight_zero_point, 0)[:n].float() - CODE_OFFSET
        zero = -points * scale
    return in_our_groups(unpack_words(weight_packed, 1)[:, :k], scale, zero, group_size, act_order)


def compressed_tensors_of_groupwise(weight: GroupwiseInt4) -> tuple[dict[str, Tensor], GroupwiseInt4]:
    """The parts of a weight, asymmetric, by their names, and the weight that these stand for.

    Raises:
        ValueError: the weight has an order of columns, or as `nearest_points`.
    """
    if weight.act_order is not None:
        raise ValueError(
            "the weight has groups of columns in another order (act_order), which compressed-tensors "
            "does not read any more, since 0.20; export it as gptq"
        )
    points, scale, value = nearest_points(weight)
    parts = {
        "weight_packed": pack_words(weight.codes, 1),
        "weight_scale": scale,
        "weight_zero_point": pack_words(points, 0),
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, value
