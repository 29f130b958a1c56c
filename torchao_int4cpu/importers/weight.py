"""A weight of another tool as a tensor, with scales and zeros in the dtype that keeps them best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, GroupwiseInt4
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


def as_weight(weight: GroupwiseInt4, dtype: torch.dtype) -> Int4OpaqueTensor:
    """Pack a weight whose logical dtype is ``dtype``.

    Raises:
        ValueError: a scale or zero fits neither float16 nor bfloat16.
    """
    return Int4OpaqueTensor.from_groupwise(weight, dtype=dtype, qparams_dtype=qparams_dtype_of(weight))


def common_order(orders: Sequence[Tensor | None]) -> Tensor | None:
    """The order of columns that all experts of a stack have.

    Raises:
        ValueError: there are two.
    """
    first = orders[0]
    if any((first is None) != (o is None) for o in orders) or not all(
        first is None or o is None or torch.equal(first, o) for o in orders
    ):
        raise ValueError(
            "the experts have their columns in orders of their own (desc_act), and a stack has one for "
            "all; take a checkpoint with desc_act=false, or load this one with GPTQModel after "
            "torchao_int4cpu.import_checkpoints(False)"
        )
    return first


def qparams_dtype_of(weight: GroupwiseInt4) -> torch.dtype:
    """The dtype that moves no weight further than the other would: float16, or bfloat16.

    Not float16 where `Int4OpaqueTensor.from_groupwise` refuses it.
    """
    moved = _moved(weight, torch.float16)
    fits = moved <= 2.0**-11 and moved <= _moved(weight, torch.bfloat16)
    return torch.float16 if fits else torch.bfloat16


def _moved(weight: GroupwiseInt4, dtype: torch.dtype) -> float:
    """How far rounding to a dtype moves a weight at most, relative to the largest of its group."""
    scale, zero = weight.scale.double(), weight.zero.double()
    moved = CODE_OFFSET * (scale.to(dtype) - scale).abs() + (zero.to(dtype) - zero).abs()
    largest = CODE_OFFSET * scale.abs() + zero.abs()
    return float((moved / largest).nan_to_num(nan=0.0, posinf=torch.inf).max())
