"""`load_prototype`: files that torchao itself wrote, what else may be in them, and damaged ones.

``fixtures/upstream`` holds files of real releases, named ``format-release-layout``. Each is the
``torch.save`` of the state dict of ``nn.Sequential(nn.Linear(32, 64, bias=False))`` in bfloat16 with
the weight of `fixture_weight`, after ``quantize_`` in groups of 32, written once with torch 2.13.0,
that release's wheel from PyPI on ``PYTHONPATH`` and ``ATEN_CPU_CAPABILITY=<layout>``. The config was

- format ``affine``: ``Int4WeightOnlyConfig(32, layout=Int4CPULayout())``, with ``version=1`` in 0.15.0;
- format ``prototype``: in 0.14.1 ``Int4WeightOnlyConfig(32, int4_packing_format="opaque")``, in 0.16.0
  ``torchao.prototype.int4_opaque_tensor.Int4WeightOnlyOpaqueTensorConfig(32)``, in 0.18.0
  ``torchao.prototype.quantization.int4.PrototypeInt4WeightOnlyConfig(32)``.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Prototype
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

from tests.numerics import assert_int4, assert_product, native, random_groupwise
from tests.whole_weight import saved
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.format.layout import LAYOUTS, layout_named
from torchao_int4cpu.format.slicing import repack
from torchao_int4cpu.importers.torchao import (
    AFFINE_IMPL_PATH,
    AFFINE_PATH,
    PROTOTYPE_PATHS,
    load_prototype,
)

FILES = sorted((Path(__file__).parent / "fixtures" / "upstream").glob("*.pt"))


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """The right layout must never be doubted."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Validating sparse tensor")  # torch 2.14, of what it reads
        yield


def fixture_weight() -> Tensor:
    """The same on every machine, in no order that hides a layout, and with tails as weights have."""
    index = torch.arange(64 * 32).view(64, 32)
    uniform = index * (7 * index + 13) % 8191 - 4095
    return (uniform.pow(5).double() / 2**60).float()


def model(dtype: torch.dtype = torch.bfloat16) -> Any:
    layers: Any = nn.Sequential(nn.Linear(128, 80), nn.ReLU(), nn.Linear(96, 48, bias=False)).to(dtype)
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight)
    return layers


def prototype_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    layers = model(dtype)
    quantize_(layers, PrototypeInt4WeightOnlyConfig(group_size=32))
    assert type(layers[0].weight) is Prototype
    return layers


def prototype(
    layout: str = "", shape: tuple[int, int] = (128, 64), dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A weight of the prototype, packed as a machine with that layout would."""
    t = Prototype.from_hp(torch.randn(shape).to(dtype), [1, 32])
    if layout:
        t.qdata = repack(t.qdata, native(), layout_named(layout))
    return t


def assert_same(ours: object, upstream: Any) -> None:
    """Bit for bit what `from_upstream` makes of the same tensor in memory."""
    expected = Int4OpaqueTensor.from_upstream(upstream, native().name)
    n, k = expected.shape
    w = assert_int4(ours, (n, k), 32)
    assert type(w) is Int4OpaqueTensor
    assert w.dtype == expected.dtype
    assert w.qdata_layout == native().name
    assert torch.equal(w.qdata, expected.qdata)
    assert torch.equal(w.scale_and_zero, expected.scale_and_zero)


# --- files of real releases ---------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_files_of_every_release_give_the_same_weight(file: Path) -> None:
    state = load_prototype(file, file.stem.split("-")[-1])
    assert type(state) is OrderedDict
    assert list(state) == ["0.weight"]
    assert state._metadata == OrderedDict({"": {"version": 1}, "0": {"version": 1}})  # type: ignore[attr-defined]
    value = assert_int4(state["0.weight"], (64, 32), 32).to_groupwise()
    expected = choose_qparams(fixture_weight().bfloat16(), 32)
    assert torch.equal(value.codes, expected.codes)
    assert torch.equal(value.scale, expected.scale)
    assert torch.equal(value.zero, expected.zero)


def test_there_is_a_file_of_each_class_path_and_layout() -> None:
    paths = {path for file in FILES for path in (*PROTOTYPE_PATHS, AFFINE_PATH) if _names(file, path)}
    assert paths == {*PROTOTYPE_PATHS, AFFINE_PATH}
    assert {file.stem.split("-")[-1] for file in FILES} == set(LAYOUTS)


def _names(file: Path, path: str) -> bool:
    module, name = path.rsplit(".", 1)
    return f"{module}\n{name}\n".encode() in file.read_bytes()  # the pickle is stored uncompressed


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_a_wrong_layout_gives_another_weight_and_a_warning(file: Path) -> None:
    right = file.stem.split("-")[-1]
    for wrong in LAYOUTS.keys() - {right}:
        message = f"layout={wrong!r} is probably wrong: read as {right!r}.*with layout={right!r}"
        with pytest.warns(UserWarning, match=message):
            w = load_prototype(file, wrong)["0.weight"].dequantize().float()
        # Further from the weight than zero is.
        assert float((w - fixture_weight()).norm()) > float(fixture_weight().norm())


def test_weights_without_tails_do_not_show_their_layout() -> None:
    """What the warning cannot tell: every row of them looks like every other."""
    file = saved(Prototype.from_hp(torch.rand(128, 256) - 0.5, [1, 32]))
    codes = []
    for layout in LAYOUTS:
        file.seek(0)
        codes.append(load_prototype(file, layout).to_groupwise().codes)  # without a warning
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[1], codes[2])


# --- the prototype of the installed torchao ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_computes_as_before(dtype: torch.dtype, kernel: str) -> None:
    source = prototype_model(dtype)
    state = load_prototype(saved(source.state_dict()), native().name)
    for index in (0, 2):
        assert_same(state[f"{index}.weight"], source[index].weight)
    assert torch.equal(state["0.bias"], source[0].bias)

    for assign in (True, False):
        target = model(dtype)
        quantize_(target, Int4WeightOnlyConfig(group_size=32))
        target.load_state_dict(state, assign=assign)
        x = torch.randn(3, 96).to(dtype)
        y = target[2](x)
        assert_product(y, x, target[2].weight.packed())
        if kernel == "aten" and dtype == torch.bfloat16:  # the same op, and nothing is rounded
            assert torch.equal(y, source[2](x))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("zip_file", [True, False])
def test_both_formats_of_torch_save(layout: str, zip_file: bool) -> None:
    """In the old one tensors have no data before the file has been read to its end."""
    torch.manual_seed(1)
    elsewhere = prototype(layout)
    torch.manual_seed(1)
    file = saved([elsewhere], _use_new_zipfile_serialization=zip_file)
    assert_same(load_prototype(file, layout)[0], prototype())


@pytest.mark.parametrize("mmap", [True, False])
def test_a_path(mmap: bool, tmp_path: Path) -> None:
    source = prototype_model()
    torch.save(source.state_dict(), tmp_path / "state.pt")
    for path in (tmp_path / "state.pt", str(tmp_path / "state.pt")):
        state = load_prototype(path, native().name, mmap=mmap)
        assert_same(state["0.weight"], source[0].weight)


def test_the_scale_of_the_activation_stays() -> None:
    t = prototype()
    t.act_pre_scale = torch.rand(64)
    back = load_prototype(saved(t), native().name)
    assert torch.equal(back.act_pre_scale, t.act_pre_scale)


def test_a_meta_tensor() -> None:
    t = prototype()
    t.qdata, t.scale_and_zero = t.qdata.to("meta"), t.scale_and_zero.to("meta")
    assert load_prototype(saved(t), "avx2").qdata.device.type == "meta"


# --- what else is in a file ---------------------------------------------------------------------


def test_structure_sharing_and_everything_else_stay() -> None:
    t, ours = prototype(), Int4OpaqueTensor.from_groupwise(random_groupwise(40, 70, 32))
    parameter = nn.Parameter(prototype(), requires_grad=False)
    plain = torch.randn(3)
    cycle: list[Any] = [t]
    cycle.append(cycle)
    thing = {
        "z": t,
        "a": (t, [parameter, {7: plain}]),
        "model": OrderedDict(b=plain, a=plain[1:]),
        "step": 3,
        "ours": ours,
        "cycle": cycle,
        "attached": OrderedDict(),
    }
    thing["attached"].hidden = t
    back = load_prototype(saved(thing), native().name)
    assert list(back) == list(thing)
    assert_same(back["z"], t)
    assert back["a"][0] is back["z"] is back["cycle"][0] is back["attached"].hidden
    assert back["cycle"][1] is back["cycle"]
    assert_same(back["a"][1][0], parameter)
    assert not isinstance(back["z"], nn.Parameter)
    assert isinstance(back["a"][1][0], nn.Parameter)
    assert not back["a"][1][0].requires_grad
    assert type(back["model"]) is OrderedDict
    assert back["model"]["b"] is back["a"][1][1][7]
    assert back["model"]["a"].untyped_storage().data_ptr() == back["model"]["b"].data_ptr()
    assert torch.equal(back["model"]["b"], plain)
    assert back["step"] == 3
    assert torch.equal(back["ours"].qdata, ours.qdata)


def test_other_quantized_tensors_are_as_torch_load_gives_them() -> None:
    layers = model()
    quantize_(layers[0], Int8WeightOnlyConfig())
    quantize_(layers[2], PrototypeInt4WeightOnlyConfig(group_size=32))
    back = load_prototype(saved(layers.state_dict()), native().name)
    assert type(back["0.weight"]) is Int8Tensor
    assert torch.equal(back["0.weight"].qdata, layers[0].weight.qdata)
    assert_same(back["2.weight"], layers[2].weight)


def test_a_module_of_classes_that_the_user_allows() -> None:
    source = prototype_model()
    for layer in (source[0], source[2]):
        del layer.extra_repr  # torchao's is a bound method, which no weights_only load reads
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU]):
        back = load_prototype(saved(source), native().name)
    weight: Any = back[0].weight
    assert_same(weight, source[0].weight)
    x = torch.randn(2, 128).bfloat16()
    assert_product(F.linear(x, weight), x, weight.packed())
    assert isinstance(weight, nn.Parameter)


def test_the_safe_classes_of_torch_load_are_as_before() -> None:
    before = set(torch.serialization.get_safe_globals())
    load_prototype(saved(prototype()), native().name)
    with pytest.raises(ValueError, match="the file holds"):
        load_prototype(saved(model()), native().name)
    assert set(torch.serialization.get_safe_globals()) == before
    assert type(torch.load(saved(prototype()), weights_only=True)) is Prototype


# --- what is refused ----------------------------------------------------------------------------


def da8w4() -> Any:
    """The parts that torchao's DA8W4 packing gives, whose op not every build has."""
    packed = torch.zeros(4, 2, 32, 16, dtype=torch.uint8)
    qzeros = torch.zeros(4, 2, 32, dtype=torch.int8)
    return Prototype(
        packed,
        torch.zeros(4, 2, 32),
        [1, 32],
        (128, 64),
        qzeros=qzeros,
        compensation=torch.zeros(4, 2, 32, dtype=torch.int32),
        act_mapping_type="asymmetric",
    )


def test_int8_activations_are_refused_by_name() -> None:
    state = {"model": {"0.weight": prototype(), "1.weight": da8w4()}}
    message = r"model\.1\.weight: this tensor has int8 activations \(DA8W4.*'asymmetric'.*quantize the"
    with pytest.raises(TypeError, match=message):
        load_prototype(saved(state), native().name)
    with pytest.raises(TypeError, match=r"^the tensor: this tensor has int8 activations"):
        load_prototype(saved(da8w4()), native().name)


def test_a_tensor_that_no_key_leads_to_is_refused_without_a_name() -> None:
    hidden: Any = OrderedDict()
    hidden.attached = da8w4()
    hidden["itself"] = hidden
    with pytest.raises(TypeError, match=r"^a tensor in the file: this tensor has int8 activations"):
        load_prototype(saved(hidden), native().name)


def test_an_unknown_layout_is_refused_before_the_file_is_read() -> None:
    with pytest.raises(ValueError, match="layout 'sse' is not known; choose 'avx512', 'avx2'"):
        load_prototype("no such file", "sse")


def test_a_whole_model_is_refused_with_a_cure() -> None:
    message = r"holds torch\.nn\.modules\.container\.Sequential.*save model\.state_dict\(\) instead"
    with pytest.raises(ValueError, match=message):
        load_prototype(saved(prototype_model()), native().name)


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (shutil.rmtree, ValueError, r"the file holds shutil\.rmtree, which is neither"),
        (os.rmdir, pickle.UnpicklingError, r"\w+\.rmdir whose module \w+ is blocked"),
    ],
)
def test_nothing_in_the_file_runs(
    function: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = saved({"a": prototype(), "b": _Call(function, str(tmp_path))})
    with pytest.raises(error, match=message):
        load_prototype(file, native().name)
    assert tmp_path.exists()


# Classes that pickle under the names of torchao's, which the installed torchao lacks.
_Affine = type("AffineQuantizedTensor", (Prototype,), {"__module__": AFFINE_PATH.rsplit(".", 1)[0]})
_Impl = type("Int4CPUAQTTensorImpl", (Prototype,), {"__module__": AFFINE_IMPL_PATH.rsplit(".", 1)[0]})


@pytest.fixture
def torchao_of_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save looks each class up where it says it is."""
    for cls in (_Affine, _Impl):
        parts = cls.__module__.split(".")
        for end in range(2, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules[cls.__module__], cls.__name__, cls, raising=False)


def wrapper(cls: type, dtype: torch.dtype, shape: tuple[int, ...]) -> _Call:
    """A tensor of that class that claims this shape, with nothing in it."""
    stride = (shape[-1], 1)
    arguments = (cls, dtype, shape, stride, 0, torch.strided, "cpu", False)
    return _Call(torch._utils._rebuild_wrapper_subclass, *arguments)


def forged(
    state: object, cls: type = Prototype, shape: Any = (128, 64), dtype: Any = torch.bfloat16
) -> _Call:
    """A tensor of that class with this state."""
    function, args = wrapper(cls, dtype, shape).call
    return _Call(torch._tensor._rebuild_from_type_v2, function, cls, args, state)


def affine_state(**change: Any) -> dict[str, Any]:
    impl = {
        "packed_weight": prototype().qdata,
        "scale_and_zero": prototype().scale_and_zero,
        "transposed": False,
    }
    impl |= {name: change.pop(name) for name in list(change) if name in impl}
    state = {
        "tensor_impl": forged(impl, _Impl, (128, 32), torch.uint8),
        "block_size": (1, 32),
        "quant_min": 0,
        "quant_max": 15,
        "zero_point_domain": 2,
    }
    return state | change


@pytest.mark.usefixtures("torchao_of_old")
def test_the_forger_forges() -> None:
    t = prototype()
    assert_same(load_prototype(saved([forged(vars(t))]), native().name)[0], t)
    back = load_prototype(saved([forged(affine_state(), _Affine)]), native().name)[0]
    assert_int4(back, (128, 64), 32)


def _u8(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def _bf16(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def _last_is(value: float) -> Tensor:
    scale_and_zero = torch.zeros(2, 128, 2)
    scale_and_zero[-1, -1, -1] = value
    return scale_and_zero


HUGE = 2**30


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qdata": _u8(128, 31)}, ValueError, r"qdata has shape \[128, 31\]"),
        ({"qdata": None}, TypeError, "qdata is NoneType"),
        ({"qdata": 7}, TypeError, "qdata is int"),
        ({"qdata": _u8(32, 128).t()}, ValueError, "qdata has strides"),
        ({"qdata": _u8(128, 32).to_sparse()}, TypeError, r"qdata is a Tensor \(torch\.sparse_coo\)"),
        ({"qdata": wrapper(Prototype, torch.uint8, (128, 32))}, TypeError, "must be a dense tensor"),
        ({"qdata": wrapper(Int4OpaqueTensor, torch.uint8, (128, 32))}, TypeError, "must be a dense"),
        ({"scale_and_zero": _bf16(1, 128, 2)}, ValueError, r"needs \[2, 128, 2\]"),
        ({"scale_and_zero": _bf16(2, 128, 2).int()}, TypeError, "scale_and_zero is torch.int32"),
        ({"scale_and_zero": None}, TypeError, "scale_and_zero is NoneType"),
        ({"scale_and_zero": torch.zeros(1).expand(2, HUGE, HUGE)}, TypeError, "is torch.float32"),
        ({"scale_and_zero": _last_is(torch.nan)}, ValueError, "scale_and_zero has NaN or infinite"),
        ({"scale_and_zero": _last_is(3.4e38)}, ValueError, "infinite values in bfloat16"),
        ({"block_size": 32}, ValueError, "block_size is 32"),
        ({"block_size": [1, 48]}, ValueError, "group_size=48"),
        ({"act_pre_scale": torch.ones(3)}, ValueError, "act_pre_scale has shape"),
        ({"qzeros": torch.ones(3)}, TypeError, "int8 activations"),
        ({"act_mapping_type": "symmetric"}, TypeError, "int8 activations.*'symmetric'"),
        ({"permutation": torch.ones(3)}, ValueError, "has 'permutation', which torchao 0.14 to 0.18"),
        ({3: 3}, ValueError, "the tensor has 3, which"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    change: dict[Any, Any], error: type[Exception], message: str
) -> None:
    state = vars(prototype()) | change
    with pytest.raises(error, match=rf"^layers\.1: .*{message}"):
        load_prototype(saved({"layers": [1, forged(state)]}), native().name)


@pytest.mark.usefixtures("torchao_of_old")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quant_min": -8}, ValueError, "quant_min is -8; it must be 0"),
        ({"quant_max": None}, ValueError, "quant_max is None; it must be 15"),
        ({"zero_point_domain": 1}, ValueError, "zero_point_domain is 1; it must be 2"),
        ({"quant_max": torch.ones(3)}, ValueError, "quant_max is tensor"),
        ({"tensor_impl": _u8(128, 32)}, TypeError, "tensor_impl is a Tensor; it must be torchao's"),
        ({"packed_weight": _u8(128, 8).view(torch.int32)}, TypeError, "qdata is torch.int32"),
        ({"scale_and_zero": _bf16(1, 128, 2)}, ValueError, r"needs \[2, 128, 2\]"),
        ({"block_size": (1, 64)}, ValueError, "needs"),
    ],
)
def test_affine_parts_that_do_not_fit_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^0: .*{message}"):
        load_prototype(saved([forged(affine_state(**change), _Affine)]), native().name)


@pytest.mark.parametrize(
    ("thing", "error", "message"),
    [
        (forged([1, 2]), TypeError, "the state is a list; it must be a dict"),
        (forged(None), TypeError, "the state is a NoneType"),
        (forged({}, shape=(HUGE, HUGE)), ValueError, "block_size is None"),
        (forged(vars(prototype()), shape=(HUGE, 64)), ValueError, "needs"),
        (forged(vars(prototype()), dtype=torch.int8), TypeError, "dtype is torch.int8"),
        (_Call(Prototype, HUGE, HUGE), TypeError, "is not called by what torch.save writes"),
    ],
)
def test_forged_tensors_are_refused(thing: _Call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_prototype(saved(thing), native().name)


def test_a_tensor_without_state_computes_nothing() -> None:
    bare = load_prototype(saved(wrapper(Prototype, torch.bfloat16, (128, 64))), native().name)
    with pytest.raises(TypeError, match="a tensor of torchao's without data"):
        F.linear(torch.ones(1, 64).bfloat16(), bare)
