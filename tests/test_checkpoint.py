"""Saving and loading in one process: every way there is, versions, damaged files.

From one instruction set to another: test_isa.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import quantize_

from tests.numerics import assert_int4, native, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.checkpoint.pickles import FORMAT_VERSION, get_state, get_state_of_view
from torchao_int4cpu.format.layout import LAYOUTS, layout_named
from torchao_int4cpu.format.slicing import repack
from torchao_int4cpu.tensor.module_repr import ExtraRepr
from torchao_int4cpu.tensor.provenance import Provenance
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor


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
    assert state["format_version"] == 3
    assert FORMAT_VERSION == 5
    assert set(state) == {
        "qdata",
        "scale_and_zero",
        "act_pre_scale",
        "block_size",
        "qdata_layout",
        "format_version",
    }


# --- stacks, transposed views, cuts --------------------------------------------------------------

Weight = Int4OpaqueTensor | Int4TransposedTensor


def stack() -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_hp(torch.randn(3, 160, 70).bfloat16(), [1, 1, 32])


def matrix() -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(random_groupwise(200, 70, 32))


#: By name: a weight, and whether its bytes are those of a larger one.
VIEWS: dict[str, tuple[Callable[[], Any], bool]] = {
    "a stack": (stack, False),
    "a stack, transposed": (lambda: stack().transpose(-2, -1), False),
    "a matrix, transposed": (lambda: matrix().t(), False),
    "rows": (lambda: matrix()[64:128], True),
    "rows of a stack": (lambda: stack()[:, 64:128], True),
    "an expert": (lambda: stack()[0], True),
    "an expert, transposed": (lambda: stack()[1].t(), True),
    "some experts": (lambda: stack()[1:], True),
    "a repacked copy of rows": (lambda: matrix()[3:40], False),
    "a repacked copy of columns": (lambda: stack()[..., 32:], False),
    "a parameter": (lambda: nn.Parameter(stack(), requires_grad=False), False),
    "a transposed parameter": (
        lambda: nn.Parameter(stack().transpose(-2, -1), requires_grad=False),
        False,
    ),
}


def flat_and_back(t: Tensor) -> Tensor:
    state, rest = unflatten_tensor_state_dict(*flatten_tensor_state_dict({"a.w": t}))
    assert rest == {}
    back: Tensor = state["a.w"]
    return back


def through_a_file(t: Tensor, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(t, Path(folder) / "t.pt")
        return torch.load(Path(folder) / "t.pt", **options)


def through_dcp(t: Tensor) -> Tensor:
    state = {"w": t.detach()}
    into = {"w": t.detach().clone()}
    opaque(into["w"]).qdata.zero_()
    opaque(into["w"]).scale_and_zero.zero_()
    with tempfile.TemporaryDirectory() as folder:
        state_dict_saver.save(state, checkpoint_id=folder, no_dist=True)
        state_dict_loader.load(into, checkpoint_id=folder, no_dist=True)
    return into["w"]


#: Every way to save or copy a weight; and whether what comes back is a parameter if it was one.
ROADS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "torch.save": (lambda t: torch.load(saved(t), weights_only=True), True),
    "mapped": (lambda t: through_a_file(t, weights_only=True, mmap=True), True),
    "all of pickle": (lambda t: torch.load(saved(t), weights_only=False), True),
    "the old format": (lambda t: torch.load(saved(t, _use_new_zipfile_serialization=False)), True),
    "pickle": (lambda t: pickle.loads(pickle.dumps(t)), True),
    "copy.deepcopy": (copy.deepcopy, True),
    "copy.copy": (copy.copy, True),
    "a state dict": (lambda t: torch.load(saved({"w": t}))["w"], True),
    "safetensors": (flat_and_back, False),
    "distributed checkpoint": (through_dcp, False),
}


def opaque(t: object) -> Int4OpaqueTensor:
    weight = t.untransposed() if isinstance(t, Int4TransposedTensor) else t
    assert isinstance(weight, Int4OpaqueTensor)
    return weight


@pytest.mark.parametrize("road", list(ROADS))
@pytest.mark.parametrize("name", list(VIEWS))
def test_what_comes_back_is_a_weight_of_its_own(name: str, road: str) -> None:
    """The same numbers; writable, whatever it was cut from; and the original is not touched."""
    t = VIEWS[name][0]()
    expected, before = t.dequantize(), opaque(t).read_only
    send, keeps = ROADS[road]
    back = send(t)
    assert type(back) is type(t)
    assert isinstance(back, nn.Parameter) == (keeps and isinstance(t, nn.Parameter))
    assert (back.shape, back.stride(), back.dtype) == (t.shape, t.stride(), t.dtype)
    assert torch.equal(back.dequantize(), expected)
    assert not back.requires_grad
    w = opaque(back)
    assert w.provenance == Provenance()
    assert opaque(t).read_only == before
    if road == "copy.copy":
        return  # which shares the parts
    other = opaque(back.clone())
    other.qdata.zero_()
    other.scale_and_zero.fill_(2)
    back.detach().copy_(Int4TransposedTensor(other) if isinstance(t, Int4TransposedTensor) else other)
    assert bool((back.dequantize() == -14).all())  # (0 - 8) · 2 + 2
    assert torch.equal(t.dequantize(), expected)


@pytest.mark.parametrize("road", ["safetensors", "distributed checkpoint"])
@pytest.mark.parametrize("name", list(VIEWS))
def test_a_view_does_not_keep_what_it_was_cut_from(name: str, road: str) -> None:
    """`torch.save` writes the whole storage of any view; these formats write what it shows."""
    w = opaque(ROADS[road][0](VIEWS[name][0]()))
    for part in (w.qdata, w.scale_and_zero):
        assert part.untyped_storage().nbytes() == part.nbytes
    saved_whole = opaque(torch.load(saved(VIEWS[name][0]()))).qdata
    assert (saved_whole.untyped_storage().nbytes() > saved_whole.nbytes) == VIEWS[name][1]


def test_a_deep_copy_of_a_module_shares_what_the_module_shares() -> None:
    """A weight and views of it: one memory in the copy, too, and none of the original's."""
    module = nn.ParameterDict()
    module["w"] = nn.Parameter(stack(), requires_grad=False)
    module["tied"] = module["w"]
    module["turned"] = nn.Parameter(module["w"].detach().transpose(-2, -1), requires_grad=False)
    module["expert"] = nn.Parameter(module["w"].detach()[1], requires_grad=False)
    module["w"].note = ["kept"]
    copied = copy.deepcopy(module)
    w = opaque(copied["w"])
    assert copied["tied"] is copied["w"]
    assert opaque(copied["turned"]).qdata.data_ptr() == w.qdata.data_ptr()
    assert opaque(copied["expert"]).qdata.data_ptr() == w.qdata[1].data_ptr()
    assert w.qdata.data_ptr() != opaque(module["w"]).qdata.data_ptr()
    assert copied["w"].note == ["kept"]
    assert copied["w"].note is not module["w"].note


def test_a_deep_copy_takes_the_memory_of_one() -> None:
    """Torch's own way, by `clone` and ``__dict__``, takes the parts twice."""
    t = Int4OpaqueTensor.empty((4, 512, 512), 128, torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        copied = copy.deepcopy(t.transpose(-2, -1))
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    size = t.qdata.nbytes + t.scale_and_zero.nbytes
    assert opaque(copied).qdata.data_ptr() != t.qdata.data_ptr()
    assert allocated < 1.1 * size


def test_a_deep_copy_of_what_is_to_be_filled_can_be_filled() -> None:
    placeholder = matrix().new_zeros((200, 70))
    cut = placeholder[3:40]
    for copied, filled in ((copy.deepcopy(placeholder), True), (copy.deepcopy(cut), True)):
        assert copied.provenance == Provenance(filled_by_cuts=filled)
    copied = copy.deepcopy(placeholder)
    copied[3:40].copy_(matrix()[3:40])
    assert torch.equal(copied[3:40].dequantize(), matrix()[3:40].dequantize())
    assert not bool(placeholder.dequantize().any())
    back = torch.load(saved(placeholder))
    assert not back.provenance.filled_by_cuts


def test_a_cyclic_attribute_is_deep_copied() -> None:
    for t in (stack(), stack().transpose(-2, -1)):
        t.itself = [t]
        copied: Any = copy.deepcopy(t)
        assert copied.itself[0] is copied


@pytest.mark.parametrize("road", list(ROADS))
def test_a_matrix_expanded_to_a_stack(road: str) -> None:
    """One matrix stands for three; in a file they are three, since a file must justify its shape."""
    if road == "distributed checkpoint":
        return  # which copies into what is there
    t = matrix().unsqueeze(0).expand(3, -1, -1)
    back = ROADS[road][0](t)
    assert back.shape == (3, 200, 70)
    assert torch.equal(back.dequantize(), t.dequantize())


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("name", ["a stack", "a stack, transposed", "a transposed parameter"])
def test_loading_repacks_stacks(name: str, layout: str) -> None:
    t = VIEWS[name][0]()
    expected = t.dequantize()
    w = opaque(t)
    w.qdata = torch.stack([repack(m, native(), layout_named(layout)) for m in w.qdata])
    w.qdata_layout = layout
    for back in (torch.load(saved(t)), pickle.loads(pickle.dumps(t)), flat_and_back(t)):
        assert opaque(back).qdata_layout == native().name
        assert torch.equal(back.dequantize(), expected)
    # Torch fills the parts after it made the weight, which is repacked after that.
    old = torch.load(saved(t, _use_new_zipfile_serialization=False))
    assert opaque(old).qdata_layout == native().name
    assert torch.equal(old.dequantize(), expected)


def test_what_is_stored_of_a_transposed_view() -> None:
    """The weight, and what Python has attached."""
    view = stack().transpose(-2, -1)
    view.note = 1
    state = get_state_of_view(view)
    assert set(state) == {"weight", "note", "format_version"}
    assert state["format_version"] == get_state(stack())["format_version"] == 3


@pytest.mark.parametrize("mmap", [True, False])
def test_a_module_of_experts(mmap: bool, tmp_path: Path) -> None:
    """The whole module, and its state dict into another."""
    modules = []
    for _ in range(2):
        module = nn.ParameterDict()
        module["up"] = nn.Parameter(stack(), requires_grad=False)
        module["down"] = nn.Parameter(stack().transpose(-2, -1), requires_grad=False)
        modules.append(module)
    torch.save(modules[0], tmp_path / "module.pt")
    torch.save(modules[0].state_dict(), tmp_path / "state.pt")
    whole = torch.load(tmp_path / "module.pt", weights_only=False, mmap=mmap)
    state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)
    for assign in (False, True):
        modules[1].load_state_dict(state, assign=assign)
        for name, parameter in modules[0].items():
            for other in (whole, modules[1]):
                assert type(other[name]) is type(parameter)
                assert torch.equal(other[name].dequantize(), parameter.dequantize())


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
        ({"change": {"format_version": 6}}, ValueError, "format_version=6; .*install a newer one"),
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
