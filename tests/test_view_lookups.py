"""Views of a 4-bit weight as tables of rows to look up: eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.product_forms import VIEWS, K, N
from tests.weights import ALL_LAYOUTS, random_weight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


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
