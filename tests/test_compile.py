"""`torch.compile` and `torch.export`: no graph break, few graphs, the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.quantization import quantize_

from tests.numerics import assert_int4, product_bound
from tests.weights import random_weight
from torchao_int4cpu import Int4WeightOnlyConfig, set_kernel
from torchao_int4cpu.format.packed import int4_mm_reference

pytestmark = pytest.mark.usefixtures("kernel", "_fresh_dynamo")


def layer(dtype: torch.dtype = torch.bfloat16, n: int = 600, k: int = 512) -> Any:
    """Large enough that hundreds of rows are prefilled; N and K padded."""
    linear = nn.Linear(k, n).to(dtype)
    quantize_(linear, Int4WeightOnlyConfig(group_size=128))
    assert_int4(linear.weight, (n, k), 128)
    return linear


def assert_close_to_eager(compiled: Callable[[Tensor], Tensor], eager: Any, x: Tensor) -> None:
    """Both are within the derived bound of the exact product, so at most two bounds apart."""
    with torch.no_grad():
        y, expected = compiled(x), eager(x)
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    flat = x.reshape(-1, x.shape[-1])
    packed = eager.weight.packed()
    bound = product_bound(flat, packed, x.dtype)
    exact = int4_mm_reference(flat, packed) + eager.bias.double()
    bound = bound + 2.0**-8 * (exact.abs() + bound)
    for result in (y, expected):
        assert bool(((result.double().view(exact.shape) - exact).abs() <= bound).all())


def count_graphs(model: Any, rows: list[int], **options: Any) -> int:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter, **options)
    for m in rows:
        x = torch.randn(m, 512).bfloat16()
        if isinstance(model.weight, nn.Parameter) and type(model.weight) is not nn.Parameter:
            assert_close_to_eager(compiled, model, x)
        else:
            with torch.no_grad():
                compiled(x)
    return int(counter.frame_count)


DECODE_FIRST = [1, 700, 2, 40, 1, 2000, 300]
PREFILL_FIRST = [700, 1, 2, 2000, 40, 1, 300]


@pytest.mark.parametrize("rows", [DECODE_FIRST, PREFILL_FIRST], ids=["decode", "prefill"])
def test_two_graphs_serve_all_rows_under_dynamic_true(rows: list[int]) -> None:
    """One for M = 1, which torch always specializes on, and one for the rest."""
    assert count_graphs(layer(), rows, dynamic=True) == 2


def test_two_graphs_serve_all_rows_under_automatic_dynamic() -> None:
    assert count_graphs(layer(), DECODE_FIRST) == 2


@pytest.mark.parametrize("rows", [DECODE_FIRST, PREFILL_FIRST], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"dynamic": True}],
    ids=["automatic", "dynamic"],
)
def test_no_more_graphs_than_a_dense_layer(rows: list[int], options: dict[str, Any]) -> None:
    dense = nn.Linear(512, 600).bfloat16()
    assert count_graphs(layer(), rows, **options) == count_graphs(dense, rows, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [*(pytest.param(m, marks=pytest.mark.slow) for m in (1, 5)), 700])
def test_inductor_equals_eager(dtype: torch.dtype, m: int) -> None:
    eager = layer(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Int4OpaqueTensor")  # torch's advice is followed
        compiled: Any = torch.compile(eager, fullgraph=True)
        assert_close_to_eager(compiled, eager, torch.randn(m, 512).to(dtype))
        assert_close_to_eager(compiled, eager, torch.randn(2, m, 512).to(dtype))


@pytest.mark.parametrize(
    "mode", [pytest.param("max-autotune", marks=pytest.mark.slow), "reduce-overhead"]
)
@pytest.mark.parametrize("freezing", [False, True])
def test_other_modes(mode: str, freezing: bool) -> None:
    """With freezing, max-autotune may take inductor's own int4 template, which reads our bytes."""
    eager = layer(n=128)
    with torch._inductor.config.patch(freezing=freezing):
        compiled: Any = torch.compile(eager, fullgraph=True, mode=mode)
        for m in (1, 4, 700):
            assert_close_to_eager(compiled, eager, torch.randn(m, 512).bfloat16())


def ops_in_graph(model: Any, x: Tensor) -> set[str]:
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.update(str(node.target) for node in graph.graph.nodes if "int4" in str(node.target))
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    with torch.no_grad():
        aot: Any = aot_autograd
        compiled: Any = torch.compile(model, fullgraph=True, backend=aot(fw_compiler=backend))
        compiled(x)
    return found


@pytest.mark.parametrize("m", [1, 2000])
def test_few_rows_show_pytorchs_op_in_the_graph(m: int, kernel: str) -> None:
    """If it is to multiply them: other tools match it. Our own op chooses when it runs."""
    shown = "aten._weight_int4pack_mm_for_cpu.default"
    ours = "torchao_int4cpu.int4_mm.default"
    found = ops_in_graph(layer(), torch.randn(m, 512).bfloat16())
    assert found == {shown if kernel == "aten" and m == 1 else ours}


@pytest.mark.parametrize("kernel", ["aten"], indirect=True)
def test_an_exported_program_shows_pytorchs_op(kernel: str) -> None:
    program = torch.export.export(layer(), (torch.randn(1, 512).bfloat16(),))
    program = program.run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten._weight_int4pack_mm_for_cpu.default" in targets


def test_a_graph_follows_a_later_choice(kernel: str) -> None:
    """Of the kernel, within its bound; nothing is traced again."""
    eager = layer()
    compiled: Any = torch.compile(eager, fullgraph=True)
    x = torch.randn(3, 512).bfloat16()
    assert_close_to_eager(compiled, eager, x)
    set_kernel("auto" if kernel == "aten" else "aten")
    assert_close_to_eager(compiled, eager, x)


def test_gradients_through_a_compiled_layer() -> None:
    eager = layer(torch.float32)
    compiled: Any = torch.compile(eager, fullgraph=True)
    grads = []
    for function in (eager, compiled):
        x = torch.linspace(-1, 1, 9 * 512).view(9, 512).requires_grad_()
        eager.bias.grad = None
        function(x).square().sum().backward()
        assert x.grad is not None
        grads.append((x.grad, eager.bias.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])
    assert float(grads[0][0].abs().max()) > 0


def test_act_pre_scale_and_3d_input_compile() -> None:
    eager = layer(torch.float32)
    eager.weight.act_pre_scale = torch.rand(512) + 0.5
    compiled: Any = torch.compile(eager, fullgraph=True)
    x = torch.randn(2, 3, 512)
    with torch.no_grad():
        scaled = compiled(x)
        torch.testing.assert_close(scaled, eager(x), rtol=2.0**-7, atol=1e-3)
        eager.weight.act_pre_scale = None
        without = eager(x)
        assert not torch.allclose(scaled, without, rtol=2.0**-7, atol=1e-3)  # it was in the graph
        torch.testing.assert_close(compiled(x), without, rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic: bool) -> None:
    eager = layer(torch.float32)
    m = torch.export.Dim("m", min=2, max=4096)
    shapes = {"input": {0: m}} if dynamic else None
    program = torch.export.export(eager, (torch.randn(5, 512),), dynamic_shapes=shapes)
    for rows in (5, 2, 900) if dynamic else (5,):
        assert_close_to_eager(program.module(), eager, torch.randn(rows, 512))


@pytest.mark.parametrize("with_bias", [False, True])
def test_make_fx_sees_the_product(with_bias: bool) -> None:
    """A traced graph computes from its input: a call that no mode sees would leave its result out."""
    w, bias = random_weight(40, 70), torch.randn(40) if with_bias else None
    x, other = torch.randn(3, 70), torch.randn(3, 70)
    graph = make_fx(lambda x: F.linear(x, w, bias))(x)
    expected = F.linear(other, w, bias)
    assert not torch.equal(expected, F.linear(x, w, bias))
    assert torch.equal(graph(other), expected)
