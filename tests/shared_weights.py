"""4-bit weights and layers that ranks share, the shard that each must have, the bound of a product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tests.numerics import UNIT, native, packed_in, product_bound
from tests.processes import Ranks
from tests.scales import SCALES
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.dispatch.cuts import same_numbers
from torchao_int4cpu.format.packed import int4_mm_reference

GROUP = 32


def mesh_of(ranks: Ranks) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks.world,))


def weight_of(
    n: int,
    k: int,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    scale: Tensor | None = None,
    ordered: bool = False,
) -> Int4OpaqueTensor:
    value = exact_groupwise(n, k, seed)
    if ordered:
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed)).int()
        value = replace(value, act_order=order)
    return Int4OpaqueTensor.from_groupwise(value, dtype=dtype, act_pre_scale=scale)


def exact_groupwise(n: int, k: int, seed: int = 0) -> GroupwiseInt4:
    """The same in every instruction set, where powers and normal numbers differ in the last bit."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // GROUP)
    scale = torch.randint(32, 256, (n, groups), generator=generator) / 2**13
    zero = torch.randint(-255, 256, (n, groups), generator=generator) / 2**9
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    return GroupwiseInt4(codes, scale.to(SCALES), zero.to(SCALES), GROUP)


def stack_of(experts: int, n: int, k: int) -> Int4OpaqueTensor:
    made: Any = torch.stack([weight_of(n, k, seed) for seed in range(experts)])
    assert isinstance(made, Int4OpaqueTensor)
    return made


def linear_of(weight: Int4OpaqueTensor, bias: bool = False) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def assert_same_codes(a: object, b: object) -> None:
    """Exactly the same codes, scales and zeros (and activation scales), whatever the layouts."""
    assert isinstance(a, Int4OpaqueTensor)
    assert isinstance(b, Int4OpaqueTensor)
    assert (a.shape, a.dtype, a.block_size) == (b.shape, b.dtype, b.block_size)
    mine, other = a.to_groupwise(), b.to_groupwise()
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name
    assert (a.act_pre_scale is None) == (b.act_pre_scale is None)
    if a.act_pre_scale is not None and b.act_pre_scale is not None:
        k = a.shape[-1]  # one number for all columns may come back as K times that number
        assert torch.equal(a.act_pre_scale.expand(k), b.act_pre_scale.expand(k))
    assert same_numbers(a.act_order, b.act_order)


def expected_shard(weight: Int4OpaqueTensor, dim: int, ranks: Ranks) -> Int4OpaqueTensor:
    """The shard that this rank must have, cut from the codes and packed anew."""
    groupwise, size = weight.to_groupwise(), weight.group_size
    piece = -(-weight.shape[dim] // ranks.world)
    places = slice(ranks.rank * piece, (ranks.rank + 1) * piece)
    along_k = dim == weight.ndim - 1
    groups = slice(places.start // size, -(-places.stop // size)) if along_k else places
    where, where_groups = ((slice(None),) * dim + (some,) for some in (places, groups))
    pre_scale = weight.act_pre_scale
    if along_k and pre_scale is not None and pre_scale.numel() > 1:
        pre_scale = pre_scale[places]
    return Int4OpaqueTensor.from_groupwise(
        GroupwiseInt4(
            groupwise.codes[where],
            groupwise.scale[where_groups],
            groupwise.zero[where_groups],
            size,
            groupwise.act_order,
        ),
        dtype=weight.dtype,
        act_pre_scale=pre_scale,
    )


def local(t: Tensor) -> Tensor:
    assert isinstance(t, DTensor)
    made: Tensor = t.to_local()
    return made


def bound_of(
    x: Tensor,
    weight: Int4OpaqueTensor,
    dim: int,
    world: int,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """How far the product may be from the exact one, elementwise, in float64.

    Sharded by rows, each element is one product of one rank. Sharded by columns it is a sum of
    ``world`` products, each with the error of its own; every addition in the dtype of the result, and
    that of the bias, rounds a sum that is no larger than the sum of all magnitudes.
    """
    groupwise, dtype = weight.to_groupwise(), dtype or x.dtype
    places = [slice(None)] if dim == 0 else list(_chunks(weight.shape[1], world))
    error, magnitude = torch.zeros(1).double(), torch.zeros(1).double()
    for columns in places:
        groups = slice(None) if dim == 0 else slice(columns.start // GROUP, columns.stop // GROUP)
        part = packed_in(
            GroupwiseInt4(
                groupwise.codes[:, columns],
                groupwise.scale[:, groups],
                groupwise.zero[:, groups],
                GROUP,
            ),
            native(),
        )
        piece = x[:, columns]
        bound = product_bound(piece, part, dtype)
        error = error + bound
        magnitude = magnitude + int4_mm_reference(piece, part).abs() + bound
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    additions = len(places) - 1 + (bias is not None)
    grown = (1 + UNIT[dtype]) ** additions
    return error + additions * UNIT[dtype] * grown * magnitude


def _chunks(total: int, world: int) -> list[slice]:
    size = -(-total // world)
    return [slice(start, min(total, start + size)) for start in range(0, total, size)]


def exact(x: Tensor, weight: Int4OpaqueTensor, bias: Tensor | None) -> Tensor:
    y = int4_mm_reference(x, packed_in(weight.to_groupwise(), native()))
    return y if bias is None else y + bias.double()


def assert_near(y: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.2f} of the bound"
