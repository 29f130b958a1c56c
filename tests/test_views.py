"""Products, look-ups and comparisons with views of a 4-bit weight: eager, compiled, differentiated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import quantize_
from torchao.testing.utils import TorchAOIntegrationTestCase

from tests.numerics import UNIT
from tests.weights import ALL_LAYOUTS, random_weight
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.dispatch import copies
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
aten = torch.ops.aten

M, N, K = 5, 160, 128  # of what the products below are taken: the views of larger weights


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


# --- what multiplies, and how it is multiplied --------------------------------------------------------

#: Every kind of ``[160, 128]`` that there is.
VIEWS: dict[str, Callable[..., Any]] = {
    "whole": lambda **how: random_weight(N, K, **how),
    "rows, a view": lambda **how: random_weight(64 + N, K, **how)[64:],
    "rows, a copy": lambda **how: random_weight(300, K, **how).narrow(0, 7, N),
    "columns": lambda **how: random_weight(N, 256, **how)[:, 64:192],
    "of a stack": lambda **how: random_weight(3, N, K, **how)[1],
    "rows of a stack": lambda **how: random_weight(2, 64 + N, K, **how).narrow(1, 64, N)[1],
    "joined": lambda **how: torch.cat(random_weight(N, K, **how).split([60, 100])),
    "chosen": lambda **how: random_weight(200, K, **how)[torch.arange(199, 39, -1)],
    "turned twice": lambda **how: random_weight(N, K, **how).t().t(),
}

#: Every kind of ``[3, 160, 128]``.
STACKS: dict[str, Callable[..., Any]] = {
    "whole": lambda **how: random_weight(3, N, K, **how),
    "matrices": lambda **how: random_weight(5, N, K, **how)[1:4],
    "rows, a view": lambda **how: random_weight(3, 64 + N, K, **how)[:, 64:],
    "rows, a copy": lambda **how: random_weight(3, 170, K, **how)[:, 3:163],
    "columns": lambda **how: random_weight(3, N, 256, **how)[..., 64:192],
    "expanded": lambda **how: random_weight(N, K, **how).expand(3, -1, -1),
    "chosen": lambda **how: random_weight(4, N, K, **how)[torch.tensor([3, 0, 3])],
    "stacked": lambda **how: torch.stack(list(random_weight(3, N, K, **how))),
}

#: Products of x ``[5, 128]``, y ``[5, 160]``, bias z ``[160]`` and w ``[160, 128]``.
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "x w.t()": lambda x, y, z, w: torch.mm(x, w.t()),
    "x w.mT": lambda x, y, z, w: x @ w.mT,
    "y w": lambda x, y, z, w: torch.mm(y, w),
    "w x.t()": lambda x, y, z, w: torch.mm(w, x.t()),
    "w.t() y.t()": lambda x, y, z, w: w.t() @ y.t(),
    "linear": lambda x, y, z, w: F.linear(x, w, z),
    "linear of the transposed": lambda x, y, z, w: F.linear(y, w.t(), z[:K]),
    "linear of a row": lambda x, y, z, w: F.linear(x[0], w),
    "mv": lambda x, y, z, w: torch.mv(w, x[0]),
    "mv of the transposed": lambda x, y, z, w: w.t() @ y[0],
    "vector w.t()": lambda x, y, z, w: x[0] @ w.t(),
    "vector w": lambda x, y, z, w: y[0] @ w,
    "3 dimensions": lambda x, y, z, w: x.view(1, M, K) @ w.t(),
    "4 dimensions": lambda x, y, z, w: torch.matmul(x.view(1, M, 1, K), w.t()),
    "w, 3 dimensions": lambda x, y, z, w: torch.matmul(w, x.t().expand(2, K, M)),
    "w.t(), 3 dimensions": lambda x, y, z, w: w.t() @ y.t().expand(2, N, M),
    "addmm": lambda x, y, z, w: torch.addmm(z, x, w.t()),
    "addmm, scaled": lambda x, y, z, w: torch.addmm(z, x, w.t(), beta=0.5, alpha=2),
    "addmm, only the product": lambda x, y, z, w: torch.addmm(z * torch.inf, x, w.t(), beta=0),
    "addmm of w": lambda x, y, z, w: torch.addmm(z[:K], y, w),
    "addmm from the left": lambda x, y, z, w: torch.addmm(z[:, None], w, x.t(), alpha=3),
    "bmm of one": lambda x, y, z, w: torch.bmm(x[None], w.t()[None]),
    "one for all": lambda x, y, z, w: torch.bmm(x.expand(2, M, K), w.unsqueeze(0).expand(2, N, K).mT),
    "no rows": lambda x, y, z, w: x[:0] @ w.t(),
    "w, 4 dimensions": lambda x, y, z, w: w @ x.t().expand(2, 3, K, M),
    "matmul by keyword": lambda x, y, z, w: torch.matmul(input=x, other=w.t()),
}

#: Products of x ``[3, 5, 128]``, y ``[3, 5, 160]``, bias z ``[3, 5, 160]`` and w ``[3, 160, 128]``.
BATCHED: dict[str, Callable[..., Tensor]] = {
    "x w.mT": lambda x, y, z, w: torch.bmm(x, w.mT),
    "y w": lambda x, y, z, w: torch.bmm(y, w),
    "w x.mT": lambda x, y, z, w: torch.bmm(w, x.mT),
    "w.mT y.mT": lambda x, y, z, w: w.mT @ y.mT,
    "matmul": lambda x, y, z, w: x @ w.mT,
    "one x for all": lambda x, y, z, w: x[0] @ w.mT,
    "one x of 3 dimensions for all": lambda x, y, z, w: x[:1] @ w.mT,
    "baddbmm": lambda x, y, z, w: torch.baddbmm(z, x, w.mT),
    "baddbmm, scaled": lambda x, y, z, w: torch.baddbmm(z[:, :1], x, w.mT, beta=2, alpha=0.5),
    "linear of one": lambda x, y, z, w: F.linear(x[2], w[2], z[0, 0]),
    "grouped without groups": lambda x, y, z, w: (
        x @ w.mT if x.dtype == torch.float64 else F.grouped_mm(x, w.mT)
    ),
    "a vector for all": lambda x, y, z, w: x[0, 0] @ w.mT,
    "w, a vector for all": lambda x, y, z, w: w @ x[0, 0],
    "w, a matrix for all": lambda x, y, z, w: w @ x[0].t(),
    "4 dimensions": lambda x, y, z, w: x.expand(2, 3, M, K) @ w.mT,
    "4 dimensions, one for all": lambda x, y, z, w: x.view(3, 1, M, K) @ w.mT,
    "w, 4 dimensions": lambda x, y, z, w: torch.matmul(w, x.mT.expand(2, 3, K, M)),
    "a stack of one": lambda x, y, z, w: x @ w[1:2].mT,
    "a stack of one, a matrix": lambda x, y, z, w: y[0] @ w[:1],
    "no rows": lambda x, y, z, w: y[:, :0] @ w,
}

OFFS = torch.tensor([4, 4, 13], dtype=torch.int32)
#: Products of rows in groups: x ``[15, 128]``, y ``[15, 160]``.
GROUPED: dict[str, Callable[..., Tensor]] = {
    "grouped x w.mT": lambda x, y, z, w: grouped(x.view(-1, K), w.mT),
    "grouped y w": lambda x, y, z, w: grouped(y.view(-1, N), w),
}


def grouped(x: Tensor, experts: Any) -> Tensor:
    """`torch.nn.functional.grouped_mm`, or its meaning in float64, which torch does not take."""
    if x.dtype != torch.float64:
        result: Tensor = F.grouped_mm(x, experts, offs=OFFS)
        return result
    borders = itertools.pairwise([0, *OFFS.tolist()])
    parts = [x[a:b] @ experts[e] for e, (a, b) in enumerate(borders)]
    return torch.cat([*parts, x.new_zeros(len(x) - int(OFFS[-1]), experts.shape[-1])])


def operands(stack: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    x, y = torch.randn(*stack, M, K), torch.randn(*stack, M, N)
    z = torch.randn(*stack, M, N) if stack else torch.randn(N)
    return [t.to(dtype) for t in (x, y, z)]


def plain(w: Any) -> tuple[Tensor, Tensor]:
    """The matrix that multiplies, and what each of its numbers was summed up of; float64."""
    value = w.to_groupwise()
    scale, zero = (
        part.double().abs().repeat_interleave(value.group_size, -1)[..., : w.shape[-1]]
        for part in (value.scale, value.zero)
    )
    unit = 16 * scale + zero
    pre_scale = torch.ones(1) if w.act_pre_scale is None else w.act_pre_scale.double().reshape(-1)
    return value.dequantize(torch.float64) * pre_scale, unit * pre_scale


def assert_right(
    result: Tensor,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    w: Any,
    dtype: torch.dtype,
) -> None:
    """Within the bound that all kernels keep, elementwise; ``function`` is linear in each argument.

    With u = 2^-8: x and W rounded to bfloat16, the product rounded to bfloat16 and to ``dtype``, the
    bias added and all rounded once more, and a scale multiplied and rounded: 5u of the sum of absolute
    values. And 2^-24 for each of the K additions, of sums of the numbers that W is computed from.
    """
    dense, unit = plain(w)
    exact = function(*(t.detach().double() for t in inputs), dense)
    magnitudes = [t.detach().double().abs() for t in inputs]
    terms, largest = function(*magnitudes, dense.abs()), function(*magnitudes, unit)
    assert result.shape == exact.shape
    assert result.dtype == dtype
    u = max(UNIT[torch.bfloat16], UNIT[dtype])
    bound = 5.1 * u * terms + 2.0**-24 * (256 + 4) * largest + 1e-7
    error = (result.detach().double() - exact).abs()
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.2f} of the bound"


def assert_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], w: Any, run: Any = None
) -> None:
    """For x, y and z, as those of the same function of plain tensors; the bound as above."""
    dense, unit = plain(w)
    upstream = (
        torch.rand(function(*(t.double() for t in inputs), dense).shape, dtype=torch.float64) + 0.5
    )
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    result = (run or function)(*leaves, w)
    result.backward(upstream.to(result.dtype))

    def gradients(of: Tensor) -> list[Tensor | None]:
        # Absolute inputs have no part in it: the function is linear, and upstream is positive.
        plain_leaves = [t.detach().double().requires_grad_() for t in inputs]
        function(*plain_leaves, of).backward(upstream)
        return [leaf.grad for leaf in plain_leaves]

    for leaf, exact, terms, largest in zip(
        leaves, gradients(dense), gradients(dense.abs()), gradients(unit)
    ):
        if exact is None or terms is None or largest is None:
            assert leaf.grad is None
            continue
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        u = max(UNIT[torch.bfloat16], UNIT[leaf.dtype])
        bound = 6.1 * u * terms.abs() + 2.0**-24 * 512 * largest.abs() + 1e-7
        assert bool(((leaf.grad.double() - exact).abs() <= bound).all())


foreign = pytest.mark.filterwarnings("ignore:a 4-bit weight is packed for")


def scales_of(view: str) -> list[Tensor | None]:
    return [None, torch.rand(1) + 0.5, torch.rand(256 if view == "columns" else K) + 0.5]


@foreign
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("view", list(VIEWS))
def test_products(view: str, layout: str) -> None:
    inputs = operands([], torch.float32)
    weights = itertools.cycle([VIEWS[view](layout=layout, act_pre_scale=s) for s in scales_of(view)])
    for name, function in PRODUCTS.items():
        w = next(weights)
        y = function(*inputs, w)
        assert_right(y, function, inputs, w, torch.float32)
        assert y.is_contiguous(), name


@foreign
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("view", list(STACKS))
def test_products_of_stacks(view: str, layout: str) -> None:
    inputs = operands([3], torch.float32)
    weights = itertools.cycle([STACKS[view](layout=layout, act_pre_scale=s) for s in scales_of(view)])
    for name, function in {**BATCHED, **GROUPED}.items():
        w = next(weights)
        y = function(*inputs, w)
        assert_right(y, function, inputs, w, torch.float32)
        assert y.is_contiguous(), name


ALL_PRODUCTS = [
    *((name, [], function) for name, function in PRODUCTS.items()),
    *((f"stack: {name}", [3], function) for name, function in {**BATCHED, **GROUPED}.items()),
]
products = pytest.mark.parametrize(
    ("stack", "function"),
    [(stack, function) for _, stack, function in ALL_PRODUCTS],
    ids=[name for name, _, _ in ALL_PRODUCTS],
)
#: What needs a gradient of the inf below is left out.
differentiable = pytest.mark.parametrize(
    ("stack", "function"),
    [(stack, function) for name, stack, function in ALL_PRODUCTS if name != "addmm, only the product"],
    ids=[name for name, _, _ in ALL_PRODUCTS if name != "addmm, only the product"],
)


@products
@dtypes
def test_the_activation_decides_the_dtype(stack: list[int], function: Any, dtype: torch.dtype) -> None:
    for weight_dtype in DTYPES:
        w = random_weight(*stack, N, K, dtype=weight_dtype)
        inputs = operands(stack, dtype)
        assert_right(function(*inputs, w), function, inputs, w, dtype)


@differentiable
@dtypes
def test_gradients(stack: list[int], function: Any, dtype: torch.dtype) -> None:
    w = nn.Parameter(random_weight(*stack, N, K, act_pre_scale=torch.rand(K) + 0.5))
    assert_gradients(function, operands(stack, dtype), w)
    assert w.grad is None


@products
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_autocast(stack: list[int], function: Any, weight_dtype: torch.dtype) -> None:
    """The result has the dtype that it has with plain tensors."""
    w = random_weight(*stack, N, K, dtype=weight_dtype)
    inputs = operands(stack, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*inputs, w)
        expected = function(*inputs, w.dequantize().float())
    rounded = [t.bfloat16() for t in inputs]
    if y.dtype == expected.dtype == torch.bfloat16:
        assert_right(y, function, rounded, w, torch.bfloat16)
    else:
        assert y.dtype == expected.dtype
        assert_right(y, function, inputs, w, y.dtype)


@products
def test_inference_mode(stack: list[int], function: Any) -> None:
    w, inputs = random_weight(*stack, N, K), operands(stack, torch.float32)
    outside = function(*inputs, w)
    with torch.inference_mode():
        assert torch.equal(function(*inputs, w), outside)
        inside = function(*inputs, w.clone())  # a weight that was made inside
    assert torch.equal(inside, outside)


def test_views_in_inference_mode_are_of_no_mode_as_torchs() -> None:
    w, stack = random_weight(128, 128), random_weight(2, 64, 128)
    with torch.inference_mode():
        views = [w.t(), w[:64], w.detach(), w.view(128, 128), *w.split(64), stack[0], *stack.unbind()]
        of_views = [views[0].t(), w.t()[:, :64]]
        copies = [w[3:70], w[torch.tensor([1])], w.clone()]
    for view in [*views, *of_views]:
        assert not view.is_inference()
    x = torch.randn(3, 128, requires_grad=True)
    (x @ views[0]).sum().backward()  # so they may take part in training afterwards
    for copied in copies:
        assert copied.dequantize().shape == copied.shape


# --- under torch.compile ------------------------------------------------------------------------------


#: All products of a rank in one graph, which is much faster than each in its own.
TOGETHER = pytest.mark.parametrize(
    ("stack", "functions"),
    [([], list(PRODUCTS.values())), ([3], list({**BATCHED, **GROUPED}.values()))],
    ids=["matrix", "stack"],
)


@TOGETHER
@pytest.mark.parametrize("view", ["whole", "rows, a view", "rows, a copy", "columns"])
def test_compiled_products_equal_eager(
    stack: list[int], functions: list[Any], view: str, kernel: str
) -> None:
    """The views are taken in the graph, too."""
    cut: Callable[[Any], Any] = {
        "whole": lambda w: w,
        "rows, a view": lambda w: w.narrow(-2, 64, N),
        "rows, a copy": lambda w: w.narrow(-2, 30, N),
        "columns": lambda w: w.narrow(-2, 0, N).narrow(-1, 128, K),
    }[view]
    k = 256 if view == "columns" else K
    w = random_weight(*stack, N if view == "whole" else 256, k, act_pre_scale=torch.rand(k) + 0.5)
    inputs = operands(stack, torch.float32)

    def run(*arguments: Any) -> list[Tensor]:
        *others, weight = arguments
        return [function(*others, cut(weight)) for function in functions]

    compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for y, expected in zip(compiled(*inputs, w), run(*inputs, w)):
            assert torch.equal(y, expected)
            assert y.is_contiguous()


def test_dynamic_rows() -> None:
    """One graph for any number of rows from 2 on, for all forms at once."""
    counter = CompileCounterWithBackend("aot_eager")
    w, s = random_weight(N, K), random_weight(3, N, K)

    def run(x: Tensor, offs: Tensor) -> list[Tensor]:
        rows = x.shape[0]
        left = w.t() @ torch.cat([x, x[:, :32]], 1).t()
        return [
            x @ w.t(),
            w @ x.t(),
            left,
            torch.addmm(torch.ones(N), x, w.t()),
            x.expand(3, rows, K) @ s.mT,
            F.grouped_mm(x, s.mT, offs=offs),
            F.embedding(offs % N, w),
            F.linear(x, w[64:]),
            x[:, :64] @ w[:, :64].t(),
        ]

    compiled: Any = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for rows in (5, 2, 40, 700):
            x = torch.randn(rows, K)
            offs = torch.tensor([rows // 2, rows // 2, rows], dtype=torch.int32)
            for y, expected in zip(compiled(x, offs), run(x, offs)):
                assert torch.equal(y, expected)
    assert counter.frame_count == 1


def test_inductor() -> None:
    """All forms through the real backend, once."""
    w, s = (random_weight(*shape, act_pre_scale=torch.rand(K) + 0.5) for shape in ((N, K), (3, N, K)))
    inputs, stacked = operands([], torch.float32), operands([3], torch.float32)
    forms = [(f, inputs, w) for f in PRODUCTS.values()]
    forms += [(f, stacked, s) for f in (*BATCHED.values(), *GROUPED.values())]

    def run(w: Any, s: Any) -> list[Tensor]:
        weights = {2: w, 3: s}
        return [f(*arguments, weights[weight.ndim]) for f, arguments, weight in forms]

    with torch.no_grad():
        for y, (function, arguments, weight) in zip(torch.compile(run, fullgraph=True)(w, s), forms):
            assert_right(y, function, arguments, weight, torch.float32)


@TOGETHER
def test_gradients_when_compiled(stack: list[int], functions: list[Any]) -> None:
    def run(*arguments: Any) -> Tensor:
        finite = [
            function for function in functions if function is not PRODUCTS["addmm, only the product"]
        ]
        return torch.cat([function(*arguments).reshape(-1) for function in finite])

    w = nn.Parameter(random_weight(*stack, N, K))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_gradients(run, operands(stack, torch.float32), w, compiled)


#: What makes a weight of weights: each is compared with what eager gives, part by part.
MADE: dict[str, Callable[[Any, Any], Any]] = {
    "narrow": lambda w, s: w.narrow(0, 64, 64),
    "narrow inside a block": lambda w, s: w[3:150],
    "columns": lambda w, s: w[:, 32:],
    "split": lambda w, s: w.split([64, 64, 32]),
    "chunk": lambda w, s: s.chunk(3, 1),
    "split K": lambda w, s: w.split(64, 1),
    "cat": lambda w, s: torch.cat([w[:5], w[64:128], w]),
    "cat K": lambda w, s: torch.cat([w, w[:, :64]], 1),
    "cat stacks": lambda w, s: torch.cat([s, s[1:]]),
    "stack": lambda w, s: torch.stack([w, w.clone()]),
    "select": lambda w, s: s[1],
    "unbind": lambda w, s: list(s),
    "index": lambda w, s: w[torch.tensor([5, 0, -1])],
    "index of a stack": lambda w, s: s[torch.tensor([1, -2])],
    "t": lambda w, s: w.t(),
    "permute": lambda w, s: s.permute(0, 2, 1),
    "unsqueeze": lambda w, s: w.unsqueeze(0),
    "squeeze": lambda w, s: s[:1].squeeze(0),
    "expand": lambda w, s: w.expand(2, -1, -1),
    "view": lambda w, s: w.view(1, -1, 128),
    "clone": lambda w, s: w.t().clone(),
    "detach": lambda w, s: w.detach(),
    "to": lambda w, s: w.to(torch.float32),
    "contiguous": lambda w, s: w[:64].contiguous(),
    "new_zeros": lambda w, s: w.new_zeros(5, 64),
    "pad": lambda w, s: F.pad(w, (0, 0, 0, 7)),
    "dequantize": lambda w, s: s.mT.dequantize(),
}


def assert_same_weight(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if type(a) is Tensor:
        assert torch.equal(a, b)
        return
    if isinstance(a, Int4TransposedTensor):
        a, b = a.untransposed(), b.untransposed()
    assert torch.equal(a.qdata, b.qdata)
    assert torch.equal(a.scale_and_zero, b.scale_and_zero)
    assert a.read_only == b.read_only
    assert (a.act_pre_scale is None) == (b.act_pre_scale is None)
    if a.act_pre_scale is not None:
        assert torch.equal(a.act_pre_scale, b.act_pre_scale)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("with_scale", [False, True])
def test_compiled_weights_equal_eager(backend: str, with_scale: bool) -> None:
    scale = torch.rand(K) + 0.5 if with_scale else None
    w, s = (random_weight(*shape, act_pre_scale=scale) for shape in ((N, K), (2, N, K)))

    def run(w: Any, s: Any) -> list[Any]:
        made = [make(w, s) for make in MADE.values()]
        return [list(some) if isinstance(some, (tuple, list)) else [some] for some in made]

    with torch.no_grad():
        results, expected = torch.compile(run, fullgraph=True, backend=backend)(w, s), run(w, s)
    assert [len(some) for some in results] == [len(some) for some in expected]
    for made, wanted in zip(itertools.chain(*results), itertools.chain(*expected)):
        assert_same_weight(made, wanted)


def test_views_of_graphs_are_views() -> None:
    """What a graph returns aliases what it was given, where it does so in eager."""
    w = random_weight(128, 64)
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(lambda t: t.narrow(0, 64, 64), fullgraph=True, backend=backend)
        view = compiled(w)
        new = random_weight(64, 64, seed=ord(backend[0]))
        view.copy_(new)
        assert torch.equal(w.dequantize()[64:], new.dequantize())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_writes_in_graphs(backend: str, layout: str) -> None:
    """As vLLM loads fused weights, from any layout; a write to a repacked copy is refused, too."""
    target, source = random_weight(192, 64), random_weight(192, 64, layout=layout, seed=1)

    def load(target: Any, source: Any) -> None:
        target.narrow(0, 64, 64).copy_(source.narrow(0, 128, 64))

    expected = target.dequantize()
    expected[64:128] = source.dequantize()[128:]
    torch.compile(load, fullgraph=True, backend=backend)(target, source)
    assert torch.equal(target.dequantize(), expected)

    def load_inside_a_block(target: Any, source: Any) -> None:
        target.narrow(0, 60, 64).copy_(source.narrow(0, 128, 64))

    with pytest.raises(Exception, match="so it is a repacked copy and the weight would not change"):
        torch.compile(load_inside_a_block, fullgraph=True, backend=backend)(target, source)
    assert torch.equal(target.dequantize(), expected)


def test_a_graph_checks_what_it_joins() -> None:
    """Scales and indices are known only when a graph runs."""
    a, b = (random_weight(64, 64, act_pre_scale=torch.ones(64), seed=seed) for seed in (0, 1))
    join = torch.compile(lambda a, b: torch.cat([a, b]), fullgraph=True, backend="aot_eager")
    assert_same_weight(join(a, b), torch.cat([a, b]))
    assert b.act_pre_scale is not None
    b.act_pre_scale[3] = 2
    with pytest.raises(RuntimeError, match="different act_pre_scale"):
        join(a, b)
    stack = random_weight(3, 64, 64)
    take = torch.compile(lambda w, index: w[index], fullgraph=True, backend="aot_eager")
    for w in (a, stack):
        n = w.shape[0]
        index = torch.tensor([n - 1, -n])
        assert_same_weight(take(w, index), w[index])
        for wrong in (n, -n - 1):
            with pytest.raises(IndexError, match=r"out of (range|bounds)"):
                take(w, torch.tensor([0, wrong]))


# --- look-ups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("view", list(VIEWS))
@dtypes
def test_embedding_is_bit_equal_to_dequantize(layout: str, view: str, dtype: torch.dtype) -> None:
    table = VIEWS[view](layout=layout, dtype=dtype)
    dense = table.dequantize()
    for shape in ((), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)):
        for index_dtype in (torch.int64, torch.int32):
            indices = torch.randint(0, N, shape, dtype=index_dtype)
            for padding in (None, 3, -1):
                rows = F.embedding(indices, table, padding_idx=padding)
                assert rows.dtype == dtype
                assert torch.equal(rows, F.embedding(indices, dense))


def test_an_embedding_module(kernel: str) -> None:
    module = nn.Embedding(N, K, padding_idx=0)
    module.weight = nn.Parameter(random_weight(N, K))
    indices = torch.tensor([[0, 5], [159, 5]])
    expected = module.weight.dequantize()[indices]
    assert torch.equal(module(indices), expected)
    assert not module(indices).requires_grad
    for dynamic in (False, True):
        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
        assert torch.equal(compiled(indices), expected)
        assert torch.equal(compiled(indices[:1]), expected[:1])


@pytest.mark.parametrize("index", [-1, N])
def test_embedding_refuses_indices_out_of_range(index: int) -> None:
    table = random_weight(N, K)
    for call in (F.embedding, torch.compile(F.embedding, fullgraph=True, backend="aot_eager")):
        with pytest.raises(IndexError, match=f"got index {index}; a weight of N={N} rows takes 0 to"):
            call(torch.tensor([3, index]), table)


# --- comparing, pinning -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 70), (300, 128), (3, 70, 64)], ids=str)
def test_equal_and_allclose(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "COMPARE_ELEMENTS", 64 * 64)
    w = random_weight(*shape)
    for layout in LAYOUTS:
        same = random_weight(*shape, layout=layout)
        assert torch.equal(w, same)
        assert torch.allclose(w, same, rtol=0, atol=0)
        assert torch.equal(w.mT, same.mT)
        assert torch.equal(same.dequantize(), w)
        assert torch.equal(w.mT, same.dequantize().mT)
        if len(shape) == 2 and shape[0] == 300:  # one turned, one not
            square, other = w.narrow(0, 10, 128), same.narrow(0, 10, 128)
            assert torch.equal(square, square)
            assert not torch.equal(square, other.t())
            assert torch.allclose(square, other.t().t())
            assert not torch.allclose(square, other.t())
        assert w.allclose(same.dequantize(), rtol=0, atol=0)
    for position in (0, -1):
        other = w.clone()
        other.scale_and_zero.view(-1, *w.scale_and_zero.shape[-3:])[position, -1, shape[-2] - 1, 1] *= 2
        assert not torch.equal(w, other)
        assert not torch.allclose(w, other)
        assert not torch.equal(w.mT, other.mT)
        assert torch.allclose(w, other, rtol=0, atol=100)
        assert not torch.equal(w, other.dequantize())
    padding = w.clone()
    padding.scale_and_zero[..., shape[-2] :, :] = 3  # is not compared
    assert torch.equal(w, padding)
    assert not torch.equal(w, random_weight(*shape[:-1], shape[-1] + 1))


def test_a_weight_equals_its_transposed_view_if_it_is_symmetric(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is expanded by rows, the other by columns: more than one piece of each."""
    monkeypatch.setattr(copies, "COMPARE_ELEMENTS", 64 * 64)
    n = 600
    codes = torch.randint(0, 16, (n, n), dtype=torch.uint8)
    codes = codes.triu() + codes.triu(1).t()
    scale = torch.full((n, 19), 0.5).bfloat16()
    w = Int4OpaqueTensor.from_groupwise(GroupwiseInt4(codes, scale, scale, 32))
    assert torch.equal(w, w.t())
    assert torch.allclose(w.t(), w)
    for row, column in ((0, 599), (599, 0), (300, 10)):
        codes[row, column] ^= 1
        w = Int4OpaqueTensor.from_groupwise(GroupwiseInt4(codes, scale, scale, 32))
        assert not torch.equal(w, w.t())
        assert not torch.equal(w.t(), w)
        codes[row, column] ^= 1


def test_weights_with_other_scales_are_not_equal() -> None:
    ones, twos, none = (
        random_weight(40, 70, act_pre_scale=s) for s in (torch.ones(70), torch.ones(70) * 2, None)
    )
    assert torch.equal(ones, ones.clone())
    assert not torch.equal(ones, twos)
    assert not torch.equal(ones, none)
    assert not torch.equal(none, ones)
    assert torch.allclose(ones, twos)  # of the numbers alone


def test_pinning() -> None:
    for w in (random_weight(40, 70), random_weight(40, 70).t()):
        assert w.is_pinned() is False
        with pytest.raises(ValueError, match="cannot be pinned; it never leaves the CPU, so leave"):
            w.pin_memory()


# --- torchao's own checks -----------------------------------------------------------------------------


class OnTheCpu(TorchAOIntegrationTestCase):  # type: ignore[misc]  # has no annotations
    """`TorchAOIntegrationTestCase` as it is, where only the device is another."""

    def setUp(self) -> None:
        class LinearOnTheCpu(nn.Linear):
            def __init__(self, *args: Any, device: object = None, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)

        for patch in (
            mock.patch("torch.accelerator.is_available", return_value=True),
            mock.patch(
                "torchao.testing.utils.get_current_accelerator_device",
                return_value=torch.device("cpu"),
            ),
            mock.patch("torch.nn.Linear", LinearOnTheCpu),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def test_slice_and_copy_similar_to_vllm(self) -> None:
        self._test_slice_and_copy_similar_to_vllm(Int4WeightOnlyConfig())

    def test_narrow_similar_to_vllm(self) -> None:
        self._test_narrow_similar_to_vllm(Int4WeightOnlyConfig())

    def test_chunk_similar_to_vllm_llama4(self) -> None:
        for shape in ((128, 256), (100, 320), (2, 128, 256)):
            for dim in range(len(shape)):
                self._test_chunk_similar_to_vllm_llama4(random_weight(*shape), dim)


def test_quantize_3d_param_similar_to_vllm() -> None:
    """Smaller than torchao's, which takes 700 MB: matrices of a checkpoint become a stack in memory."""
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.randn(6, 96, 64))
    quantize_(linear, Int4WeightOnlyConfig(group_size=32))
    weight: Any = linear.weight
    assert isinstance(weight, Int4OpaqueTensor)
    matrices = [random_weight(96, 64, dtype=torch.float32, seed=seed) for seed in range(6)]
    for expert, matrix in enumerate(matrices):
        weight.data[expert].copy_(matrix)
    for expert, matrix in enumerate(matrices):
        assert torch.equal(weight[expert].dequantize(), matrix.dequantize())


def test_fused_qkv_as_vllm_loads_it() -> None:
    """Query, key and value from checkpoints of any layout; the projection is that of each."""
    parts = [
        random_weight(n, 128, layout=layout, seed=i)
        for i, (n, layout) in enumerate([(256, "avx512"), (64, "avx2"), (64, "default")])
    ]
    fused = nn.Parameter(random_weight(384, 128, seed=9), requires_grad=False)
    start = 0
    for part in parts:
        fused.data.narrow(0, start, part.shape[0]).copy_(part)
        start += part.shape[0]
    assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))
    x = torch.randn(3, 128)
    y = F.linear(x, fused)
    assert torch.equal(y, torch.cat([F.linear(x, part) for part in fused.split([256, 64, 64])], 1))


def test_slicing_packed_bytes_along_k_mixes_up_the_weight() -> None:
    """As two published patches do. Bytes run along K inside a block: half of them are half its rows."""
    w = Int4OpaqueTensor.from_hp(torch.randn(256, 512), [1, 128])
    half = w.dequantize()[:, :256]

    def error(t: Any) -> float:
        return float((t.dequantize() - half).norm() / half.norm())

    sliced = Int4OpaqueTensor(
        w.qdata[:, :128].contiguous(),
        w.scale_and_zero[:2].contiguous(),
        [1, 128],
        (256, 256),
        w.qdata_layout,
        w.dtype,
    )
    assert error(sliced) > 1
    assert error(w.narrow(1, 0, 256)) == 0
