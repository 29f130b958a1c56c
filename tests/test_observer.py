"""Which activations are seen to reach a weight, by every product and in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_int4cpu.calibration.observer import Observer

MODULE = nn.Module()


def observed(weight: Tensor, run: Callable[[], object], mode: Any = torch.no_grad) -> list[Tensor]:
    """The sums for a weight, or for each expert."""
    with mode(), Observer({"weight": (MODULE, weight)}) as observer:
        run()
    return [hessian.sum for hessian in observer.watched["weight"].hessians]


def gram(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    return rows.t() @ rows


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(mode: Any, dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    layer, x = nn.Linear(8, 16, bias=bias, dtype=dtype), torch.randn(shape, dtype=dtype)
    (found,) = observed(layer.weight, lambda: layer(x), mode)
    torch.testing.assert_close(found, gram(x), rtol=1e-5, atol=1e-6)


W, X = torch.randn(16, 8), torch.randn(5, 8)


@pytest.mark.parametrize(
    "product",
    [
        lambda: X @ W.t(),
        lambda: W @ X.t(),
        lambda: torch.mm(X, W.T),
        lambda: torch.addmm(torch.ones(16), X, W.t()),
        lambda: torch.einsum("mk,nk->mn", X, W),
        lambda: [F.linear(X, W[:3]), F.linear(torch.zeros(2, 8), W[3:])],
        lambda: torch.bmm(X[None], W.t()[None]),
        lambda: [torch.mv(W, x) for x in X],
        lambda: F.linear(X.clone(), W),
    ],
)
def test_other_products(product: Callable[[], object]) -> None:
    (found,) = observed(W, product)
    torch.testing.assert_close(found, gram(X), rtol=1e-5, atol=1e-6)


def test_experts() -> None:
    """Each by itself, by the rows that are multiplied with it."""
    stack, x = torch.randn(4, 16, 8), torch.randn(7, 8)
    offs = torch.tensor([2, 2, 3, 7], dtype=torch.int32)

    def grouped() -> None:
        F.grouped_mm(x, stack.transpose(1, 2), offs=offs)

    def one_by_one() -> None:
        for e, (start, stop) in enumerate(((0, 2), (2, 2), (2, 3), (3, 7))):
            F.linear(x[start:stop], stack[e])

    for run in (grouped, one_by_one):
        found = observed(stack, run)
        for part, rows in zip(found, (x[:2], x[:0], x[2:3], x[3:])):
            torch.testing.assert_close(part, gram(rows), rtol=1e-5, atol=1e-6)
    found = observed(stack, lambda: torch.bmm(x[None].expand(4, -1, -1), stack.transpose(1, 2)))
    for part in found:
        torch.testing.assert_close(part, gram(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_changed_in_place_is_another(mode: Any) -> None:
    before = torch.randn(5, 8)

    def run() -> None:
        x = before.clone()  # of inference_mode, in that
        F.linear(x, W)
        x.mul_(2)
        F.linear(x, W)

    (found,) = observed(W, run, mode)
    torch.testing.assert_close(found, 5 * gram(before), rtol=1e-5, atol=1e-6)


def test_weights_with_one_input_share_what_is_made_of_it() -> None:
    """One object, so that it is factorized once; other inputs, another."""
    q, k, other = (nn.Linear(8, 16) for _ in range(3))
    weights = {name: (MODULE, layer.weight) for name, layer in (("q", q), ("k", k), ("other", other))}
    with torch.no_grad(), Observer(weights) as observer:
        for _ in range(3):
            x = torch.randn(5, 8)
            other(k(x)[:, :8] + q(x)[:, :8])
    observer.share_equal()
    (first,), (second,), (third,) = (each.hessians for each in observer.watched.values())
    assert first is second
    assert third is not first
    assert first.rows == third.rows == 15


def test_other_tensors_are_none_of_it() -> None:
    found = observed(W, lambda: [X @ torch.randn(8, 3), torch.randn(2, 16) @ W, W * 2])
    assert not found[0].any()
