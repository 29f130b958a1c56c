"""torchao's 4-bit tensors for other devices and for export: the same weight, from memory and files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import Int4TilePackedTo4dTensor

from tests.numerics import assert_int4, random_groupwise
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, load_torchao_checkpoint
from torchao_int4cpu.importers.torchao_formats import weight_of_parts

PLAIN = "torchao.quantization.Int4Tensor"
TILES = "torchao.quantization.Int4TilePackedTo4dTensor"
UNPACKED = "torchao.quantization.IntxUnpackedToInt8Tensor"


def value_of(n: int, k: int, group_size: int = 32) -> GroupwiseInt4:
    """Scales and zeros that bfloat16 holds."""
    value = random_groupwise(n, k, group_size)
    return GroupwiseInt4(value.codes, value.scale.bfloat16(), value.zero.bfloat16(), value.group_size)


def plain_parts(value: GroupwiseInt4) -> dict[str, Any]:
    """As the layout is drawn: two's complement, even columns in the low nibble."""
    signed = value.codes.to(torch.int16) - 8
    pairs = (signed[:, 0::2] & 15) | (signed[:, 1::2] << 4)
    return {
        "qdata": pairs.to(torch.int8),
        "scale": value.scale.t().contiguous(),
        "zero_point": value.zero.t().contiguous(),
        "block_size": [1, value.group_size],
    }


def tile_parts(value: GroupwiseInt4) -> dict[str, Any]:
    """Number by number: where each thread of a tensor core has its eight."""
    n, k = value.shape
    tall, wide = -(-n // 8), -(-k // 1024) * 8
    codes = torch.zeros(tall * 8, wide * 128, dtype=torch.int64)
    codes[:n, :k] = value.codes
    qdata = torch.zeros(tall, wide, 32, 4, dtype=torch.int64)
    for t in range(32):
        for pair in range(4):
            for nibble, column in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                at = 32 * pair + column + 2 * (t % 4)
                qdata[:, :, t, pair] |= codes[t // 4 :: 8, at::128] << 4 * nibble
    groups = wide * 128 // value.group_size
    pairs = torch.zeros(groups, tall * 8, 2, dtype=torch.bfloat16)
    mine = value.scale.shape[1]
    pairs[:mine, :n, 0], pairs[:mine, :n, 1] = value.scale.t(), value.zero.t()
    words = torch.where(qdata < 2**31, qdata, qdata - 2**32).to(torch.int32)
    return {"qdata": words, "scale_and_zero": pairs, "block_size": [1, value.group_size]}


def assert_is(t: Any, value: GroupwiseInt4) -> None:
    n, k = value.shape
    assert_int4(t, (n, k), value.group_size)
    found = t.to_groupwise()
    assert torch.equal(found.codes, value.codes)
    assert torch.equal(found.dequantize(torch.float64), value.dequantize(torch.float64))


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(("n", "k"), [(48, 256), (16, 1024), (20, 2048)])
def test_plain_and_tiles(n: int, k: int, group_size: int) -> None:
    value = value_of(n, k, group_size)
    for name, parts in ((PLAIN, plain_parts(value)), (TILES, tile_parts(value))):
        t = weight_of_parts(name, parts, (n, k), torch.bfloat16)
        assert t.scale_and_zero.dtype == torch.bfloat16
        assert_is(t, value)


def test_a_plain_stack() -> None:
    values = [value_of(16, 64), value_of(16, 64)]
    parts = [plain_parts(value) for value in values]
    stacked = {name: torch.stack([p[name] for p in parts]) for name in ("qdata", "scale", "zero_point")}
    t = weight_of_parts(PLAIN, stacked | {"block_size": [1, 1, 32]}, (2, 16, 64), torch.bfloat16)
    for matrix, value in zip(t, values):
        assert_is(matrix, value)


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC])
@pytest.mark.parametrize("granularity", [PerGroup(32), PerGroup(128), PerAxis(0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_for_export(mapping: MappingType, granularity: Any, dtype: torch.dtype) -> None:
    """As torchao dequantizes it."""
    layer: Any = nn.Linear(256, 48, bias=False, dtype=dtype)
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=granularity,
        mapping_type=mapping,
    )
    quantize_(layer, config)
    theirs: Any = layer.weight
    assert type(theirs).__name__ == "IntxUnpackedToInt8Tensor"
    for ours in (Int4OpaqueTensor.from_upstream(theirs.data), _through_a_file(layer)["weight"]):
        assert ours.dtype == dtype
        assert torch.equal(ours.to_groupwise().codes, (theirs.qdata + 8).to(torch.uint8))
        scale, points = (part.double() for part in (theirs.scale, theirs.zero_point))
        group = 256 // scale.shape[1]
        exact = (theirs.qdata.double() - points.repeat_interleave(group, 1)) * scale.repeat_interleave(
            group, 1
        )
        error = ours.to_groupwise().dequantize(torch.float64) - exact
        # Zeros of 15 bits are rounded to float16; scales of float32 are, too.
        assert float(error.norm() / exact.norm()) < 3e-4


def _through_a_file(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return load_torchao_checkpoint(file)


def test_a_file_of_tiles() -> None:
    """Of a state dict with a class that is made here by its own constructor; and other tensors."""
    value = value_of(24, 200)
    theirs = Int4TilePackedTo4dTensor(**tile_parts(value), shape=torch.Size([24, 200]))
    assert_is(Int4OpaqueTensor.from_upstream(theirs), value)
    file = io.BytesIO()
    torch.save({"a.weight": nn.Parameter(theirs, requires_grad=False), "b": torch.ones(2)}, file)
    file.seek(0)
    found = load_torchao_checkpoint(file)
    assert isinstance(found["a.weight"], nn.Parameter)
    assert_is(found["a.weight"], value)
    assert torch.equal(found["b"], torch.ones(2))


def test_a_cpu_weight_needs_its_layout(tmp_path: Path) -> None:
    from tests.test_torchao_checkpoints import prototype

    torch.save(prototype(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"does not say how its bytes lie; give layout='avx512'"):
        load_torchao_checkpoint(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"does not say how its bytes lie; give layout='avx512'"):
        Int4OpaqueTensor.from_upstream(prototype())


def changed(parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = parts | changes
    return {name: part for name, part in found.items() if part is not ...}


WHOLE = value_of(24, 256)
PLAIN_PARTS, TILE_PARTS = plain_parts(WHOLE), tile_parts(WHOLE)
UNPACKED_PARTS: dict[str, Any] = {
    "qdata": (WHOLE.codes.to(torch.int8) - 8),
    "scale": WHOLE.scale,
    "zero_point": torch.zeros(24, 8, dtype=torch.int8),
    "block_size": (1, 32),
    "target_dtype": torch.int4,  # type: ignore[attr-defined]
    "activation_quantization": None,
}
ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        (
            PLAIN,
            changed(PLAIN_PARTS, qdata=PLAIN_PARTS["qdata"][:, 1:]),
            r"qdata has shape \[24, 127\]",
        ),
        (PLAIN, changed(PLAIN_PARTS, scale=ONES), r"scale has shape \[2, 2\].*must be \[8, 24\]"),
        (PLAIN, changed(PLAIN_PARTS, zero_point=None), "zero_point is NoneType"),
        (PLAIN, changed(PLAIN_PARTS, qdata=...), "the tensor has only scale, zero_point, block_size"),
        (PLAIN, changed(PLAIN_PARTS, block_size=[2, 32]), r"block_size is \[2, 32\]; only groups"),
        (PLAIN, changed(PLAIN_PARTS, block_size=[1, 2**70]), "scale has shape"),
        (PLAIN, changed(PLAIN_PARTS, block_size="32"), "block_size is '32'"),
        (PLAIN, changed(PLAIN_PARTS, block_size=[1, 16]), "scale has shape"),
        (
            PLAIN,
            changed(PLAIN_PARTS, activation_dtype=torch.float8_e4m3fn),
            "activations in torch.float8",
        ),
        (TILES, changed(TILE_PARTS, qdata=ONES), r"qdata has 2 tiles of 8 rows and 2 of 128 columns"),
        (TILES, changed(TILE_PARTS, qdata=None), "qdata has 0 tiles"),
        (TILES, changed(TILE_PARTS, qdata=TILE_PARTS["qdata"].long()), "qdata is torch.int64"),
        (TILES, changed(TILE_PARTS, scale_and_zero=ONES), "scale_and_zero is torch.float32"),
        (TILES, changed(TILE_PARTS, block_size=[1, 48]), "in groups of 48; the file is damaged"),
        (UNPACKED, changed(UNPACKED_PARTS, target_dtype=torch.int8), "has torch.int8; only torch.int4"),
        (UNPACKED, changed(UNPACKED_PARTS, activation_quantization="x"), "for activations in 8 bits"),
        (UNPACKED, changed(UNPACKED_PARTS, qdata=UNPACKED_PARTS["qdata"] * 2), "beyond -8 and 7"),
        (UNPACKED, changed(UNPACKED_PARTS, zero_point=ONES), r"zero_point has shape \[2, 2\]"),
    ],
)
def test_damaged_parts(name: str, parts: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        weight_of_parts(name, parts, (24, 256), torch.bfloat16)


def test_the_parts_that_are_damaged_there_are_right_here() -> None:
    for name, parts in ((PLAIN, PLAIN_PARTS), (TILES, TILE_PARTS), (UNPACKED, UNPACKED_PARTS)):
        made: Tensor = weight_of_parts(name, parts, (24, 256), torch.bfloat16)
        assert made.shape == (24, 256)
