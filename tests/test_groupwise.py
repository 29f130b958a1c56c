"""The plain value: its equation, its conventions, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import random_groupwise
from torchao_int4cpu import GroupwiseInt4


def test_every_code_stands_for_the_equation() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 2)
    value = GroupwiseInt4(codes, torch.tensor([[0.25]]), torch.tensor([[3.0]]), 32)
    expected = (torch.arange(16) - 8) * 0.25 + 3.0
    assert torch.equal(value.dequantize()[0, :16], expected)
    assert torch.equal(value.dequantize()[0, 16:], expected)


def test_code_8_is_the_zero_and_integer_zero_points_convert() -> None:
    """An integer zero point p with w = (q - p) * s is zero = (8 - p) * s."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 2)
    for point in range(16):
        value = GroupwiseInt4(codes, torch.tensor([[0.5]]), torch.tensor([[(8 - point) * 0.5]]), 32)
        assert torch.equal(value.dequantize()[0, :16], (torch.arange(16) - point) * 0.5)


@pytest.mark.parametrize(("n", "k", "group_size"), [(3, 70, 32), (1, 1, 64), (2, 300, 256)])
def test_dequantize_matches_a_loop_with_a_short_last_group(n: int, k: int, group_size: int) -> None:
    value = random_groupwise(n, k, group_size)
    exact = value.dequantize(torch.float64)
    for row in range(n):
        for column in range(k):
            group = column // group_size
            expected = (int(value.codes[row, column]) - 8) * float(value.scale[row, group])
            assert float(exact[row, column]) == expected + float(value.zero[row, group])
    assert torch.equal(value.dequantize(torch.bfloat16), value.dequantize().bfloat16())


def _parts() -> dict[str, object]:
    return {
        "codes": torch.zeros(4, 40, dtype=torch.uint8),
        "scale": torch.ones(4, 2),
        "zero": torch.zeros(4, 2),
        "group_size": 32,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"group_size": 48}, ValueError, "group_size=48 is not supported; choose 32, 64, 128 or 256"),
        ({"group_size": 32.0}, TypeError, "group_size=32.0 is a float"),
        ({"group_size": True}, TypeError, "group_size=True is a bool"),
        ({"codes": torch.zeros(4, 40, dtype=torch.int32)}, TypeError, "codes are torch.int32"),
        ({"codes": torch.zeros(0, 40, dtype=torch.uint8)}, ValueError, r"codes have shape \[0, 40\]"),
        ({"codes": torch.zeros(40, dtype=torch.uint8)}, ValueError, r"codes have shape \[40\]"),
        ({"codes": torch.full((4, 40), 16, dtype=torch.uint8)}, ValueError, "codes reach 16"),
        ({"scale": torch.ones(4, 1)}, ValueError, r"scale has shape \[4, 1\].*need \[4, 2\]"),
        ({"zero": torch.zeros(2, 4)}, ValueError, r"zero has shape \[2, 4\].*need \[4, 2\]"),
        ({"zero": torch.zeros(4, 2).half()}, TypeError, "zero is torch.float16"),
        ({"scale": torch.ones(4, 2).double()}, TypeError, "scale is torch.float64"),
        ({"scale": torch.full((4, 2), torch.nan)}, ValueError, "scale has NaN or infinite"),
        ({"zero": torch.full((4, 2), torch.inf)}, ValueError, "zero has NaN or infinite"),
    ],
)
def test_parts_that_break_an_invariant_are_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    GroupwiseInt4(**_parts())  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        GroupwiseInt4(**(_parts() | change))  # type: ignore[arg-type]
