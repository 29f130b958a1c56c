"""The layouts of GPTQ, AWQ, compressed-tensors and GGUF: codes exact, scales as the file means them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.foreign_checkpoints import (
    Foreign,
    awq_parts,
    compressed_tensors_parts,
    foreign,
    gptq_parts,
    mlx_parts,
    pack_words,
)
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.importers.awq import groupwise_of_awq
from torchao_int4cpu.importers.compressed_tensors import groupwise_of_compressed_tensors
from torchao_int4cpu.importers.gguf import KINDS, groupwise_of_gguf
from torchao_int4cpu.importers.gptq import groupwise_of_gptq
from torchao_int4cpu.importers.groups import group_size_of, in_our_groups
from torchao_int4cpu.importers.mlx import groupwise_of_mlx
from torchao_int4cpu.importers.weight import qparams_dtype_of
from torchao_int4cpu.importers.words import unpack_words

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
formats = pytest.mark.parametrize("format", FORMATS)


def read(format: str, weight: Foreign) -> GroupwiseInt4:
    k, size = weight.codes.shape[1], weight.group_size
    if format == "awq":
        return groupwise_of_awq(**awq_parts(weight), k=k, group_size=size)
    if format == "compressed-tensors":
        parts: dict[str, Any] = compressed_tensors_parts(weight)
        return groupwise_of_compressed_tensors(**parts, group_size=size)
    version = 2 if format == "gptq_v2" else 1
    parts = gptq_parts(weight, version)
    return groupwise_of_gptq(**parts, k=k, version=version, group_size=size)


# --- what they hold -----------------------------------------------------------------------------


def test_nibbles_of_a_word() -> None:
    """As the layouts are drawn: the lowest nibble first; AWQ's order; the sign bit."""
    codes = torch.arange(8, 16, dtype=torch.uint8)[None]
    assert pack_words(codes, 1).tolist() == [[0xFEDCBA98 - 2**32]]
    assert torch.equal(unpack_words(pack_words(codes, 1), 1), codes)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    assert pack_words(codes, 1, order).tolist() == [[0xFDB9ECA8 - 2**32]]
    assert torch.equal(unpack_words(pack_words(codes, 1, order), 1, order), codes)
    assert torch.equal(unpack_words(pack_words(codes.t(), 0), 0), codes.t())


@formats
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, 256, 512, -1]),
    symmetric=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_weight_is_that_of_the_file(
    format: str, n: int, k: int, group_size: int, symmetric: bool, ordered: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(k, generator=generator) if ordered and format != "awq" else None
    weight = foreign(torch.randn(n, k, generator=generator), group_size, symmetric, order)
    groupwise = read(format, weight)
    columns = torch.arange(k) if groupwise.act_order is None else groupwise.act_order.long()
    assert torch.equal(groupwise.codes, weight.codes[:, columns])
    assert torch.equal(groupwise.dequantize(torch.float64), weight.dense())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@formats
def test_what_storing_it_costs(format: str, symmetric: bool) -> None:
    """Nothing with zero points 8. Else the zero has 15 bits where float16 has 11: 2^-12 of it at most.

    That moves a weight by 2^-12 * 8 scales at most, and a weight is 4.6 scales in the mean: up to
    4.2e-4, 1e-4 in the mean; bfloat16 would move it by 8 times as much.
    """
    weight = foreign(torch.randn(64, 512), 128, symmetric)
    groupwise = read(format, weight)
    assert qparams_dtype_of(groupwise) == torch.float16
    stored = Int4OpaqueTensor.from_groupwise(groupwise, qparams_dtype=torch.float16)
    moved = stored.to_groupwise().dequantize(torch.float64) - weight.dense()
    error = float(moved.norm() / weight.dense().norm())
    assert error == 0.0 if symmetric else 1e-5 < error < 1.5e-4
    assert bool((moved.abs() <= 2.0**-9 * weight.scale.double().repeat_interleave(128, 1)).all())


def test_scales_of_another_range_are_bfloat16() -> None:
    weight = foreign(torch.randn(16, 64), 32, symmetric=True)
    tiny = weight._replace(scale=weight.scale.bfloat16() * 1e-7)
    parts: dict[str, Any] = compressed_tensors_parts(tiny)
    groupwise = groupwise_of_compressed_tensors(**parts)
    assert qparams_dtype_of(groupwise) == torch.bfloat16
    stored = Int4OpaqueTensor.from_groupwise(groupwise, qparams_dtype=torch.bfloat16)
    assert torch.equal(stored.to_groupwise().dequantize(torch.float64), tiny.dense())
    # Here float16 would be nearer, but moves a weight further than it may: 6.3e-4.
    small = weight._replace(scale=torch.full_like(weight.scale.float(), 3.0e-5))
    parts = dict(compressed_tensors_parts(small))
    groupwise = groupwise_of_compressed_tensors(**parts)
    Int4OpaqueTensor.from_groupwise(groupwise, qparams_dtype=qparams_dtype_of(groupwise))


@pytest.mark.parametrize(
    ("k", "groups", "configured", "size"),
    [
        (96, 3, None, 32),
        (96, 2, 64, 64),  # a short last group, which the config alone tells from 48
        (96, 2, None, 48),
        (96, 1, -1, 96),
        (256, 2, 64, 128),  # a layer with groups of its own
        (100, 2, -1, 50),
        (33, 2, None, 32),
        (500, 4, None, 125),
        (501, 4, None, 128),
    ],
)
def test_the_size_of_groups(k: int, groups: int, configured: int | None, size: int) -> None:
    assert group_size_of(k, groups, configured) == size


def test_groups_that_there_are_not_here() -> None:
    codes = torch.zeros(4, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"groups of 48 columns.*quantize the original weight"):
        in_our_groups(codes, torch.ones(4, 2), torch.ones(4, 2), 48)
    with pytest.raises(ValueError, match="groups of 16 columns"):
        read("gptq", foreign(torch.randn(8, 64), 16, True))
    whole = in_our_groups(codes, torch.ones(4, 1), torch.ones(4, 1), 96)  # one group a row, of any size
    assert (whole.group_size, whole.scale.shape) == (256, (4, 1))


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_blocks_are_what_the_package_gguf_reads(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    columns, size, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (24, 3 * size), dtype=torch.uint8, generator=generator)
    halves = torch.randn(24, 3, 2, generator=generator).mul(0.01).half().view(torch.uint8)
    blocks.view(24, 3, size)[..., : 4 if kind != "Q4_0" else 2] = halves[
        ..., : 4 if kind != "Q4_0" else 2
    ]
    expected = gguf.dequantize(blocks.numpy(), getattr(gguf.GGMLQuantizationType, kind))
    groupwise = groupwise_of_gguf(blocks, kind, 3 * columns)
    assert groupwise.group_size == 32
    error = (groupwise.dequantize(torch.float64) - torch.from_numpy(expected).double()).abs()
    # gguf rounds each of two products and their difference to float32, we scale and zero.
    assert float(error.max()) <= 8 * 2.0**-24 * float(abs(expected).max())


def test_gguf_blocks_as_they_are_drawn() -> None:
    """One block of each, by hand."""
    d = torch.tensor([0.5, 2.0]).half().view(torch.uint8)
    nibbles = (torch.arange(16) | (15 - torch.arange(16)) << 4).to(torch.uint8)
    codes = torch.cat([torch.arange(16), 15 - torch.arange(16)]).double()
    q4_0 = groupwise_of_gguf(torch.cat([d[:2], nibbles])[None], "Q4_0", 32)
    assert torch.equal(q4_0.dequantize(torch.float64)[0], 0.5 * (codes - 8))
    q4_1 = groupwise_of_gguf(torch.cat([d, nibbles])[None], "Q4_1", 32)
    assert torch.equal(q4_1.dequantize(torch.float64)[0], 0.5 * codes + 2.0)
    # Scales 1 to 8 times 7 and minima 8 to 1 times 7, of which the last four need all 6 bits.
    sc, mn = 7 * torch.arange(1, 9), 7 * torch.arange(8, 0, -1)
    low = sc[:4] | (sc[4:] >> 4) << 6
    middle = mn[:4] | (mn[4:] >> 4) << 6
    high = (sc[4:] & 15) | (mn[4:] & 15) << 4
    packed = torch.cat([low, middle, high]).to(torch.uint8)
    runs = torch.cat([torch.full((32,), i + 16 * (i + 8)) for i in range(4)]).to(torch.uint8)
    q4_k = groupwise_of_gguf(torch.cat([d, packed, runs])[None], "Q4_K", 256)
    codes = torch.tensor([0, 8, 1, 9, 2, 10, 3, 11]).double()
    expected = (0.5 * sc * codes - 2.0 * mn).repeat_interleave(32)
    assert torch.equal(q4_k.dequantize(torch.float64)[0], expected)


@pytest.mark.parametrize(
    ("blocks", "kind", "k", "message"),
    [
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", 32, "Q8_0 is not one of Q4_0, Q4_1, Q4_K"),
        (torch.zeros(2, 17, dtype=torch.uint8), "Q4_0", 32, r"shape \[2, 17\].*must be \[2, 18\]"),
        (torch.zeros(2, 18, dtype=torch.uint8), "Q4_0", 33, "a multiple of 32"),
        (torch.zeros(2, 144, dtype=torch.uint8), "Q4_K", 128, "a multiple of 256"),
    ],
)
def test_gguf_blocks_that_are_refused(blocks: Tensor, kind: str, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groupwise_of_gguf(blocks, kind, k)


# --- what is refused ----------------------------------------------------------------------------


def damaged(format: str, **changes: Any) -> dict[str, Any]:
    weight = foreign(torch.randn(24, 96), 32, False)
    if format == "compressed-tensors":
        return compressed_tensors_parts(weight) | changes
    return (awq_parts(weight) if format == "awq" else gptq_parts(weight)) | changes


WORDS = torch.zeros(12, 24, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": WORDS[:, :20]}, r"qweight has shape \[12, 20\].*must be \[12, 24\]"),
        ({"qweight": WORDS.repeat(2, 1)}, "8 bits a weight; only 4 bits are read"),
        ({"qweight": WORDS[:9]}, "3 bits a weight; only 4 bits"),
        ({"qweight": WORDS[0]}, "1 and 2 dimensions"),
        ({"qweight": WORDS.long()}, "qweight is torch.int64; it must be a tensor of int32"),
        ({"qzeros": WORDS[:3, :2]}, r"qzeros has shape \[3, 2\].*must be \[3, 3\]"),
        ({"scales": torch.ones(3, 25).half()}, r"qweight has shape \[12, 24\].*must be \[12, 25\]"),
        (
            {"scales": torch.ones(0, 24).half(), "qzeros": WORDS[:0, :3]},
            "0 groups of scales",
        ),
        (
            {"scales": torch.ones(95, 24).half(), "qzeros": torch.zeros(95, 3).int()},
            "95 groups of scales for 96 columns, which no group",
        ),
        ({"scales": torch.ones(3, 24).int()}, "scales is torch.int32"),
        ({"scales": torch.full((3, 24), torch.nan).half()}, "scale has NaN or infinite values"),
        ({"g_idx": torch.zeros(96).int()}, "g_idx puts 0 to 96 of 96 columns into a group"),
        ({"g_idx": torch.full((96,), 3).int()}, "groups from 3 to 3 beside 3 groups"),
        ({"g_idx": torch.full((96,), -1).int()}, "groups from -1 to -1"),
        ({"g_idx": torch.arange(95).int() // 32}, r"g_idx has shape \[95\].*must be \[96\]"),
        ({"g_idx": torch.zeros(96)}, "g_idx is torch.float32; it must be a tensor of int32 or int64"),
    ],
)
def test_damaged_gptq(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        groupwise_of_gptq(**damaged("gptq", **changes), k=96)


def test_mlx() -> None:
    """Scales of both signs; a group that ends early."""
    weight = foreign(torch.randn(24, 150), 64, False)
    groupwise = groupwise_of_mlx(**mlx_parts(weight, every=3), k=150, group_size=64)
    assert bool((groupwise.scale < 0).any())
    assert torch.equal(groupwise.dequantize(torch.float64), weight.dense())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(24, 24).to(torch.uint32)}, "for 96 inputs, 8 bits a weight"),
        ({"weight": torch.zeros(24, 12).int()}, "weight is torch.int32; it must be a tensor of uint32"),
        ({"scales": torch.ones(24, 4)}, r"biases has shape \[24, 3\].*must be \[24, 4\]"),
        ({"scales": torch.ones(23, 3)}, r"weight has shape \[24, 12\].*must be \[23, 12\]"),
        ({"biases": torch.ones(24, 3).int()}, "biases is torch.int32"),
        ({"biases": torch.full((24, 3), torch.inf)}, "zero has NaN or infinite values"),
    ],
)
def test_damaged_mlx(changes: dict[str, Tensor], message: str) -> None:
    parts: dict[str, Any] = mlx_parts(foreign(torch.randn(24, 96), 32, False)) | changes
    with pytest.raises((TypeError, ValueError), match=message):
        groupwise_of_mlx(**parts, k=96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qweight": torch.zeros(24, 12).int()}, "only AWQ's version 'gemm' is read"),
        ({"qweight": torch.zeros(96, 4).int()}, r"qweight has shape \[96, 4\].*must be \[96, 3\]"),
        ({"qzeros": torch.zeros(2, 3).int()}, r"qzeros has shape \[2, 3\]"),
        ({"scales": torch.ones(3, 24).long()}, "scales is torch.int64"),
    ],
)
def test_damaged_awq(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        groupwise_of_awq(**damaged("awq", **changes), k=96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight_packed": torch.zeros(24, 24).int()},
            r"weight_packed has shape \[24, 24\]",
        ),
        (
            {"weight_shape": torch.tensor([24])},
            "weight_shape, weight_packed and weight_scale are",
        ),
        ({"weight_shape": torch.tensor([24, -96])}, r"weight_shape is \[24, -96\]"),
        ({"weight_shape": torch.tensor([2**40, 96])}, r"weight_packed has shape \[24, 12\]"),
        ({"weight_zero_point": torch.zeros(24, 3).int()}, r"weight_zero_point has shape \[24, 3\]"),
        ({"weight_g_idx": torch.randperm(96).int() // 33}, "g_idx puts 30 to 33 of 96 columns"),
        ({"weight_scale": torch.ones(24, 3).double()}, "weight_scale is torch.float64"),
    ],
)
def test_damaged_compressed_tensors(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        groupwise_of_compressed_tensors(**damaged("compressed-tensors", **changes))
