"""Derived error bounds, weights to test with, and the guard that a weight really is 4-bit."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.scales import SCALES
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.format.layout import NibbleLayout, native_layout, pack
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference

#: Unit roundoff: half the gap between 1 and the next number.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}

#: Below this, numbers of the dtype lose precision; each term of a sum may lose so much.
UNDERFLOW = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


def native() -> NibbleLayout:
    layout = native_layout()
    assert layout is not None, "PyTorch's int4 op does not run here"
    return layout


def random_groupwise(n: int, k: int, group_size: int, seed: int = 0) -> GroupwiseInt4:
    """Random codes, scales over two powers of ten, zeros of the size of a few codes."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    scale = 10 ** (-3 + 2 * torch.rand(n, groups, generator=generator))
    zero = torch.randn(n, groups, generator=generator) * scale * 3
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    return GroupwiseInt4(codes, scale.to(SCALES), zero.to(SCALES), group_size)


def packed_in(groupwise: GroupwiseInt4, layout: NibbleLayout) -> PackedInt4:
    """The packed parts in any layout, not only in this process's."""
    tensor = Int4OpaqueTensor.from_groupwise(groupwise)
    n, k = groupwise.shape
    codes = torch.full((tensor.qdata.shape[0], tensor.qdata.shape[1] * 2), 8, dtype=torch.uint8)
    codes[:n, :k] = groupwise.codes
    return PackedInt4(pack(codes, layout), tensor.scale_and_zero, groupwise.group_size, layout, n, k)


#: How an activation may lie in memory.
STRIDES = ("contiguous", "rows apart", "transposed", "expanded", "offset")


def strided(values: Tensor, strides: str) -> Tensor:
    """``[m, k]`` of ``values`` ``[m + 1, 2 * k + 1]`` that lies in memory as one of `STRIDES` says."""
    m, k = values.shape[0] - 1, values.shape[1] // 2
    return {
        "contiguous": lambda: values[:m, :k].contiguous(),
        "rows apart": lambda: values[:m, :k],
        "transposed": lambda: values[:m, :k].t().contiguous().t(),
        "expanded": lambda: values[:1, :k].expand(m, k),
        "offset": lambda: values[1:, 1 : k + 1],
    }[strides]()


def product_bound(x: Tensor, weight: PackedInt4, out_dtype: torch.dtype, pieces: int = 1) -> Tensor:
    """How far a product of ours may be from `int4_mm_reference`, elementwise, in float64.

    With u = 2^-8 (bfloat16) and e = 2^-24 (float32), sums over K of absolute values:

    - x rounded to bfloat16: u; W rounded to bfloat16 (prefill): u; both: 2u + u² of sum |x||w|;
    - W computed in float32 from scale · code + (zero - 8 · scale): 4e of sum |x| (16|scale| + |zero|);
    - K additions in float32, in any order: K · e of the same;
    - the product rounded to bfloat16 (once for each piece of K), then to ``out_dtype``.
    """
    u, e = UNIT[torch.bfloat16], UNIT[torch.float32]
    unit = torch.zeros_like(weight.scale_and_zero, dtype=torch.float64)
    unit[..., 1] = 16 * weight.scale_and_zero[..., 0].abs() + weight.scale_and_zero[..., 1].abs()
    flat = weight._replace(scale_and_zero=unit)
    largest = int4_mm_reference(x.double().abs(), flat)  # sum |x| (16 |scale| + |zero|)
    terms = _sum_of_magnitudes(x, weight)
    error = (2 * u + u * u) * terms + (weight.k + 4) * e * largest
    total = int4_mm_reference(x, weight).abs() + error
    error = error + (pieces * u + UNIT[out_dtype]) * terms.maximum(total)
    return error + weight.k * (UNDERFLOW[torch.bfloat16] + UNDERFLOW[out_dtype]) * (1 + largest)


def _sum_of_magnitudes(x: Tensor, weight: PackedInt4) -> Tensor:
    w = int4_mm_reference(torch.eye(weight.k), weight)  # [K, N]
    return x.double().abs() @ w.abs()


def assert_product(
    y: Tensor, x: Tensor, weight: PackedInt4, pieces: int = 1, slack: Tensor | float = 0.0
) -> None:
    """Check shape, dtype and the derived bound, to which ``slack`` is added."""
    assert y.shape == (x.shape[0], weight.n)
    assert y.dtype == x.dtype
    error = (y.double() - int4_mm_reference(x, weight)).abs()
    bound = product_bound(x, weight, x.dtype, pieces) + slack
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.2f} of the bound"


def assert_int4(weight: object, shape: tuple[int, int], group_size: int) -> Int4OpaqueTensor:
    """The guard: this is our tensor, of that shape, and it takes the bytes of 4 bits a weight."""
    assert isinstance(weight, Int4OpaqueTensor)
    n, k = shape
    assert tuple(weight.shape) == shape
    assert weight.block_size == [1, group_size]
    padded_n, padded_k = -(-n // 16) * 16, -(-k // group_size) * group_size
    assert weight.qdata.nbytes == padded_n * padded_k // 2
    assert weight.scale_and_zero.nbytes == padded_n * padded_k // group_size * 4
    return weight
