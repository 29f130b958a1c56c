"""Reading a weight as a kernel does, for `bench`: all of it, each word once, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.native_variants import Variant, variant_of
from tests.test_kernels import apart
from torchao_int4cpu import set_kernel
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.native.library import KERNELS
from torchao_int4cpu.kernels.selection import native_kernel, read_at_best

#: One of each layout; the others differ in steps and chunks at most.
FAST = ("int16_avx2", "int16_vbmi")


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in KERNELS],
)
def variant(request: pytest.FixtureRequest) -> Variant:
    return variant_of(request.param)


def words(part: Tensor) -> int:
    """The exclusive or of its 32-bit words."""
    left = part.contiguous().view(torch.int32).flatten()
    while (count := left.numel()) > 1:
        half = count // 2
        left = torch.cat([left[:half] ^ left[half : 2 * half], left[2 * half :]])
    return int(left) & 0xFFFFFFFF


def expected(weight: PackedInt4) -> int:
    return words(weight.qdata) ^ words(weight.scale_and_zero)


#: Whole blocks, a short one alone and after others, one group and many, along K in several parts.
SHAPES = [(64, 64), (16, 256), (130, 300), (257, 1024), (100, 5000), (1024, 2048)]


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_all_is_read_once(variant: Variant, group_size: int, threads: int) -> None:
    """On 64 threads also in tasks that share a block, which end inside a group of some kernels."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for n, k in SHAPES:
            weight = variant.random(n, k, group_size)
            assert variant.library.read(variant.name, weight) == expected(weight)
            view = apart(weight)  # groups that lie apart: what is between them is not read
            assert variant.library.read(variant.name, view) == expected(weight)
    finally:
        torch.set_num_threads(before)


def test_every_byte_counts(variant: Variant) -> None:
    """Any one that is changed, of whole blocks and a short one, in the middle and at both ends."""
    weight = variant.random(150, 100, 32)
    found = variant.library.read(variant.name, weight)
    for part in (weight.qdata, weight.scale_and_zero):
        raw = part.view(torch.uint8).flatten()
        for at in [*range(0, raw.numel(), 7), raw.numel() - 1]:
            raw[at] ^= 0x41
            assert variant.library.read(variant.name, weight) != found
            raw[at] ^= 0x41
    assert variant.library.read(variant.name, weight) == found


def test_half_precision_scales_are_read(variant: Variant) -> None:
    weight = variant.random(70, 90, 32)
    half = weight._replace(scale_and_zero=weight.scale_and_zero.half())
    assert variant.library.read(variant.name, half) == expected(half)


@pytest.mark.parametrize("part", ["qdata", "scale_and_zero"])
def test_freed_memory_is_refused(variant: Variant, part: str) -> None:
    weight = variant.random(70, 90, 32)
    weight = weight._replace(**{part: getattr(weight, part).clone()})
    getattr(weight, part).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="was freed"):
        variant.library.read(variant.name, weight)


def test_the_chosen_kernel_reads(variant: Variant) -> None:
    weight = variant.random(70, 90, 32)
    chosen = native_kernel(weight.layout) is not None
    assert read_at_best(weight) == (expected(weight) if chosen else None)
    with set_kernel("aten"):
        assert read_at_best(weight) is None
