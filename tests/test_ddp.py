"""`DistributedDataParallel` over a frozen 4-bit model with low-rank adapters.

The gradients of two ranks are averaged, so a step is that of one process with the rows of both, up to
the rounding of float32 sums in another order.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.processes import Ranks, in_ranks, raises
from tests.shared_weights import assert_same_codes
from tests.test_fsdp import Lora
from tests.weights import quantized
from torchao_int4cpu import Int4OpaqueTensor


def model_of(seed: int, scale: Tensor | None = None) -> nn.Sequential:
    return nn.Sequential(
        Lora(48, 128, seed, torch.float32, scale),
        nn.Tanh(),
        Lora(128, 48, seed + 1, torch.float32, None),
    )


def trained(model: nn.Module, rows: Tensor) -> list[Tensor]:
    parameters: list[Tensor] = [
        parameter for parameter in model.parameters() if parameter.requires_grad
    ]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()
    return parameters


@in_ranks("2", "2 mixed")
def test_training_is_that_of_one_process(ranks: Ranks) -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 8, 128)
    single = model_of(1)
    parallel = DistributedDataParallel(copy.deepcopy(single))
    mine = trained(parallel, rows[ranks.rank])
    expected = trained(single, rows.flatten(0, 1))
    # Layouts differ between mixed ranks, and so do the kernels and their rounding: bfloat16's 2^-9.
    for parameter, other in zip(mine, expected, strict=True):
        assert torch.allclose(parameter, other, rtol=2.0**-6, atol=2.0**-9)
    layer = parallel.module[0]
    assert isinstance(layer.weight, Int4OpaqueTensor)
    assert_same_codes(layer.weight, single[0].weight)


@in_ranks("2", "2 mixed")
def test_all_ranks_get_the_weights_of_the_first(ranks: Ranks) -> None:
    scale = torch.full((128,), 1.0 + ranks.rank)
    model = model_of(10 * ranks.rank, scale)
    DistributedDataParallel(model)
    first = model_of(0, torch.ones(128))
    assert_same_codes(model[0].weight, first[0].weight)
    assert_same_codes(model[2].weight, first[2].weight)
    model = model_of(10 * ranks.rank)
    DistributedDataParallel(model, init_sync=False)  # as torch leaves the others then
    assert_same_codes(model[0].weight, model_of(10 * ranks.rank)[0].weight)


@in_ranks("2")
def test_other_weights_on_another_rank(ranks: Ranks) -> None:
    layer = nn.Linear(128, 48)
    layer.weight = nn.Parameter(quantized(48, 128, group_size=32 << ranks.rank), requires_grad=False)
    raises(ValueError, "all must hold the same model", lambda: DistributedDataParallel(layer))
