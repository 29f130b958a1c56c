"""FSDP2 of a frozen 4-bit base with bfloat16 LoRA parameters, in real processes over gloo.

The weight that FSDP2 gathers has exactly the codes, in the layout of the rank, so every rank computes
what one process would on the same rows; only the gradients of LoRA are summed in another order.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torchao.quantization import quantize_

from tests.processes import Ranks, in_ranks, raises
from tests.shared_weights import (
    assert_same_codes,
    expected_shard,
    local,
    stack_of,
    weight_of,
)
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig

K, RANK = 128, 4


class Lora(nn.Module):
    """A frozen 4-bit linear layer and a low-rank bfloat16 adapter beside it."""

    def __init__(
        self, n: int, k: int, seed: int, dtype: torch.dtype, scale: Tensor | None, ordered: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_of(n, k, seed, dtype, scale, ordered), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(n, dtype=dtype), requires_grad=False)
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter((torch.randn(RANK, k, generator=generator) * 0.05).to(dtype))
        self.up = nn.Parameter((torch.randn(n, RANK, generator=generator) * 0.05).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)


def model_of(
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    scale: Tensor | None = None,
    ordered: bool = False,
) -> nn.Sequential:
    return nn.Sequential(
        Lora(n, K, 1, dtype, scale, ordered),
        nn.Tanh(),
        Lora(K, n, 2, dtype, None, ordered),
        nn.Tanh(),
        Lora(n, K, 3, dtype, scale, ordered),
    )


def sharded(model: nn.Sequential, ranks: Ranks, reshard: bool, **kwargs: Any) -> Any:
    mesh = init_device_mesh("cpu", (ranks.world,))
    for layer in model:
        if isinstance(layer, Lora):
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, **kwargs)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **kwargs)


def bases(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if name.endswith("weight")]


def train(
    model: nn.Module, batches: list[Tensor], optimizer: Any, average: bool = False
) -> list[Tensor]:
    """Losses of some steps; with ``average`` of the gradients over all ranks, by hand."""
    losses = []
    for x in batches:
        loss = model(x).float().square().mean()
        loss.backward()
        for p in model.parameters():
            if average and p.grad is not None:
                total = p.grad.float()
                dist.all_reduce(total)
                p.grad.copy_(total / dist.get_world_size())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


class Descent(torch.optim.Optimizer):
    """Gradient descent, one rounding after the other.

    torch's own rounds the last elements of a tensor, which fill no vector, otherwise than the rest: the
    same numbers give other results in shards.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.copy_(p.float() - p.grad.float() * 0.01)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


#: Gradients are summed in float32, where sums of two, or of equal ones, of bfloat16 are exact enough.
IN_FLOAT32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)


@in_ranks("2", "4")
def test_training_is_that_of_one_process(ranks: Ranks) -> None:
    """Every rank has the same rows: the mean of the gradients is each of them, bit for bit."""
    scale = torch.rand(K) + 0.5
    for n, reshard, with_scale in ((128, True, False), (100, True, True), (65, False, False)):
        single = model_of(n, scale=scale if with_scale else None, ordered=with_scale)
        before = copy.deepcopy(single)
        parallel = sharded(copy.deepcopy(single), ranks, reshard, mp_policy=IN_FLOAT32)
        batches = [torch.randn(6, K).bfloat16() for _ in range(4)]
        expected = train(single, batches, Descent(single))
        assert len(set(expected)) == len(batches)  # it learns
        assert train(parallel, batches, Descent(parallel)) == expected
        for (name, mine), (_, original) in zip(bases(parallel), bases(before)):
            assert not mine.requires_grad, name
            assert_same_codes(local(mine), expected_shard(original.data, 0, ranks))
            assert_same_codes(mine.full_tensor(), original.data)
        for (name, mine), (_, other) in zip(parallel.named_parameters(), single.named_parameters()):
            if other.requires_grad:
                assert torch.equal(mine.full_tensor(), other), name


@in_ranks("2", "2 mixed")
def test_training_on_different_rows_is_that_of_data_parallelism(ranks: Ranks) -> None:
    """The whole model on each rank, with gradients averaged by hand, gives the same bit for bit.

    Layouts may differ: each rank gathers the codes into its own.
    """
    for n, reshard in ((128, True), (100, True), (97, False)):
        whole = model_of(n)
        parallel = sharded(copy.deepcopy(whole), ranks, reshard, mp_policy=IN_FLOAT32)
        torch.manual_seed(ranks.rank)
        batches = [torch.randn(6, K).bfloat16() for _ in range(4)]
        expected = train(whole, batches, Descent(whole), average=True)
        assert train(parallel, batches, Descent(parallel)) == expected
        for (_, mine), (_, original) in zip(bases(parallel), bases(whole)):
            assert_same_codes(mine.full_tensor(), original.data)


@in_ranks("2", "4")
def test_each_rank_keeps_its_share_of_the_bytes(ranks: Ranks) -> None:
    """1 / ranks of the bytes between the steps, and what is gathered is freed after the forward."""
    single = model_of(256)
    whole = sum(bytes_of(p.data) for _, p in bases(single))
    parallel = sharded(copy.deepcopy(single), ranks, reshard=True)
    assert sum(bytes_of(local(p)) for _, p in bases(parallel)) * ranks.world == whole
    inside = 0

    def look(module: Any, args: Any) -> None:
        nonlocal inside
        weight = module.weight
        assert type(weight) is Int4OpaqueTensor
        inside = max(inside, bytes_of(weight))

    for layer in parallel:
        if isinstance(layer, Lora):
            layer.register_forward_pre_hook(look)
    for training in (True, False, True):
        y = parallel(torch.randn(3, K).bfloat16().requires_grad_(training))
        if training:
            y.float().sum().backward()
        del y
        gc.collect()
        assert inside == max(bytes_of(p.data) for _, p in bases(single))
        freed = [part for layer in parallel for part in unsharded_parts(layer)]
        assert len(freed) > 0
        assert sum(part.untyped_storage().nbytes() for part in freed) == 0


def unsharded_parts(layer: nn.Module) -> list[Tensor]:
    """The memory of the gathered weight, which FSDP2 keeps as a tensor of no bytes."""
    if not isinstance(layer, Lora):
        return []
    group: Any = layer._get_fsdp_state()._fsdp_param_group  # type: ignore[operator]
    found: list[Tensor] = []
    for parameter in group.fsdp_params:
        if isinstance(parameter._unsharded_param, Int4OpaqueTensor):
            found += [parameter._unsharded_param.qdata, parameter._unsharded_param.scale_and_zero]
            found += parameter.all_gather_outputs
    return found


def bytes_of(weight: object) -> int:
    assert isinstance(weight, Int4OpaqueTensor)
    return weight.qdata.nbytes + weight.scale_and_zero.nbytes


@in_ranks("2", "4")
def test_state_dicts(ranks: Ranks) -> None:
    """Own, full, loaded with copy_ and assigned; the optimizer knows only LoRA."""
    for n in (128, 100):
        single, other = (model_of(n, scale=torch.rand(K) + 0.5) for _ in range(2))
        for (_, mine), seed in zip(bases(other), (7, 8, 9)):
            n_rows, k = mine.shape
            mine.data.copy_(weight_of(n_rows, k, seed, scale=mine.act_pre_scale))
        parallel = sharded(copy.deepcopy(single), ranks, reshard=True)
        x = torch.randn(3, K).bfloat16()
        dist.broadcast(x, src=0)
        with torch.no_grad():
            assert torch.equal(parallel(x), single(x))
        source = sharded(copy.deepcopy(other), ranks, reshard=True)
        parallel.load_state_dict(source.state_dict())
        with torch.no_grad():
            assert torch.equal(parallel(x), other(x))
        full = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
        if full:
            for name, weight in bases(other):
                assert_same_codes(full[name], weight.data)
        back = sharded(copy.deepcopy(single), ranks, reshard=True)
        back.load_state_dict(parallel.state_dict(), assign=True)
        with torch.no_grad():
            assert torch.equal(back(x), other(x))
        set_model_state_dict(
            back, copy.deepcopy(single).state_dict(), options=StateDictOptions(full_state_dict=True)
        )
        with torch.no_grad():
            assert torch.equal(back(x), single(x))
        optimizer = optimizer_of(parallel)
        train(parallel, [x], optimizer)
        state: Any = get_optimizer_state_dict(parallel, optimizer)["state"]
        assert sorted(state) == sorted(
            name for name, _ in parallel.named_parameters() if name.endswith(("up", "down"))
        )


@in_ranks("2")
def test_mixed_precision_policy(ranks: Ranks) -> None:
    """A float32 model that computes in bfloat16 is the bfloat16 model."""
    single = model_of(100, dtype=torch.float32)
    parallel = sharded(
        copy.deepcopy(single),
        ranks,
        reshard=True,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    x = torch.randn(6, K)
    dist.broadcast(x, src=0)
    expected = single.to(torch.bfloat16)(x.bfloat16())
    for _ in range(2):
        y = parallel(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        y.float().sum().backward()


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(stack_of(experts, 40, K), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(self.weight.shape[0], -1, -1), self.weight.transpose(-2, -1))


@in_ranks("2", "4", "2 mixed")
def test_stacks_of_experts(ranks: Ranks) -> None:
    """Sharded by experts, evenly or not."""
    for experts in (8, 7):
        single: Any = Experts(experts)
        parallel: Any = fully_shard(copy.deepcopy(single), mesh=init_device_mesh("cpu", (ranks.world,)))
        x = torch.randn(5, K).bfloat16()
        weight: Any = parallel.weight
        assert_same_codes(local(weight), expected_shard(single.weight.data, 0, ranks))
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(parallel(x), single(x))
            parallel.reshard()


@in_ranks("4")
def test_with_tensor_parallelism_inside(ranks: Ranks) -> None:
    """Two ranks share a weight by rows or columns, and two such pairs share that by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def layer(n: int, k: int, seed: int) -> nn.Linear:
        made = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
        made.weight = nn.Parameter(weight_of(n, k, seed), requires_grad=False)
        return made

    single: Any = nn.Sequential(layer(256, K, 1), nn.Tanh(), layer(70, 256, 2))
    plan: dict[str, ParallelStyle] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallel: Any = parallelize_module(copy.deepcopy(single), mesh["tp"], plan)
    tp_only = parallelize_module(copy.deepcopy(single), mesh["tp"], plan)
    for part in (parallel[0], parallel[2]):
        fully_shard(part, mesh=mesh["dp"])
    fully_shard(parallel, mesh=mesh["dp"])
    x = torch.randn(4, K).bfloat16()
    dist.broadcast(x, src=0)
    for _ in range(3):
        x = x.detach().requires_grad_()
        y, expected = parallel(x), tp_only(x)
        assert torch.equal(y, expected)
        y.float().sum().backward()
    for i in (0, 2):
        assert isinstance(parallel[i].weight, DTensor)
        assert_same_codes(parallel[i].weight.full_tensor(), single[i].weight.data)


@in_ranks("4")
def test_rows_for_every_rank_or_a_clear_error_on_all(ranks: Ranks) -> None:
    message = raises(
        ValueError, "use 1, 2, 3, 5 processes", lambda: sharded(model_of(5), ranks, reshard=True)
    )
    assert "do not shard this weight" in message


@in_ranks("2")
def test_what_fsdp_cannot_do_is_refused_by_all(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.world,))
    x = torch.randn(3, K).bfloat16()
    dist.broadcast(x, src=0)

    def run_sharded_along(dim: int) -> None:
        def place(parameter: nn.Parameter) -> Shard:
            return Shard(dim)

        model: Any = fully_shard(Experts(4), mesh=mesh, shard_placement_fn=place)
        model(x)

    raises(ValueError, "along dimension 1; it can along dimension 0", lambda: run_sharded_along(1))
    raises(ValueError, "along dimension 2; it can along dimension 0", lambda: run_sharded_along(2))
    dense = fully_shard(nn.Sequential(nn.Linear(K, 64)), mesh=mesh)
    raises(
        ValueError,
        "0.weight: fully_shard has sharded this model",
        lambda: quantize_(dense, Int4WeightOnlyConfig(group_size=32)),
    )
    raises(
        ValueError,
        "cannot be pinned",
        lambda: sharded(model_of(64), ranks, True, offload_policy=CPUOffloadPolicy()),
    )
    left_out = sharded(model_of(64), ranks, True, offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert torch.equal(left_out(x), model_of(64)(x))
