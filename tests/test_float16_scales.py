"""Weights with float16 scales and zeros: nothing rounds them, and products are as exact as ever.

Other tests run again with such weights everywhere: `test_everything_else_holds`.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Prototype
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from tests.native_variants import variant_of
from tests.numerics import assert_int4, assert_product, native
from tests.processes import ROOT, Ranks, in_ranks, raises
from tests.scales import SCALES_VARIABLE
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.checkpoint.pickles import get_state
from torchao_int4cpu.checkpoint.safetensors import from_safetensors, metadata_of
from torchao_int4cpu.distributed.collectives import _header
from torchao_int4cpu.distributed.ddp import _description
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, pack
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference
from torchao_int4cpu.kernels.portable.decode import decode
from torchao_int4cpu.kernels.portable.prefill import prefill
from torchao_int4cpu.kernels.selection import int4_mm

F16, BF16 = torch.float16, torch.bfloat16
N, K, GROUP = 80, 160, 32


def foreign(
    n: int = N, k: int = K, group_size: int = GROUP, *, symmetric: bool = False
) -> GroupwiseInt4:
    """What a checkpoint of another tool holds: float16 scales, an integer zero point for each group.

    A tenth of the scales lie below float16's normal range, whose steps are 2^-24.
    """
    generator = torch.Generator().manual_seed(n + k)
    groups = -(-k // group_size)
    scale = (0.001 + 0.02 * torch.rand(n, groups, generator=generator)).half()
    tiny = torch.rand(n, groups, generator=generator) < 0.1
    scale = torch.where(tiny, (scale * 2.0**-10).half(), scale)
    points = torch.randint(0, 16, scale.shape, generator=generator)
    if symmetric:
        points.fill_(8)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    return GroupwiseInt4(codes, scale.float(), (8 - points) * scale.float(), group_size)


def of(value: GroupwiseInt4, qparams_dtype: torch.dtype = F16) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(value, dtype=F16, qparams_dtype=qparams_dtype)


def weight(*shape: int, qparams_dtype: torch.dtype = F16) -> Int4OpaqueTensor:
    return of(foreign(*shape or (N, K)), qparams_dtype)


def packed_in(layout: NibbleLayout, n: int = N, k: int = K, group_size: int = GROUP) -> PackedInt4:
    value = foreign(n, k, group_size)
    packed = of(value).packed()
    codes = torch.full((packed.qdata.shape[0], 2 * packed.qdata.shape[1]), 8, dtype=torch.uint8)
    codes[:n, :k] = value.codes
    return packed._replace(qdata=pack(codes, layout), layout=layout)


def assert_same(loaded: object, w: Int4OpaqueTensor) -> None:
    """The same bits, in float16 still, and really 4-bit."""
    n, k = w.shape
    found = assert_int4(loaded, (n, k), w.group_size)
    assert found.scale_and_zero.dtype == F16
    assert torch.equal(found.qdata, w.qdata)
    assert torch.equal(found.scale_and_zero.view(torch.int16), w.scale_and_zero.view(torch.int16))


# --- what is stored -----------------------------------------------------------------------------


def test_scales_stay_as_they_are_and_zeros_lose_half_a_step() -> None:
    """scale has float16's 11 bits; (8 - z) * scale has at most 3 more, and below 2^-14 is exact."""
    value = foreign()
    t = of(value)
    assert t.scale_and_zero.dtype == F16
    stored = t.to_groupwise()
    assert stored.scale.dtype == stored.zero.dtype == F16
    assert torch.equal(stored.codes, value.codes)
    assert torch.equal(stored.scale.float(), value.scale)
    moved = (stored.zero.double() - value.zero.double()).abs()
    assert bool((moved <= 2.0**-11 * value.zero.double().abs()).all())
    small = value.zero.abs() < 2.0**-14
    assert 0 < int(small.sum()) < small.numel()
    assert not moved[small].any()
    assert moved.any()
    assert torch.equal(t.dequantize(), stored.dequantize(F16))
    codes, scale, zero = (torch.stack([p, p]) for p in (value.codes, value.scale, value.zero))
    for matrix in of(GroupwiseInt4(codes, scale, zero, GROUP)):
        assert_same(matrix, t)


def test_the_default_rounds_to_bfloat16() -> None:
    value = foreign()
    t = Int4OpaqueTensor.from_groupwise(value, qparams_dtype=BF16)
    assert t.scale_and_zero.dtype == BF16
    assert torch.equal(t.to_groupwise().scale, value.scale.bfloat16())
    assert Int4OpaqueTensor.from_hp(torch.randn(4, 32), [1, 32]).scale_and_zero.dtype == BF16


def _one(scale: float, zero: float) -> GroupwiseInt4:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    return GroupwiseInt4(codes, torch.full((1, 1), float(scale)), torch.full((1, 1), float(zero)), 32)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (_one(65520.0, 0), r"does not fit float16 \(6.55e\+04 at most\)"),
        (_one(1.0, -1e5), "does not fit float16"),
        (_one(1e-9, 0), "too small for float16, which would move a weight by 1.0e.00"),
        (_one(1e-6, 8e-6), "too small for float16"),
        (_one(0, 2.0**-25), "too small for float16"),
    ],
)
def test_what_does_not_fit_float16_is_refused(value: GroupwiseInt4, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(value)
    assert of(value, BF16).scale_and_zero.dtype == BF16  # the cure


def test_small_numbers_beside_large_ones_are_taken() -> None:
    """A scale of 1e-6 loses a hundredth, which moves no weight by 2^-11 of 0.5."""
    for value in (_one(1e-6, 0.5), _one(1e-9, -1.0), _one(0.01, 1e-9), _one(0, 0)):
        t = of(value)
        exact, stored = (v.dequantize(torch.float64) for v in (value, t.to_groupwise()))
        largest = 8 * value.scale.double().abs() + value.zero.double().abs()
        assert bool(((stored - exact).abs() <= 2.0**-11 * largest).all())


def test_other_dtypes_are_refused() -> None:
    value = foreign()
    with pytest.raises(TypeError, match=r"qparams_dtype is torch.float32; choose torch.bfloat16 or"):
        of(value, torch.float32)
    parts = arguments_of(weight())
    with pytest.raises(TypeError, match=r"a torch.bfloat16 or torch.float16 tensor, so make"):
        Int4OpaqueTensor(**parts | {"scale_and_zero": parts["scale_and_zero"].float()})


def arguments_of(t: Int4OpaqueTensor) -> dict[str, Any]:
    attributes = ("block_size", "shape", "qdata_layout", "dtype")
    return t.parts() | {name: getattr(t, name) for name in attributes}


def test_torchaos_float16_is_kept() -> None:
    t = weight()
    theirs = Prototype(t.qdata, t.scale_and_zero, t.block_size, t.shape)
    assert_same(Int4OpaqueTensor.from_upstream(theirs, layout=native().name), t)


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sorted(LAYOUTS.values()), ids=lambda layout: str(layout.name))
@pytest.mark.parametrize("dtype", [BF16, F16, torch.float32])
@pytest.mark.usefixtures("kernel")
@pytest.mark.filterwarnings("ignore:a 4-bit weight is packed for")
def test_products(dtype: torch.dtype, layout: NibbleLayout) -> None:
    """Within the bound of bfloat16 scales; a mean of 1 shows what moves a group as one."""
    for n, k, group_size in ((N, K, GROUP), (33, 70, 64), (130, 512, 128)):
        packed = packed_in(layout, n, k, group_size)
        for rows in (1, 3, 7, 40, 300):
            x = (torch.randn(rows, k) + 1).to(dtype)
            assert_product(int4_mm(x, packed), x, packed)
            assert_product(prefill(x, packed), x, packed)
            if layout == native():
                assert_product(decode(x, packed), x, packed)


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_the_kernels_that_round_no_activation_are_exact(name: str) -> None:
    """Additions of K terms in float32, each 2^-24, in any order: far below 1e-5 in the norm.

    Few rows are rounded to 16 bits, by 1 / 32640 of the largest of a group at most: 5e-5.
    """
    variant = variant_of(name)
    for symmetric in (True, False):
        value = foreign(128, 512, 128, symmetric=symmetric)
        packed = of(value).packed()
        codes = value.codes
        packed = packed._replace(qdata=pack(codes, variant.layout), layout=variant.layout)
        for rows in (1, 4, 16, 40):
            x = torch.randn(rows, 512) + 1
            y, stored = variant.mm(x, packed).double(), int4_mm_reference(x, packed)
            assert float((y - stored).norm() / stored.norm()) <= (1e-5 if rows > 16 else 5e-5)
            # Against the checkpoint itself: its zeros, but not 0, were rounded by 2^-11 at most.
            exact = x.double() @ value.dequantize(torch.float64).t()
            error = float((y - exact).norm() / exact.norm())
            assert error <= ((1e-5 if rows > 16 else 5e-5) if symmetric else 2.0**-11)
            rounded = packed._replace(scale_and_zero=packed.scale_and_zero.bfloat16())
            assert error < float((int4_mm_reference(x, rounded) - exact).norm() / exact.norm()) / 4


def test_the_portable_path_rounds_no_scale() -> None:
    """The halves of a scale are exact, so each product of ones is off by its rounding to bfloat16 only.

    That is 2^-8 of each, and on top 1024 additions in float32, of terms up to 8 * |scale| + |zero|.
    """
    packed = packed_in(native(), 256, 1024, 128)
    x = torch.ones(3, 1024)
    exact = int4_mm_reference(x, packed)
    high = packed._replace(scale_and_zero=packed.scale_and_zero.bfloat16())
    of_high = int4_mm_reference(x, high)
    pairs = packed.scale_and_zero.double().abs()
    largest = 128 * (8 * pairs[..., 0] + pairs[..., 1]).sum(0)
    bound = 2.0**-8 * (of_high.abs() + (exact - of_high).abs()) + 2 * 1024 * 2.0**-24 * largest
    assert bool(((decode(x, packed).double() - exact).abs() <= bound).all())
    # Scales that are rounded to bfloat16 fail, as they move all weights of a group alike.
    assert bool(((decode(x, high).double() - exact).abs() > bound).any())


@pytest.mark.usefixtures("aten")
def test_nan_and_infinity_stay_in_their_row() -> None:
    """A half of a weight may be 0, and must not make a NaN of an infinity."""
    packed = packed_in(native())
    x = torch.randn(4, K)
    x[1, 3], x[2, 5] = float("inf"), float("nan")
    for dtype in (torch.float32, BF16):
        y, dense = (
            int4_mm(x.to(dtype), packed),
            x.to(dtype).float() @ of(foreign()).dequantize().float().t(),
        )
        assert torch.equal(y.isnan(), dense.to(dtype).isnan())
        assert torch.equal(y[1].isposinf(), dense[1].isposinf())
        assert_product(y[:1], x[:1].to(dtype), packed)


def test_gradients_and_rows() -> None:
    t = weight()
    x = torch.randn(3, K, requires_grad=True)
    F.linear(x, t).sum().backward()
    expected = t.to_groupwise().dequantize(torch.float64).sum(0)
    # 80 rows of W rounded to bfloat16 at most, of magnitude sum |w|
    bound = 2.0**-7 * t.to_groupwise().dequantize(torch.float64).abs().sum(0)
    assert x.grad is not None
    assert bool(((x.grad.double() - expected).abs() <= bound).all())
    index = torch.tensor([[3, 79], [0, 3]])
    assert torch.equal(F.embedding(index, t), t.dequantize()[index])


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_and_exported(rows: int, kernel: str) -> None:
    """PyTorch's own op takes one bfloat16, so no graph shows it; the op of this package does both."""
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(weight(), requires_grad=False)
    x = torch.randn(rows, K)
    y = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), y)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), y)
    parts = program.run_decompositions()
    assert "torchao_int4cpu.int4_mm.default" in str(parts.graph)
    assert "_weight_int4pack_mm" not in str(parts.graph)
    assert torch.equal(parts.module()(x), y)


def test_a_cached_graph_is_of_one_dtype() -> None:
    hashes = {weight(qparams_dtype=dtype)._stable_hash_for_caching() for dtype in (F16, BF16)}
    assert len(hashes) == 2


# --- joins and copies ---------------------------------------------------------------------------

JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "cat": lambda a, b: torch.cat([a, b]),
    "cat along K": lambda a, b: torch.cat([a, b], 1),
    "stack": lambda a, b: torch.stack([a, b]),
    "copy_": lambda a, b: a.copy_(b),
    "copy_ into a view": lambda a, b: a.t().copy_(b.t()),
}


@pytest.mark.parametrize("how", JOINS)
@pytest.mark.parametrize("first", [F16, BF16])
def test_weights_of_two_dtypes_do_not_meet(how: str, first: torch.dtype) -> None:
    other = BF16 if first == F16 else F16
    a, b = weight(qparams_dtype=first), weight(qparams_dtype=other)
    before = copy.deepcopy(a)
    message = f"w with scale_and_zero in {other} where {first} is needed; both must agree"
    with pytest.raises(ValueError, match=message):
        JOINS[how](a, b)
    assert torch.equal(a.scale_and_zero, before.scale_and_zero)
    assert a.scale_and_zero.dtype == first
    cured = Int4OpaqueTensor.from_groupwise(
        b.to_groupwise(), dtype=b.dtype, act_pre_scale=b.act_pre_scale, qparams_dtype=first
    )
    joined = JOINS[how](a, cured)
    assert joined.scale_and_zero.dtype == first


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("border", [32, 40])
def test_zeros_take_the_dtype_of_what_is_copied_first(border: int, transposed: bool) -> None:
    """As vLLM fills a weight that it allocated before it knew the file: by cuts of ``.data``."""
    whole: Any = nn.Parameter(weight(qparams_dtype=BF16).new_zeros([N, K]), requires_grad=False)
    before = whole[64:]
    target, source = (whole.t(), weight().t()) if transposed else (whole, weight())
    dim = 1 if transposed else 0
    for start, stop in ((0, border), (border, N)):
        target.data.narrow(dim, start, stop - start).copy_(source.narrow(dim, start, stop - start))
    for t in (whole, nn.Parameter(whole, requires_grad=False)):
        assert_same(t, weight())
    assert torch.equal(before.to_groupwise().scale, weight()[64:].to_groupwise().scale)
    with pytest.raises(ValueError, match=r"where torch.float16 is needed"):
        whole.data.narrow(0, 0, 32).copy_(weight(qparams_dtype=BF16)[:32])
    assert_same(whole, weight())


def test_what_is_added_has_the_dtype_of_the_rest() -> None:
    t = weight()
    assert t.new_zeros([N, K]).scale_and_zero.dtype == F16
    padded: Any = F.pad(t, (0, 0, 0, 7))
    assert padded.shape == (N + 7, K)
    assert padded.scale_and_zero.dtype == F16
    assert torch.equal(padded.dequantize(), F.pad(t.dequantize(), (0, 0, 0, 7)))


def test_numbers_that_came_another_way_keep_their_dtype() -> None:
    whole = weight(qparams_dtype=BF16).new_zeros([N, K])
    view = whole[:32]
    whole.scale_and_zero.copy_(weight(qparams_dtype=BF16).scale_and_zero)
    with pytest.raises(ValueError, match=r"where torch.bfloat16 is needed"):
        view.copy_(weight()[:32])
    assert torch.equal(whole.scale_and_zero, weight(qparams_dtype=BF16).scale_and_zero)


def test_a_state_dict_is_assigned() -> None:
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(weight(qparams_dtype=BF16), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"assign=True\), or convert it"):
        layer.load_state_dict({"weight": weight()})
    layer.load_state_dict({"weight": weight()}, assign=True)
    assert_same(layer.weight, weight())


def test_factors_within_float16() -> None:
    t = of(foreign(symmetric=True))
    scaled: Any = t * 4
    assert torch.equal(scaled.scale_and_zero, t.scale_and_zero * 4)
    for factor in (2.0**24, 2.0**-8, 1.1):
        with pytest.raises(ValueError, match="a power of two within the range of float16"):
            t * factor


# --- roads --------------------------------------------------------------------------------------


def test_files_and_processes(tmp_path: Any) -> None:
    t = weight()
    assert get_state(t)["format_version"] == 4
    assert get_state(weight(qparams_dtype=BF16))["format_version"] == 3
    torch.save({"l.weight": t}, tmp_path / "state.pt")
    save_file(*flattened({"l.weight": t}, tmp_path / "model.safetensors"))
    loaded, _ = unflatten_tensor_state_dict(
        load_file(tmp_path / "model.safetensors"), flatten_tensor_state_dict({"l.weight": t})[1]
    )
    roads = {
        "torch.load": torch.load(tmp_path / "state.pt")["l.weight"],
        "safetensors": loaded["l.weight"],
        "pickle": pickle.loads(pickle.dumps(t)),
        "deepcopy": copy.deepcopy(t),
        "clone": t.clone(),
        "dtype": t.float(),
        "empty_like": torch.empty_like(t).copy_(t),
        "new_zeros": t.new_zeros(t.shape).copy_(t),
        "meta": torch.empty_like(t.to("meta"), device="cpu").copy_(t),
        "slices": torch.cat([t[:32], t[32:]]),
        "columns": torch.cat([t[:, :96], t[:, 96:]], 1),
        "index": t[torch.arange(N)],
        "experts": torch.stack([t, t])[1],
        "transposed": t.t().t(),
        "times": t * 2 / 2,
        "shared memory": t.clone().share_memory_(),
    }
    for road, w in roads.items():
        assert w.scale_and_zero.dtype == F16, road
        assert_same(w, t)


def flattened(state: dict[str, Tensor], path: Any) -> tuple[Any, ...]:
    tensors, metadata = flatten_tensor_state_dict(state)
    return tensors, path, metadata


@pytest.mark.parametrize(("written", "read"), [(F16, BF16), (BF16, F16)])
def test_the_other_dtype_in_a_file_is_damage(written: torch.dtype, read: torch.dtype) -> None:
    """Both take two bytes: a file with the wrong name of one would give a weight of other numbers."""
    t = weight(qparams_dtype=written)
    data = metadata_of(t)["_data"] | {"dtype": F16}
    parts = {"qdata": t.qdata, "scale_and_zero": t.scale_and_zero.view(read)}
    with pytest.raises(ValueError, match=f"scale_and_zero in {read}; that version has it in {written}"):
        from_safetensors(**data, **parts)
    state = get_state(t) | parts
    with pytest.raises(ValueError, match=f"scale_and_zero in {read}; that version has it in {written}"):
        weight(qparams_dtype=written).__setstate__(state)


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.slow
@in_ranks("2")
def test_ranks_with_two_dtypes_are_told(ranks: Ranks) -> None:
    """As bytes they would be taken for each other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (ranks.world,))
    alike = DTensor.from_local(weight(), mesh, [Shard(0)], run_check=False)
    whole: Any = alike.full_tensor()
    assert_same(whole[:N], weight())
    mixed = weight(qparams_dtype=F16 if ranks.rank else BF16)
    shards = DTensor.from_local(mixed, mesh, [Shard(0)], run_check=False)
    raises(ValueError, "torch.bfloat16, torch.float16 on the ranks", shards.full_tensor)


def test_what_ranks_compare_has_the_dtype() -> None:
    for describe in (_header, _description):
        mine, other = (describe(weight(qparams_dtype=dtype)) for dtype in (F16, BF16))
        assert not torch.equal(mine[1:], other[1:])


# --- everything else ----------------------------------------------------------------------------

#: Of the other tests one in so many is run again, all over their files; ``1`` (by hand) runs all.
EVERY = os.environ.get("INT4CPU_TEST_EVERY", "4")

#: What can only be of bfloat16 scales: the numbers of format versions; weights that `quantize_` makes,
#: which have scales of 8 bits and of any size; graphs that show PyTorch's op.
_OF_BFLOAT16 = (
    "format_version or stored_of_a_transposed or docstring_draws or transposed_views or padding_idx or "
    "from_hp_quantizes or rounded_to_bfloat16 or cannot_arrive or other_factors or gemma3 or "
    "pytorchs_op or static_batch or any_instruction_set or without_this_package or "
    "the_program_of_torch_export"
)


def _run_again(*names: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-k", f"not ({_OF_BFLOAT16})", "--every", EVERY),
            *(f"tests/test_{name}.py" for name in names),
        ],
        cwd=ROOT,
        env=os.environ | {SCALES_VARIABLE: "float16"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_other_tests_hold() -> None:
    _run_again("safetensors_format")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        "algebra dispatch slicing reads assignments views transforms",
        "plain_products kernels native native_threads embedding expert_kernels expert_ops experts",
        "checkpoint safetensors_format distributed_checkpoint vllm_flow saving",
        "compile compiled_views experts_graphs export onnx",
        "fsdp ddp tensor_parallel tensor_parallel_blocks huggingface",
    ],
)
def test_everything_else_holds(names: str) -> None:
    _run_again(*names.split())
