"""What the algebra allocates: nothing for views, the packed result for copies, never a dense weight.

Torch's profiler sees every allocation of its CPU allocator, those inside of ops and kernels, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from tests.weights import random_weight
from torchao_int4cpu.format import slicing
from torchao_int4cpu.kernels.portable import dequantize as rows
from torchao_int4cpu.kernels.portable import prefill

N, K, E = 1024, 1024, 4
DENSE = N * K * 2  # bytes in bfloat16
PACKED = N * K // 2 + N * K // 32 * 4

#: Activations and their results, some of them several times (scaled, padded, in bfloat16 and float32).
ACTIVATIONS = 256 << 10
#: Objects of Python and indices.
SMALL = 64 << 10


class Usage(NamedTuple):
    """Bytes: of the largest allocation, and of all that were alive at one time, results included."""

    largest: int
    peak: int


def usage_of(call: Callable[[], object]) -> Usage:
    call()  # what is made once and kept is not counted: lookup tables, scratch memory
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    results: Any = profiled.profiler
    sizes = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    ]
    alive = largest = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        alive, largest = alive + size, max(largest, size)
        peak = max(peak, alive)
    return Usage(largest, peak)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 1024 x 1024 is to be large: what is done piece by piece is done in small pieces."""
    from torchao_int4cpu.dispatch import pieces

    monkeypatch.setattr(slicing, "SHUFFLE_CODES", 1 << 14)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1 << 14)
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(prefill, "PREFILL_MAX_BYTES", 1 << 19)


#: Codes, their pairs and their bytes, for one piece at a time.
SHUFFLE = 6 << 14

VIEWS: dict[str, Callable[[Any, Any], object]] = {
    "narrow": lambda w, s: w.narrow(0, 64, 512),
    "split": lambda w, s: w.split(256),
    "chunk": lambda w, s: s.chunk(4, 1),
    "all of K": lambda w, s: w.narrow(1, 0, K),
    "select": lambda w, s: s[2],
    "unbind": lambda w, s: list(s),
    "matrices": lambda w, s: s[1:3],
    "t": lambda w, s: w.t(),
    "permute": lambda w, s: s.permute(0, 2, 1),
    "narrow of the transposed": lambda w, s: w.t()[:, 64:],
    "unsqueeze": lambda w, s: w.unsqueeze(0),
    "squeeze": lambda w, s: s[:1].squeeze(0),
    "expand": lambda w, s: w.expand(64, -1, -1),
    "view": lambda w, s: w.view(1, N, K),
    "detach": lambda w, s: w.detach(),
    "as it is": lambda w, s: w.as_strided(w.shape, w.stride()),
    "contiguous": lambda w, s: w.contiguous(),
    "is_pinned": lambda w, s: w.is_pinned(),
}

#: Copies, and how many matrices come out.
COPIES: dict[str, tuple[float, Callable[[Any, Any], object]]] = {
    "rows inside a block": (1, lambda w, s: w[3:]),
    "rows of a stack": (E, lambda w, s: s[:, 3:]),
    "columns": (0.5, lambda w, s: w[:, 512:]),
    "columns of a stack": (E / 2, lambda w, s: s[..., :512]),
    "split K": (1, lambda w, s: w.split(256, 1)),
    "index": (1, lambda w, s: w[torch.arange(N - 1, -1, -1)]),
    "index of a stack": (3, lambda w, s: s[torch.tensor([3, 0, 3])]),
    "cat": (2, lambda w, s: torch.cat([w, w])),
    "cat inside a block": (2, lambda w, s: torch.cat([w[:64], w[: N - 3], w[:64]])),
    "cat of stacks": (2 * E, lambda w, s: torch.cat([s, s])),
    "cat along N of stacks": (2 * E, lambda w, s: torch.cat([s, s], 1)),
    "cat along K": (2, lambda w, s: torch.cat([w, w], 1)),
    "cat along K of stacks": (2 * E, lambda w, s: torch.cat([s, s], 2)),
    "stack": (2, lambda w, s: torch.stack([w, w])),
    "clone": (1, lambda w, s: w.clone()),
    "clone of the transposed": (E, lambda w, s: s.mT.clone()),
    "to": (1, lambda w, s: w.to(torch.float32)),
    "empty_like": (1, lambda w, s: torch.empty_like(w)),
    "new_zeros": (1, lambda w, s: w.new_zeros(N, K)),
    "pad": (1.1, lambda w, s: F.pad(w, (0, 0, 0, 64))),
}

#: Written in place, compared, or looked up.
IN_PLACE: dict[str, Callable[[Any, Any], object]] = {
    "copy_": lambda w, s: w.narrow(0, 64, 512).copy_(w.narrow(0, 1024, 512)),
    "copy_ of a stack": lambda w, s: s.copy_(s),
    "equal": lambda w, s: torch.equal(w, w),
    "equal, transposed": lambda w, s: torch.equal(w, w.t()),
    "equal, both transposed": lambda w, s: torch.equal(s.mT, s.mT),
    "allclose": lambda w, s: torch.allclose(w, w),
    "embedding": lambda w, s: F.embedding(torch.arange(4), w),
}

X, Y = torch.randn(4, K), torch.randn(4, N)
XS = torch.randn(E, 4, K)
OFFS = torch.tensor([1, 1, 3, 4], dtype=torch.int32)
PRODUCTS: dict[str, Callable[[Any, Any], object]] = {
    "linear": lambda w, s: F.linear(X, w),
    "linear of the transposed": lambda w, s: F.linear(Y, w.t()),
    "mm": lambda w, s: torch.mm(X, w.t()),
    "mm from the left": lambda w, s: w @ X.t(),
    "transposed": lambda w, s: Y @ w,
    "transposed from the left": lambda w, s: w.t() @ Y.t(),
    "mv": lambda w, s: torch.mv(w, X[0]),
    "addmm": lambda w, s: torch.addmm(torch.ones(N), X, w.t(), alpha=2),
    "matmul": lambda w, s: X.view(1, 4, K) @ w.t(),
    "bmm": lambda w, s: torch.bmm(XS, s.mT),
    "bmm, transposed": lambda w, s: torch.bmm(XS, s),
    "baddbmm": lambda w, s: torch.baddbmm(torch.ones(E, 1, N), XS, s.mT),
    "matmul of a stack": lambda w, s: X @ s.mT,
    "one for all": lambda w, s: torch.bmm(XS, w.expand(E, -1, -1).mT),
    "grouped": lambda w, s: F.grouped_mm(X, s.mT, offs=OFFS),
    "grouped, transposed": lambda w, s: F.grouped_mm(X, s, offs=OFFS),
}
#: Of those: they take more than a second, and the others are of their kind.
SLOW = ("bmm, transposed", "grouped, transposed")


def weights() -> tuple[Any, Any]:
    return random_weight(N, K), random_weight(E, N, K)


@pytest.mark.parametrize("name", list(VIEWS))
def test_views_allocate_nothing(name: str) -> None:
    w, s = weights()
    assert usage_of(lambda: VIEWS[name](w, s)).peak <= SMALL


@pytest.mark.parametrize("name", list(COPIES))
def test_copies_allocate_the_result(name: str) -> None:
    """And a piece; for stacks and for scales that are padded one matrix, or its scales, more."""
    w, s = weights()
    matrices, call = COPIES[name]
    used = usage_of(lambda: call(w, s))
    one = PACKED if matrices > 2 else PACKED // 4  # a matrix before it is in its place, or scales
    assert used.peak <= matrices * PACKED + one + SHUFFLE + SMALL
    assert used.largest <= matrices * N * K // 2 + SMALL


@pytest.mark.parametrize("name", list(IN_PLACE))
def test_what_is_done_in_place_allocates_a_piece(name: str) -> None:
    """The least that is compared at a time is 256 rows of each side, here an eighth of the weight.

    Torch's own ``allclose`` makes five more of that size.
    """
    w, s = random_weight(2048, 2048), random_weight(2, 2048, 1024)
    dense = 2048 * 2048 * 2
    used = usage_of(lambda: IN_PLACE[name](w, s))
    assert used.largest <= dense // 8
    assert used.peak <= dense // 8 * (7 if name == "allclose" else 2) + 64 * 2048 * 8 + SMALL


def test_a_copy_from_another_layout_allocates_the_repacked_weight() -> None:
    w, other = random_weight(N, K, layout="avx512"), random_weight(N, K, layout="avx2")
    assert usage_of(lambda: w.copy_(other)).peak <= PACKED + SHUFFLE + SMALL


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PRODUCTS],
)
def test_products_allocate_activations(name: str, kernel: str) -> None:
    """Or, of the weight, as much as the prefill may (`PREFILL_MAX_BYTES`, here 2^19)."""
    w, s = weights()
    used = usage_of(lambda: PRODUCTS[name](w, s))
    assert used.peak <= (1 << 19) + ACTIVATIONS
    assert used.largest < DENSE // 2


def test_the_measure_sees_a_dense_weight() -> None:
    """`dequantize` is the exception, and proof that it would be seen."""
    w, _ = weights()
    used = usage_of(w.dequantize)
    assert used.largest == DENSE
    assert DENSE <= used.peak <= DENSE + 8 * (1 << 17) + SMALL
    assert usage_of(lambda: w.t().dequantize()).largest == DENSE
