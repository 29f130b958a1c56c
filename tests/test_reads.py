"""Ops that only read a weight give what they give for the dense twin, without a dense copy of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_int4cpu import SUPPORTED_OPS, Int4OpaqueTensor
from torchao_int4cpu.dispatch import pieces

#: Results that no order of sums changes: bit for bit.
EXACT: dict[str, Callable[[Tensor], Any]] = {
    "abs": lambda w: w.abs(),
    "abs max": lambda w: w.abs().max(),
    "isnan": lambda w: torch.isnan(w),
    "isfinite": lambda w: torch.isfinite(w),
    "isinf any": lambda w: torch.isinf(w).any(),
    "==": lambda w: w == w,
    "== 0": lambda w: w == 0,
    "dense ==": lambda w: torch.ones(w.shape) == w,
    "> row": lambda w: w > torch.zeros(w.shape[-1]),
    "clamp": lambda w: w.clamp(-1, 1),
    "where": lambda w: torch.where(w > 0, w, torch.zeros(())),
    "add": lambda w: w + torch.ones(w.shape),
    "sub": lambda w: torch.ones(w.shape[-1]) - w,
    "mul": lambda w: w * torch.full((w.shape[-1],), 3.0),
    "broadcast": lambda w: w + torch.ones(2, *[1] * w.ndim),
    "half of it": lambda w: w.half().abs(),
    "amax": lambda w: w.amax(),
    "amin": lambda w: w.amin(dim=-1),
    "max": lambda w: w.max(),
    "max of rows": lambda w: tuple(w.max(dim=-1)),
    "min of columns": lambda w: tuple(w.min(dim=-2)),
    "all": lambda w: w.all(),
    "any of columns": lambda w: w.any(dim=-2),
    "count_nonzero": lambda w: w.count_nonzero(),
    "zero norm": lambda w: torch.linalg.vector_norm(w, 0),
    "infinite norm": lambda w: torch.linalg.vector_norm(w, torch.inf),
    "zeros_like": lambda w: torch.zeros_like(w),
    "ones_like": lambda w: torch.ones_like(w, dtype=torch.float64),
    "full_like": lambda w: torch.full_like(w, 3.0),
}

#: Sums: ours are in float64 and rounded once, torch's in float32.
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda w: w.sum(),
    "sum of rows": lambda w: w.sum(dim=-1, keepdim=True),
    "sum of columns": lambda w: w.sum(dim=-2),
    "mean": lambda w: w.mean(),
    "mean of columns": lambda w: w.mean(dim=-2, keepdim=True),
    "float64 mean": lambda w: w.mean(dtype=torch.float64),
    "norm": lambda w: w.norm(),
    "norm of rows": lambda w: torch.linalg.norm(w, dim=-1),
    "norm of columns": lambda w: w.norm(p=2, dim=-2),
    "1 norm": lambda w: torch.linalg.vector_norm(w, 1),
    "3 norm": lambda w: torch.linalg.vector_norm(w, 3),
    "var": lambda w: w.var(),
    "std": lambda w: w.std(),
    "uncorrected std": lambda w: w.std(correction=0),
    "var of rows": lambda w: w.var(dim=-1),
}

SHAPES = [(40, 96), (3, 40, 96)]


@pytest.fixture(params=[False, True], ids=["weight", "transposed"])
def transposed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 1)
    monkeypatch.setattr(pieces, "MAX_GROUP_SIZE", 64)


def made(shape: tuple[int, ...], transposed: bool) -> Tensor:
    weight = Int4OpaqueTensor.from_hp(torch.randn(shape), [1] * (len(shape) - 1) + [32])
    return weight.transpose(-2, -1) if transposed else weight


def numbers(value: Any) -> Any:
    return value.dequantize() if type(value).__module__ == "torchao_int4cpu" else value


@pytest.mark.filterwarnings("ignore:.*expands a 4-bit weight")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_exact_reads(shape: tuple[int, ...], name: str, transposed: bool) -> None:
    w = made(shape, transposed)
    result, expected = EXACT[name](w), EXACT[name](w.dequantize())
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    for mine, twin in pairs:
        assert type(mine) is Tensor
        assert mine.dtype == twin.dtype
        assert torch.equal(mine, twin)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SUMS)
def test_sums(shape: tuple[int, ...], name: str, transposed: bool) -> None:
    """float32 sums of n numbers err by log2(n) roundings of the sum of magnitudes: torch sums pairwise.

    Of 11,520 numbers of size about 1 that is 14 * 2^-24 * 11520 at most, and its square root (a norm)
    or a mean less. Ours are summed in float64 where all numbers are, and else by torch.
    """
    w = made(shape, transposed)
    result, expected = SUMS[name](w), SUMS[name](w.dequantize())
    exact = SUMS[name](w.dequantize().double())
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert torch.allclose(result.double(), exact, rtol=14 * 2.0**-24, atol=14 * 2.0**-24 * w.numel())
    assert not torch.allclose(result.double(), exact * 1.01, rtol=1e-5, atol=1e-5)


class LargestResult(TorchDispatchMode):
    """The most numbers that any op gave."""

    largest: int = 0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and result.dtype.is_floating_point:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("name", ["isnan", "abs max", "sum", "norm of rows", "norm of columns", "std"])
def test_no_dense_copy_is_made(name: str, transposed: bool) -> None:
    w = made((640, 256), transposed)
    read = SUMS[name] if name in SUMS else EXACT[name]
    if name == "abs max":
        read = torch.amax
    with LargestResult() as mode:
        read(w)
    assert mode.largest <= 64 * 640


def test_an_expansion_on_each_step_is_said() -> None:
    w = made((40, 96), False)
    with pytest.warns(
        UserWarning, match=r"aten\.add\.Tensor expands a 4-bit weight of shape \[40, 96\]"
    ):
        w + torch.ones(40, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.isnan(w).any(), w.norm(), w.abs().max(), w == w


def test_a_refusal_says_its_cure_first() -> None:
    w = made((40, 96), False)
    with pytest.raises(NotImplementedError) as caught:
        torch.linalg.svd(w)
    text = str(caught.value)
    assert len(text) < 200
    assert text.index(".dequantize()") < text.index("SUPPORTED_OPS")
    assert torch.linalg.svd(w.dequantize())  # the cure
    assert "aten.linear.default" in SUPPORTED_OPS
    assert list(SUPPORTED_OPS) == sorted(SUPPORTED_OPS)
