"""Comparing 4-bit weights and views of them, with each other and with plain tensors; and pinning."""

from __future__ import annotations

import pytest
import torch

from tests.weights import random_weight
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu.dispatch import pieces
from torchao_int4cpu.format.layout import LAYOUTS


@pytest.mark.parametrize("shape", [(40, 70), (300, 128), (3, 70, 64)], ids=str)
def test_equal_and_allclose(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 64 * 64)
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
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 64 * 64)
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
