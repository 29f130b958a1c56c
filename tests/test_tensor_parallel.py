"""Tensor parallelism by PyTorch's own DTensor, in real processes over gloo.

Every result is held to a bound that follows from the roundings, and every shard to the exact codes.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torchao.quantization import quantize_

from tests.numerics import UNIT, native, packed_in, product_bound, random_groupwise
from tests.processes import Ranks, in_ranks, raises
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.distributed.collectives import _receive
from torchao_int4cpu.format.packed import int4_mm_reference

GROUP = 32


def mesh_of(ranks: Ranks) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks.world,))


def weight_of(
    n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: Tensor | None = None
) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(
        random_groupwise(n, k, GROUP, seed), dtype=dtype, act_pre_scale=scale
    )


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
            groupwise.codes[where], groupwise.scale[where_groups], groupwise.zero[where_groups], size
        ),
        dtype=weight.dtype,
        act_pre_scale=pre_scale,
    )


def local(t: Tensor) -> Tensor:
    assert isinstance(t, DTensor)
    made: Tensor = t.to_local()
    return made


# --- shards -------------------------------------------------------------------------------------


@in_ranks("2", "4", "2 mixed")
def test_shards_are_slices_of_the_codes_and_gather_to_them(ranks: Ranks) -> None:
    """Along every dimension, on block borders or not, even or not, sent or cut by everyone."""
    mesh = mesh_of(ranks)
    scale = torch.rand(128) + 0.5
    weights = [
        (weight_of(128, 128), (0, 1)),
        (weight_of(100, 128, dtype=torch.float32), (0, 1)),
        (weight_of(10, 256, dtype=torch.float16), (0, 1)),
        (weight_of(99, 160), (0,)),
        (weight_of(257, 40), (0,)),
        (weight_of(70, 128, scale=scale), (0, 1)),
        (weight_of(70, 128, scale=scale[:1]), (0, 1)),
        (stack_of(4, 33, 128), (0, 1, 2)),
        (stack_of(7, 80, 128), (0, 1, 2)),
    ]
    for (weight, dims), source in itertools.product(weights, (0, None)):
        other = (
            weight.clone() if source is None or ranks.rank == source else weight.new_zeros(weight.shape)
        )
        for dim in dims:
            sharded = distribute_tensor(other, mesh, [Shard(dim)], src_data_rank=source)
            assert sharded.shape == weight.shape
            assert not sharded.requires_grad
            assert_same_codes(local(sharded), expected_shard(weight, dim, ranks))
            assert_same_codes(sharded.full_tensor(), weight)
        replicated = distribute_tensor(other, mesh, [Replicate()], src_data_rank=source)
        assert_same_codes(local(replicated), weight)


@in_ranks("2", "4")
def test_shards_are_redistributed(ranks: Ranks) -> None:
    """From rows to columns and back, and to everyone."""
    mesh, scale = mesh_of(ranks), torch.rand(128) + 0.5
    for weight in (weight_of(100, 128), weight_of(100, 128, scale=scale), stack_of(7, 40, 128)):
        last = weight.ndim - 1
        rows = distribute_tensor(weight, mesh, [Shard(last - 1)])
        columns = rows.redistribute(mesh, [Shard(last)])
        assert_same_codes(local(columns), expected_shard(weight, last, ranks))
        assert_same_codes(
            local(columns.redistribute(mesh, [Shard(0)])), expected_shard(weight, 0, ranks)
        )
        assert_same_codes(local(columns.redistribute(mesh, [Replicate()])), weight)


@in_ranks("2", "4")
def test_views_of_shards_gather(ranks: Ranks) -> None:
    """The transposed view of a sharded weight is gathered, too: DTensor does so in some products."""
    mesh = mesh_of(ranks)
    for weight in (weight_of(96, 128), weight_of(96, 128, scale=torch.rand(128) + 0.5)):
        for dim in (0, 1):
            turned: Any = distribute_tensor(weight, mesh, [Shard(dim)]).t()
            whole: Any = turned.full_tensor()
            assert_same_codes(whole.t(), weight)


@in_ranks("4")
def test_a_piece_for_every_process_or_a_clear_error_on_all(ranks: Ranks) -> None:
    mesh = mesh_of(ranks)
    for source in (0, None):

        def shard(weight: Int4OpaqueTensor, dim: int, source: int | None = source) -> None:
            distribute_tensor(weight, mesh, [Shard(dim)], src_data_rank=source)

        rows = weight_of(5, 128)
        message = raises(ValueError, "use 1, 2, 3, 5 processes", lambda w=rows: shard(w, 0))  # type: ignore[misc]
        assert "dimension 0 of 5 makes 3 pieces of 2" in message
        raises(ValueError, "use 1 processes", lambda: shard(weight_of(1, 128), 0))
        raises(ValueError, "use 1, 2, 3 processes", lambda: shard(stack_of(3, 16, 32), 0))
        raises(ValueError, "use 1, 5 pieces (processes)", lambda: shard(weight_of(64, 160), 1))
        raises(ValueError, "use 1, 2 pieces (processes)", lambda: shard(weight_of(64, 64), 1))
        shard(weight_of(7, 128), 0)
        shard(weight_of(64, 128), 1)


def test_processes_that_quantized_differently_are_told() -> None:
    weight = weight_of(64, 128)
    sent = Int4OpaqueTensor.from_groupwise(random_groupwise(64, 128, 64))

    def communicate(buffer: Tensor, part: Any) -> tuple[None, None]:
        buffer.copy_(part(sent))
        return None, None

    with pytest.raises(ValueError, match="all must quantize the model alike"):
        _receive(weight, communicate)


# --- products -----------------------------------------------------------------------------------

STYLES = {0: ColwiseParallel, 1: RowwiseParallel}


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


def run_linear(
    style: int,
    weight: Int4OpaqueTensor,
    bias: bool,
    shape: tuple[int, ...],
    mode: str,
    source: int | None,
    ranks: Ranks,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One layer alone and over all ranks; both within the bound, and its gradient, too."""
    torch.manual_seed(1)
    n, k = weight.shape
    single = linear_of(weight, bias).to(dtype)
    x = torch.randn(*shape, k).to(dtype)
    dist.broadcast(x, src=0)
    for parameter in [] if single.bias is None else [single.bias]:
        dist.broadcast(parameter.data, src=0)
    added = None if single.bias is None else single.bias.detach()
    kwargs: dict[str, Any] = {"output_layouts": Replicate()} if style == 0 else {}
    plan: ParallelStyle = STYLES[style](input_layouts=Replicate(), **kwargs)
    parallel = parallelize_module(
        nn.Sequential(_copy_of(single)), mesh_of(ranks), {"0": plan}, src_data_rank=source
    )
    mine, theirs = x.clone().requires_grad_(mode == "grad"), x.clone().requires_grad_(mode == "grad")
    context = {
        "grad": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
    }[mode]
    with context:
        y, alone = parallel(mine), single(theirs)
    y = y.full_tensor() if isinstance(y, DTensor) else y
    assert y.dtype == dtype
    assert y.shape == (*shape, n)
    rows = x.reshape(-1, k)
    expected = exact(rows, weight, added)
    bound = bound_of(rows, weight, style, ranks.world, added)
    assert_near(y.reshape(-1, n), expected, bound)
    single_bound = bound_of(rows, weight, 0, 1, added)
    assert_near(alone.reshape(-1, n), expected, single_bound)
    assert_near(y.reshape(-1, n), alone.reshape(-1, n).double(), bound + single_bound)
    if mode == "grad":
        out = torch.randn(y.shape).to(dtype)
        dist.broadcast(out, src=0)
        y.backward(out)
        assert mine.grad is not None
        check_grad(mine.grad.reshape(-1, k), out.reshape(-1, n), weight, ranks.world)


def check_grad(grad: Tensor, out: Tensor, weight: Int4OpaqueTensor, world: int) -> None:
    """``out · W``, summed over the ranks that have some of its rows: see `numerics.product_bound`."""
    packed = packed_in(weight.to_groupwise(), native())
    dense = int4_mm_reference(torch.eye(packed.k), packed).t()  # [N, K]
    u, e = UNIT[torch.bfloat16], UNIT[torch.float32]
    terms = out.double().abs() @ dense.abs()
    unit = torch.zeros_like(packed.scale_and_zero, dtype=torch.float64)
    unit[..., 1] = 16 * packed.scale_and_zero[..., 0].abs() + packed.scale_and_zero[..., 1].abs()
    largest = int4_mm_reference(torch.eye(packed.k), packed._replace(scale_and_zero=unit)).t()
    error = (2 * u + u * u) * terms + (packed.n + 4) * e * (out.double().abs() @ largest)
    # Each rank rounds its part, and each of world - 1 additions rounds a sum.
    rounded = (world + 1) * (1 + u) ** world * UNIT[grad.dtype] * (terms + error)
    assert_near(grad, out.double() @ dense, error + rounded + u * (terms + error))


def _copy_of(layer: nn.Linear) -> nn.Linear:
    weight: Any = layer.weight
    copy = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, dtype=weight.dtype)
    copy.weight = nn.Parameter(weight.data.clone(), requires_grad=False)
    if layer.bias is not None:
        copy.bias.data.copy_(layer.bias.data)
    return copy


@in_ranks("2", "4", "2 mixed")
def test_one_layer_is_within_the_bound(ranks: Ranks) -> None:
    """By rows and by columns, with bias and without, 2-D and 3-D, in each mode of autograd."""
    weight = weight_of(100, 128)
    cases = itertools.product(STYLES, (True, False), ((3,), (2, 3)), ("grad", "no_grad", "inference"))
    for i, (style, bias, shape, mode) in enumerate(cases):
        run_linear(style, weight, bias, shape, mode, 0 if i % 2 else None, ranks)


@in_ranks("2", "4")
def test_other_shapes_and_dtypes_are_within_the_bound(ranks: Ranks) -> None:
    for style, weight in ((0, weight_of(10, 64)), (1, weight_of(16, 256)), (0, weight_of(130, 40))):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            run_linear(style, weight, True, (2, 2), "grad", 0, ranks, dtype)
            run_linear(style, weight, True, (70,), "no_grad", None, ranks, dtype)


@in_ranks("2", "4")
def test_a_scaled_activation_is_within_the_bound(ranks: Ranks) -> None:
    """``act_pre_scale`` goes with the columns it is for."""
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(32)  # exact: it multiplies no rounding
    weight, plain = weight_of(100, 128, scale=scale), weight_of(100, 128)
    for style in STYLES:
        x = torch.randn(3, 128).bfloat16()
        dist.broadcast(x, src=0)
        for mode in (torch.no_grad(), torch.inference_mode()):
            kwargs: dict[str, Any] = {"output_layouts": Replicate()} if style == 0 else {}
            plan = STYLES[style](input_layouts=Replicate(), **kwargs)
            layer: Any = nn.Sequential(linear_of(weight, bias=True))
            layer = parallelize_module(layer, mesh_of(ranks), {"0": plan})
            with mode:
                y, bias = layer(x), layer[0].bias.full_tensor()
            scaled = (x.float() * scale).bfloat16()
            bound = bound_of(scaled, plain, style, ranks.world, bias.detach())
            assert_near(y, exact(scaled, plain, bias.detach()), bound)


# --- a whole block ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """Numbers in float64 and how far the computed ones may be from them."""

    value: Tensor
    error: Tensor

    def rounded(self, times: int = 1) -> Near:
        """After so many roundings to bfloat16."""
        grown = (1 + UNIT[torch.bfloat16]) ** times - 1
        return Near(self.value, self.error + grown * (self.value.abs() + self.error))

    def __add__(self, other: Near) -> Near:
        return Near(self.value + other.value, self.error + other.error).rounded()

    def __mul__(self, other: Near) -> Near:
        error = self.error * (other.value.abs() + other.error) + self.value.abs() * other.error
        return Near(self.value * other.value, error)

    def matmul(self, other: Near) -> Near:
        error = self.error @ (other.value.abs() + other.error) + self.value.abs() @ other.error
        k = self.value.shape[-1]
        magnitude = (self.value.abs() + self.error) @ (other.value.abs() + other.error)
        return Near(self.value @ other.value, error + k * UNIT[torch.float32] * magnitude)


def near_linear(x: Near, layer: nn.Linear, dim: int, world: int) -> Near:
    """Through a 4-bit layer: the error of x through |W|, and that of the products."""
    weight: Any = layer.weight
    packed = packed_in(weight.to_groupwise(), native())
    dense = int4_mm_reference(torch.eye(packed.k), packed)  # [K, N]
    flat = x.value.reshape(-1, packed.k)
    through = x.error.reshape(-1, packed.k) @ dense.abs()
    # The bound of a product grows with the magnitudes of x. For other signs with the same magnitudes
    # the sums that are rounded, once by each rank and addition, are no larger than ``magnitude``.
    larger = flat.abs() + x.error.reshape(-1, packed.k)
    magnitude = larger @ dense.abs()
    error = through + bound_of(larger, weight, dim, world, None, torch.bfloat16)
    error = error + (world + 2) * UNIT[torch.bfloat16] * magnitude
    shape = (*x.value.shape[:-1], packed.n)
    return Near((flat @ dense).view(shape), error.view(shape))


class Block(nn.Module):
    """Attention and a gated MLP as in Llama, with what is not 4-bit in float32 inside."""

    HIDDEN, HEADS, MLP = 128, 4, 256

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "q": (self.HIDDEN, self.HIDDEN),
            "k": (self.HIDDEN, self.HIDDEN),
            "v": (self.HIDDEN, self.HIDDEN),
            "o": (self.HIDDEN, self.HIDDEN),
            "gate": (self.MLP, self.HIDDEN),
            "up": (self.MLP, self.HIDDEN),
            "down": (self.HIDDEN, self.MLP),
        }
        for seed, (name, (n, k)) in enumerate(sizes.items()):
            groupwise = random_groupwise(n, k, GROUP, seed)
            small = GroupwiseInt4(groupwise.codes, groupwise.scale / 16, groupwise.zero / 16, GROUP)
            setattr(self, name, linear_of(Int4OpaqueTensor.from_groupwise(small)))

    def __getattr__(self, name: str) -> Any:  # what it gives are layers
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.HIDDEN // self.HEADS).transpose(1, 2).float()

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        mixed = torch.softmax(q @ k.transpose(-2, -1) / 8, dim=-1) @ v
        x = x + self.o(mixed.transpose(1, 2).flatten(2).bfloat16())
        gated = torch.nn.functional.silu(self.gate(x).float()) * self.up(x).float()
        y: Tensor = x + self.down(gated.bfloat16())
        return y

    def near(self, x: Tensor, world: int) -> Near:
        """The same in float64, with a bound for ``world`` processes."""
        start = Near(x.double(), torch.zeros_like(x, dtype=torch.float64))

        def heads(layer: Any) -> Near:
            y = near_linear(start, layer, 0, world)
            split = [
                part.view(*part.shape[:2], self.HEADS, -1).transpose(1, 2)
                for part in (y.value, y.error)
            ]
            return Near(*split)

        q, k, v = heads(self.q), heads(self.k), heads(self.v)
        scores = q.matmul(Near(k.value.transpose(-2, -1), k.error.transpose(-2, -1)))
        p = torch.softmax(scores.value / 8, dim=-1)
        # Scores that are off by d at most change a softmax by a factor of exp(2 d) at most; float32 is
        # good for much better than 2^-16.
        off = (scores.error / 8).amax(-1, keepdim=True)
        mixed = Near(p, p * (torch.expm1(2 * off) + 2.0**-16)).matmul(v)
        parts = (part.transpose(1, 2).flatten(2) for part in (mixed.value, mixed.error))
        joined = Near(*parts).rounded()
        middle = start + near_linear(joined, self.o, 1, world)
        gate = near_linear(middle, self.gate, 0, world)
        up = near_linear(middle, self.up, 0, world)
        # silu rises by 1.1 per unit at most.
        silu_error = 1.1 * gate.error + 2.0**-16 * gate.value.abs()
        silu = Near(torch.nn.functional.silu(gate.value), silu_error)
        return middle + near_linear((silu * up).rounded(2), self.down, 1, world)


PLAN: dict[str, ParallelStyle] = {
    **{name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")},
    **{name: RowwiseParallel() for name in ("o", "down")},
}


@in_ranks("2", "4", "2 mixed")
def test_a_block_as_of_llama_is_within_the_bound(ranks: Ranks) -> None:
    """In each mode of autograd; each rank keeps its share of the bytes of the base."""
    single, parallel = Block(), parallelize_module(Block(), mesh_of(ranks), PLAN)
    x = torch.randn(2, 5, Block.HIDDEN).bfloat16()
    dist.broadcast(x, src=0)
    near, near_single = single.near(x, ranks.world), single.near(x, 1)
    assert float((near.error / near.value.abs().mean()).mean()) < 0.1  # it says something
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            y, alone = parallel(x), single(x)
        assert_near(y, near.value, near.error)
        assert_near(y, alone.double(), near.error + near_single.error)
    for (name, p), (_, whole) in zip(parallel.named_parameters(), single.named_parameters()):
        mine: Any = local(p)
        original: Any = whole
        assert mine.qdata.untyped_storage().nbytes() * ranks.world == original.qdata.nbytes, name


@in_ranks("2")
def test_a_compiled_block_is_the_eager_one(ranks: Ranks) -> None:
    """`torch.compile` traces through DTensor and the 4-bit weights; collectives are in the graph."""
    block = parallelize_module(Block(), mesh_of(ranks), PLAN)
    x = torch.randn(2, 5, Block.HIDDEN).bfloat16()
    dist.broadcast(x, src=0)
    with torch.no_grad():
        assert torch.equal(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


@in_ranks("2", "4")
def test_sequence_parallel_around_a_block(ranks: Ranks) -> None:
    """Norms work on a piece of the sequence each; the layers gather it and scatter it again."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(128, dtype=torch.bfloat16)
            self.up = linear_of(weight_of(256, 128, 1))
            self.down = linear_of(weight_of(128, 256, 2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
            return y

    mesh = mesh_of(ranks)
    plan: dict[str, ParallelStyle] = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    single, parallel = Mlp(), parallelize_module(Mlp(), mesh, plan)
    x = torch.randn(2, 8, 128).bfloat16()
    dist.broadcast(x, src=0)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            y = parallel(distribute_tensor(x, mesh, [Shard(1)]))
            assert y.placements == (Shard(1),)
            assert y.to_local().shape == (2, 8 // ranks.world, 128)
            # By layer, as each has its own bound: what the first gives, alone, is what the second gets.
            middle = torch.relu(single.up(single.norm(x)))
            found = y.full_tensor().reshape(-1, 128)
        first: Any = single.up.weight
        second: Any = single.down.weight
        normed = single.norm(x).detach().reshape(-1, 128)
        between = 2 * bound_of(normed, first, 0, 1, None)
        dense = int4_mm_reference(torch.eye(256), packed_in(second.to_groupwise(), native())).abs()
        rows = middle.detach().reshape(-1, 256)
        # The ranks' sums start from numbers that are off by ``between`` and round those.
        bound = bound_of(rows, second, 1, ranks.world, None) + 1.1 * between @ dense
        assert_near(found, exact(rows, second, None), bound)


@in_ranks("2", "4")
def test_a_4_bit_embedding_and_its_tied_head(ranks: Ranks) -> None:
    """Rows of the table are gathered exactly, by vocabulary or by columns; the head multiplies."""
    table = weight_of(100, 128)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, 128, dtype=torch.bfloat16)
            self.embedding.weight = nn.Parameter(table.clone(), requires_grad=False)
            self.head = nn.Linear(128, 100, bias=False, dtype=torch.bfloat16)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embedding(tokens)
            return x, self.head(x)

    tokens = torch.randint(0, 100, (2, 7))
    dist.broadcast(tokens, src=0)
    styles: tuple[ParallelStyle, ...] = (
        RowwiseParallel(input_layouts=Replicate()),
        ColwiseParallel(output_layouts=Replicate()),
    )
    for style in styles:
        for mode in (torch.no_grad(), torch.inference_mode()):
            plan = {"embedding": style, "head": ColwiseParallel(output_layouts=Replicate())}
            model = parallelize_module(Model(), mesh_of(ranks), plan)
            with mode:
                x, y = model(tokens)
            assert torch.equal(x, torch.nn.functional.embedding(tokens, table.dequantize()))
            rows = x.reshape(-1, 128)
            assert_near(y.reshape(-1, 100), exact(rows, table, None), bound_of(rows, table, 0, 1, None))


# --- other orders -------------------------------------------------------------------------------


@in_ranks("2", "4")
def test_sharded_first_and_quantized_then(ranks: Ranks) -> None:
    """`quantize_` after `parallelize_module`: the same codes as before it."""
    torch.manual_seed(3)

    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(128, 99), nn.ReLU(), nn.Linear(99, 128), nn.Linear(128, 64))

    original = fresh()
    for p in original.parameters():
        dist.broadcast(p.data, src=0)
    plan: dict[str, ParallelStyle] = {"0": ColwiseParallel(), "3": RowwiseParallel()}
    config = Int4WeightOnlyConfig(group_size=GROUP)
    first = copy.deepcopy(original)
    quantize_(first, config)
    second: Any = parallelize_module(copy.deepcopy(original), mesh_of(ranks), plan)
    quantize_(second, config)
    quantize_(second, config)  # has nothing left to do
    for i in (0, 2, 3):
        weight: Any = second[i].weight
        whole: Any = first[i].weight
        found = weight.full_tensor() if isinstance(weight, DTensor) else weight
        assert weight.shape == whole.shape
        assert isinstance(weight, DTensor) == (i != 2)
        assert not weight.requires_grad
        assert_same_codes(found, whole)


@in_ranks("4")
def test_what_cannot_be_quantized_in_pieces_is_refused_by_all(ranks: Ranks) -> None:
    config = Int4WeightOnlyConfig(group_size=GROUP)
    for n, k, style, words in (
        (100, 160, RowwiseParallel(), "0.weight: dimension 1 of 160 .* of 40, .* use 1, 5 processes"),
        (5, 128, ColwiseParallel(), "0.weight: dimension 0 of 5 .* use 1, 2, 3, 5 processes"),
    ):
        model = nn.Sequential(nn.Linear(k, n))
        parallelize_module(model, mesh_of(ranks), {"0": style})
        with pytest.raises(ValueError, match=words):
            quantize_(model, config)
