"""GPTQ against the method in float64, against brute force, and against rounding to nearest."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from torchao_int4cpu import GroupwiseInt4
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams, mse
from torchao_int4cpu.algorithms.gptq import gptq, rounded
from torchao_int4cpu.algorithms.hessian import DAMPING, Hessian


def hessian_of(x: Tensor) -> Hessian:
    """Of an activation ``[M, K]``."""
    hessian = Hessian(x.shape[1])
    hessian.add(x.t() @ x, len(x))
    return hessian


def inputs(rows: int, k: int, seed: int = 0) -> Tensor:
    """With columns that are alike, and some that are large, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixed: Tensor = torch.randn(rows, max(1, k // 2), generator=generator)
    mixed = mixed @ torch.randn(max(1, k // 2), k, generator=generator) / k**0.5
    x = mixed + 0.3 * torch.randn(rows, k, generator=generator)
    x[:, :: max(1, k // 3)] *= 5
    return x


def weight(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


class Twin(NamedTuple):
    """What the method gives in float64, with scales and zeros that are given.

    Attributes:
        codes: uint8 ``[N, K]``.
        margin: ``[N]``, how near to the middle between two codes a number of the row came, in scales.
        same: of the pairs of scale and zero, the part that it would have chosen itself.
    """

    codes: Tensor
    margin: Tensor
    same: float


def twin(w: Tensor, h: Tensor, value: GroupwiseInt4) -> Twin:
    """Column by column in float64; what is left of H^-1 by elimination, without Cholesky factors."""
    h = h.double().clone()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    squares = torch.where(dead, 0.0, h.diagonal())
    importance = (squares / squares.mean()).clamp(min=1e-6).float()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    w = w.double().clone()
    n, k = w.shape
    codes = torch.empty(n, k, dtype=torch.uint8)
    margin, same = torch.full((n,), 0.5, dtype=torch.float64), []
    for column in range(k):
        group = column // value.group_size
        last = min(k, (group + 1) * value.group_size)
        s, z = (part[:, group].double() for part in (value.scale, value.zero))
        if column % value.group_size == 0:
            _, scale, zero = mse(w[:, column:last].float(), importance[column:last])
            same.append((scale[:, 0] == s) & (zero[:, 0] == z))
        exact = (w[:, column] - z) / s
        code = exact.round().clamp(-8, 7)
        inside = (exact > -8.5) & (exact < 7.5)
        margin = torch.where(inside, torch.minimum(margin, 0.5 - (exact - code).abs()), margin)
        codes[:, column] = (code + 8).to(torch.uint8)
        error = (w[:, column] - (code * s + z)) / inverse[column, column]
        w -= error[:, None] * inverse[column]
        inverse -= inverse[:, column, None] * inverse[column] / inverse[column, column]
    return Twin(codes, margin, float(torch.stack(same).double().mean()))


@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(16, 64, 32), (9, 320, 32), (5, 300, 256), (3, 33, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_method_in_float64(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """Codes exactly, where float32 can tell; also over several blocks of columns, and a short group."""
    w, hessian = weight(n, k).to(dtype), hessian_of(inputs(500, k))
    value = gptq(w, hessian, group_size).value
    expected = twin(w, hessian.sum, value)
    nearest = choose_qparams(w, group_size, "mse")
    fitted = (value.codes != nearest.codes).any(1) | (value.scale != nearest.scale).any(1)
    # What float32 makes of sums of k products and of a factor of H^-1 is 1e-5 of a scale here.
    clear = fitted & (expected.margin > 1e-4)
    assert int(clear.sum()) >= 0.6 * n
    assert torch.equal(value.codes[clear], expected.codes[clear])
    assert expected.same >= 0.8


def errors(w: Tensor, rounded: Tensor, h: Tensor) -> Tensor:
    """Of each row, the squared error of its outputs."""
    change = w.double() - rounded.double()
    return torch.einsum("nk,kl,nl->n", change, h.double(), change)


@pytest.mark.parametrize("k", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_against_all_codes(k: int) -> None:
    """Never better than the best of all codes, and never worse than rounding to nearest."""
    w, hessian = weight(40, k), hessian_of(inputs(200, k))
    value = gptq(w, hessian, 32).value
    found = errors(w, value.dequantize(), hessian.sum)
    scale, zero = value.scale.double(), value.zero.double()
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for codes in itertools.product(range(-8, 8), repeat=k):
        best = torch.minimum(best, errors(w, torch.tensor(codes) * scale + zero, hessian.sum))
    tiny = 1e-10 * errors(w, torch.zeros_like(w), hessian.sum)  # what float32 makes of code * scale
    assert bool((found >= best * (1 - 1e-6) - tiny).all())
    by_rounding = choose_qparams(w, 32, "mse")
    assert bool((found <= errors(w, by_rounding.dequantize(), hessian.sum) * (1 + 1e-4) + tiny).all())


@pytest.mark.parametrize("group_size", [32, 128])
def test_it_is_far_better_than_rounding_on_its_inputs_and_others_of_their_kind(group_size: int) -> None:
    w, x = weight(64, 256), inputs(4000, 256)
    value = gptq(w, hessian_of(x[:2000]), group_size).value
    rounded = choose_qparams(w, group_size, "mse")
    for part, most in ((x[:2000], 0.5), (x[2000:], 0.6)):
        h = hessian_of(part).sum
        ours, theirs = (float(errors(w, each.dequantize(), h).sum()) for each in (value, rounded))
        assert 0.02 * theirs < ours < most * theirs


def test_inputs_without_relation_lead_to_rounding() -> None:
    """Nothing can make up for anything, so each column is rounded to nearest."""
    w = weight(12, 96)
    hessian = Hessian(96)
    hessian.add(torch.eye(96), 96)
    value, rounded = gptq(w, hessian, 32).value, choose_qparams(w, 32, "mse")
    assert torch.equal(value.codes, rounded.codes)
    assert torch.equal(value.scale, rounded.scale)


def test_inputs_that_are_all_zero_lead_to_rounding() -> None:
    w = weight(12, 96)
    fitted = gptq(w, hessian_of(torch.zeros(200, 96)), 32)
    assert torch.equal(fitted.value.codes, choose_qparams(w, 32, "mse").codes)
    assert fitted.error == 0.0


def test_columns_that_nothing_reaches_are_rounded() -> None:
    x = inputs(300, 96)
    x[:, 64:] = 0  # a whole group
    w = weight(12, 96)
    value = gptq(w, hessian_of(x), 32).value
    rounded = choose_qparams(w, 32, "mse")
    assert torch.equal(value.codes[:, 64:], rounded.codes[:, 64:])


def test_the_same_twice() -> None:
    w, hessian = weight(64, 256), hessian_of(inputs(1000, 256))
    first, second = gptq(w, hessian, 64).value, gptq(w, hessian, 64).value
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)


def test_rows_do_not_depend_on_how_many_are_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = weight(50, 96), hessian_of(inputs(300, 96))
    whole = gptq(w, hessian, 32).value
    monkeypatch.setattr("torchao_int4cpu.algorithms.gptq.CHUNK_ELEMENTS", 7 * 96)
    parts = gptq(w, hessian, 32).value
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.zero, parts.zero)


# --- Hessians -----------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = hessian_of(inputs(300, 40))
    factor = hessian.inverse_factor().double()
    damped = hessian.sum.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    assert torch.equal(factor, factor.triu())
    product = factor.t() @ factor @ damped
    assert float((product - torch.eye(40)).abs().max()) < 1e-3
    assert hessian.inverse_factor() is hessian.inverse_factor()
    hessian.add(torch.eye(40), 1)
    assert not torch.equal(hessian.inverse_factor().double(), factor)


def test_one_row_is_damped_until_it_can_be_inverted() -> None:
    x = torch.full((1, 64), 1e3)
    assert bool(hessian_of(x).inverse_factor(1e-9).isfinite().all())


def test_the_error_is_that_of_the_outputs() -> None:
    x, w = inputs(300, 96), weight(8, 96)
    for fitted in (gptq(w, hessian_of(x), 32), rounded(w, hessian_of(x), 32)):
        change = w - fitted.value.dequantize()
        expected = float((x @ change.t()).double().norm() / (x @ w.t()).double().norm())
        assert fitted.error == pytest.approx(expected, rel=1e-3)
    assert rounded(w, Hessian(96), 32).error == 0.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_inputs_that_are_refused(value: float) -> None:
    x = inputs(100, 32)
    x[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite values, or their squares"):
        gptq(weight(4, 32), hessian_of(x), 32)


def test_arguments_that_are_refused() -> None:
    hessian = hessian_of(inputs(100, 32))
    with pytest.raises(ValueError, match="inputs have 32 columns and the weight 64"):
        gptq(weight(4, 64), hessian, 32)
    with pytest.raises(ValueError, match="group_size=48"):
        gptq(weight(4, 32), hessian, 48)
    with pytest.raises(TypeError, match="float64"):
        gptq(weight(4, 32).double(), hessian, 32)
