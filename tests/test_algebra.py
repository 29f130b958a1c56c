"""The algebra of a weight: whatever is done to the packed tensor equals doing it to the codes.

Random sequences of operations are applied to packed tensors and to `Twin`, a small model that does
the same to plain codes, scales and zeros with torch's own ops on plain tensors. So torch's views are
the judge of aliasing, too: a write must show where the model's write shows, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import native, product_bound
from tests.twins import Pair, Refused, Twin, assert_same, cat, k_of, new_pair
from tests.weights import ALL_LAYOUTS
from torchao_int4cpu.format.packed import int4_mm_reference

# --- the operations, as torch is asked for them and as the model is -----------------------------------


class Sequencer:
    """Draws operations, applies each to both sides, and compares all that there is."""

    def __init__(self, data: st.DataObject, pairs: list[Pair]) -> None:
        self.data = data
        self.pairs = pairs

    def draw(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self.data.draw(strategy)

    def step(self) -> None:
        # The latest more often, and cuts and writes more often: a write to a cut is what is to be seen.
        pair = self.draw(st.sampled_from([*self.pairs, *self.pairs[-2:] * 3]))
        often = (
            ["narrow"] * 5 + ["copy_"] * 6
            if pair.twin.read_only or len(self.pairs) > 1
            else ["narrow"] * 5
        )
        name = self.draw(st.sampled_from([*OPERATIONS, *often]))
        ours, theirs = getattr(self, name)(pair)
        self.both(ours, theirs)
        for other in self.pairs:
            assert_same(other)

    def both(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
        """Keep what comes out; if the model refuses, ours must raise one of the errors for users."""
        try:
            expected = theirs()
        except Refused:
            with pytest.raises((ValueError, TypeError, IndexError)):
                ours()
            return
        results = ours()
        if expected is None:
            return
        single = isinstance(expected, Twin)
        for packed, twin in zip([results] if single else results, [expected] if single else expected):
            pair = Pair(packed, twin)
            assert_same(pair)
            self.pairs.append(pair)
        assert single or len(results) == len(expected)

    def border(self, twin: Twin, dim: int) -> int:
        """A place to cut, often a legal one."""
        total = twin.shape[dim]
        step = {"E": 1, "N": self.draw(st.sampled_from([1, 16, 32, 64])), "K": twin.group_size}[
            twin.along(dim)
        ]
        step = self.draw(st.sampled_from([step, step, step, 1]))
        return min(total, int(step) * int(self.draw(st.integers(0, -(-total // step)))))

    def a_dim(self, twin: Twin) -> int:
        return int(self.draw(st.integers(0, len(twin.shape) - 1)))

    def narrow(self, pair: Pair) -> Any:
        dim = self.a_dim(pair.twin)
        start, stop = sorted(self.border(pair.twin, dim) for _ in range(2))
        if start == stop != pair.twin.shape[dim]:  # else too many empty ones
            stop = pair.twin.shape[dim]
        spelled = self.draw(st.booleans())

        def ours() -> Any:
            if spelled:
                return pair.packed[(slice(None),) * dim + (slice(start, stop),)]
            return pair.packed.narrow(dim - pair.packed.ndim, start, stop - start)

        if spelled and (start, stop) == (0, pair.twin.shape[dim]):
            return (lambda: pair.packed.detach()), pair.twin.detach
        return ours, lambda: pair.twin.narrow(dim, start, stop - start)

    def split(self, pair: Pair) -> Any:
        dim = self.a_dim(pair.twin)
        borders = sorted({0, pair.twin.shape[dim], *(self.border(pair.twin, dim) for _ in range(2))})
        sizes = [b - a for a, b in itertools.pairwise(borders)]
        return (lambda: pair.packed.split(sizes, dim)), lambda: pair.twin.split(sizes, dim)

    def chunk(self, pair: Pair) -> Any:
        dim, count = self.a_dim(pair.twin), self.draw(st.integers(1, 4))
        return (lambda: pair.packed.chunk(count, dim)), lambda: pair.twin.chunk(count, dim)

    def select(self, pair: Pair) -> Any:
        index = self.draw(st.integers(-pair.twin.shape[0], pair.twin.shape[0] - 1))
        return (lambda: pair.packed[index]), lambda: pair.twin.select(0, index)

    def unbind(self, pair: Pair) -> Any:
        return (lambda: list(pair.packed.unbind())), pair.twin.unbind

    def index(self, pair: Pair) -> Any:
        total = pair.twin.shape[0]
        chosen = self.draw(st.lists(st.integers(-total, total - 1), min_size=1, max_size=5))
        spelling = self.draw(st.sampled_from(["index", "select", "mask"]))
        index = torch.tensor(chosen)
        if spelling == "mask":
            mask = torch.zeros(total, dtype=torch.bool)
            mask[index] = True
            return (lambda: pair.packed[mask]), lambda: pair.twin.take(mask.nonzero().flatten())
        if spelling == "select":
            index = index % total
            return (lambda: pair.packed.index_select(0, index)), lambda: pair.twin.take(index)
        return (lambda: pair.packed[index]), lambda: pair.twin.take(index)

    def transpose(self, pair: Pair) -> Any:
        dims = len(pair.twin.shape)
        order = (*range(dims - 2), dims - 1, dims - 2)
        spellings: list[Callable[[Any], Any]] = [
            lambda t: t.transpose(-1, -2),
            lambda t: t.mT,
            lambda t: t.permute(order),
        ]
        if dims == 2:
            spellings += [lambda t: t.t(), lambda t: t.T]
        spelled = self.draw(st.sampled_from(spellings))
        return (lambda: spelled(pair.packed)), pair.twin.transpose

    def unsqueeze(self, pair: Pair) -> Any:
        return (lambda: pair.packed.unsqueeze(0)), pair.twin.unsqueeze

    def squeeze(self, pair: Pair) -> Any:
        def theirs() -> Twin:
            if not pair.twin.stack and pair.twin.shape[0] == 1:
                raise Refused
            return pair.twin.squeeze()

        return (lambda: pair.packed.squeeze(0)), theirs

    def expand(self, pair: Pair) -> Any:
        count = self.draw(st.integers(1, 3))
        return (lambda: pair.packed.expand(count, -1, -1)), lambda: pair.twin.expand(count)

    def view(self, pair: Pair) -> Any:
        shape = list(pair.twin.shape)
        if len(shape) == 2 and self.draw(st.booleans()):
            return (lambda: pair.packed.view(1, -1, shape[1])), pair.twin.unsqueeze
        if shape[0] == 1 and len(shape) == 3 and self.draw(st.booleans()):
            return (lambda: pair.packed.reshape(shape[1:])), pair.twin.squeeze
        return (lambda: pair.packed.view(shape)), pair.twin.detach

    def detach(self, pair: Pair) -> Any:
        return pair.packed.detach, pair.twin.detach

    def clone(self, pair: Pair) -> Any:
        return pair.packed.clone, pair.twin.clone

    def to(self, pair: Pair) -> Any:
        dtype = self.draw(st.sampled_from([torch.bfloat16, torch.float32]))
        return (lambda: pair.packed.to(dtype)), lambda: pair.twin.to(dtype)

    def pad(self, pair: Pair) -> Any:
        dim, amount = self.a_dim(pair.twin), self.draw(st.integers(0, 40))
        padding = [0, 0] * (len(pair.twin.shape) - 1 - dim) + [0, amount]
        return (lambda: F.pad(pair.packed, padding)), lambda: pair.twin.pad(dim, amount)

    def cat(self, pair: Pair) -> Any:
        dim = self.a_dim(pair.twin)
        others = [p for p in self.pairs if len(p.twin.shape) == len(pair.twin.shape)]
        chosen = [
            pair,
            *(self.draw(st.sampled_from(others)) for _ in range(self.draw(st.integers(0, 2)))),
        ]
        order = self.draw(st.permutations(chosen))
        return (
            lambda: torch.cat([p.packed for p in order], dim),
            lambda: cat([p.twin for p in order], dim),
        )

    def stack(self, pair: Pair) -> Any:
        chosen = [pair, self.draw(st.sampled_from(self.pairs))]
        return (
            lambda: torch.stack([p.packed for p in chosen]),
            lambda: cat([p.twin.unsqueeze() for p in chosen], 0),
        )

    def copy_(self, pair: Pair) -> Any:
        """Into whatever it is: a whole weight, a view, a view of a view, a repacked copy."""
        twin = pair.twin
        seed = self.draw(st.integers(0, 1000))
        scale = twin.pre_scale
        source = new_pair(
            twin.codes.shape,
            twin.group_size,
            self.draw(st.sampled_from(ALL_LAYOUTS)),
            pre_scale=None if scale is None else torch.rand(scale.shape) + 0.5,
            seed=seed,
            turned=twin.turned,
        )
        return (lambda: pair.packed.copy_(source.packed)), lambda: twin.copy_(source.twin)

    def copy_other(self, pair: Pair) -> Any:
        source = self.draw(st.sampled_from(self.pairs))
        packed, twin = source.packed.clone(), source.twin.clone()
        return (lambda: pair.packed.copy_(packed)), lambda: pair.twin.copy_(twin)


OPERATIONS = [
    name
    for name in vars(Sequencer)
    if not name.startswith("__") and name not in ("draw", "step", "both", "border", "a_dim")
]

SHAPES = st.one_of(
    st.tuples(st.integers(1, 150), st.integers(1, 130)),
    st.tuples(
        st.integers(1, 3), st.sampled_from([16, 40, 64, 100, 128]), st.sampled_from([32, 70, 128])
    ),
)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    shape = draw(SHAPES)
    scale = draw(st.sampled_from(["none", "none", "one", "vector"]))
    vector = torch.rand(shape[-1]) + 0.5
    return new_pair(
        shape,
        draw(st.sampled_from([32, 64])),
        draw(st.sampled_from(ALL_LAYOUTS)),
        pre_scale={"none": None, "one": torch.rand(1), "vector": vector}[scale],
        seed=draw(st.integers(0, 1000)),
        turned=draw(st.booleans()),
    )


@pytest.mark.slow
@settings(max_examples=400)
@given(first=pairs(), data=st.data())
def test_any_sequence_of_operations(first: Pair, data: st.DataObject) -> None:
    sequencer = Sequencer(data, [first])
    for _ in range(data.draw(st.integers(3, 9))):
        sequencer.step()
        sequencer.pairs = sequencer.pairs[-12:]


@settings(max_examples=150)
@given(first=pairs(), data=st.data())
def test_a_new_weight_is_filled_cut_by_cut(first: Pair, data: st.DataObject) -> None:
    """As sharding code does with ``new_zeros``: on block borders or not, through views of cuts or not.

    Here every cut is a view, as torch's are, so the model need not know of layouts.
    """
    stored = data.draw(SHAPES)
    twin = first.twin.zeros(stored)
    shape = twin.shape
    packed: Any = first.packed.new_zeros(shape)
    whole = Pair(packed, twin)
    assert_same(whole)
    sequencer = Sequencer(data, [whole])
    for _ in range(data.draw(st.integers(1, 4))):
        cut, view = whole.packed, whole.twin
        for _ in range(data.draw(st.integers(1, 3))):
            cut, view = one_cut(sequencer, cut, view)
        ours, theirs = sequencer.copy_(Pair(cut, view))
        theirs()
        ours()
        assert_same(whole)
        assert_same(Pair(cut, replace(view, read_only=False)))


def one_cut(sequencer: Sequencer, packed: Any, twin: Twin) -> tuple[Any, Twin]:
    """A cut or another view, and the same as a view of the model whatever the layout is."""
    kind = sequencer.draw(
        st.sampled_from(["narrow", "select", "unsqueeze", "transpose", "detach", "squeeze"])
    )
    if kind == "select" and twin.stack:
        return packed[0], twin.select(0, 0)
    if kind == "unsqueeze" and not twin.stack:
        return packed.unsqueeze(0), twin.unsqueeze()
    if kind == "squeeze" and twin.stack and twin.shape[0] == 1:
        return packed.squeeze(0), twin.squeeze()
    if kind == "transpose":
        return packed.transpose(-2, -1), twin.transpose()
    if kind == "detach":
        return packed.detach(), twin.detach()
    dim = sequencer.a_dim(twin)
    start, stop = sorted(sequencer.border(twin, dim) for _ in range(2))
    size, k = twin.group_size, k_of(twin)
    axis = twin.along(dim)
    if axis == "K":
        start, stop = (b if b % size == 0 or b == k else b // size * size for b in (start, stop))
    if start == stop:
        start, stop = 0, twin.shape[dim]
    ours = packed.narrow(dim, start, stop - start)
    if axis == "E":
        return ours, twin.parts(lambda part: part[start:stop])
    if axis == "N":
        return ours, twin.parts(lambda part: part[..., start:stop, :])
    groups, scale = slice(start // size, -(-stop // size)), twin.pre_scale
    return ours, replace(
        twin,
        codes=twin.codes[..., start:stop],
        scale=twin.scale[..., groups],
        zero=twin.zero[..., groups],
        pre_scale=scale[start:stop] if scale is not None and scale.numel() > 1 else scale,
    )


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("shape", [(20, 160), (2, 20, 150)], ids=str)
def test_every_cut_along_k(layout: str, shape: tuple[int, ...]) -> None:
    """At borders of groups and at the end; anywhere else the nearest legal ones are named."""
    pair, k, size = new_pair(shape, 64, layout), shape[-1], 64
    for border in range(1, k):
        for start, length in ((0, border), (border, k - border)):
            if border % size == 0:
                cut = Pair(pair.packed.narrow(-1, start, length), pair.twin.narrow(-1, start, length))
                assert_same(cut)
                continue
            below = border // size * size
            nearest = [b for b in (below, below + size) if 0 < b < k]
            with pytest.raises(
                ValueError, match=f"at {border}; .*nearest: {' or '.join(map(str, nearest))}"
            ):
                pair.packed.narrow(-1, start, length)


SHARE_NOTHING: dict[str, Callable[[Any], Any]] = {
    "index": lambda t: t[torch.tensor([0, 1])],
    "index_select": lambda t: t.index_select(0, torch.tensor([1])),
    "cat": lambda t: torch.cat([t, t]),
    "cat along K": lambda t: torch.cat([t, t], -1),
    "stack": lambda t: torch.stack([t, t]) if t.ndim == 2 else torch.cat([t]),
    "pad": lambda t: F.pad(t, (0, 0, 0, 16)),
    "clone": lambda t: t.clone(),
    "to": lambda t: t.to(torch.float32),
    "new_zeros": lambda t: t.new_zeros(t.shape),
    "columns": lambda t: t[..., 32:].clone(),
}


@pytest.mark.parametrize("name", list(SHARE_NOTHING))
@pytest.mark.parametrize("shape", [(128, 64), (2, 64, 64)], ids=str)
@pytest.mark.parametrize("scale", [torch.rand(1) + 0.5, torch.rand(64) + 0.5], ids=["one", "vector"])
def test_what_is_written_to_a_copy_stays_there(
    name: str, shape: tuple[int, ...], scale: Tensor
) -> None:
    """``act_pre_scale`` included."""
    pair = new_pair(shape, 32, native().name, pre_scale=scale)
    made = SHARE_NOTHING[name](pair.packed)
    source = new_pair(made.shape, 32, native().name, pre_scale=made.act_pre_scale * 2, seed=1)
    made.copy_(source.packed)
    assert_same(Pair(made, replace(source.twin, dtype=made.dtype)))
    assert_same(pair)


def scaled(x: Tensor, weight: Any) -> Tensor:
    """What the codes are multiplied with."""
    return x if weight.act_pre_scale is None else x * weight.act_pre_scale.reshape(-1)


@pytest.mark.filterwarnings("ignore:a 4-bit weight is packed for")
def test_columns_with_and_without_a_scale() -> None:
    """Each brings its own; one without brings ones."""
    scales = [None, torch.rand(1) + 0.5, torch.rand(64) + 0.5]
    made = [
        new_pair((20, 64), 32, layout, pre_scale=s, seed=i)
        for i, (s, layout) in enumerate(zip(scales, ALL_LAYOUTS))
    ]
    for first, second in itertools.product(made, repeat=2):
        joined = torch.cat([first.packed, second.packed], 1)
        assert_same(Pair(joined, cat([first.twin, second.twin], 1)))
        x = torch.randn(3, 128)
        exact = sum(
            int4_mm_reference(scaled(part, pair.packed), pair.packed.packed())
            for part, pair in ((x[:, :64], first), (x[:, 64:], second))
        )
        bound = product_bound(scaled(x, joined), joined.packed(), x.dtype)  # type: ignore[attr-defined]
        error = (F.linear(x, joined).double() - exact).abs()
        assert bool((error <= 1.01 * bound).all())  # 1.01: x · s is rounded to float32 first
