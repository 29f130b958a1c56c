"""Cutting and joining packed bytes gives what cutting and joining codes gives, in every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchao_int4cpu.format import slicing
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, layout_named, pack, unpack
from torchao_int4cpu.format.slicing import (
    PackedRows,
    at_border,
    cut_columns,
    join_columns,
    join_rows,
    write_columns,
    write_rows,
)
from torchao_int4cpu.kernels.ops.slicing import traceable_join_rows

layouts = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
any_layout = st.sampled_from(list(LAYOUTS.values()))


def random_codes(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)


def padded(codes: Tensor) -> Tensor:
    """Rows of code 8 below, up to a multiple of 16."""
    n = -(-len(codes) // 16) * 16
    below = torch.full((n - len(codes), codes.shape[1]), 8, dtype=torch.uint8)
    return torch.cat([codes, below])


def packed_rows(codes: Tensor, layout: NibbleLayout, start: int, stop: int) -> PackedRows:
    return PackedRows(pack(padded(codes), layout), layout, len(codes), start, stop)


@pytest.fixture(
    params=[None, pytest.param(64, marks=pytest.mark.slow), 5000],
    ids=["at once", "2 columns", "some columns"],
)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few codes at a time, so that small weights are shuffled in many pieces."""
    if request.param is not None:
        monkeypatch.setattr(slicing, "SHUFFLE_CODES", request.param)


@layouts
@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("n", [1, 16, 40, 64, 100, 128, 150])
def test_every_cut_of_rows(layout: NibbleLayout, n: int) -> None:
    """All borders for small weights, and those around the borders of blocks for large ones."""
    codes = random_codes(n, 34)
    near = {b + d for b in range(0, n + 1, 16) for d in (-1, 0, 1)}
    borders = sorted(b for b in (range(n + 1) if n <= 40 else near) if 0 <= b <= n)
    for start in borders:
        for stop in (b for b in borders if b > start):
            out = join_rows([packed_rows(codes, layout, start, stop)], layout)
            assert torch.equal(unpack(out, layout)[: stop - start], codes[start:stop])
            assert out.shape == (-(-(stop - start) // 16) * 16, 17)
            assert out.is_contiguous()


@layouts
def test_a_cut_at_borders_is_a_view_of_whole_blocks(layout: NibbleLayout) -> None:
    """What `at_border` promises: these bytes are the rows, without a copy."""
    for n in (40, 64, 100, 128, 129, 150, 192):
        codes = random_codes(n, 34)
        qdata = pack(padded(codes), layout)
        borders = [b for b in range(n + 1) if at_border(b, n, layout)]
        assert borders == sorted({*range(0, n + 1, layout.rows_per_block), n})
        for start in borders:
            for stop in (b for b in borders if b > start):
                view = qdata[start : stop if stop < n else len(qdata)]
                assert torch.equal(unpack(view, layout)[: stop - start], codes[start:stop])


@given(
    source=any_layout,
    target=any_layout,
    pieces=st.lists(
        st.tuples(st.integers(1, 150), st.integers(0, 149), st.integers(1, 150), any_layout),
        min_size=1,
        max_size=4,
    ),
    same=st.booleans(),
    aligned=st.booleans(),
    limit=st.sampled_from([64, 4000, 1 << 21]),
)
def test_rows_of_many_weights(
    source: NibbleLayout,
    target: NibbleLayout,
    pieces: list[tuple[int, int, int, NibbleLayout]],
    same: bool,
    aligned: bool,
    limit: int,
) -> None:
    """In one layout or in several; at borders of blocks, where bytes are joined as they are, or not."""
    rows, expected = [], []
    for seed, (n, start, length, own) in enumerate(pieces):
        layout = source if same else own
        start = min(start, n - 1)
        stop = min(n, start + length)
        if aligned:
            start = start // layout.rows_per_block * layout.rows_per_block
            stop = min(n, -(-stop // layout.rows_per_block) * layout.rows_per_block)
        codes = random_codes(n, 38, seed)
        rows.append(packed_rows(codes, layout, start, stop))
        expected.append(codes[start:stop])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "SHUFFLE_CODES", limit)
        out = join_rows(rows, target)
    wanted = padded(torch.cat(expected))
    found = unpack(out, target)
    n = sum(len(part) for part in expected)
    assert torch.equal(found[:n], wanted[:n])
    assert torch.equal(found, wanted), "rows that pad hold code 8"
    for piece in rows:
        assert out.data_ptr() != piece.qdata.data_ptr()


@layouts
@pytest.mark.usefixtures("chunk")
def test_chosen_rows(layout: NibbleLayout) -> None:
    codes = random_codes(100, 34)
    for start, stop, index in (
        (0, 100, [0]),
        (0, 100, [99, 0, 64, 63, 32, 31, 0, 0]),
        (0, 100, [-1, -100, 5]),
        (30, 90, [0, 59, -60, 20]),
        (0, 100, list(range(99, -1, -1)) * 2),  # more than there are
    ):
        chosen = torch.tensor(index)
        piece = packed_rows(codes, layout, start, stop)._replace(chosen=chosen)
        assert piece.height == len(index)
        out = join_rows([piece], layout)
        assert torch.equal(unpack(out, layout), padded(codes[start:stop][chosen]))


@given(
    layout=any_layout,
    n=st.sampled_from([16, 48, 64, 112, 128, 144]),
    start=st.integers(0, 143),
    length=st.integers(1, 144),
    limit=st.sampled_from([64, 3000, 1 << 21]),
)
def test_write_rows(layout: NibbleLayout, n: int, start: int, length: int, limit: int) -> None:
    start = min(start, n - 1)
    stop = min(n, start + length)
    codes, new = random_codes(n, 34), random_codes(stop - start, 34, seed=1)
    target = pack(codes, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "SHUFFLE_CODES", limit)
        write_rows(target, layout, start, stop, pack(padded(new), layout))
    codes[start:stop] = new
    assert torch.equal(unpack(target, layout), codes)


@layouts
@pytest.mark.parametrize("n", [16, 48, 64, 112, 144])
def test_columns(layout: NibbleLayout, n: int) -> None:
    """Cut, written, and joined: only where they are."""
    codes = random_codes(n, 34)
    qdata = pack(codes, layout)
    borders = range(0, 35, 2)
    for start in borders:
        for stop in (b for b in borders if b > start):
            columns = slice(start, stop)
            cut = cut_columns(qdata, layout, columns)
            assert torch.equal(unpack(cut, layout), codes[:, columns])
            parts = [p for p in (codes[:, :start], codes[:, columns], codes[:, stop:]) if p.numel()]
            joined = join_columns([pack(p.contiguous(), layout) for p in parts], layout)
            assert torch.equal(joined, qdata)
            new = random_codes(n, stop - start, seed=1)
            target, expected = qdata.clone(), codes.clone()
            write_columns(target, layout, columns, pack(new, layout))
            expected[:, columns] = new
            assert torch.equal(unpack(target, layout), expected)


@layouts
def test_few_codes_are_unpacked_at_a_time(
    layout: NibbleLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows or pieces there are: no tensor of codes passes `SHUFFLE_CODES`."""
    limit, largest = 1 << 12, 0
    monkeypatch.setattr(slicing, "SHUFFLE_CODES", limit)

    def counting(codes: Tensor, layout: NibbleLayout) -> Tensor:
        nonlocal largest
        largest = max(largest, codes.numel())
        return pack(codes, layout)

    monkeypatch.setattr(slicing, "pack", counting)
    codes = random_codes(150, 512)
    piece = packed_rows(codes, layout, 1, 150)
    many = piece._replace(chosen=torch.arange(149).repeat(4))
    for pieces in ([piece], [piece] * 5, [many]):
        largest = 0
        join_rows(pieces, layout)
        assert 0 < largest <= limit
    largest = 0
    write_rows(piece.qdata, layout, 1, 140, pack(padded(codes[:139]), layout))
    assert 0 < largest <= limit


def test_a_low_cut_of_a_tall_weight_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are measured by the blocks that are unpacked, not by the rows above them."""
    layout, calls = layout_named("avx512"), 0
    monkeypatch.setattr(slicing, "SHUFFLE_CODES", 64 * 34)

    def counting(codes: Tensor, layout: NibbleLayout) -> Tensor:
        nonlocal calls
        calls += 1
        return pack(codes, layout)

    monkeypatch.setattr(slicing, "pack", counting)
    join_rows([packed_rows(random_codes(1024, 34), layout, 1001, 1020)], layout)
    assert calls == 1


# --- the op -------------------------------------------------------------------------------------


def arguments(index: Tensor | None = None) -> tuple[object, ...]:
    a = pack(padded(random_codes(100, 34)), layout_named("avx512"))
    b = pack(padded(random_codes(40, 34, 1)), layout_named("avx2"))
    return [a, b], ["avx512", "avx2"], [100, 3, 90, 40, 0, 33], [index, None], "default"


@pytest.mark.parametrize("index", [None, torch.tensor([5, 0, 86, -1])], ids=["all", "chosen"])
def test_opcheck(index: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.torchao_int4cpu.join_rows.default, arguments(index))


def test_the_op_gives_the_same_when_compiled() -> None:
    pieces = [
        packed_rows(random_codes(100, 34), layout_named("avx512"), 3, 90),
        packed_rows(random_codes(40, 34, 1), layout_named("avx2"), 0, 40)._replace(
            chosen=torch.tensor([7, 0, -1])
        ),
    ]
    target = layout_named("default")
    expected = join_rows(pieces, target)
    assert torch.equal(traceable_join_rows(pieces, target), expected)
    compiled = torch.compile(traceable_join_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pieces, target), expected)
    meta = [piece._replace(qdata=piece.qdata.to("meta"), chosen=None) for piece in pieces]
    assert traceable_join_rows(meta, target).shape == (-(-(87 + 40) // 16) * 16, 17)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({2: [100, 3, 101, 40, 0, 33]}, ValueError, r"\[112, 17\] and rows 3:101 of 100"),
        ({2: [200, 3, 101, 40, 0, 33]}, ValueError, "rows 3:101 of 200"),
        ({2: [100, -1, 9, 40, 0, 33]}, ValueError, "rows -1:9"),
        ({2: [100, 9, 9, 40, 0, 33]}, ValueError, "rows 9:9"),
        ({1: ["avx512", "sse"]}, ValueError, "layout 'sse' is not known"),
        ({4: "sse"}, ValueError, "layout 'sse' is not known"),
        ({3: [torch.tensor([87]), None]}, IndexError, "index 87 is out of range.* choose -87 to 86"),
        ({3: [torch.tensor([-88]), None]}, IndexError, "index -88 is out of range"),
    ],
)
def test_the_op_refuses_what_does_not_fit(
    change: dict[int, object], error: type[Exception], message: str
) -> None:
    """It may come from a file: an exported program holds such calls."""
    given_arguments = list(arguments())
    for position, value in change.items():
        given_arguments[position] = value
    with pytest.raises(error, match=message):
        torch.ops.torchao_int4cpu.join_rows(*given_arguments)


@pytest.mark.parametrize(
    "part",
    [
        torch.zeros(112, 17),
        torch.zeros(100, 17, dtype=torch.uint8),
        torch.zeros(112, 16, dtype=torch.uint8),
        torch.zeros(112, 34, dtype=torch.uint8)[:, ::2],
        torch.zeros(1, 112, 17, dtype=torch.uint8),
    ],
    ids=["dtype", "rows", "columns", "strides", "dimensions"],
)
def test_the_op_refuses_other_parts(part: Tensor) -> None:
    good = pack(padded(random_codes(40, 34)), layout_named("avx2"))
    with pytest.raises(ValueError, match=r"join_rows got .*; it takes contiguous uint8"):
        torch.ops.torchao_int4cpu.join_rows(
            [good, part], ["avx2", "avx512"], [40, 0, 33, 100, 3, 90], [None, None], "default"
        )
