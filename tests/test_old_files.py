"""Files that earlier versions wrote must load for ever: one set a format version and layout, kept here.

``ATEN_CPU_CAPABILITY=avx2 python -m tests.test_old_files`` writes the set of the newest version; it is
run once, when the format changes, and what it wrote is never touched again.

Version 1 holds a matrix; version 2 a stack of two, and a transposed view of it; version 3 all of them.
Version 3 is one of pickles: they name the classes ``torchao_int4cpu.Int4OpaqueTensor`` and so on. What
is not pickled says 1 or 2 still, and so do safetensors files of version 3. Version 4 is the one of
float16 scales and zeros, of which bfloat16 can hold none, and version 5 that of weights with an
act_order; other weights are written as in version 3.

The modules of version 2 are pickled with the names of the modules that the classes were in then.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from tests.numerics import assert_int4, native
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.checkpoint.pickles import FORMAT_VERSION
from torchao_int4cpu.tensor.module_repr import ExtraRepr
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

FILES = Path(__file__).parent / "fixtures"
SETS = [
    f"v{version}-{layout}" for version in (1, 2, 3, 4, 5) for layout in ("avx512", "avx2", "default")
]

#: One full block of each layout, and a last group that is short.
N, K, GROUP_SIZE = 64, 40, 32


def value(shift: int = 0) -> GroupwiseInt4:
    """Codes without a period that a layout could hide; scales and zeros that bfloat16 holds exactly."""
    index = torch.arange(shift, shift + N * K).view(N, K)
    codes = (index * 40503 // 256 % 16).to(torch.uint8)
    groups = torch.arange(shift, shift + N * 2).view(N, 2)
    return GroupwiseInt4(codes, 2.0 ** (groups % 7 - 9), (groups % 11 - 5) / 64, GROUP_SIZE)


def float16_value(shift: int = 0) -> GroupwiseInt4:
    """The same codes; scales and zeros that need all bits of float16, some of them below its range."""
    groups = torch.arange(shift, shift + N * 2).view(N, 2)
    mantissas = 1025 + 2 * (groups * 37 % 500)
    normal = mantissas * 2.0 ** (groups % 9 - 20)
    tiny = (257 + 2 * (groups % 100)) * 2.0**-24
    scales = torch.where(groups % 5 == 0, tiny, normal).half()
    return GroupwiseInt4(value(shift).codes, scales, -scales.flip(0), GROUP_SIZE)


def stack_value(matrix: Callable[[int], GroupwiseInt4] = value) -> GroupwiseInt4:
    """Two different matrices."""
    both = matrix(0), matrix(N * K)
    codes, scales, zeros = (
        torch.stack([getattr(v, name) for v in both]) for name in ("codes", "scale", "zero")
    )
    return GroupwiseInt4(codes, scales, zeros, GROUP_SIZE)


def scale() -> Tensor:
    return torch.arange(1, K + 1, dtype=torch.float32) / 8


def weight() -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(value(), dtype=torch.float16, act_pre_scale=scale())


def stack() -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(stack_value(), dtype=torch.float16, act_pre_scale=scale())


def turned() -> Int4TransposedTensor:
    view: Int4TransposedTensor = stack().transpose(-2, -1)
    return view


def act_order() -> Tensor:
    """A permutation that is not its own inverse."""
    return (torch.arange(K) * 7 % K).int()


def ordered(value: GroupwiseInt4) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(
        replace(value, act_order=act_order()), dtype=torch.float16, act_pre_scale=scale()
    )


def float16_weight(value: GroupwiseInt4) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(
        value, dtype=torch.float16, act_pre_scale=scale(), qparams_dtype=torch.float16
    )


def state_of(name: str) -> dict[str, Tensor]:
    """What the files of a set hold."""
    states: dict[str, dict[str, Tensor]] = {
        "v1": {"layer.weight": weight()},
        "v2": {"layer.weight": stack(), "layer.turned": turned()},
        "v3": {"layer.weight": weight(), "layer.stack": stack(), "layer.turned": turned()},
        "v4": {
            "layer.weight": float16_weight(float16_value()),
            "layer.stack": float16_weight(stack_value(float16_value)),
            "layer.turned": float16_weight(stack_value(float16_value)).transpose(-2, -1),
        },
        "v5": {
            "layer.weight": ordered(value()),
            "layer.stack": ordered(stack_value()),
            "layer.turned": ordered(stack_value()).transpose(-2, -1),
        },
    }
    return states[name[:2]]


def module(name: str) -> nn.Linear:
    """A layer with a 4-bit weight, which shows it when it is printed."""
    layer = nn.Linear(K, N, bias=False)
    w = state_of(name)["layer.weight"] if name[:2] in ("v4", "v5") else weight()
    layer.weight = nn.Parameter(w, requires_grad=False)
    layer.extra_repr = ExtraRepr(layer)  # type: ignore[method-assign]
    return layer


def check(loaded: object, name: str, *, stacked: bool, view: bool = False) -> None:
    """Check one weight from a file of that set."""
    assert isinstance(loaded, Int4TransposedTensor if view else Int4OpaqueTensor)
    w = loaded.untransposed() if isinstance(loaded, Int4TransposedTensor) else loaded
    assert isinstance(w, Int4OpaqueTensor)
    new = name.startswith("v4")
    matrix = float16_value if new else value
    expected = stack_value(matrix) if stacked else matrix()
    assert w.scale_and_zero.dtype == (torch.float16 if new else torch.bfloat16)
    assert w.shape == expected.shape
    for matrix in [w] if w.ndim == 2 else w:
        assert_int4(matrix, (N, K), GROUP_SIZE)
    assert w.qdata_layout == native().name
    assert w.dtype == loaded.dtype == torch.float16
    assert torch.equal(w.to_groupwise().codes, expected.codes)
    assert torch.equal(w.to_groupwise().scale.float(), expected.scale.float())
    assert torch.equal(w.to_groupwise().zero.float(), expected.zero.float())
    assert w.act_pre_scale is not None
    assert torch.equal(w.act_pre_scale, scale())
    if name.startswith("v5"):
        assert w.act_order is not None
        assert torch.equal(w.act_order, act_order())
    else:
        assert w.act_order is None


def check_state(state: dict[str, Tensor], name: str) -> None:
    assert set(state) == set(state_of(name))
    for key, loaded in state.items():
        stacked = key != "layer.weight" or name.startswith("v2")
        check(loaded, name, stacked=stacked, view=key == "layer.turned")


def write(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = state_of(folder.name)
    torch.save(state, folder / "state.pt")
    torch.save(nn.Parameter([*state.values()][-1], requires_grad=False), folder / "parameter.pt")
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, folder / "model.safetensors", metadata)
    state_dict_saver.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    torch.save(module(folder.name), folder / "module.pt")
    (folder / "module.pickle").write_bytes(pickle.dumps(module(folder.name)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load(name: str, mmap: bool) -> None:
    check_state(torch.load(FILES / name / "state.pt", weights_only=True, mmap=mmap), name)
    parameter = torch.load(FILES / name / "parameter.pt", weights_only=True, mmap=mmap)
    assert isinstance(parameter, nn.Parameter)
    check(parameter, name, stacked=not name.startswith("v1"), view=not name.startswith("v1"))


@pytest.mark.parametrize("name", SETS)
def test_safetensors(name: str) -> None:
    with safe_open(FILES / name / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state, rest = unflatten_tensor_state_dict(tensors, file.metadata())
    assert rest == {}
    check_state(state, name)


@pytest.mark.parametrize("name", SETS)
def test_distributed_checkpoint(name: str) -> None:
    state = state_of(name)
    for t in state.values():
        empty = t.untransposed() if isinstance(t, Int4TransposedTensor) else t
        assert isinstance(empty, Int4OpaqueTensor)
        empty.qdata.zero_()
        empty.scale_and_zero.zero_()
        empty.act_pre_scale.zero_()  # type: ignore[union-attr]
        if empty.act_order is not None:
            empty.act_order.copy_(torch.arange(K))
    state_dict_loader.load(state, checkpoint_id=FILES / name / "dcp", no_dist=True)
    check_state(state, name)


@pytest.mark.parametrize("name", [name for name in SETS if not name.startswith("v1")])
def test_whole_modules(name: str) -> None:
    """Also those of version 2, whose modules lay elsewhere."""
    folder = FILES / name
    old = name.startswith("v2")
    assert (b"torchao_int4cpu.module_repr" in (folder / "module.pickle").read_bytes()) == old
    with torch.serialization.safe_globals([nn.Linear]):
        safe = torch.load(folder / "module.pt", weights_only=True)
    whole = torch.load(folder / "module.pt", weights_only=False)
    for layer in (safe, whole, pickle.loads((folder / "module.pickle").read_bytes())):
        check(layer.weight, name, stacked=False)
        assert isinstance(layer.extra_repr, ExtraRepr)
        assert "weight=Int4OpaqueTensor(shape=[64, 40]" in repr(layer)


def test_pickles_name_the_package_and_no_module_of_it() -> None:
    for name in SETS:
        text = pickled(FILES / name / "parameter.pt")
        assert (b"ctorchao_int4cpu.t" not in text) == (name[:2] in ("v3", "v4", "v5")), name


@pytest.mark.parametrize("version", [3, 4, 5])
def test_files_are_written_as_before(version: int, tmp_path: Path) -> None:
    """Whoever reads the version reads them; what torch writes around pickles is its own."""
    old = FILES / f"v{version}-{native().name}"
    new = tmp_path / old.name
    write(new)
    for file in ("state.pt", "parameter.pt"):
        assert pickled(new / file) == pickled(old / file), file
    assert_same_safetensors(new, old)


def test_a_matrix_in_safetensors_is_written_as_in_version_1(tmp_path: Path) -> None:
    old = FILES / f"v1-{native().name}"
    write(tmp_path / old.name)
    assert_same_safetensors(tmp_path / old.name, old)


def pickled(file: Path) -> bytes:
    with zipfile.ZipFile(file) as records:
        (name,) = (name for name in records.namelist() if name.endswith("/data.pkl"))
        return records.read(name)


def assert_same_safetensors(new: Path, old: Path) -> None:
    raw, before = ((folder / "model.safetensors").read_bytes() for folder in (new, old))
    length = 8 + int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8:length]) == json.loads(before[8:length])  # in any order
    assert raw[length:] == before[length:]


def test_there_is_a_set_of_every_version_and_layout_and_no_other() -> None:
    assert {path.name for path in FILES.glob("v*")} == set(SETS)
    assert {name.partition("-")[0] for name in SETS} == {
        f"v{version}" for version in range(1, FORMAT_VERSION + 1)
    }


def test_the_sets_really_lie_in_the_layout_that_they_are_named_after() -> None:
    stored = {}
    for name in SETS:
        with safe_open(FILES / name / "model.safetensors", "pt") as file:
            stored[name] = file.get_tensor("layer._weight_qdata").flatten()
            written = json.loads(file.metadata()["layer.weight"])["_data"]
        assert written["qdata_layout"] == name.partition("-")[2]
        assert written["format_version"] == {"v2": 2, "v4": 4, "v5": 5}.get(name[:2], 1)
    # Versions 3 to 5 have the codes of version 1.
    assert len({bytes(qdata.tolist()) for qdata in stored.values()}) == len(SETS) - 9


def test_the_float16_scales_need_all_of_their_bits() -> None:
    for numbers in (stack_value(float16_value).scale, stack_value(float16_value).zero):
        assert not (numbers.bfloat16().double() == numbers.double()).any()
        assert 0 < int((numbers.abs() < torch.finfo(torch.float16).tiny).sum()) < numbers.numel() // 2


if __name__ == "__main__":
    write(FILES / f"v{FORMAT_VERSION}-{native().name}")
    sys.exit()
