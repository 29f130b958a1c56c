"""Products with views of a 4-bit weight, and what makes views, under `torch.compile`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.product_forms import (
    BATCHED,
    GROUPED,
    PRODUCTS,
    K,
    N,
    assert_gradients,
    assert_right,
    operands,
)
from tests.weights import ALL_LAYOUTS, random_weight
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


#: All products of a rank in one graph, which is much faster than each in its own.
TOGETHER = pytest.mark.parametrize(
    ("stack", "functions"),
    [([], list(PRODUCTS.values())), ([3], list({**BATCHED, **GROUPED}.values()))],
    ids=["matrix", "stack"],
)


@TOGETHER
@pytest.mark.parametrize(
    "view",
    [
        "whole",
        "rows, a view",
        pytest.param("rows, a copy", marks=pytest.mark.slow),
        pytest.param("columns", marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
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
