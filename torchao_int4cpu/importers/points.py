"""Zero points of other tools: whole numbers of 4 bits, where a weight here has a zero of any size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, GroupwiseInt4

LARGEST_POINT = 15


class Points(NamedTuple):
    """``w = (code - point) * scale``, as near as it comes to a weight.

    Attributes:
        points: uint8 ``[N, G]``, 0 to 15.
        scale: float16 ``[N, G]``.
        value: the weight that this stands for; codes and order are those of the original.
    """

    points: Tensor
    scale: Tensor
    value: GroupwiseInt4


def nearest_points(weight: GroupwiseInt4) -> Points:
    """The nearest weight of whole zero points and float16 scales.

    It is the same weight, up to the rounding of its zeros, if that came from such a checkpoint.
    Elsewhere a group moves by up to half of its scale.

    Raises:
        ValueError: a scale does not fit float16.
    """
    scale = weight.scale.to(torch.float16)
    if not bool(scale.isfinite().all()):
        raise ValueError(
            f"scales reach {float(weight.scale.abs().max()):.3g}, and float16, in which the other tool "
            "keeps them, 65504; divide the weight by a constant"
        )
    exact = scale.float()
    level = (exact == 0) & (weight.zero.float() != 0)
    if bool(level.any()):
        raise ValueError(
            f"{int(level.sum())} of {level.numel()} groups have equal numbers, held as a zero with a "
            "scale of 0, which the other tool cannot hold; leave it dense (quantize with --skip)"
        )
    ratio = weight.zero.float() / torch.where(exact == 0, 1.0, exact)
    points = (CODE_OFFSET - ratio).round().clamp(0, LARGEST_POINT)
    stored = GroupwiseInt4(
        weight.codes, exact, (CODE_OFFSET - points) * exact, weight.group_size, weight.act_order
    )
    return Points(points.to(torch.uint8), scale, stored)
