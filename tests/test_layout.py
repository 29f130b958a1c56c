"""The layout table: against the op, against its own drawing, and round trips."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import native
from torchao_int4cpu.format import layout as layout_module
from torchao_int4cpu.format.layout import (
    LAYOUTS,
    NibbleLayout,
    layout_named,
    pack,
    segments,
    unpack,
)
from torchao_int4cpu.format.slicing import repack

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)


def random_codes(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)


def pack_by_loop(codes: torch.Tensor, layout: NibbleLayout) -> torch.Tensor:
    """The readable twin of `pack`: one byte after the other, as the docstring of the module says."""
    n, k = codes.shape
    out: list[int] = []
    for start in range(0, n, layout.rows_per_block):
        rows = min(layout.rows_per_block, n - start)
        d = layout.nibble_distance if rows == layout.rows_per_block else 1
        for column in range(k):
            for i in range(rows // 2):
                low = start + (i // d) * 2 * d + i % d
                out.append(int(codes[low, column]) | int(codes[low + d, column]) << 4)
    return torch.tensor(out, dtype=torch.uint8).view(n, k // 2)


@pytest.mark.parametrize("n", [16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192])
def test_pack_writes_the_bytes_of_the_op_here(n: int) -> None:
    codes = random_codes(n, 64, seed=n)
    op = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert torch.equal(pack(codes, native()), op)


@layouts
@pytest.mark.parametrize("n", [16, 32, 48, 64, 96, 112, 128, 144])
def test_pack_is_its_twin(layout: NibbleLayout, n: int) -> None:
    codes = random_codes(n, 6, seed=n)
    assert torch.equal(pack(codes, layout), pack_by_loop(codes, layout))


@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    blocks=st.integers(1, 14),
    half_k=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(name: str, blocks: int, half_k: int, seed: int) -> None:
    codes = random_codes(blocks * 16, half_k * 2, seed)
    packed = pack(codes, LAYOUTS[name])
    assert packed.shape == (blocks * 16, half_k)
    assert torch.equal(unpack(packed, LAYOUTS[name]), codes)


@layouts
@pytest.mark.parametrize("target", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_repack_goes_from_any_layout_to_any(layout: NibbleLayout, target: NibbleLayout) -> None:
    codes = random_codes(112, 64)
    source = pack(codes, layout)
    moved = repack(source, layout, target)
    assert torch.equal(moved, pack(codes, target))
    assert (moved is source) == (layout == target)


def test_no_two_layouts_give_the_same_bytes() -> None:
    """Else the question that `native_layout` asks the op would have no answer."""
    codes = random_codes(64, 2)
    packed = [pack(codes, layout) for layout in LAYOUTS.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(packed) for b in packed[:i])


def test_the_drawing_in_the_docstring_shows_the_bytes() -> None:
    """Each drawn byte ``r.k|r.k`` is looked up in what pack makes of a weight with marked codes."""
    text = layout_module.__doc__
    assert text is not None
    drawn = re.findall(r"^    (avx512|avx2|default) +(\d.*)$", text, re.MULTILINE)
    assert [name for name, _ in drawn] == list(LAYOUTS)
    for name, line in drawn:
        before, after = line.split("...")[:2]
        layout = LAYOUTS[name]
        half = layout.rows_per_block // 2
        first = [_pair(byte) for byte in before.split()]
        last_of_column, *next_column = [_pair(byte) for byte in after.split()]
        positions = dict(enumerate(first)) | {half - 1: last_of_column}
        positions |= {half + i: pair for i, pair in enumerate(next_column)}
        assert len(positions) == 5
        for position, ((low, k_low), (high, k_high)) in positions.items():
            for row, k, shift in ((low, k_low, 0), (high, k_high, 4)):
                codes = torch.zeros(64, 2, dtype=torch.uint8)
                codes[row, k] = 15
                flat = pack(codes, layout).flatten()
                assert flat.nonzero().flatten().tolist() == [position]
                assert int(flat[position]) == 15 << shift


def _pair(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    low, high = (tuple(int(part) for part in code.split(".")) for code in text.split("|"))
    return (low[0], low[1]), (high[0], high[1])


@layouts
def test_segments_cover_every_row_once(layout: NibbleLayout) -> None:
    for n in range(16, 200, 16):
        parts = list(segments(n, layout))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == n


@pytest.mark.parametrize(("n", "k"), [(15, 4), (16, 3), (8, 4)])
def test_pack_refuses_what_the_op_cannot_read(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"codes have shape \[{n}, {k}\]; pad the rows"):
        pack(torch.zeros(n, k, dtype=torch.uint8), native())


@pytest.mark.parametrize("name", ["avx1024", "", None, 3])
def test_unknown_layouts_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="is not known; choose 'avx512', 'avx2', 'default'"):
        layout_named(name)
