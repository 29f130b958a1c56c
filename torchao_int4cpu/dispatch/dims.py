"""Which weight and which dimension of it is meant, whichever way it is turned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.conversions import alias, same_parts
from torchao_int4cpu.dispatch.table import Args, Kwargs, Weight
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor

aten = torch.ops.aten


def dim_of(t: Tensor, dim: int) -> int:
    """``dim`` counted from the front.

    Raises:
        IndexError: there is no such dimension.
    """
    if not -t.ndim <= dim < t.ndim:
        raise IndexError(
            f"dimension {dim} is out of range for a 4-bit weight of shape {list(t.shape)}; "
            f"choose {-t.ndim} to {t.ndim - 1}"
        )
    return dim % t.ndim


def turned_dim(t: Tensor, dim: int) -> int:
    """The dimension of the weight that is ``dim`` of its transposed view."""
    return {t.ndim - 1: t.ndim - 2, t.ndim - 2: t.ndim - 1}.get(dim, dim)


def on_the_weight(t: Weight, change: Callable[[Int4OpaqueTensor], Int4OpaqueTensor]) -> Weight:
    """Change the weight itself, or the one behind a transposed view."""
    if isinstance(t, Int4TransposedTensor):
        return Int4TransposedTensor(change(t.back()))
    return change(t)


def aliased(func: Any, args: Args, kwargs: Kwargs) -> Weight:
    """The same parts in another tensor, as the output of any op that changes nothing."""
    t = args[0]
    if isinstance(t, Int4TransposedTensor):
        return Int4TransposedTensor(same_parts(t.back()))
    if func in (aten.reshape.default, aten._unsafe_view.default):  # not marked as views
        return same_parts(t)
    return alias(func, args, kwargs)
