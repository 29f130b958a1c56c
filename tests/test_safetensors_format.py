"""torchao's flatten and unflatten on our class: what is written, what is read, what is refused."""

from __future__ import annotations

import importlib
import json
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Prototype
from torchao.prototype.safetensors import safetensors_utils
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.numerics import assert_int4, native, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.checkpoint import safetensors as safetensors_format
from torchao_int4cpu.checkpoint.safetensors import TYPE_NAME, crc32, part_key
from torchao_int4cpu.format.layout import LAYOUTS, layout_named
from torchao_int4cpu.format.slicing import repack


def weight(**options: Any) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(random_groupwise(80, 70, 32), **options)


def flat(t: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = flatten_tensor_state_dict({"a.b.weight": t})
    return tensors, metadata


def back(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Int4OpaqueTensor:
    state, rest = unflatten_tensor_state_dict(tensors, metadata)
    assert rest == {}
    return assert_int4(state["a.b.weight"], (80, 70), 32)


def changed(metadata: dict[str, str], **data: Any) -> dict[str, str]:
    entry = json.loads(metadata["a.b.weight"])
    entry["_data"] = {k: v for k, v in (entry["_data"] | data).items() if v is not None}
    return metadata | {"a.b.weight": json.dumps(entry)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [None, torch.rand(70), torch.tensor(2.0, dtype=torch.bfloat16)])
def test_there_and_back(dtype: torch.dtype, scale: Tensor | None) -> None:
    t = weight(dtype=dtype, act_pre_scale=scale)
    tensors, metadata = flat(t)
    names = ["qdata", "scale_and_zero"] + ([] if scale is None else ["act_pre_scale"])
    assert set(tensors) == {f"a.b._weight_{name}" for name in names}
    w = back(tensors, metadata)
    assert w.dtype == dtype
    assert torch.equal(w.qdata, t.qdata)
    assert torch.equal(w.scale_and_zero, t.scale_and_zero)
    assert (w.act_pre_scale is None) == (scale is None)
    assert scale is None or torch.equal(w.act_pre_scale, scale)  # type: ignore[arg-type]


def test_the_metadata_is_what_the_docstring_draws() -> None:
    t = weight()
    entry = json.loads(flat(t)[1]["a.b.weight"])
    assert entry == {
        "_type": "torchao_int4cpu.Int4OpaqueTensor",
        "_data": {
            "format_version": 1,
            "block_size": [1, 32],
            "shape": [80, 70],
            "qdata_layout": native().name,
            "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
            "crc32": {"qdata": crc32(t.qdata), "scale_and_zero": crc32(t.scale_and_zero)},
        },
        "_tensor_data_names": ["qdata", "scale_and_zero"],
    }
    drawn = str(safetensors_format.__doc__)
    assert all(f'"{key}"' in drawn for key in (*entry, *entry["_data"]))


def test_the_checksum_is_crc32_of_the_bytes() -> None:
    assert crc32(torch.tensor([], dtype=torch.uint8)) == f"{zlib.crc32(b''):08x}"
    part = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    assert crc32(part) == f"{zlib.crc32(bytes([0xC0, 0x3F, 0x00, 0xC0])):08x}"


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_loading_repacks(layout: str) -> None:
    t = weight()
    t.qdata, t.qdata_layout = repack(t.qdata, native(), layout_named(layout)), layout
    w = back(*flat(t))
    assert w.qdata_layout == native().name
    assert torch.equal(w.to_groupwise().codes, random_groupwise(80, 70, 32).codes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format_version": 6}, "format_version=6; .* install a newer one"),
        ({"format_version": None}, "format_version=None"),
        ({"format_version": "1"}, "format_version='1'"),
        ({"qdata_layout": "avx1024"}, "layout 'avx1024' is not known"),
        ({"qdata_layout": None}, "it must have 'qdata'.* 'qdata_layout'"),
        ({"zero_point": 7}, "'zero_point', .*; it must have"),
        ({"shape": [80, 7000]}, "a weight of shape .* needs"),
        ({"shape": [-80, 70]}, r"shape is \[-80, 70\]"),
        ({"shape": [2**62, 2**62]}, "needs"),
        ({"block_size": [1, 64]}, "needs"),
        ({"dtype": {"_type": "torch.dtype", "_data": "nn"}}, "dtype is .*; choose torch.bfloat16"),
    ],
)
def test_wrong_metadata_is_refused(data: dict[str, Any], message: str) -> None:
    tensors, metadata = flat(weight())
    with pytest.raises(ValueError, match=message):
        unflatten_tensor_state_dict(tensors, changed(metadata, **data))


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("scale", [None, torch.rand(70)])
def test_stacks_and_transposed_views(view: bool, scale: Tensor | None) -> None:
    """Version 2; a view says so beside the shape of its weight, and has the checksums of its parts."""
    stack = torch.stack([weight(act_pre_scale=scale), weight(act_pre_scale=scale)])
    t: Any = stack.transpose(-2, -1) if view else stack
    tensors, metadata = flat(t)
    data = json.loads(metadata["a.b.weight"])["_data"]
    assert data["format_version"] == 2
    assert (data["shape"], data["block_size"]) == ([2, 80, 70], [1, 1, 32])
    assert data.get("transposed") == (True if view else None)
    assert data["crc32"] == {
        key.removeprefix("a.b._weight_"): crc32(part) for key, part in tensors.items()
    }
    state, rest = unflatten_tensor_state_dict(tensors, metadata)
    assert rest == {}
    loaded = state["a.b.weight"]
    assert type(loaded) is type(t)
    assert torch.equal(loaded.dequantize(), t.dequantize())
    assert (loaded.act_pre_scale is None) == (scale is None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"transposed": 1}, "transposed=1; it must be true or absent"),
        ({"transposed": "true"}, "transposed='true'; it must be true or absent"),
        ({"transposed": []}, r"transposed=\[\]; it must be true or absent"),
        ({"shape": [3, 80, 70]}, r"a weight of shape \[3, 80, 70\] in groups of 32 needs"),
        ({"shape": [2**60, 80, 70]}, "needs"),
        ({"shape": [160, 70]}, "block_size is"),
        ({"block_size": [1, 32]}, "block_size is .*; it must be .1, 1, group_size"),
    ],
)
def test_wrong_metadata_of_a_stack_is_refused(data: dict[str, Any], message: str) -> None:
    stack: Any = torch.stack([weight(), weight()])
    tensors, metadata = flat(stack.transpose(-2, -1))
    with pytest.raises(ValueError, match=message):
        unflatten_tensor_state_dict(tensors, changed(metadata, **data))


def test_checksums_are_not_needed_to_load() -> None:
    tensors, metadata = flat(weight())
    back(tensors, changed(metadata, crc32=None))


def test_the_prototype_of_torchao_is_told_from_ours() -> None:
    ours = weight()
    prototype = Prototype(ours.qdata, ours.scale_and_zero, [1, 32], torch.Size([80, 70]))
    with pytest.raises(ValueError, match=r"torchao's prototype, .* convert it with .*from_upstream"):
        flat(prototype)


def test_torchaos_own_classes_are_written_as_before() -> None:
    layer: Any = nn.Sequential(nn.Linear(64, 32))
    quantize_(layer, Int8WeightOnlyConfig(version=2))
    for _ in range(2):
        importlib.reload(safetensors_format)  # a second import wraps nothing twice
    tensors, metadata = flatten_tensor_state_dict(layer.state_dict())
    state, _ = unflatten_tensor_state_dict(tensors, metadata)
    assert torch.equal(state["0.weight"].qdata, layer[0].weight.qdata)
    assert safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.count(TYPE_NAME) == 1
    default = safetensors_utils.TensorSubclassAttributeJSONEncoder.default
    assert not hasattr(default.torchao_default, "torchao_default")


def test_the_keys_of_parts() -> None:
    assert part_key("a.b.weight", "qdata") == "a.b._weight_qdata"
    with pytest.raises(ValueError, match="'weight' is the name of a 4-bit weight without a module"):
        part_key("weight", "qdata")
