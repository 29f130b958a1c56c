"""Tensor parallelism by PyTorch's own DTensor, in real processes over gloo: shards, single layers.

Every result is held to a bound that follows from the roundings, and every shard to the exact codes.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torchao.quantization import quantize_

from tests.numerics import UNIT, native, packed_in, random_groupwise
from tests.processes import Ranks, in_ranks, raises
from tests.shared_weights import (
    GROUP,
    assert_near,
    assert_same_codes,
    bound_of,
    exact,
    expected_shard,
    linear_of,
    local,
    mesh_of,
    stack_of,
    weight_of,
)
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.distributed.collectives import _receive
from torchao_int4cpu.format.packed import int4_mm_reference


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
        (weight_of(70, 128, ordered=True), (0,)),
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
