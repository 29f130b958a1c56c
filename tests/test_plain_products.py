"""The product called from C with Python's tensors: what it takes, what it leaves, and to whom."""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.native_variants import CALLED_KERNELS, Variant, variant_of
from tests.references import assert_keeps_no_reference, in_three_threads
from tests.weights import random_weight
from torchao_int4cpu.kernels import selection
from torchao_int4cpu.kernels.native.build import compile_library
from torchao_int4cpu.kernels.native.library import NativeLibrary, Unavailable
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

N, K = 40, 70


@pytest.fixture(params=CALLED_KERNELS)
def variant(request: pytest.FixtureRequest) -> Variant:
    found = variant_of(request.param)
    if not found.library.plain_products:
        pytest.skip("the library was compiled without Python's headers, or this torch has no table")
    return found


class Form(NamedTuple):
    """An activation, of which ``base`` makes a view or what it is; and whether C takes it."""

    name: str
    of: Callable[[Tensor], Tensor]
    taken: bool


FORMS = [
    Form("rows", lambda x: x, True),
    Form("one dimension", lambda x: x[0], True),
    Form("three dimensions", lambda x: x.reshape(2, 3, K), True),
    Form("cut along K", lambda x: F.pad(x, (3, 5))[:, 3:-5], True),
    Form("every other row", lambda x: x.repeat_interleave(2, 0)[::2], True),
    Form(
        "cut along K, three dimensions", lambda x: F.pad(x, (0, 2))[:, :-2].unflatten(0, (3, 2)), True
    ),
    Form("one row, many times", lambda x: x[:1].expand(6, K), True),
    Form("dimensions of one", lambda x: x.view(1, 6, 1, K).transpose(0, 2), True),
    Form("detached", lambda x: x.clone().requires_grad_().detach(), True),
    Form("columns", lambda x: x.t().contiguous().t(), False),
    Form("every other column", lambda x: x.repeat_interleave(2, 1)[:, ::2], False),
    Form("leading dimensions exchanged", lambda x: x.reshape(3, 2, K).transpose(0, 1), False),
    Form("no rows", lambda x: x[:0], False),
    Form("wants a gradient", lambda x: x.clone().requires_grad_(), False),
    Form("a parameter", lambda x: nn.Parameter(x, requires_grad=False), False),
    Form("no memory", lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype), False),
    Form("negative", torch._neg_view, False),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_equals_the_call_by_ctypes(
    variant: Variant, form: Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what is left of `NativeLibrary.mm` without it, or None."""
    weight = variant.random(N, K, 32)
    x = form.of(torch.randn(6, K).to(dtype))
    plain = variant.library.plain_products[variant.name]
    monkeypatch.setattr(variant.library, "plain_products", {})
    for bias in (None, torch.randn(N), nn.Parameter(torch.randn(N), requires_grad=False)):
        y = plain(x, weight, bias)
        assert (y is not None) == form.taken
        if y is not None:
            expected = variant.mm(x.reshape(-1, K), weight, bias)
            assert type(y) is Tensor
            assert y.dtype == dtype
            assert y.is_contiguous()
            assert torch.equal(y, expected.view(*x.shape[:-1], N))
            assert y.count_nonzero() > y.numel() / 2


def test_what_it_leaves_to_python(variant: Variant) -> None:
    """None for anything else, with no exception left behind and nothing computed."""
    plain = variant.library.plain_products[variant.name]
    weight, x = variant.random(N, K, 32), torch.randn(6, K)

    class Subclass(Tensor):
        pass

    meta = weight._replace(qdata=weight.qdata.to("meta"))
    freed = weight._replace(qdata=weight.qdata.clone())
    freed.qdata.untyped_storage().resize_(0)
    nested = torch.nested.nested_tensor([x, x])
    left: list[tuple[object, ...]] = [
        (),
        (x, weight),
        (None, weight, None),
        (3, weight, None),
        (x, None, None),
        (x, weight[:5], None),
        (x, (*weight[:4], "40", weight.k), None),
        (x, (*weight[:5], None), None),
        (x, weight._replace(group_size=48), None),
        (x, weight._replace(qdata=weight.qdata.as_subclass(Subclass)), None),
        (x, weight._replace(qdata=weight.qdata[0]), None),
        (x, meta, None),
        (x, freed, None),
        (x.as_subclass(Subclass), weight, None),
        (x.double(), weight, None),
        (x.to(torch.complex64), weight, None),
        (x.int(), weight, None),
        (x[:, :-1], weight, None),
        (torch.tensor(1.0), weight, None),
        (x.to("meta"), weight, None),
        (x.to_sparse(), weight, None),
        (x.to_mkldnn(), weight, None),
        (nested, weight, None),
        (x, weight, 1.0),
        (x, weight, torch.randn(N - 1)),
        (x, weight, torch.randn(1, N)),
        (x, weight, torch.randn(2 * N)[::2]),
        (x, weight, torch.randn(N).double()),
        (x, weight, torch.randn(N).requires_grad_()),
        (x, weight, torch.randn(N, device="meta")),
        (x, weight, torch.complex(torch.randn(N), torch.randn(N)).conj().imag),
    ]
    for arguments in left:
        assert plain(*arguments) is None, [type(argument) for argument in arguments]
    assert plain(x, weight, torch.randn(N)) is not None
    with torch.no_grad():
        assert plain(x.clone().requires_grad_(), weight, torch.randn(N).requires_grad_()) is not None


def test_rows_that_are_not_finite_stay_alone(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = variant.library.plain_products[variant.name]
    weight, bias = variant.random(N, K, 32), torch.randn(N)
    x = torch.randn(2, 3, K)
    x[0, 1, 5], x[1, 2, 7] = torch.nan, -torch.inf
    y = plain(x, weight, bias)
    assert y is not None
    monkeypatch.setattr(variant.library, "plain_products", {})
    expected = variant.mm(x.view(6, K), weight, bias).view(2, 3, N)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert y[0, 0].isfinite().all()
    assert not y[0, 1].isfinite().any()


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow) for name in CALLED_KERNELS],
    indirect=True,
)
def test_it_keeps_no_reference(variant: Variant) -> None:
    """Not to arguments, what it asks torch for, or results, whether it takes a call or leaves it."""
    plain = variant.library.plain_products[variant.name]
    weight, bias, x = variant.random(N, K, 32), torch.randn(N), torch.randn(2, 3, K)
    bad = x.clone()
    bad[0, 0, 0] = torch.nan
    calls = [
        (x, weight, bias),
        (bad, weight, bias),
        (x.double(), weight, bias),
        (x.to_sparse(), weight, None),
    ]
    kept = [x, weight, bias, bad, *weight, torch.float32, torch.get_num_threads, torch.is_grad_enabled]

    def call() -> None:
        for arguments in calls:
            plain(*arguments)

    assert_keeps_no_reference(call, kept)


def test_other_threads_run_meanwhile(variant: Variant) -> None:
    """The interpreter is let go of during the product, as by ctypes."""
    plain = variant.library.plain_products[variant.name]
    weight = variant.random(1024, 1024, 32)
    rows = [torch.randn(m, 1024) for m in (1, 3, 64)]
    expected = [plain(x, weight, None) for x in rows]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            for i, x in enumerate(rows):
                y, right = plain(x, weight, None), expected[i]
                assert y is not None
                assert right is not None
                if not torch.equal(y, right):
                    wrong.append(i)

    in_three_threads(work)
    assert not wrong


def test_an_eager_layer_comes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each call, in each mode without a gradient; and not while anything watches."""
    if not selection._plain_products:
        pytest.skip("no native kernel runs here, or its library was compiled without Python's headers")
    calls: list[object] = []

    def counted(product: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*arguments: object) -> Tensor | None:
            y = product(*arguments)
            calls.append(None if y is None else tuple(y.shape))
            return y

        return call

    products = {name: counted(product) for name, product in selection._plain_products.items()}
    monkeypatch.setattr(selection, "_plain_products", products)
    layer = nn.Linear(K, N).requires_grad_(False)
    layer.weight = nn.Parameter(Int4OpaqueTensor.from_hp(layer.weight, [1, 32]), requires_grad=False)
    twin = nn.Linear(K, N).requires_grad_(False)
    twin.weight, twin.bias = nn.Parameter(layer.weight.dequantize()), layer.bias
    x = torch.randn(2, 3, K)
    with torch.no_grad():
        y = layer(x)
    with torch.inference_mode():
        inferred = layer(x)
        assert inferred.is_inference()
    assert torch.equal(layer(x), y)
    assert torch.equal(inferred, y)
    torch.testing.assert_close(y, twin(x).detach(), rtol=0.02, atol=0.02)
    assert calls == [(2, 3, N)] * 3
    layer.bias = nn.Parameter(layer.bias.detach())
    assert layer(x).requires_grad
    assert calls[3:] == [None]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
    assert torch.func.vmap(layer)(x).shape == (2, 3, N)
    assert len(calls) == 4


@pytest.mark.slow
def test_without_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library works as before, only slower for small layers, and `info` says so."""
    if isinstance(selection.LIBRARY, Unavailable):
        pytest.skip(f"no native kernel: {selection.LIBRARY}")
    compile_library(tmp_path / "lib.so", headers=[])
    library = NativeLibrary(tmp_path / "lib.so")
    assert library.plain_products == {}
    assert library.kernels == selection.LIBRARY.kernels
    weight = random_weight(N, K)
    x = torch.randn(3, K)
    expected = F.linear(x, weight)
    with monkeypatch.context() as patch:
        patch.setattr(selection, "LIBRARY", library)
        with selection.set_kernel(selection.get_kernel()):
            assert not selection._plain_products
            assert torch.equal(F.linear(x, weight), expected)
            assert "without Python's headers" in selection.native_status()
    assert "without Python's headers" not in selection.native_status()


@pytest.mark.parametrize("what", ["gil", "table", "newer", "no views"])
def test_pythons_and_torches_that_it_cannot_read(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Python without a limited API, a torch without DLPack's table: the call by ctypes remains."""
    if isinstance(selection.LIBRARY, Unavailable) or not selection.LIBRARY.plain_products:
        pytest.skip("there is no such function here")
    if what == "gil":
        monkeypatch.setattr(sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED")
    elif what == "table":
        monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__")
    else:
        version = 2 if what == "newer" else 1
        table = (ctypes.c_uint64 * 7)(version, 0, 1, 1, 1, 1 if what == "newer" else 0, 1)
        new = ctypes.PyDLL(None).PyCapsule_New
        new.argtypes, new.restype = (
            [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
            ctypes.py_object,
        )
        name = ctypes.create_string_buffer(b"dlpack_exchange_api")
        capsule = new(ctypes.addressof(table), ctypes.addressof(name), None)
        monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", capsule)
    path = tmp_path / "copy.so"  # the functions of a library are bound once
    path.write_bytes(selection.LIBRARY.path.read_bytes())
    library = NativeLibrary(path)
    assert library.plain_products == {}
    assert library.kernels == selection.LIBRARY.kernels
