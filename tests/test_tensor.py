"""`Int4OpaqueTensor`: round trips, padding, conversion, the checks of its parts."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Prototype
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

from tests.numerics import assert_int4, native, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.format.layout import LAYOUTS, layout_named
from torchao_int4cpu.format.slicing import repack


@given(
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, 256]),
    seed=st.integers(0, 2**31),
)
def test_to_groupwise_gives_the_exact_value_back(n: int, k: int, group_size: int, seed: int) -> None:
    value = random_groupwise(n, k, group_size, seed)
    t = assert_int4(Int4OpaqueTensor.from_groupwise(value), (n, k), group_size)
    back = t.to_groupwise()
    assert torch.equal(back.codes, value.codes)
    assert torch.equal(back.scale, value.scale)
    assert torch.equal(back.zero, value.zero)
    assert back.group_size == group_size
    assert torch.equal(t.dequantize(), value.dequantize(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("algorithm", ["tinygemm", Int4ChooseQParamsAlgorithm.HQQ, "mse"])
@pytest.mark.parametrize(("n", "k"), [(100, 2880), (1, 1), (16, 128)])
def test_from_hp_quantizes_and_packs(n: int, k: int, algorithm: str, dtype: torch.dtype) -> None:
    w = torch.randn(n, k).to(dtype)
    t = assert_int4(Int4OpaqueTensor.from_hp(w, [1, 128], algorithm), (n, k), 128)
    assert t.dtype == dtype
    value = choose_qparams(w, 128, algorithm)
    assert torch.equal(t.to_groupwise().codes, value.codes)
    dequantized = t.dequantize()
    assert dequantized.dtype == dtype
    assert torch.equal(dequantized, value.dequantize(dtype))
    if k > 16:
        assert not torch.equal(dequantized, w)  # it was quantized


def test_padding_stands_for_weights_of_zero() -> None:
    t = Int4OpaqueTensor.from_groupwise(random_groupwise(17, 40, 32))
    padded = Int4OpaqueTensor(
        t.qdata, t.scale_and_zero, [1, 32], (32, 64), t.qdata_layout, torch.float32
    ).dequantize()
    assert torch.equal(padded[:17, :40], t.to_groupwise().dequantize())
    assert int(padded[17:].count_nonzero()) == 0


def test_scales_are_rounded_to_bfloat16_and_must_fit() -> None:
    value = random_groupwise(3, 32, 32)
    wide = type(value)(value.codes, value.scale.float() * 1.001, value.zero.float(), 32)
    assert torch.equal(
        Int4OpaqueTensor.from_groupwise(wide).to_groupwise().scale, wide.scale.bfloat16()
    )
    huge = type(value)(value.codes, torch.full((3, 1), 3.4e38), value.zero.float(), 32)
    with pytest.raises(ValueError, match="scale or zero does not fit bfloat16"):
        Int4OpaqueTensor.from_groupwise(huge)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_upstream_in_any_layout(layout: str, dtype: torch.dtype) -> None:
    w = (torch.randn(48, 128) * 0.1).to(dtype)
    here = Prototype.from_hp(w, [1, 32])
    elsewhere = Prototype(
        repack(here.qdata, native(), layout_named(layout)), here.scale_and_zero, [1, 32], w.shape
    )
    t = assert_int4(Int4OpaqueTensor.from_upstream(elsewhere, layout=layout), (48, 128), 32)
    assert t.qdata_layout == native().name
    assert t.dtype == dtype
    assert torch.equal(t.to_groupwise().codes, choose_qparams(w, 32).codes)
    assert torch.equal(t.dequantize(), Int4OpaqueTensor.from_hp(w, [1, 32]).dequantize())


def test_from_upstream_refuses_other_things() -> None:
    w = torch.randn(64, 64)
    upstream = Prototype.from_hp(w, [1, 32])
    with pytest.raises(TypeError, match=r"got a torch\.Tensor; from_upstream converts torchao"):
        Int4OpaqueTensor.from_upstream(w, layout="avx512")
    with pytest.raises(TypeError, match=r"got a torchao_int4cpu\.Int4OpaqueTensor"):
        Int4OpaqueTensor.from_upstream(Int4OpaqueTensor.from_hp(w, [1, 32]), layout="avx512")
    with pytest.raises(ValueError, match="layout 'sse' is not known"):
        Int4OpaqueTensor.from_upstream(upstream, layout="sse")
    upstream.act_mapping_type = "symmetric"
    with pytest.raises(TypeError, match=r"int8 activations .*'symmetric'"):
        Int4OpaqueTensor.from_upstream(upstream, layout="avx512")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_repack_keeps_the_value(layout: str) -> None:
    value = random_groupwise(80, 64, 32)
    t = Int4OpaqueTensor.from_groupwise(value)
    foreign = Int4OpaqueTensor(
        repack(t.qdata, native(), layout_named(layout)),
        t.scale_and_zero,
        [1, 32],
        (80, 64),
        layout,
        t.dtype,
    )
    assert torch.equal(foreign.to_groupwise().codes, value.codes)
    assert foreign.repack_() is foreign
    assert foreign.qdata_layout == native().name
    assert torch.equal(foreign.qdata, t.qdata)


class TestRepr(expecttest.TestCase):  # type: ignore[misc]  # has no annotations
    def test_repr_shows_no_data(self) -> None:
        t = Int4OpaqueTensor.from_groupwise(random_groupwise(100, 90, 32))
        shown = repr(t).replace(native().name, "LAYOUT")
        self.assertExpectedInline(
            shown,
            """\
Int4OpaqueTensor(shape=[100, 90], group_size=32, dtype=torch.bfloat16,
    device=cpu, qdata_layout='LAYOUT', bytes=6720)""",
        )
        t.act_pre_scale = torch.ones(90)
        assert "act_pre_scale=[90]" in repr(torch.nn.Parameter(t, requires_grad=False))


def good_parts() -> dict[str, Any]:
    t = Int4OpaqueTensor.from_groupwise(random_groupwise(20, 70, 32))
    return {
        "qdata": t.qdata,
        "scale_and_zero": t.scale_and_zero,
        "block_size": [1, 32],
        "shape": torch.Size((20, 70)),
        "qdata_layout": "avx2",
        "dtype": torch.bfloat16,
        "act_pre_scale": torch.ones(70),
    }


def _u8(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def _bf16(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qdata": _u8(32, 47)}, ValueError, r"qdata has shape \[32, 47\].*needs \[32, 48\]"),
        ({"qdata": _u8(20, 48)}, ValueError, r"qdata has shape \[20, 48\].*needs \[32, 48\]"),
        ({"qdata": _u8(32 * 48)}, ValueError, r"qdata has shape \[1536\]"),
        ({"qdata": _bf16(32, 48)}, TypeError, "qdata is torch.bfloat16; it must be a torch.uint8"),
        ({"qdata": None}, TypeError, "qdata is NoneType"),
        ({"qdata": _u8(48, 32).t()}, ValueError, r"qdata has strides \[1, 32\].*strides \[48, 1\]"),
        (
            {"scale_and_zero": _bf16(3, 2, 32).transpose(1, 2)},
            ValueError,
            r"scale_and_zero has strides \[64, 1, 32\].*\[even, 2, 1\]",
        ),
        (
            {"scale_and_zero": _bf16(3 * 65).as_strided((3, 32, 2), (65, 2, 1))},
            ValueError,
            r"scale_and_zero has strides \[65, 2, 1\]",
        ),
        ({"scale_and_zero": _bf16(2, 32, 2)}, ValueError, r"\[2, 32, 2\].*needs \[3, 32, 2\]"),
        ({"scale_and_zero": _bf16(3, 20, 2)}, ValueError, r"\[3, 20, 2\].*needs \[3, 32, 2\]"),
        ({"scale_and_zero": _bf16(3, 32, 2).float()}, TypeError, "scale_and_zero is torch.float32"),
        ({"block_size": [1, 48]}, ValueError, "group_size=48 is not supported"),
        ({"block_size": [1, 64]}, ValueError, "needs"),
        ({"block_size": [2, 32]}, ValueError, r"block_size is \[2, 32\]; it must be"),
        ({"block_size": 32}, ValueError, "block_size is 32"),
        ({"block_size": [1, "32"]}, TypeError, "group_size='32' is a str"),
        ({"shape": (20, 170)}, ValueError, "needs"),
        ({"shape": (-20, 70)}, ValueError, r"shape is \(-20, 70\); it must be \[N, K\]"),
        (
            {"shape": (1, 20, 70)},
            ValueError,
            r"block_size is \[1, 32\]; it must be \[1, 1, group_size\]",
        ),
        ({"shape": (1, 20, 70), "block_size": [1, 1, 32]}, ValueError, r"needs \[1, 32, 48\]"),
        ({"shape": (1, 1, 20, 70)}, ValueError, "shape is"),
        ({"shape": (70,)}, ValueError, "shape is"),
        ({"shape": (20.0, 70)}, ValueError, "shape is"),
        ({"shape": None}, ValueError, "shape is None"),
        ({"qdata_layout": "avx3"}, ValueError, "layout 'avx3' is not known; choose"),
        ({"qdata_layout": None}, ValueError, "layout None is not known"),
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64; choose"),
        ({"dtype": "bfloat16"}, TypeError, "dtype is bfloat16"),
        ({"act_pre_scale": torch.ones(71)}, ValueError, r"has shape \[71\].*shape \[70\]"),
        ({"act_pre_scale": torch.ones(70).int()}, TypeError, "act_pre_scale is torch.int32"),
        ({"act_pre_scale": 2.0}, TypeError, "act_pre_scale is float"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    Int4OpaqueTensor(**good_parts())
    with pytest.raises(error, match=message):
        Int4OpaqueTensor(**(good_parts() | change))


@pytest.mark.parametrize("block_size", [[1, 16], [1], [2, 32], 32, None])
def test_from_hp_refuses_a_wrong_block_size(block_size: Any) -> None:
    with pytest.raises(ValueError, match=r"group_size|block_size"):
        Int4OpaqueTensor.from_hp(torch.randn(4, 64), block_size)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 4, 64)], ids=str)
def test_from_hp_refuses_a_wrong_rank(shape: tuple[int, ...]) -> None:
    block_size = [1] * (max(2, len(shape)) - 1) + [32]
    with pytest.raises(ValueError, match=r"weight has shape .*; only \[N, K\]"):
        Int4OpaqueTensor.from_hp(torch.randn(shape), block_size)


def test_from_hp_of_a_stack_names_its_block_size() -> None:
    with pytest.raises(ValueError, match=r"block_size is \[1, 32\]; it must be \[1, 1, group_size\]"):
        Int4OpaqueTensor.from_hp(torch.randn(2, 4, 64), [1, 32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("algorithm", ["tinygemm", Int4ChooseQParamsAlgorithm.HQQ, "mse"])
def test_a_stack_is_its_matrices(algorithm: str, dtype: torch.dtype) -> None:
    w = torch.randn(3, 20, 70).to(dtype)
    stack = Int4OpaqueTensor.from_hp(w, [1, 1, 32], algorithm)
    assert stack.shape == (3, 20, 70)
    assert stack.block_size == [1, 1, 32]
    assert stack.dtype == dtype
    assert stack.qdata.nbytes == 3 * 32 * 96 // 2  # 4 bits each
    value = stack.to_groupwise()
    for e, matrix in enumerate(w):
        alone = Int4OpaqueTensor.from_hp(matrix, [1, 32], algorithm)
        assert torch.equal(stack.qdata[e], alone.qdata)
        assert torch.equal(stack.scale_and_zero[e], alone.scale_and_zero)
        assert torch.equal(value.codes[e], alone.to_groupwise().codes)
        assert torch.equal(stack.dequantize()[e], alone.dequantize())
    again = Int4OpaqueTensor.from_groupwise(value, dtype=dtype)
    assert torch.equal(again.qdata, stack.qdata)
    assert torch.equal(again.scale_and_zero, stack.scale_and_zero)
