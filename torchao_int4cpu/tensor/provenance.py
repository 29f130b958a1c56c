"""Where a weight came from in this process: what it was cut from, and what copies into it reach."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

#: An `Int4OpaqueTensor`: its module imports this one.
Weight: TypeAlias = Any


class Cut(NamedTuple):
    """``source.narrow(dim, start, stop - start)``, and whether it is a view of ``source``."""

    source: Weight
    dim: int
    start: int
    stop: int
    aliases: bool


class Filling:
    """Zeros that nothing was copied into yet, with all their views and cuts: see `Provenance`.

    Whoever allocates a weight before it knows the file cannot tell the dtype of the scales. Zeros are
    the same bytes in both, so until the first copy it can change.
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[Weight]] | None = []

    def add(self, member: Weight) -> None:
        """Remember another view or cut, as long as nothing was copied."""
        if self._members is not None:
            self._members = [known for known in self._members if known() is not None]
            self._members.append(weakref.ref(member))

    def start(self, qparams_dtype: torch.dtype) -> None:
        """Before a copy of scales in that dtype: if it is the first, all get that dtype."""
        members = [member for known in self._members or () if (member := known()) is not None]
        self._members = None
        others = [member for member in members if member.scale_and_zero.dtype != qparams_dtype]
        if any(part.is_cpu and bool(part.any()) for part in (t.scale_and_zero for t in others)):
            return  # numbers came another way, and are of the dtype that they are in
        for member in others:
            member.scale_and_zero = member.scale_and_zero.view(qparams_dtype)


@dataclass(frozen=True)
class Provenance:
    """Where a weight came from in this process. It is not saved, and only ``read_only`` is traced.

    Attributes:
        read_only: whether this is a copy where torch would give a view, because its bytes had to be
            repacked: what is written to it would not get where it should, so ``copy_`` refuses.
        filled_by_cuts: whether `new_zeros` made it, or what it was cut from, to be filled piece by
            piece: what is copied into a cut is written back.
        filling: what they are part of, and decides on the dtype of the scales.
        cut_from: where such a cut was cut from.
        split_from: the dimension, and its size, that `split` cut this piece from, for messages.
        gathered: shards that cannot be one weight (`distributed.collectives`), for `split`.
    """

    read_only: bool = False
    filled_by_cuts: bool = False
    filling: Filling | None = None
    cut_from: Cut | None = None
    split_from: tuple[int, int] | None = None
    gathered: tuple[Tensor, ...] | None = None


#: Of a weight of its own.
OWN = Provenance()
