"""The kernels on plain tensors: against their twin, within derived bounds; which one runs when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import assert_product, native, packed_in, random_groupwise
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference
from torchao_int4cpu.kernels import selection as choice
from torchao_int4cpu.kernels.ops.products import traceable_int4_mm, traceable_int4_mm_transposed
from torchao_int4cpu.kernels.portable import prefill as prefill_module
from torchao_int4cpu.kernels.portable.decode import decode
from torchao_int4cpu.kernels.portable.prefill import (
    prefill,
    prefill_transposed,
)
from torchao_int4cpu.kernels.selection import choose_kernel, decode_max_rows, int4_mm, kernel_choices

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
SHAPES = [(64, 64, 32), (100, 100, 32), (1, 1, 64), (130, 300, 128), (48, 512, 256), (257, 90, 32)]
shapes = pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)


def test_the_twin_is_the_product_with_the_dequantized_weight() -> None:
    groupwise = random_groupwise(70, 90, 32)
    x = torch.randn(3, 90)
    expected = x.double() @ groupwise.dequantize(torch.float64).t()
    for layout in LAYOUTS.values():
        assert torch.equal(int4_mm_reference(x, packed_in(groupwise, layout)), expected)


@shapes
@dtypes
@pytest.mark.parametrize("m", [1, 2, 5])
def test_decode_is_within_the_bound(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = packed_in(random_groupwise(n, k, group_size), native())
    x = torch.randn(m, k).to(dtype)
    assert_product(decode(x, weight), x, weight)


@shapes
@dtypes
@layouts
def test_prefill_is_within_the_bound_in_any_layout(
    layout: str, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = packed_in(random_groupwise(n, k, group_size), layout)  # type: ignore[arg-type]
    x = torch.randn(7, k).to(dtype)
    assert_product(prefill(x, weight), x, weight)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_both_kernels_at_any_shape(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    weight = packed_in(random_groupwise(n, k, group_size, seed), native())
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=generator) * 10.0**exponent).to(dtype)
    assert_product(decode(x, weight), x, weight)
    assert_product(prefill(x, weight), x, weight)


@dtypes
def test_small_integers_come_out_exact(dtype: torch.dtype) -> None:
    """Nothing to round: codes, scale 1, zero 0 and x in {-1, 0, 1} give integers below 256."""
    groupwise = random_groupwise(100, 30, 32)
    ones = torch.ones_like(groupwise.scale)
    exact = packed_in(type(groupwise)(groupwise.codes, ones, torch.zeros_like(ones), 32), native())
    x = torch.randint(-1, 2, (9, 30)).to(dtype)
    expected = int4_mm_reference(x, exact)
    assert float(expected.abs().max()) < 256
    assert torch.equal(decode(x, exact).double(), expected)
    assert torch.equal(prefill(x, exact).double(), expected)
    grad = torch.randint(-1, 2, (9, 100)).to(dtype)
    expected_grad = grad.double() @ int4_mm_reference(torch.eye(30), exact).t()
    close = prefill_transposed(grad, exact).double()
    assert bool(((close - expected_grad).abs() <= expected_grad.abs() * 2.0**-7).all())


def test_a_wrong_scale_row_or_group_breaks_the_bound() -> None:
    """The bound is tight enough to see one code, scale or group that is off."""
    weight = packed_in(random_groupwise(64, 128, 32), native())
    x = torch.randn(3, 128)
    y = int4_mm(x, weight)
    assert_product(y, x, weight)
    swapped = weight.scale_and_zero[[1, 0, 2, 3]].contiguous()
    damaged = weight.qdata.clone()
    damaged[0, 0] ^= 0x08
    for wrong in (
        weight._replace(scale_and_zero=swapped),
        weight._replace(scale_and_zero=weight.scale_and_zero.roll(1, dims=1).contiguous()),
        weight._replace(qdata=damaged),
    ):
        with pytest.raises(AssertionError, match="of the bound"):
            assert_product(y, x, wrong)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e30, -1e30])
@dtypes
def test_special_activations(value: float, dtype: torch.dtype) -> None:
    value = max(-50.0, min(50.0, value)) if dtype == torch.float16 else value  # the sum fits, too
    weight = packed_in(random_groupwise(33, 64, 32), native())
    x = torch.full((2, 64), value, dtype=dtype)
    for kernel in (decode, prefill):
        assert_product(kernel(x, weight), x, weight)


@dtypes
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype) -> None:
    weight = packed_in(random_groupwise(33, 70, 32), native())
    x = torch.randn(3, 70).to(dtype)
    clean = [kernel(x, weight) for kernel in (decode, prefill)]
    x[1, 69] = torch.nan
    for kernel, before in zip((decode, prefill), clean):
        y = kernel(x, weight)
        assert bool(y[1].isnan().all())
        assert torch.equal(y[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("make", ["transposed", "strided", "expanded", "offset"])
@dtypes
def test_any_strides_of_the_activation(make: str, dtype: torch.dtype) -> None:
    weight = packed_in(random_groupwise(33, 70, 32), native())
    x = {
        "transposed": lambda: torch.randn(70, 4).to(dtype).t(),
        "strided": lambda: torch.randn(4, 140).to(dtype)[:, ::2],
        "expanded": lambda: torch.randn(1, 70).to(dtype).expand(4, 70),
        "offset": lambda: torch.randn(5, 71).to(dtype)[1:, 1:],
    }[make]()
    for kernel in (decode, prefill):
        assert_product(kernel(x, weight), x, weight)


# --- some rows of a larger weight ---------------------------------------------------------------


def apart(weight: PackedInt4) -> PackedInt4:
    """The same weight as rows of a larger one: NaN lies before, between and after its groups."""
    pairs = weight.scale_and_zero
    groups, padded_n, _ = pairs.shape
    larger = pairs.new_full((groups, 64 + padded_n + 16, 2), torch.nan)
    view = larger[:, 64 : 64 + padded_n]
    view.copy_(pairs)
    if groups == 1:  # torch lets the stride of such a dimension be any
        view = view.as_strided(view.shape, (7, 2, 1))
    return weight._replace(scale_and_zero=view)


@shapes
@layouts
@dtypes
def test_groups_that_lie_apart_give_the_same_bits(
    layout: NibbleLayout, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = packed_in(random_groupwise(n, k, group_size), layout)
    view = apart(weight)
    assert view.scale_and_zero.is_contiguous() == (len(view.scale_and_zero) == 1)
    grad = torch.randn(5, n).to(dtype)
    assert torch.equal(prefill_transposed(grad, view), prefill_transposed(grad, weight))
    for m in (1, 7, 300):
        x = torch.randn(m, k).to(dtype)
        assert torch.equal(prefill(x, view), prefill(x, weight))
        if layout == native():
            assert torch.equal(decode(x, view), decode(x, weight))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("m", "k"), [(1, 90), (200, 90), (1, 30)])
def test_compiled_products_with_some_rows_of_a_weight(m: int, k: int) -> None:
    """Taken inside of the graph: inductor must hand the view over as it is, or copy it right."""
    torch._dynamo.reset()  # a graph keeps the kernel that it was traced for
    weight = packed_in(random_groupwise(200, k, 32), native())
    x, y = torch.randn(m, k), torch.randn(m, 72)

    def product(x: Tensor, y: Tensor, qdata: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        rows = PackedInt4(qdata[128:208], pairs[:, 128:208] * 1, 32, native(), 72, k)
        view = rows._replace(scale_and_zero=pairs[:, 128:208])
        return traceable_int4_mm(x, view), traceable_int4_mm_transposed(y, rows)

    with torch.no_grad():
        expected = product(x, y, weight.qdata, weight.scale_and_zero)
        found = torch.compile(product, fullgraph=True)(x, y, weight.qdata, weight.scale_and_zero)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert_product(expected[0], x, _rows(weight))


def _rows(weight: PackedInt4) -> PackedInt4:
    pairs = weight.scale_and_zero[:, 128:208].contiguous()
    return weight._replace(qdata=weight.qdata[128:208], scale_and_zero=pairs, n=72)


def test_zero_rows() -> None:
    weight = packed_in(random_groupwise(33, 70, 32), native())
    assert int4_mm(torch.empty(0, 70), weight).shape == (0, 33)


# --- gradient -----------------------------------------------------------------------------------


@shapes
@dtypes
@layouts
def test_the_gradient_is_within_the_bound(
    layout: object, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    """grad and W rounded to bfloat16 (2u), each panel's product (u), the result (u), u = 2^-8: with
    room for float32, 4.1 u of sum |grad| |w|."""
    weight = packed_in(random_groupwise(n, k, group_size), layout)  # type: ignore[arg-type]
    grad = torch.randn(5, n).to(dtype)
    w = int4_mm_reference(torch.eye(k), weight).t()
    result = prefill_transposed(grad, weight)
    assert result.shape == (5, k)
    assert result.dtype == dtype
    terms = grad.double().abs() @ w.abs()
    error = (result.double() - grad.double() @ w).abs()
    assert bool((error <= 4.1 * 2.0**-8 * terms + 1e-6).all())


# --- choice -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("aten")
def test_few_rows_decode_and_many_prefill() -> None:
    large = _pretend(4096, 4096)
    border = decode_max_rows(large)
    assert choose_kernel(1, large) == "decode"
    assert choose_kernel(border, large) == "decode"
    assert choose_kernel(border + 1, large) == "prefill"
    assert choose_kernel(100 * border, large) == "prefill"
    assert decode_max_rows(_pretend(64, 64)) > border


def _pretend(n: int, k: int) -> PackedInt4:
    empty = torch.empty(0)
    return PackedInt4(empty, empty, 128, native(), n, k)


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize(("m", "called"), [(1, "decode"), (3000, "prefill")])
def test_int4_mm_calls_the_chosen_kernel(m: int, called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_in(random_groupwise(512, 512, 32), native())
    x = torch.randn(m, 512)
    calls = []

    def spy(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*args: object) -> Tensor:
            calls.append(name)
            return real(*args)

        return called

    for name in ("decode", "prefill"):
        monkeypatch.setattr(choice, name, spy(name, getattr(choice, name)))
    assert_product(int4_mm(x, weight), x, weight)
    assert calls == [called]


@pytest.mark.usefixtures("aten")
def test_a_foreign_layout_is_right_and_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_warned_layouts", set())
    foreign = next(layout for layout in LAYOUTS.values() if layout != native())
    weight = packed_in(random_groupwise(100, 90, 32), foreign)
    x = torch.randn(1, 90)
    message = rf"packed for '{foreign.name}' but this process runs '{native().name}'.*repack_\(\)"
    with pytest.warns(UserWarning, match=message):
        y = int4_mm(x, weight)
    assert_product(y, x, weight)
    assert torch.equal(int4_mm(x, weight), y)  # and no second warning, which would be an error


@pytest.mark.usefixtures("aten")
def test_without_the_op_every_product_is_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another architecture: no native layout."""
    monkeypatch.setattr(choice, "_warned_layouts", set())
    monkeypatch.setattr(choice, "native_layout", lambda: None)
    weight = packed_in(random_groupwise(100, 90, 32), LAYOUTS["default"])
    x = torch.randn(1, 90)
    with pytest.warns(UserWarning, match="PyTorch's int4 op does not run here"):
        assert_product(int4_mm(x, weight), x, weight)
    assert [line.kernel for line in kernel_choices()] == ["prefill"]


@dtypes
def test_without_bfloat16_instructions_the_dense_product_is_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more exact for it: only the activation may still be rounded, and not if it is float32."""
    monkeypatch.setattr(prefill_module, "DENSE_DTYPE", torch.float32)
    weight = packed_in(random_groupwise(100, 90, 32), native())
    x = torch.randn(70, 90).to(dtype)
    y = prefill(x, weight)
    assert_product(y, x, weight)
    if dtype == torch.float32:
        reference = int4_mm_reference(x, weight)
        assert float((y.double() - reference).abs().max() / reference.abs().max()) < 1e-5


def test_torch_ops_pass_opcheck() -> None:
    weight = packed_in(random_groupwise(40, 70, 32), native())
    parts = (weight.qdata, weight.scale_and_zero, 32, weight.layout.name)
    ops = torch.ops.torchao_int4cpu
    torch.library.opcheck(ops.int4_mm.default, (torch.randn(3, 70), *parts, 40))
    for x in (torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)):
        torch.library.opcheck(ops.int4_mm_differentiable.default, (x, *parts, 40))
    torch.library.opcheck(ops.int4_mm_grad.default, (torch.randn(3, 40), *parts, 70))
    parts = (weight.qdata, apart(weight).scale_and_zero, 32, weight.layout.name)
    torch.library.opcheck(ops.int4_mm.default, (torch.randn(3, 70), *parts, 40))


@pytest.mark.parametrize("op", ["int4_mm", "int4_mm_differentiable"])
@pytest.mark.parametrize(
    "wrong",
    [
        "rows",
        "columns",
        "groups",
        "dtype",
        "strides",
        "overlap",
        "odd stride",
        "pairs",
        "x",
        "group_size",
    ],
)
def test_the_op_refuses_parts_that_do_not_fit(op: str, wrong: str) -> None:
    """Whoever calls it may have read them from a file; a kernel would read out of bounds."""
    weight = packed_in(random_groupwise(40, 70, 32), native())
    qdata, scale_and_zero, x, n, group_size = (
        weight.qdata,
        weight.scale_and_zero,
        torch.randn(3, 70),
        40,
        32,
    )
    if wrong == "rows":
        n = 60
    elif wrong == "columns":
        x = torch.randn(3, 100)
    elif wrong == "groups":
        scale_and_zero = scale_and_zero[:2]
    elif wrong == "dtype":
        qdata = qdata.to(torch.int8)
    elif wrong == "strides":
        qdata = qdata.t().contiguous().t()
    elif wrong == "overlap":
        scale_and_zero = scale_and_zero[:1].expand(3, -1, -1)
    elif wrong == "odd stride":
        scale_and_zero = torch.zeros(3 * 97, dtype=torch.bfloat16).as_strided((3, 48, 2), (97, 2, 1))
    elif wrong == "pairs":
        scale_and_zero = scale_and_zero.transpose(1, 2).contiguous().transpose(1, 2)
    elif wrong == "x":
        x = x.double()
    else:
        group_size = 48
    call = getattr(torch.ops.torchao_int4cpu, op)
    with pytest.raises(
        ValueError, match=r"take (them|the parts) from|call .contiguous|choose 32|so convert"
    ):
        call(x, qdata, scale_and_zero, group_size, weight.layout.name, n)


@pytest.mark.parametrize("op", ["int4_mm", "int4_mm_differentiable", "int4_mm_grad"])
def test_ops_refuse_parts_on_several_devices_and_empty_ones(op: str) -> None:
    """One on meta would send the call to the fake kernel, which returns whatever memory holds."""
    weight = packed_in(random_groupwise(64, 64, 32), native())
    x = torch.randn(3, 64)
    call = getattr(torch.ops.torchao_int4cpu, op)
    arguments: list[Any] = [x, weight.qdata, weight.scale_and_zero, 32, native().name, 64]
    assert call(*arguments).shape == (3, 64)
    for index in range(3):
        mixed = [*arguments]
        mixed[index] = mixed[index].to("meta")
        with pytest.raises(ValueError, match="all must be on one device"):
            call(*mixed)
    with pytest.raises(ValueError, match=r"take (them|the parts) from|call .contiguous"):
        call(*arguments[:-1], 0)
    with pytest.raises(ValueError, match=r"take (them|the parts) from|call .contiguous"):
        call(x[:, :0], *arguments[1:])
