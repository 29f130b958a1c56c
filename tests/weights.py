"""4-bit weights to test with: matrices and stacks, in any layout, and small plain pictures of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.numerics import random_groupwise
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.format.layout import LAYOUTS, layout_named, pack

ALL_LAYOUTS = sorted(LAYOUTS)


def random_value(shape: tuple[int, ...], group_size: int, seed: int = 0) -> GroupwiseInt4:
    """`random_groupwise` for a matrix ``[N, K]`` or a stack ``[E, N, K]``."""
    *stack, n, k = shape
    if not stack:
        return random_groupwise(n, k, group_size, seed)
    matrices = [random_groupwise(n, k, group_size, 100 * seed + e) for e in range(stack[0])]
    codes, scale, zero = (
        torch.stack([getattr(matrix, name) for matrix in matrices])
        for name in ("codes", "scale", "zero")
    )
    return GroupwiseInt4(codes, scale, zero, group_size)


def quantized(*shape: int, group_size: int = 32) -> Int4OpaqueTensor:
    """A weight of random normal numbers, float32."""
    return Int4OpaqueTensor.from_hp(torch.randn(shape), [1] * (len(shape) - 1) + [group_size])


def weight_in(
    layout: str,
    value: GroupwiseInt4,
    dtype: torch.dtype = torch.bfloat16,
    act_pre_scale: Tensor | None = None,
) -> Int4OpaqueTensor:
    """The weight with its bytes in any layout, not only in this process's."""
    t = Int4OpaqueTensor.from_groupwise(value, dtype=dtype)
    n, k = value.shape[-2:]
    padded_n, padded_k = t.qdata.shape[-2], t.qdata.shape[-1] * 2
    codes = torch.full((*value.shape[:-2], padded_n, padded_k), 8, dtype=torch.uint8)
    codes[..., :n, :k] = value.codes
    for matrix, target in zip(
        codes.view(-1, padded_n, padded_k), t.qdata.view(-1, padded_n, padded_k // 2)
    ):
        target.copy_(pack(matrix, layout_named(layout)))
    return Int4OpaqueTensor(
        t.qdata, t.scale_and_zero, t.block_size, value.shape, layout, dtype, act_pre_scale
    )


def random_weight(
    *shape: int,
    group_size: int = 32,
    layout: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    act_pre_scale: Tensor | None = None,
    seed: int = 0,
) -> Int4OpaqueTensor:
    """A weight of that shape, in this process's layout if none is named."""
    value = random_value(shape, group_size, seed)
    if layout is None:
        return Int4OpaqueTensor.from_groupwise(value, dtype=dtype, act_pre_scale=act_pre_scale)
    return weight_in(layout, value, dtype, act_pre_scale)
