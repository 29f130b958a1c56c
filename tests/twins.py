"""A 4-bit weight and its dense twin, to which the same is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.numerics import native
from tests.weights import random_value, weight_in
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor


class Refused(Exception):
    """The model says that this must raise."""


@dataclass(frozen=True, eq=False, repr=False)
class Twin:
    """What a 4-bit weight is: codes ``[..., N, K]``, scale and zero ``[..., N, G]``, all plain.

    Where our weight is a view, these are views; where it is a repacked copy, they are copies, and
    ``read_only``. ``turned`` is the transposed view. ``layout`` decides which cuts are views.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    layout: str
    dtype: torch.dtype
    pre_scale: Tensor | None
    turned: bool = False
    read_only: bool = False

    def __repr__(self) -> str:
        return f"Twin({self.shape}, groups of {self.group_size}, {self.layout}, turned={self.turned})"

    @property
    def stack(self) -> bool:
        return self.codes.ndim == 3

    @property
    def shape(self) -> list[int]:
        *stack, n, k = self.codes.shape
        return [*stack, k, n] if self.turned else [*stack, n, k]

    def along(self, dim: int) -> str:
        """``"E"``, ``"N"`` or ``"K"``."""
        names = "ENK"[-len(self.shape) :]
        name = names[dim]
        return {"N": "K", "K": "N"}.get(name, name) if self.turned else name

    def parts(self, change: Callable[[Tensor], Tensor], **others: Any) -> Twin:
        codes, scale, zero = (change(part) for part in (self.codes, self.scale, self.zero))
        return replace(self, codes=codes, scale=scale, zero=zero, **others)

    # --- cuts

    def narrow(self, dim: int, start: int, length: int) -> Twin:
        axis, stop = self.along(dim), start + length
        if length < 1:
            raise Refused
        if axis == "E":
            return self.parts(lambda part: part[start:stop])
        n, k = self.codes.shape[-2:]
        if axis == "N":
            cut = self.parts(lambda part: part[..., start:stop, :])
            block = LAYOUTS[self.layout].rows_per_block
            is_view = all(border % block == 0 or border == n for border in (start, stop))
            return cut if is_view else cut.copied(read_only=True)
        if (start, stop) == (0, k):
            return self.parts(lambda part: part[:])
        size = self.group_size
        if any(border % size and border != k for border in (start, stop)):
            raise Refused
        groups = slice(start // size, -(-stop // size))
        scale = self.pre_scale
        return replace(
            self,
            codes=self.codes[..., start:stop],
            scale=self.scale[..., groups],
            zero=self.zero[..., groups],
            pre_scale=scale[start:stop] if scale is not None and scale.numel() > 1 else scale,
        ).copied(read_only=True, scale_too=True)

    def split(self, sizes: Sequence[int], dim: int) -> list[Twin]:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.narrow(dim, start, size) for start, size in zip(starts, sizes)]

    def chunk(self, count: int, dim: int) -> list[Twin]:
        total = self.shape[dim]
        size = -(-total // count)
        return self.split([min(size, total - start) for start in range(0, total, size)], dim)

    def select(self, dim: int, index: int) -> Twin:
        if not self.stack or dim != 0:
            raise Refused
        return self.parts(lambda part: part[index])

    def unbind(self) -> list[Twin]:
        return [self.select(0, i) for i in range(self.shape[0])]

    def take(self, index: Tensor) -> Twin:
        if not self.stack and self.turned:
            raise Refused
        return self.parts(lambda part: part[index]).copied(scale_too=True)

    # --- shapes

    def transpose(self) -> Twin:
        return replace(self.parts(lambda part: part[:]), turned=not self.turned)

    def unsqueeze(self) -> Twin:
        if self.stack:
            raise Refused
        return self.parts(lambda part: part[None])

    def squeeze(self) -> Twin:
        return self.parts(lambda part: part[0]) if self.stack and self.shape[0] == 1 else self.detach()

    def expand(self, count: int) -> Twin:
        if self.stack and self.shape[0] not in (1, count):
            raise Refused
        stack = self if self.stack else self.unsqueeze()
        return stack.parts(lambda part: part.expand(count, -1, -1))

    def detach(self) -> Twin:
        return self.parts(lambda part: part[:])

    # --- copies

    def copied(self, read_only: bool = False, scale_too: bool = False) -> Twin:
        scale = self.pre_scale
        scale = scale.clone() if scale is not None and scale_too else scale
        return self.parts(Tensor.clone, read_only=read_only, pre_scale=scale)

    def clone(self) -> Twin:
        return self.copied(scale_too=True)

    def to(self, dtype: torch.dtype) -> Twin:
        return self if dtype == self.dtype else replace(self.clone(), dtype=dtype)

    def copy_(self, source: Twin) -> None:
        mine, other = self.pre_scale, source.pre_scale
        shapes = [None if s is None else list(s.shape) for s in (mine, other)]
        same = (source.shape, source.group_size, source.turned) == (
            self.shape,
            self.group_size,
            self.turned,
        )
        expanded = self.stack and self.shape[0] > 1 and self.codes.stride(0) == 0
        if not same or shapes[0] != shapes[1] or self.read_only or expanded:
            raise Refused
        for name in ("codes", "scale", "zero"):
            getattr(self, name).copy_(getattr(source, name))
        if mine is not None and other is not None:
            mine.copy_(other)

    def zeros(self, shape: Sequence[int]) -> Twin:
        """A new weight of that shape as it is stored, all 0."""
        *stack, n, k = shape
        scale = self.pre_scale
        if scale is not None:
            scale = torch.ones(k) if scale.numel() > 1 else torch.ones_like(scale)
        groups = -(-k // self.group_size)
        return replace(
            self,
            codes=torch.full((*stack, n, k), 8, dtype=torch.uint8),
            scale=torch.zeros(*stack, n, groups, dtype=self.scale.dtype),
            zero=torch.zeros(*stack, n, groups, dtype=self.scale.dtype),
            layout=native().name,
            pre_scale=scale,
            read_only=False,
        )

    def pad(self, dim: int, amount: int) -> Twin:
        axis = self.along(dim)
        size = list(self.codes.shape)
        where = "ENK"[-len(size) :].index(axis)
        if amount < 0 or (amount and axis == "K" and size[-1] % self.group_size):
            raise Refused
        if amount == 0:
            return self.clone()
        size[where] = amount
        zeros = self.zeros(size)
        if axis != "K":
            zeros = replace(zeros, pre_scale=self.pre_scale)
        return cat([self, zeros], dim)


def cat(twins: Sequence[Twin], dim: int) -> Twin:
    first = twins[0]
    axis = first.along(dim)
    where = {"E": 0, "N": -2, "K": -1}[axis]
    for i, twin in enumerate(twins):
        shapes = [[s for d, s in enumerate(t.shape) if d != dim % len(t.shape)] for t in (first, twin)]
        kinds = [(t.stack, t.turned, t.dtype, t.group_size) for t in (first, twin)]
        full = twin.codes.shape[-1] % twin.group_size == 0 or i == len(twins) - 1
        if shapes[0] != shapes[1] or kinds[0] != kinds[1] or (axis == "K" and not full):
            raise Refused
        if axis != "K" and not same_scale(first.pre_scale, twin.pre_scale):
            raise Refused
    scale = None if first.pre_scale is None else first.pre_scale.clone()
    if axis == "K" and any(t.pre_scale is not None for t in twins):
        scale = torch.cat(
            [
                (torch.ones(1) if t.pre_scale is None else t.pre_scale.reshape(-1)).expand(k_of(t))
                for t in twins
            ]
        )
    layouts = {t.layout for t in twins}
    return replace(
        first,
        codes=torch.cat([t.codes for t in twins], where),
        scale=torch.cat([t.scale for t in twins], where),
        zero=torch.cat([t.zero for t in twins], where),
        layout=first.layout if len(layouts) == 1 else native().name,
        pre_scale=scale,
        read_only=False,
    )


def k_of(twin: Twin) -> int:
    return twin.codes.shape[-1]


def same_scale(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)


@dataclass
class Pair:
    """A packed tensor and its twin."""

    packed: Any
    twin: Twin
    whole: bool = False  # made by `new_zeros`, to be filled


def assert_same(pair: Pair) -> None:
    packed, twin = pair.packed, pair.twin
    assert type(packed) is (Int4TransposedTensor if twin.turned else Int4OpaqueTensor)
    assert list(packed.shape) == twin.shape
    weight = packed.untransposed() if twin.turned else packed
    value = weight.to_groupwise()
    assert torch.equal(value.codes, twin.codes)
    assert torch.equal(value.scale, twin.scale)
    assert torch.equal(value.zero, twin.zero)
    assert weight.qdata_layout == twin.layout
    assert weight.group_size == twin.group_size
    assert weight.dtype == packed.dtype == twin.dtype
    assert weight.read_only == twin.read_only
    assert same_scale(weight.act_pre_scale, twin.pre_scale)


def new_pair(
    shape: Sequence[int],
    group_size: int,
    layout: str,
    dtype: torch.dtype = torch.bfloat16,
    pre_scale: Tensor | None = None,
    seed: int = 0,
    turned: bool = False,
) -> Pair:
    """``shape`` as it is stored."""
    value = random_value(tuple(shape), group_size, seed)
    ours, theirs = (None if pre_scale is None else pre_scale.clone() for _ in range(2))
    packed: Any = weight_in(layout, value, dtype, ours)
    parts = value.codes.clone(), value.scale.clone(), value.zero.clone()
    twin = Twin(*parts, group_size, layout, dtype, theirs, turned)
    return Pair(packed.transpose(-2, -1) if turned else packed, twin)
