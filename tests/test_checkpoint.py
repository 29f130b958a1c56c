"""Saving and loading in one process: every way there is, versions, damaged files.

From one instruction set to another: test_isa.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

from tests.numerics import assert_int4, native, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.checkpoint import FORMAT_VERSION, get_state
from torchao_int4cpu.config import ExtraRepr
from torchao_int4cpu.layout import LAYOUTS, layout_named, repack


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 33, bias=False)).bfloat16()
    quantize_(layers, Int4WeightOnlyConfig(group_size=32))
    return layers


def saved(thing: object, **kwargs: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(thing, buffer, **kwargs)
    buffer.seek(0)
    return buffer


X = torch.randn(3, 70).bfloat16()


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_tensor_and_a_parameter(weights_only: bool) -> None:
    t = Int4OpaqueTensor.from_groupwise(
        random_groupwise(40, 70, 32), dtype=torch.float16, act_pre_scale=torch.rand(70)
    )
    for thing in (t, nn.Parameter(t, requires_grad=False)):
        back = assert_int4(torch.load(saved(thing), weights_only=weights_only), (40, 70), 32)
        assert isinstance(back, nn.Parameter) == isinstance(thing, nn.Parameter)
        assert not back.requires_grad
        assert back.dtype == torch.float16
        assert back.act_pre_scale is not None
        assert torch.equal(back.act_pre_scale, t.act_pre_scale)  # type: ignore[arg-type]
        assert torch.equal(back.dequantize(), t.dequantize())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_state_dict(assign: bool, mmap: bool, tmp_path: Any) -> None:
    source, target = model(), model()
    path = tmp_path / "state.pt"
    torch.save(source.state_dict(), path)
    state = torch.load(path, weights_only=True, mmap=mmap)
    target.load_state_dict(state, assign=assign)
    assert torch.equal(target(X), source(X))
    assert_int4(target[0].weight, (40, 70), 32)


def test_a_whole_module_with_and_without_weights_only() -> None:
    source = model()
    y = source(X)
    assert torch.equal(torch.load(saved(source), weights_only=False)(X), y)
    with pytest.raises(pickle.UnpicklingError, match=r"torch\.nn"):  # ours is not what it refuses
        torch.load(saved(source), weights_only=True)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
        back = torch.load(saved(source), weights_only=True)
    assert torch.equal(back(X), y)
    assert str(back) == str(source)
    assert isinstance(back[0].extra_repr, ExtraRepr)
    assert back[0].extra_repr.module is back[0]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    source = model()
    back = pickle.loads(pickle.dumps(source, protocol=protocol))
    assert torch.equal(back(X), source(X))
    assert str(back) == str(source)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_loading_repacks(layout: str) -> None:
    value = random_groupwise(80, 64, 32)
    t = Int4OpaqueTensor.from_groupwise(value)
    t.qdata, t.qdata_layout = repack(t.qdata, native(), layout_named(layout)), layout
    for back in (torch.load(saved(t)), pickle.loads(pickle.dumps(t))):
        assert back.qdata_layout == native().name
        assert torch.equal(back.to_groupwise().codes, value.codes)
    assert t.qdata_layout == layout  # saving does not touch the one that is saved


def test_a_meta_tensor_is_saved_without_data() -> None:
    t = Int4OpaqueTensor.from_groupwise(random_groupwise(40, 70, 32)).to("meta")
    back = torch.load(saved(t), weights_only=True)
    assert back.qdata.device.type == "meta"
    assert back.shape == (40, 70)


def test_the_format_version_is_stored() -> None:
    state = get_state(Int4OpaqueTensor.from_groupwise(random_groupwise(40, 70, 32)))
    assert state["format_version"] == FORMAT_VERSION == 1
    assert set(state) == {
        "qdata",
        "scale_and_zero",
        "act_pre_scale",
        "block_size",
        "qdata_layout",
        "format_version",
    }


# --- files that are damaged, or made to do harm -------------------------------------------------


class _Forged:
    """Pickles as an `Int4OpaqueTensor` with whatever shape, dtype and state it is given."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, state: object) -> None:
        self.shape, self.dtype, self.state = shape, dtype, state

    def __reduce__(self) -> tuple[Any, ...]:
        stride = (self.shape[-1], 1)
        wrapper = (Int4OpaqueTensor, self.dtype, self.shape, stride, 0, torch.strided, "cpu", False)
        return (
            torch._tensor._rebuild_from_type_v2,
            (torch._utils._rebuild_wrapper_subclass, Int4OpaqueTensor, wrapper, self.state),
        )


def forged(
    change: dict[str, Any] | None = None,
    *,
    drop: str = "",
    shape: tuple[int, ...] = (40, 70),
    dtype: torch.dtype = torch.bfloat16,
) -> io.BytesIO:
    state = get_state(Int4OpaqueTensor.from_groupwise(random_groupwise(40, 70, 32)))
    state.pop(drop, None)
    return saved(_Forged(shape, dtype, state | (change or {})))


def test_the_forger_forges() -> None:
    assert_int4(torch.load(forged(), weights_only=True), (40, 70), 32)


def _bf16(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"change": {"scale_and_zero": _bf16(2, 48, 2)}}, ValueError, r"needs \[3, 48, 2\]"),
        ({"change": {"scale_and_zero": _bf16(3, 48, 2).float()}}, TypeError, "is torch.float32"),
        ({"change": {"qdata": torch.zeros(48, 47, dtype=torch.uint8)}}, ValueError, "qdata has"),
        ({"change": {"qdata": 7}}, TypeError, "qdata is int"),
        ({"change": {"qdata_layout": "avx1024"}}, ValueError, "layout 'avx1024' is not known"),
        ({"change": {"block_size": [1, 64]}}, ValueError, "needs"),
        ({"change": {"act_pre_scale": torch.ones(3)}}, ValueError, "act_pre_scale has shape"),
        ({"change": {"format_version": 2}}, ValueError, "format_version=2; .*install a newer one"),
        ({"change": {"format_version": 0}}, ValueError, "format_version=0; it must be an int"),
        ({"change": {"format_version": "1"}}, ValueError, "format_version='1'"),
        ({"drop": "format_version"}, ValueError, "format_version=None"),
        ({"drop": "scale_and_zero"}, ValueError, "has no scale_and_zero; the file is damaged"),
        ({"shape": (40, 700)}, ValueError, "needs"),
        ({"shape": (2**40, 70)}, ValueError, "needs"),
        ({"shape": (40, 70), "dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
)
def test_damaged_files_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        torch.load(forged(**arguments), weights_only=True)


def test_a_state_that_is_no_dict_is_refused() -> None:
    with pytest.raises(TypeError, match="is a list; it must be a dict"):
        torch.load(saved(_Forged((40, 70), torch.bfloat16, [1, 2])), weights_only=True)
