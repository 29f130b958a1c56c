"""The packed weight as plain tensors, and the readable twin of every kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.groupwise import CODE_OFFSET
from torchao_int4cpu.layout import NibbleLayout, unpack


class PackedInt4(NamedTuple):
    """A packed weight as plain tensors.

    Attributes:
        qdata: uint8 ``[N', K'/2]`` in the order of ``layout``.
        scale_and_zero: bfloat16 ``[K'/group_size, N', 2]``.
        group_size: 32, 64, 128 or 256.
        layout: order of the codes in ``qdata``.
        n: N, the rows that are no padding.
        k: K, the columns that are no padding.
    """

    qdata: Tensor
    scale_and_zero: Tensor
    group_size: int
    layout: NibbleLayout
    n: int
    k: int


def int4_mm_reference(x: Tensor, weight: PackedInt4) -> Tensor:
    """The readable twin: ``x · Wᵀ`` in float64 with the exact dequantized weight. ``[M, N]``."""
    codes = unpack(weight.qdata, weight.layout).to(torch.float64)
    qparams = weight.scale_and_zero.to(torch.float64).repeat_interleave(weight.group_size, dim=0)
    w = (codes - CODE_OFFSET) * qparams[..., 0].t() + qparams[..., 1].t()
    return x.to(torch.float64) @ w[: weight.n, : weight.k].t()
