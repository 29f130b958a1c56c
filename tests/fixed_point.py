"""The readable twin of the kernels of integers: the same arithmetic in plain torch, bit for bit.

See csrc/fixed_point.h, int16.h and int8.h, which say why. Slow: it loops over groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET
from torchao_int4cpu.format.layout import unpack
from torchao_int4cpu.format.packed import PackedInt4

OUTLIERS = 4
CHUNK_COLUMNS = 1024


class Fixed(NamedTuple):
    """How a group is rounded: to 16 bits (the default), or to 8.

    Attributes:
        most: of the integers.
        ratio: of an outlier to the mean of the others.
        power: whether the unit is a power of two.
        leaves: whether rows with more than `OUTLIERS` in a group are left to another kernel.
    """

    most: int
    ratio: int
    power: bool
    leaves: bool


FIXED_16 = Fixed(32639, 64, power=True, leaves=True)
FIXED_8 = Fixed(127, 12, power=False, leaves=False)


def outliers(group: Tensor, fixed: Fixed = FIXED_16) -> Tensor:
    """Which numbers of each group ``[..., columns]`` are outliers. True everywhere: too many.

    The largest c <= 5 such that the c-th of the magnitudes in falling order is more than ``ratio``
    times the mean of those after it that are not 0. Five are too many: 8 bits take the first four.
    """
    magnitude = group.abs().double()
    order = magnitude.sort(dim=-1, descending=True, stable=True)
    count = magnitude.count_nonzero(dim=-1)
    taken = torch.zeros_like(count)
    for c in range(1, OUTLIERS + 2):
        rest = order.values[..., c:].sum(dim=-1)
        found = (count > c) & (order.values[..., c - 1] * (count - c) > fixed.ratio * rest)
        taken = torch.where(found, c, taken)
    rank = order.indices.argsort(dim=-1)
    if not fixed.leaves:
        return rank < taken.clamp(max=OUTLIERS)[..., None]
    return (rank < taken[..., None]) | (taken > OUTLIERS)[..., None]


def unit_of(largest: Tensor, fixed: Fixed = FIXED_16) -> Tensor:
    """The unit by which numbers up to ``largest`` are at most ``most``."""
    if not fixed.power:
        return largest.clamp(min=2.0**-112) / fixed.most
    exponent = torch.frexp(largest).exponent - 1
    exponent = torch.where(largest == 0, -112, exponent).clamp(min=-112)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 14)
    return torch.where(largest / unit > fixed.most, unit * 2, unit)


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` in float32, rounded once.

    In float64 the product is exact, and the sum is rounded to odd (away from an even last bit, to where
    the exact sum lies), after which rounding to float32 gives what one rounding gives.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = total.contiguous().view(torch.int64) & 1 == 0
    beyond = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), error))
    return torch.where(even & (error != 0), beyond, total).float()


def int8_slack(x: Tensor, weight: PackedInt4) -> Tensor:
    """What 8 bits may be off by, float64 ``[M, N]``: sum of half a unit times (8 |scale| + |zero|)."""
    groups, size = weight.scale_and_zero.shape[0], weight.group_size
    rows = F.pad(x.float(), (0, groups * size - weight.k)).view(len(x), groups, size)
    out = outliers(rows, FIXED_8)
    unit = unit_of(rows.masked_fill(out, 0.0).abs().amax(dim=-1, keepdim=True), FIXED_8)
    off = (unit.double() * 0.501).expand(rows.shape).masked_fill(out, 0.0).sum(dim=-1)
    scale, zero = weight.scale_and_zero.double().abs().unbind(dim=-1)
    return (off @ (8 * scale + zero))[:, : weight.n]


def fixed_point_mm(x: Tensor, weight: PackedInt4, fixed: Fixed = FIXED_16) -> Tensor:
    """``x · Wᵀ`` as the kernels of integers compute it, of finite rows of common size.

    ``[M, N]`` in the dtype of x. Rows with a group of too many outliers are NaN: these are for the
    float32 kernel.
    """
    m, groups, size = x.shape[0], weight.scale_and_zero.shape[0], weight.group_size
    rows = F.pad(x.float(), (0, groups * size - weight.k)).view(m, groups, size)
    out = outliers(rows, fixed)
    left = out.all(dim=-1).any(dim=-1)
    kept = rows.masked_fill(out, 0.0)
    unit = unit_of(kept.abs().amax(dim=-1), fixed)
    q = (kept * (1 / unit)[..., None]).round()
    q_sum = q.sum(dim=-1)  # at most 2^23, so exact
    codes = unpack(weight.qdata, weight.layout).view(-1, groups, size).double() - CODE_OFFSET
    scale, zero = weight.scale_and_zero.float().unbind(dim=-1)
    total = torch.zeros(m, codes.shape[0])
    chunk = torch.zeros_like(total)
    per_chunk = CHUNK_COLUMNS // size
    for g in range(groups):
        f = (q[:, g].double() @ codes[:, g].t()).float() * unit[:, g, None]
        x_sum = q_sum[:, g] * unit[:, g]
        for column in out[:, g].any(dim=0).nonzero().flatten().tolist():
            which, value = out[:, g, column], rows[:, g, column]
            f = torch.where(which[:, None], f + value[:, None] * codes[:, g, column].float(), f)
            x_sum = torch.where(which, x_sum + value, x_sum)
        chunk = fused(scale[g], f, chunk)
        chunk = fused(zero[g], x_sum[:, None], chunk)
        if (g + 1) % per_chunk == 0 or g + 1 == groups:
            total = chunk if g < per_chunk else total + chunk
            chunk = torch.zeros_like(total)
    y = total[:, : weight.n].masked_fill(left[:, None], torch.nan)
    return y.to(x.dtype)
