"""Files that earlier versions wrote must load for ever: one set a format version and layout, kept here.

``ATEN_CPU_CAPABILITY=avx2 python -m tests.test_old_files`` writes the set of the version in use; it is
run once, when the format changes, and what it wrote is never touched again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from tests.numerics import assert_int4, native
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.checkpoint import FORMAT_VERSION

FILES = Path(__file__).parent / "fixtures"
SETS = [f"v{version}-{layout}" for version in (1,) for layout in ("avx512", "avx2", "default")]

#: One full block of each layout, and a last group that is short.
N, K, GROUP_SIZE = 64, 40, 32


def value() -> GroupwiseInt4:
    """Codes without a period that a layout could hide; scales and zeros that bfloat16 holds exactly."""
    index = torch.arange(N * K).view(N, K)
    codes = (index * 40503 // 256 % 16).to(torch.uint8)
    groups = torch.arange(N * 2).view(N, 2)
    return GroupwiseInt4(codes, 2.0 ** (groups % 7 - 9), (groups % 11 - 5) / 64, GROUP_SIZE)


def weight() -> Int4OpaqueTensor:
    scale = torch.arange(1, K + 1, dtype=torch.float32) / 8
    return Int4OpaqueTensor.from_groupwise(value(), dtype=torch.float16, act_pre_scale=scale)


def check(loaded: object) -> None:
    w = assert_int4(loaded, (N, K), GROUP_SIZE)
    assert w.qdata_layout == native().name
    assert w.dtype == torch.float16
    assert torch.equal(w.to_groupwise().codes, value().codes)
    assert torch.equal(w.to_groupwise().scale.float(), value().scale)
    assert torch.equal(w.to_groupwise().zero.float(), value().zero)
    assert w.act_pre_scale is not None
    assert torch.equal(w.act_pre_scale, torch.arange(1, K + 1, dtype=torch.float32) / 8)


def write(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = {"layer.weight": weight()}
    torch.save(state, folder / "state.pt")
    torch.save(nn.Parameter(weight(), requires_grad=False), folder / "parameter.pt")
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, folder / "model.safetensors", metadata)
    state_dict_saver.save(state, checkpoint_id=folder / "dcp", no_dist=True)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load(name: str, mmap: bool) -> None:
    check(torch.load(FILES / name / "state.pt", weights_only=True, mmap=mmap)["layer.weight"])
    parameter = torch.load(FILES / name / "parameter.pt", weights_only=True, mmap=mmap)
    assert isinstance(parameter, nn.Parameter)
    check(parameter)


@pytest.mark.parametrize("name", SETS)
def test_safetensors(name: str) -> None:
    with safe_open(FILES / name / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state, rest = unflatten_tensor_state_dict(tensors, file.metadata())
    assert rest == {}
    check(state["layer.weight"])


@pytest.mark.parametrize("name", SETS)
def test_distributed_checkpoint(name: str) -> None:
    empty = weight()
    empty.qdata.zero_()
    empty.scale_and_zero.zero_()
    empty.act_pre_scale.zero_()  # type: ignore[union-attr]
    state = {"layer.weight": empty}
    state_dict_loader.load(state, checkpoint_id=FILES / name / "dcp", no_dist=True)
    check(state["layer.weight"])


def test_there_is_a_set_of_every_version_and_layout_and_no_other() -> None:
    assert {path.name for path in FILES.glob("v*")} == set(SETS)
    assert {name.partition("-")[0] for name in SETS} == {
        f"v{version}" for version in range(1, FORMAT_VERSION + 1)
    }


def test_the_sets_really_lie_in_the_layout_that_they_are_named_after() -> None:
    stored = {}
    for name in SETS:
        with safe_open(FILES / name / "model.safetensors", "pt") as file:
            stored[name] = file.get_tensor("layer._weight_qdata")
            assert f'"qdata_layout": "{name.partition("-")[2]}"' in file.metadata()["layer.weight"]
    assert len({bytes(qdata.flatten().tolist()) for qdata in stored.values()}) == len(SETS)


if __name__ == "__main__":
    write(FILES / f"v{FORMAT_VERSION}-{native().name}")
    sys.exit()
