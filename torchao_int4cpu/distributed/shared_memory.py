"""Weights in memory that processes share, for `torch.multiprocessing` and ``share_memory``."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn

from torchao_int4cpu.dispatch.table import implements_function
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of


@implements_function(torch.Tensor.share_memory_)
def handle_share_memory_(t: Int4Weight) -> Int4Weight:
    """Move every part into shared memory, in place."""
    for part in weight_of(t).parts().values():
        part.share_memory_()
    return t


@implements_function(torch.Tensor.is_shared)
def handle_is_shared(t: Int4Weight) -> bool:
    """Whether every part lies in shared memory."""
    return all(part.is_shared() for part in weight_of(t).parts().values())


def _reduce(t: Int4Weight) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """What a queue or a spawned process is sent: the parts, which torch puts into shared memory."""
    weight = weight_of(t)
    is_parameter = isinstance(t, nn.Parameter)
    attributes = (tuple(weight.shape), weight.qdata_layout, weight.dtype, weight.group_size)
    return _rebuild, (type(t), is_parameter, weight.parts(), *attributes)


def _rebuild(
    cls: type[Int4Weight],
    is_parameter: bool,
    parts: dict[str, Tensor],
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    group_size: int,
) -> Tensor:
    weight = Int4OpaqueTensor(
        **parts,  # type: ignore[arg-type]  # as its class declares them
        block_size=[1] * (len(shape) - 1) + [group_size],
        shape=shape,
        qdata_layout=layout,
        dtype=dtype,
    )
    t = Int4TransposedTensor(weight) if issubclass(cls, Int4TransposedTensor) else weight
    return nn.Parameter(t, requires_grad=False) if is_parameter else t


for _cls in (Int4OpaqueTensor, Int4TransposedTensor):
    ForkingPickler.register(_cls, _reduce)
