"""The packed weight, and a stack of them, as plain tensors; and the readable twin of every kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.groupwise import CODE_OFFSET
from torchao_int4cpu.layout import NibbleLayout, unpack


class PackedInt4(NamedTuple):
    """A packed weight as plain tensors.

    Attributes:
        qdata: uint8 ``[N', K'/2]`` in the order of ``layout``, contiguous.
        scale_and_zero: bfloat16 ``[K'/group_size, N', 2]``, strides ``(even, 2, 1)``: at least 2 N'
            from group to group, and more if these are some rows of a larger weight.
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


class PackedExperts(NamedTuple):
    """A stack of packed weights of one shape, as plain tensors: `expert` gives each of them.

    Attributes:
        qdata: uint8 ``[E, N', K'/2]`` in the order of ``layout``, strides ``(any, K'/2, 1)``.
        scale_and_zero: bfloat16 ``[E, K'/group_size, N', 2]``, strides ``(any, even, 2, 1)`` as above.
        group_size: 32, 64, 128 or 256.
        layout: order of the codes in ``qdata``.
        n: N, the rows of an expert that are no padding.
        k: K, the columns that are no padding.
    """

    qdata: Tensor
    scale_and_zero: Tensor
    group_size: int
    layout: NibbleLayout
    n: int
    k: int

    def expert(self, index: int) -> PackedInt4:
        """The weight ``[N, K]`` of one expert: views."""
        return PackedInt4(
            self.qdata.select(0, index),
            self.scale_and_zero.select(0, index),
            self.group_size,
            self.layout,
            self.n,
            self.k,
        )


def int4_mm_reference(x: Tensor, weight: PackedInt4) -> Tensor:
    """The readable twin: ``x · Wᵀ`` in float64 with the exact dequantized weight. ``[M, N]``."""
    return x.to(torch.float64) @ dense_reference(weight).t()


def dense_reference(weight: PackedInt4) -> Tensor:
    """The exact dequantized weight, float64 ``[N, K]``."""
    codes = unpack(weight.qdata, weight.layout).to(torch.float64)
    qparams = weight.scale_and_zero.to(torch.float64).repeat_interleave(weight.group_size, dim=0)
    w = (codes - CODE_OFFSET) * qparams[..., 0].t() + qparams[..., 1].t()
    return w[: weight.n, : weight.k]
