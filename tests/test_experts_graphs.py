"""Models with 4-bit experts under `torch.compile`."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from tests.moe_models import IDS, ROUNDING, logits, pair, typical
from torchao_int4cpu.dispatch.table import NAMED
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

# --- compiled -------------------------------------------------------------------------------------


COMPILED = [
    ("qwen3_moe", "batched_mm", torch.float32),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("qwen3_moe", "grouped_mm", torch.bfloat16),
            ("gpt_oss", "grouped_mm", torch.float32),
            ("gpt_oss", "batched_mm", torch.bfloat16),
            ("mixtral", "grouped_mm", torch.bfloat16),
        )
    ),
]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("family", "implementation", "dtype"), COMPILED)
def test_compiled_in_one_graph(
    family: str, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph; in float32 transformers calls an op of its own for what torch cannot compile."""
    fallback = Counter[str]()
    name = "transformers::grouped_mm_fallback"
    named = NAMED[Int4TransposedTensor]
    handler = named[name]

    def counting(*args: Any) -> Any:
        fallback[name] += 1
        return handler(*args)

    monkeypatch.setitem(named, name, counting)
    model, dense = pair(family, dtype, num_hidden_layers=1)
    for either in (model, dense):
        either.set_experts_implementation(implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's, of a cache in transformers
        y = logits(torch.compile(model, fullgraph=True))
    expected = logits(dense)
    assert 2.0**-20 < typical(y, expected) < ROUNDING[dtype]
    assert (fallback[name] > 0) == (implementation == "grouped_mm" and dtype == torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_graph_calls_what_the_implementation_says() -> None:
    """One that inductor has not seen yet; for any number of tokens."""
    seen: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append({getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes})
        return graph

    for implementation, product in (("grouped_mm", "_grouped_mm"), ("batched_mm", "bmm")):
        model, dense = pair("gpt_oss", torch.bfloat16, num_hidden_layers=1)
        for either in (model, dense):
            either.set_experts_implementation(implementation)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for ids in (IDS, IDS[:, :5]):
                assert 2.0**-20 < typical(logits(compiled, ids), logits(dense, ids)) < 0.05
        assert any(product in name for name in seen[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_eager_implementation_compiles_around_its_loop() -> None:
    """Its loop over the experts that are hit is no graph, with dense experts neither."""
    model, dense = pair("qwen3_moe", torch.float32, num_hidden_layers=1)
    for either in (model, dense):
        either.set_experts_implementation("eager")
    y = logits(torch.compile(model, backend="aot_eager"))
    assert 2.0**-20 < typical(y, logits(dense)) < ROUNDING[torch.float32]
    for either in (model, dense):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
            logits(torch.compile(either, fullgraph=True, backend="eager"))
