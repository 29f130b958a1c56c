"""`torch.distributed.checkpoint` of 4-bit weights: saved by so many processes, loaded by others.

The codes that are loaded are exactly those that were saved, however the two cut the weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from tests.processes import Ranks, in_ranks
from tests.shared_weights import (
    assert_same_codes,
    expected_shard,
    linear_of,
    local,
    mesh_of,
    stack_of,
    weight_of,
)
from torchao_int4cpu import Int4OpaqueTensor

#: Exact in every instruction set, which `torch.linspace` is not.
SCALE = torch.arange(32, 160) / 64

#: Each with the dimensions along which 2 and 4 processes can share it: cuts on block borders and not.
WEIGHTS: dict[str, tuple[Int4OpaqueTensor, tuple[int, ...]]] = {
    "on borders": (weight_of(512, 128, 1), (0, 1)),
    "off borders": (weight_of(100, 128, 2), (0, 1)),
    "few rows": (weight_of(10, 256, 3), (0, 1)),
    "scaled": (weight_of(70, 128, 4, scale=SCALE), (0, 1)),
    "scaled by one": (weight_of(70, 128, 5, scale=SCALE[:1]), (0,)),
    "short group": (weight_of(99, 40, 6, torch.float32), (0,)),
    "experts": (stack_of(7, 40, 128), (0, 1, 2)),
}


def keys() -> list[tuple[str, int | None]]:
    sharded = [(name, dim) for name, (_, dims) in WEIGHTS.items() for dim in dims]
    return [*sharded, *((name, None) for name in WEIGHTS)]


def empty(weight: Int4OpaqueTensor) -> Int4OpaqueTensor:
    """Another weight of that shape, with nothing of it."""
    made: Int4OpaqueTensor = weight.clone()
    made.qdata.fill_(0x55)
    made.scale_and_zero.fill_(7)
    if made.act_pre_scale is not None:
        made.act_pre_scale.fill_(3)
    return made


def assert_loaded(ranks: Ranks, loaded: dict[str, Any]) -> None:
    for name, dim in keys():
        weight, found = WEIGHTS[name][0], loaded[f"{name}.{dim}"]
        if isinstance(found, DTensor):
            found = local(found)
        assert_same_codes(found, weight if dim is None else expected_shard(weight, dim, ranks))


# Ranks of one launch play fewer processes: a group of some of them, while the others wait.


def save_under(count: int, ranks: Ranks, folder: Path) -> None:
    """Save as the first ``count`` ranks would if they were alone."""
    group = dist.new_group(list(range(count)))
    if ranks.rank < count:
        save(state_of(group, ranks.rank, count), checkpoint_id=folder, process_group=group)
    dist.barrier()


def state_of(group: Any, rank: int, count: int, of: Any = lambda weight: weight) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(group, "cpu")
    made = {}
    for name, dim in keys():
        placement: Placement = Replicate() if dim is None else Shard(dim)
        weight = of(WEIGHTS[name][0])
        made[f"{name}.{dim}"] = distribute_tensor(weight, mesh, [placement], src_data_rank=None)
    return made


def load_under(count: int, ranks: Ranks, folder: Path) -> None:
    group = dist.new_group(list(range(count)))
    if ranks.rank < count:
        loaded = state_of(group, ranks.rank, count, empty)
        load(loaded, checkpoint_id=folder, process_group=group)
        assert_loaded(Ranks(ranks.rank, count, folder), loaded)
        plain: dict[str, Any] = {f"{name}.{dim}": empty(WEIGHTS[name][0]) for name, dim in keys()}
        load(plain, checkpoint_id=folder, process_group=group)
        for name, dim in keys():
            assert_same_codes(plain[f"{name}.{dim}"], WEIGHTS[name][0])
    dist.barrier()


@in_ranks("4", "2 mixed")
def test_saved_by_two_loaded_by_one_two_and_four(ranks: Ranks) -> None:
    """Into DTensors and into plain weights."""
    save_under(2, ranks, ranks.folder / "two")
    for count in (1, 2, 4):
        if count <= ranks.world:
            load_under(count, ranks, ranks.folder / "two")


@in_ranks("4")
def test_saved_by_one_or_four_loaded_by_two(ranks: Ranks) -> None:
    for count in (1, 4):
        folder = ranks.folder / str(count)
        save_under(count, ranks, folder)
        load_under(2, ranks, folder)
    if ranks.rank == 0:  # no processes, no DTensors
        plain: dict[str, Any] = {name: weight for name, (weight, _) in WEIGHTS.items()}
        save(plain, checkpoint_id=ranks.folder / "plain", no_dist=True)
    dist.barrier()
    for dim in (0, 1):
        weight = empty(WEIGHTS["off borders"][0])
        found = distribute_tensor(weight, mesh_of(ranks), [Shard(dim)])
        load({"off borders": found}, checkpoint_id=ranks.folder / "plain")
        assert_same_codes(local(found), expected_shard(WEIGHTS["off borders"][0], dim, ranks))


@pytest.mark.slow
@in_ranks("2", "2 mixed")
def test_a_model_changes_the_way_it_is_sharded(ranks: Ranks) -> None:
    """Tensor parallel to FSDP2 to one process, through the state dicts of models."""

    def model(fill: Any = lambda weight: weight) -> nn.Sequential:
        first, second = weight_of(256, 128, 1, scale=SCALE), weight_of(100, 256, 2)
        return nn.Sequential(linear_of(fill(first), bias=True), nn.ReLU(), linear_of(fill(second)))

    mesh = init_device_mesh("cpu", (ranks.world,))
    original = model()
    for p in original.parameters():
        if not isinstance(p, Int4OpaqueTensor):
            dist.broadcast(p.data, src=0)
    plan: dict[str, ParallelStyle] = {"0": ColwiseParallel(), "2": RowwiseParallel()}

    def by_tensor(made: nn.Sequential) -> nn.Module:
        return parallelize_module(made, mesh, plan)

    def by_fsdp(made: nn.Sequential) -> Any:
        return fully_shard(made, mesh=mesh)

    def by_nobody(made: nn.Sequential) -> nn.Module:
        return made

    first = by_tensor(model())
    set_model_state_dict(first, by_tensor(original).state_dict())
    ways = (by_tensor, by_fsdp, by_nobody, by_fsdp, by_tensor)
    source: nn.Module = first
    for i, way in enumerate(ways):
        save({"model": get_model_state_dict(source)}, checkpoint_id=ranks.folder / str(i))
        target = way(model(empty))
        found = get_model_state_dict(target)
        load({"model": found}, checkpoint_id=ranks.folder / str(i))
        set_model_state_dict(target, found)
        for index in (0, 2):
            weight: Any = target[index].weight
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.data
            assert_same_codes(whole, model()[index].weight.data)
        x = torch.randn(3, 128).bfloat16()
        dist.broadcast(x, src=0)
        with torch.no_grad():
            y: Tensor = target(x)
        assert bool(torch.isfinite(y.float()).all())
        source = target
