"""Activations in 8 bits: the twin bit for bit, the error, who asks for them and who is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.fixed_point import FIXED_8, fixed_point_mm, int8_slack
from tests.native_variants import Variant, runnable_libraries, variant_of
from tests.numerics import UNIT, native, packed_in, random_groupwise
from tests.test_integer_kernels import DISTRIBUTIONS, activation, dtypes, magnitudes
from torchao_int4cpu import Int4OpaqueTensor, get_activations, get_kernel, set_kernel
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.format.packed import int4_mm_reference
from torchao_int4cpu.kernels import selection
from torchao_int4cpu.kernels.native.library import DYNAMIC_KERNELS


@pytest.fixture(params=DYNAMIC_KERNELS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return variant_of(request.param)


# --- numbers ------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_it_is_the_twin_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """On every instruction set: the same codes, in their layouts."""
    variants = [variant_of(each) for each in DYNAMIC_KERNELS if each in runnable_libraries()]
    if not variants:
        pytest.skip(f"no kernel for 8 bits: {selection.native_unavailable() or 'the CPU'}")
    for n, k, group_size in ((64, 128, 32), (100, 300, 128), (33, 2100, 256)):
        groupwise = random_groupwise(n, k, group_size)
        x = activation(name, 70, k, dtype)
        twin = fixed_point_mm(x, packed_in(groupwise, LAYOUTS["avx2"]), FIXED_8)
        assert bool(twin.isfinite().all())
        for each in variants:
            weight = packed_in(groupwise, each.layout)
            for m in (17, 33, 70):
                assert torch.equal(each.mm(x[:m], weight), twin[:m])


@dtypes
def test_the_error_of_each_number_is_within_the_bound(variant: Variant, dtype: torch.dtype) -> None:
    """Half a unit of each number of x, times the largest |code - 8| and |zero|; then as in float32."""
    for n, k, group_size in ((100, 300, 32), (64, 1000, 128)):
        weight = variant.random(n, k, group_size)
        x = activation("exp(4 x)", 40, k, dtype)
        units = UNIT[dtype] + (k + 4) * UNIT[torch.float32]
        bound = int8_slack(x, weight) + units * magnitudes(x, weight)
        error = (variant.mm(x, weight).double() - int4_mm_reference(x, weight)).abs()
        assert bool((error <= bound).all())


@pytest.mark.parametrize(
    ("name", "group_size", "low", "high"),
    [
        ("normal", 32, 4.5e-3, 6.0e-3),
        ("normal", 128, 5.7e-3, 7.0e-3),
        ("normal", 256, 6.0e-3, 7.6e-3),
        ("outliers x 1000", 128, 1e-5, 7e-3),
        ("outliers x 1e5", 128, 1e-8, 7e-3),
    ],
)
def test_the_error_is_what_is_said(
    variant: Variant, name: str, group_size: int, low: float, high: float
) -> None:
    """From both sides: 8 bits were really used, for more than 16 rows only.

    The unit is the largest of a group over 127, the root mean square of a rounding unit / sqrt(12), and
    the largest of 32 / 128 / 256 normal numbers 2.3 / 2.8 / 3.0 in the mean: 5.3e-3, 6.3e-3, 6.9e-3,
    and 10% to either side. A spike of 1000 hides the others in the norm. 16 bits: 3.5e-5.
    """
    weight = variant.random(256, 2048, group_size)
    x = activation(name, 64, 2048, torch.float32)
    exact = int4_mm_reference(x, weight)
    error = (variant.mm(x, weight).double() - exact).norm() / exact.norm()
    assert low < float(error) < high
    few = (variant.mm(x[:16], weight).double() - exact[:16]).norm() / exact[:16].norm()
    assert float(few) < 2e-4


def test_up_to_16_rows_have_the_bits_of_the_kernels_of_integers(variant: Variant) -> None:
    weight, x = variant.random(100, 300, 64), torch.randn(17, 300)
    twin = fixed_point_mm(x, weight)
    for m in (1, 4, 5, 16):
        assert torch.equal(variant.mm(x[:m], weight), twin[:m])
    assert not torch.equal(variant.mm(x, weight), twin)


# --- who asks -----------------------------------------------------------------------------------


def _weight() -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(random_groupwise(64, 256, 64))


needs_int8 = pytest.mark.skipif(
    not selection.takes_int8(native(), 17), reason="this CPU has no kernel for activations in 8 bits"
)


@needs_int8
def test_a_block_asks_and_what_was_chosen_before_comes_back() -> None:
    weight, x = _weight(), torch.randn(40, 256)
    before = get_kernel(), get_activations()
    exact = F.linear(x, weight)
    twin = fixed_point_mm(x, weight.packed(), FIXED_8)
    with set_kernel("native", activations="int8"):
        assert (get_kernel(), get_activations()) == ("native", "int8")
        assert torch.equal(F.linear(x, weight), twin)
        assert torch.equal(F.linear(x.view(8, 5, 256), weight).flatten(0, 1), twin)
        assert torch.equal(F.linear(x[:16], weight), F.linear(x[:16], _weight()))
        with set_kernel("native"):  # what a block does not ask for, it does not get
            assert torch.equal(F.linear(x, weight), exact)
        lines = [line for line in selection.kernel_choices() if "8-bit x" in line.reason]
        rows = [line.rows for line in lines if native().name in line.rows]
        assert rows == [f"layout {native().name!r}, more rows"]
    assert (get_kernel(), get_activations()) == before
    assert torch.equal(F.linear(x, weight), exact)
    assert not torch.equal(exact, twin)


@needs_int8
def test_a_compiled_graph_follows_the_choice_when_it_runs() -> None:
    weight, x = _weight(), torch.randn(40, 256)
    compiled = torch.compile(lambda t: F.linear(t, weight), fullgraph=True)
    with torch.no_grad():
        exact = compiled(x)
        assert torch.equal(exact, F.linear(x, weight))
        with (
            set_kernel("auto", activations="int8"),
            torch._dynamo.config.patch(error_on_recompile=True),
        ):
            assert torch.equal(compiled(x), fixed_point_mm(x, weight.packed(), FIXED_8))
        assert torch.equal(compiled(x), exact)


@pytest.mark.slow
@needs_int8
def test_the_environment_asks() -> None:
    script = "import torchao_int4cpu as t; print(t.get_kernel(), t.get_activations())"
    environment = os.environ | {"TORCHAO_INT4CPU_ACTIVATIONS": "int8"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stdout == f"{get_kernel()} int8\n", done.stderr


def test_what_cannot_be_had_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = get_kernel(), get_activations()
    with pytest.raises(ValueError, match="activations 'int4' are not known; choose 'int8' or None"):
        set_kernel("auto", activations="int4")
    with pytest.raises(
        ValueError, match="with kernel 'aten', which has none; choose kernel 'native' or"
    ):
        set_kernel("aten", activations="int8")
    monkeypatch.setattr(selection, "_RUNNABLE_DYNAMIC", {})
    for name in ("auto", "native"):
        if name == "native" and selection.native_unavailable() is not None:
            continue
        with pytest.raises(ValueError, match=r"'int8' cannot run here: .*; choose activations=None"):
            set_kernel(name, activations="int8")
        with set_kernel(name, activations=None):  # the cure
            assert get_activations() is None
    assert (get_kernel(), get_activations()) == before
