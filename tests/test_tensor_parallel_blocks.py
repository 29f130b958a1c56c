"""Whole blocks of layers in tensor parallelism, in real processes: within a bound through all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.numerics import UNIT, native, packed_in, random_groupwise
from tests.processes import Ranks, in_ranks
from tests.shared_weights import (
    GROUP,
    assert_near,
    bound_of,
    exact,
    linear_of,
    local,
    mesh_of,
    weight_of,
)
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.format.packed import int4_mm_reference


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


@in_ranks("2", "4", "2 mixed", slow=True)
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


@in_ranks("2", slow=True)
def test_a_compiled_block_is_the_eager_one(ranks: Ranks) -> None:
    """`torch.compile` traces through DTensor and the 4-bit weights; collectives are in the graph."""
    block = parallelize_module(Block(), mesh_of(ranks), PLAN)
    x = torch.randn(2, 5, Block.HIDDEN).bfloat16()
    dist.broadcast(x, src=0)
    with torch.no_grad():
        assert torch.equal(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


@in_ranks("2", "4", slow=True)
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
