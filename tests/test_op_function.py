"""The op `int4_mm` called from C: what it multiplies, what it leaves, and what torch still sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.native_variants import CALLED_KERNELS, Variant, variant_of
from tests.references import assert_keeps_no_reference, in_three_threads
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels import selection
from torchao_int4cpu.kernels.native.library import KERNELS
from torchao_int4cpu.kernels.ops.products import traceable_int4_mm
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

N, K, GROUP = 40, 70, 32
OP: Any = torch.ops.torchao_int4cpu.int4_mm.default
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=CALLED_KERNELS)
def variant(request: pytest.FixtureRequest) -> Variant:
    found = variant_of(request.param)
    if not found.library.plain_products:
        pytest.skip("the library was compiled without Python's headers, or this torch has no table")
    return found


class Left:
    """What is called for the calls that C leaves: it keeps their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
        self.answer = torch.ones(())

    def __call__(self, *arguments: object, **named: object) -> Tensor:
        self.calls.append((arguments, named))
        return self.answer


def function_of(
    variant: Variant, otherwise: Callable[..., Tensor], watched: Callable[[], bool] | None
) -> Callable[..., Tensor]:
    kernels = {variant.layout.name: KERNELS.index(variant.name)}
    return variant.library.op_function(kernels, otherwise, watched)


def arguments_of(weight: PackedInt4) -> tuple[Any, ...]:
    """All but x."""
    return (*weight[:3], weight.layout.name, weight.n)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "one row": lambda x: x[:1],
    "cut along K": lambda x: F.pad(x, (3, 5))[:, 3:-5],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row, many times": lambda x: x[:1].expand(6, K),
}


@pytest.mark.parametrize("watched", [None, lambda: False], ids=["kernel", "call"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_equals_the_call_by_ctypes(
    variant: Variant,
    dtype: torch.dtype,
    watched: Callable[[], bool] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, for whole and padded weights, one group and several, rows of a larger weight."""
    left = Left()
    call = function_of(variant, left, watched)
    monkeypatch.setattr(variant.library, "plain_products", {})
    for n, k, group_size in ((N, K, GROUP), (64, 128, 128), (16, 32, 32), (1, 1, 32), (70, 300, 256)):
        weight = variant.random(n, k, group_size)
        wider = F.pad(weight.scale_and_zero, (0, 0, 0, 16))[:, :-16]
        for parts in (weight, weight._replace(scale_and_zero=wider)):
            for form, of in FORMS.items():
                if k != K and form == "one row, many times":
                    continue
                x = of(torch.randn(6, k).to(dtype))
                y = call(x, *arguments_of(parts))
                assert type(y) is Tensor
                assert y.dtype == dtype
                assert y.is_contiguous()
                assert torch.equal(y, variant.mm(x, parts)), (n, k, group_size, form)
                assert x.count_nonzero() < 30 or y.count_nonzero() > y.numel() / 2
    assert left.calls == []


def wrong_arguments(variant: Variant) -> list[tuple[Any, ...]]:
    """That no weight has, from a file or anyone else: each is to be left, and none to be read by."""
    weight, x = variant.random(N, K, GROUP), torch.randn(6, K)
    _, q, s, *_, n = good = (x, *arguments_of(weight))

    class Subclass(Tensor):
        pass

    freed = q.clone()
    freed.untyped_storage().resize_(0)
    huge = 2**63 - 1
    replaced: list[dict[int, Any]] = [
        *({0: other} for other in (None, 3, "x", x[0], x[None], x[:, :-7], x[:, :1], x[:, :0], x[:0])),
        *({0: other} for other in (x.double(), x.int(), x.to(torch.complex64), torch.tensor(1.0))),
        *({0: other} for other in (x.to("meta"), x.to_sparse(), x.to_mkldnn(), x.t().contiguous().t())),
        *({0: other} for other in (x.as_subclass(Subclass), nn.Parameter(x), F.pad(x, (0, 64)))),
        {0: torch.nested.nested_tensor([x, x])},
        *({1: other} for other in (q[0], q[:-1], q[:16], q[:, :-1], q[:, :16], q[None], q.int())),
        *({1: other} for other in (q.to(torch.int8), q.t().contiguous().t(), q.to("meta"), freed)),
        *({1: other} for other in (q.as_subclass(Subclass), q[:0], q[:, :0], q.bool())),
        *({1: other} for other in (q.repeat_interleave(2, 0)[::2], q.repeat_interleave(2, 1)[:, ::2])),
        *({2: other} for other in (None, s[0], s[:-1], s[:, :-1], s[..., :1], s[None], s.double())),
        *({2: other} for other in (s.float(), s.to("meta"), s[:1].expand(3, -1, -1), s[:0])),
        *({2: other} for other in (s.view(torch.int16), s.repeat(2, 1, 1), s[:, :1].expand(3, 48, 2))),
        *({2: other} for other in (F.pad(s, (0, 1))[..., :2], s.transpose(1, 2).contiguous().mT)),
        {2: torch.zeros(3 * 97 + 48, dtype=s.dtype).as_strided((3, 48, 2), (97, 2, 1))},
        *({3: other} for other in (0, 1, -32, 16, 48, 64, 128, 256, 512, huge, 2**32 + 32, None, "32")),
        *({4: other} for other in ("", "avx1024", None, 7, ["x"], "AVX512")),
        *({5: other} for other in (0, -1, 32, 49, 2**32 + n, huge, -huge, None, "40", 2.0, 10**30)),
        {1: None},
        {3: 64, 5: huge},
    ]
    return [tuple(change.get(i, value) for i, value in enumerate(good)) for change in replaced]


def test_what_it_leaves(variant: Variant) -> None:
    """With the same arguments, no exception left behind, and what the other function says."""
    left = Left()
    for watched in (None, lambda: False):
        call = function_of(variant, left, watched)
        for arguments in wrong_arguments(variant):
            left.calls.clear()
            assert call(*arguments) is left.answer, [str(argument)[:60] for argument in arguments]
            ((found, named),) = left.calls
            assert all(a is b for a, b in zip(found, arguments, strict=True))
            assert named == {}
        good = (torch.randn(2, K), *arguments_of(variant.random(N, K, GROUP)))
        left.calls.clear()
        for count in (0, 5):
            assert call(*good[:count]) is left.answer
        assert call(*good, 1) is left.answer
        assert call(*good[:5], columns=N) is left.answer
        assert [(len(a), named) for a, named in left.calls] == [
            (0, {}),
            (5, {}),
            (7, {}),
            (5, {"columns": N}),
        ]
        assert call(*good) is not left.answer


def test_errors_of_the_other_function_come_through(variant: Variant) -> None:
    def refuse(*_: object) -> Tensor:
        raise ValueError("no")

    call = function_of(variant, refuse, None)
    with pytest.raises(ValueError, match=r"^no$"):
        call(torch.randn(2, 3), *arguments_of(variant.random(N, K, GROUP)))


def test_a_call_leaves_what_torch_has_to_see(variant: Variant) -> None:
    left, seen = Left(), []

    def watched() -> Any:
        seen.append(answer)
        return answer

    call = function_of(variant, left, watched)
    weight, x = variant.random(N, K, GROUP), torch.randn(6, K)
    answer: object
    for other in (True, None, 0, 1, "no"):  # anything that is not False
        answer = other
        assert call(x, *arguments_of(weight)) is left.answer
    assert seen == [True, None, 0, 1, "no"]
    answer = False
    rest = arguments_of(weight)
    assert call(x, *rest) is not left.answer
    q, s, *others = rest
    negative = [(torch._neg_view(x), q, s), (x, torch._neg_view(q), s), (x, q, torch._neg_view(s))]
    for tensors in (
        *negative,
        (x.clone().requires_grad_(), q, s),
        (x, q, s.clone().requires_grad_()),
        (torch._efficientzerotensor(x.shape), q, s),
    ):
        assert call(*tensors, *others) is left.answer
    with torch.no_grad():
        assert call(x.clone().requires_grad_(), *rest) is not left.answer

    def fail() -> bool:
        raise RuntimeError("is for the other function to raise")

    assert function_of(variant, left, fail)(x, *rest) is left.answer


def test_the_dict_says_which_kernel_multiplies(variant: Variant) -> None:
    """At each call: a choice that is made later holds."""
    left = Left()
    kernels: dict[str, int] = {}
    call = variant.library.op_function(kernels, left, None)
    good = (torch.randn(6, K), *arguments_of(variant.random(N, K, GROUP)))
    assert call(*good) is left.answer
    kernels[variant.layout.name] = KERNELS.index(variant.name)
    assert call(*good) is not left.answer
    for wrong in (-1, len(KERNELS), "amx", None):
        kernels[variant.layout.name] = wrong  # type: ignore[assignment]
        assert call(*good) is left.answer
    kernels.clear()
    assert call(*good) is left.answer


@pytest.mark.parametrize(
    "variant",
    [CALLED_KERNELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CALLED_KERNELS[1:])],
    indirect=True,
)
def test_it_keeps_no_reference(variant: Variant) -> None:
    left = Left()
    call = function_of(variant, lambda *_: left.answer, lambda: False)
    rest, x = arguments_of(variant.random(N, K, GROUP)), torch.randn(6, K)
    bad = x.clone()
    bad[0, 0] = torch.nan
    calls = [(x, *rest), (bad, *rest), (x.double(), *rest), (x, *rest[:-1], 10**30)]
    kept = [x, bad, *rest[:2], rest[3], torch.float32, torch.get_num_threads, left.answer]

    def each() -> None:
        for arguments in calls:
            call(*arguments)

    assert_keeps_no_reference(each, kept)


def test_threads_at_once(variant: Variant) -> None:
    call = function_of(variant, Left(), lambda: False)
    rest = arguments_of(variant.random(N, K, GROUP))
    inputs = torch.randn(4, 6, K)
    expected = [call(x, *rest) for x in inputs]
    wrong: list[int] = []

    def work() -> None:
        for i in range(400):
            if not torch.equal(call(inputs[i % 4], *rest), expected[i % 4]):
                wrong.append(i)

    in_three_threads(work)
    assert not wrong


# --- the op of this process ---------------------------------------------------------------------


@pytest.fixture
def weight() -> PackedInt4:
    layout = native_layout()
    if layout is None or layout.name not in selection._op_kernels:
        pytest.skip("no native kernel runs here, or its library was compiled without Python's headers")
    return Int4OpaqueTensor.from_hp(torch.randn(N, K), [1, GROUP]).packed()


def test_the_op_refuses_what_its_kernel_refuses(weight: PackedInt4) -> None:
    """In the same words, whoever multiplies; and never reads memory by it."""
    good = (torch.randn(6, K), *arguments_of(weight))
    variant = variant_of(selection._native_kernels[weight.layout.name])
    for wrong in wrong_arguments(variant):
        says = []
        for choice in ("auto", "aten"):
            with selection.set_kernel(choice):
                try:
                    y = OP(*wrong)
                    says.append(str(tuple(y.shape)))
                except Exception as error:  # torch's own among them
                    says.append(f"{type(error).__name__}: {error}")
        assert says[0] == says[1], says
    assert torch.equal(OP(*good), selection.int4_mm(good[0], weight))
    freed = weight.qdata.clone()
    freed.untyped_storage().resize_(0)
    for choice in ("auto", "aten"):
        with (
            selection.set_kernel(choice),
            pytest.raises(ValueError, match="memory was freed"),
        ):
            OP(good[0], freed, *good[2:])


@pytest.mark.parametrize("name", ["int4_mm", "int4_mm_differentiable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_set_kernel_holds_for_the_op(name: str, dtype: torch.dtype, weight: PackedInt4) -> None:
    op = getattr(torch.ops.torchao_int4cpu, name).default
    x = torch.randn(3, K).to(dtype)
    results = {}
    for choice in ("auto", "aten", "native"):
        with selection.set_kernel(choice):
            results[choice] = op(x, *arguments_of(weight))
            assert torch.equal(results[choice], selection.int4_mm(x, weight))
    assert torch.equal(results["auto"], results["native"])


def test_rows_that_are_not_finite_stay_alone(weight: PackedInt4) -> None:
    x = torch.randn(4, K)
    clean = OP(x, *arguments_of(weight))
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    y = OP(x, *arguments_of(weight))
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert not y[1].isfinite().any()
    assert not y[2].isfinite().all()


def test_modes_profilers_and_transforms_see_the_op(weight: PackedInt4) -> None:
    x, rest = torch.randn(6, K), arguments_of(weight)
    expected = OP(x, *rest)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    watch: Any = Watch
    with watch():
        assert torch.equal(OP(x, *rest), expected)
    assert seen[0] == "torchao_int4cpu.int4_mm.default"
    with FlopCounterMode(display=False) as counter:
        OP(x, *rest)
    assert counter.get_total_flops() == 2 * 6 * K * N
    with profile() as profiled:
        OP(x, *rest)
    assert "torchao_int4cpu::int4_mm" in {event.key for event in profiled.key_averages()}
    assert torch.equal(OP(torch._neg_view(x), *rest), OP(-x, *rest))
    mapped = torch.func.vmap(lambda row: OP(row[None], *rest)[0])(x)
    torch.testing.assert_close(mapped, expected)
    with torch.inference_mode():
        assert OP(x, *rest).is_inference()


def test_gradients_through_the_differentiable_op(weight: PackedInt4) -> None:
    rest = arguments_of(weight)
    x = torch.randn(6, K, requires_grad=True)
    y = torch.ops.torchao_int4cpu.int4_mm_differentiable.default(x, *rest)
    assert y.requires_grad
    assert torch.equal(y, OP(x.detach(), *rest))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.ops.torchao_int4cpu.int4_mm_grad(torch.ones(6, N), *rest[:-1], K))
    assert traceable_int4_mm(x, weight).requires_grad
