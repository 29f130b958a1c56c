"""Parts that a class declares: what cuts, joins, copies, files and processes do with one more of them.

`Marked` has a number for each column and one for each row beside what `Int4OpaqueTensor` has. No line
of the package knows these parts; what is done to them follows from their declaration alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import random_groupwise
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.format.packed import INT4_PARTS, Part

N, K, GROUP_SIZE = 128, 96, 32

MARKS = (
    Part("columns", k_dim=-1, default=0.0),
    Part("rows", n_dim=-1, k_dim=None, default=0.0),
)


class Marked(Int4OpaqueTensor):
    """A weight with a number for each column, and one for each (padded) row."""

    PARTS = (*INT4_PARTS, *MARKS)
    optional_tensor_data_names = [part.name for part in PARTS if part.optional]

    columns: Tensor | None
    rows: Tensor | None

    def __new__(
        cls, *args: Any, columns: Tensor | None = None, rows: Tensor | None = None, **kwargs: Any
    ) -> Any:
        return super().__new__(cls, *args, **kwargs)

    def __init__(
        self, *args: Any, columns: Tensor | None = None, rows: Tensor | None = None, **kwargs: Any
    ) -> None:
        self.columns, self.rows = columns, rows
        super().__init__(*args, **kwargs)


def marked(*, columns: bool = True, rows: bool = False) -> Marked:
    t = Marked.from_groupwise(random_groupwise(N, K, GROUP_SIZE))
    assert isinstance(t, Marked)
    t.columns = torch.arange(float(K)) if columns else None
    t.rows = torch.arange(float(N)) if rows else None
    return t


def numbers(part: Tensor | None) -> list[float]:
    assert part is not None
    found: list[float] = part.tolist()
    return found


SAME: dict[str, Callable[[Any], Tensor]] = {
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "to": lambda t: t.to(torch.float16),
    "view": lambda t: t.view(N, K),
    "twice transposed": lambda t: t.t().t(),
    "deep copy": copy.deepcopy,
    "of a stack": lambda t: torch.stack([t, t])[1],
    "expanded": lambda t: t.expand(3, N, K)[2],
}


@pytest.mark.parametrize("name", list(SAME))
def test_what_keeps_a_weight_keeps_its_parts(name: str) -> None:
    t = marked(rows=True)
    same = SAME[name](t)
    assert isinstance(same, Marked)
    assert numbers(same.columns) == numbers(t.columns)
    assert numbers(same.rows) == numbers(t.rows)
    if name in ("detach", "view", "twice transposed"):
        assert same.columns is not None
        assert same.columns.data_ptr() == t.columns.data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [slice(0, 64), slice(64, 128), slice(3, 20)])
def test_a_cut_along_n(rows: slice) -> None:
    """A part without rows stays whole; one with them is cut, and padded by zeros as the weight is."""
    cut = marked(rows=True)[rows]
    assert isinstance(cut, Marked)
    assert numbers(cut.columns) == list(map(float, range(K)))
    height = rows.stop - rows.start
    assert numbers(cut.rows)[:height] == list(map(float, range(rows.start, rows.stop)))
    assert not any(numbers(cut.rows)[height:])
    assert len(numbers(cut.rows)) == cut.qdata.shape[0]


def test_a_cut_along_k_follows_the_columns() -> None:
    cut = marked()[:, 32:64]
    assert isinstance(cut, Marked)
    assert numbers(cut.columns) == list(map(float, range(32, 64)))


def test_a_part_about_all_columns_refuses_a_cut_along_k() -> None:
    t = marked(rows=True)
    with pytest.raises(ValueError, match="with rows along K, which is about all columns together"):
        t[:, 32:64]
    with pytest.raises(ValueError, match="cat along K got 4-bit weights with rows, which is about all"):
        torch.cat([t, t], dim=1)


def test_rows_that_are_chosen() -> None:
    chosen = marked(rows=True)[torch.tensor([5, -1, 5])]
    assert isinstance(chosen, Marked)
    assert numbers(chosen.rows)[:3] == [5.0, N - 1.0, 5.0]
    assert numbers(chosen.columns) == list(map(float, range(K)))


def test_joined_along_k_a_missing_part_is_its_default() -> None:
    joined = torch.cat([marked(), marked(columns=False)], dim=1)
    assert isinstance(joined, Marked)
    assert numbers(joined.columns) == [*map(float, range(K)), *([0.0] * K)]


def test_joined_along_n_what_is_shared_must_agree() -> None:
    with pytest.raises(ValueError, match="cat got 4-bit weights with different columns"):
        torch.cat([marked(), marked(columns=False)])
    joined = torch.cat([marked(), marked()])
    assert isinstance(joined, Marked)
    assert numbers(joined.columns) == list(map(float, range(K)))


def test_copy_compares_and_copies_every_part() -> None:
    target = marked()
    assert target.columns is not None
    target.columns.zero_()
    target.copy_(marked())
    assert numbers(target.columns) == list(map(float, range(K)))
    with pytest.raises(ValueError, match=r"copy_ got columns None for .* with columns \[96\]"):
        target.copy_(marked(columns=False))


@pytest.mark.parametrize(("dim", "cut"), [(0, slice(0, 70)), (1, slice(0, 64))])
def test_what_is_copied_into_a_cut_of_zeros_is_written_back(dim: int, cut: slice) -> None:
    whole = marked().new_zeros(N, K)
    assert isinstance(whole, Marked)
    piece = marked().narrow(dim, 0, cut.stop)
    whole.narrow(dim, 0, cut.stop).copy_(piece)
    copied = K if dim == 0 else 64
    expected = [*map(float, range(copied)), *[0.0] * (K - copied)]
    assert numbers(whole.columns) == expected
    again = whole.narrow(dim, 0, cut.stop)
    assert torch.equal(again, piece)


def test_a_part_that_was_assigned_is_checked_again() -> None:
    """Those that every weight has; a class checks its own."""
    t = marked(rows=True)
    x = torch.randn(3, K)
    y = torch.nn.functional.linear(x, t)
    t.qdata = t.qdata.clone()
    assert torch.equal(torch.nn.functional.linear(x, t), y)
    t.qdata = t.qdata[:64]
    with pytest.raises(ValueError, match="qdata has shape"):
        torch.nn.functional.linear(x, t)


def test_the_trace_of_a_weight_depends_on_its_parts() -> None:
    weights = (marked(), marked(columns=False), marked(rows=True))
    hashes = {t._stable_hash_for_caching() for t in weights}
    assert len(hashes) == 3
    names, context = marked().__tensor_flatten__()
    assert names == ["qdata", "scale_and_zero", "columns"]
    back = Marked.__tensor_unflatten__({n: getattr(marked(), n) for n in names}, context, None, None)
    assert numbers(back.columns) == list(map(float, range(K)))
