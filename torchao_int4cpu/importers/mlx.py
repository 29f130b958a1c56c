"""Weights of MLX checkpoints (mlx-lm, affine, 4 bits).

A row of W is a row of words::

    weight   uint32  [N, K/8]   nibble i of word c of row n is the code of W[n, 8 c + i]
    scales   float   [N, G]     of any sign
    biases   float   [N, G]

    W[n, k] = scales[n, g] * code + biases[n, g]

A sketch of this layout was compared with what mlx quantizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES, GroupwiseInt4
from torchao_int4cpu.importers.groups import group_size_of, in_our_groups
from torchao_int4cpu.importers.words import CODES, check_part, unpack_words


def groupwise_of_mlx(
    weight: Tensor, scales: Tensor, biases: Tensor, *, k: int, group_size: int | None = None
) -> GroupwiseInt4:
    """A weight of an MLX checkpoint, codes exact; scale and zero float32.

    Args:
        weight: uint32 ``[N, K/8]``.
        scales: float16, bfloat16 or float32 ``[N, G]``.
        biases: as scales.
        k: K.
        group_size: of the checkpoint, see `group_size_of`.

    Raises:
        TypeError: a part has the wrong dtype.
        ValueError: not 4 bits, parts that do not fit together, or groups of a size that there is not
            here.
    """
    if weight.ndim != 2 or scales.ndim != 2 or weight.shape[1] != -(-k // CODES):
        bits = 32 * weight.shape[-1] / k if weight.ndim else 0
        raise ValueError(
            f"weight has shape {list(weight.shape)} for {k} inputs, {bits:.3g} bits a weight; only 4 "
            "bits are read, [N, K/8], so quantize the original model in 4 bits"
        )
    n, groups = scales.shape
    check_part("weight", weight, (torch.uint32,), (n, -(-k // CODES)))
    check_part("scales", scales, FLOAT_DTYPES, (n, groups))
    check_part("biases", biases, FLOAT_DTYPES, (n, groups))
    codes = unpack_words(weight.view(torch.int32), 1)[:, :k]
    scale = scales.float()
    zero = biases.float() + CODE_OFFSET * scale
    return in_our_groups(codes, scale, zero, group_size_of(k, groups, group_size))
