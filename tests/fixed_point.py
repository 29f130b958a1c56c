"""The readable twin of the kernels of integers: the same arithmetic in plain torch, bit for bit.

See csrc/int16.h, which says why. Slow: it is a loop over groups on whole matrices of integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET
from torchao_int4cpu.format.layout import unpack
from torchao_int4cpu.format.packed import PackedInt4

MOST_Q = 32639
OUTLIERS = 4
OUTLIER_RATIO = 64
CHUNK_COLUMNS = 1024


def outliers(group: Tensor) -> Tensor:
    """Which numbers of each group ``[..., columns]`` are outliers. True everywhere: too many.

    The largest c <= 5 such that the c-th of the magnitudes in falling order is more than 64 times the
    mean of those after it that are not 0; five are too many.
    """
    magnitude = group.abs().double()
    order = magnitude.sort(dim=-1, descending=True, stable=True)
    count = magnitude.count_nonzero(dim=-1)
    taken = torch.zeros_like(count)
    for c in range(1, OUTLIERS + 2):
        rest = order.values[..., c:].sum(dim=-1)
        found = (count > c) & (order.values[..., c - 1] * (count - c) > OUTLIER_RATIO * rest)
        taken = torch.where(found, c, taken)
    rank = order.indices.argsort(dim=-1)
    return (rank < taken[..., None]) | (taken > OUTLIERS)[..., None]


def unit_of(largest: Tensor) -> Tensor:
    """The power of two by which numbers up to ``largest`` are at most `MOST_Q`."""
    exponent = torch.frexp(largest).exponent - 1
    exponent = torch.where(largest == 0, -112, exponent).clamp(min=-112)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 14)
    return torch.where(largest / unit > MOST_Q, unit * 2, unit)


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


def fixed_point_mm(x: Tensor, weight: PackedInt4) -> Tensor:
    """``x · Wᵀ`` as the kernels of integers compute it, of finite rows of common size.

    ``[M, N]`` in the dtype of x. Rows with a group of too many outliers are NaN: these are for the
    float32 kernel.
    """
    m, groups, size = x.shape[0], weight.scale_and_zero.shape[0], weight.group_size
    rows = F.pad(x.float(), (0, groups * size - weight.k)).view(m, groups, size)
    out = outliers(rows)
    left = out.all(dim=-1).any(dim=-1)
    kept = rows.masked_fill(out, 0.0)
    unit = unit_of(kept.abs().amax(dim=-1))
    q = (kept / unit[..., None]).round()
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
