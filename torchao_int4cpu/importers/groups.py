"""Groups of other tools: of which size they are, and as groups of 32, 64, 128 or 256, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import GROUP_SIZES, GroupwiseInt4


def group_size_of(k: int, groups: int, configured: int | None) -> int:
    """The columns of a group: files say the number of groups, and configs what most layers have.

    Args:
        k: K.
        groups: of a row, in the file.
        configured: what the checkpoint's config says, -1 for one group a row; None if it says nothing.

    Raises:
        ValueError: no size gives so many groups.
    """
    if configured is not None and configured > 0 and groups == -(-k // configured):
        return configured
    smallest = -(-k // groups) if groups > 0 else 0
    if groups < 1 or -(-k // smallest) != groups:
        raise ValueError(
            f"got {groups} groups of scales for {k} columns, which no group size gives; the file is "
            "damaged"
        )
    if k % groups == 0:
        return smallest
    largest = -(-k // (groups - 1)) - 1
    return next((size for size in GROUP_SIZES if smallest <= size <= largest), smallest)


def in_our_groups(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, act_order: Tensor | None = None
) -> GroupwiseInt4:
    """The same weight in the largest groups that there are here and that divide its own.

    Args:
        codes: uint8 ``[N, K]``, columns as the file has them.
        scale: float ``[N, ceil(K / group_size)]``; w = (code - 8) * scale + zero.
        zero: as scale.
        group_size: columns that share a scale; K or more for one group a row.
        act_order: int32 ``[K]``, the columns of the groups, one group behind the other; None if they
            follow each other.

    Raises:
        ValueError: no group size of ours divides it, as 16.
    """
    if group_size >= codes.shape[-1]:
        group_size = -(-codes.shape[-1] // max(GROUP_SIZES)) * max(GROUP_SIZES)
    ours = next((size for size in reversed(GROUP_SIZES) if group_size % size == 0), None)
    if ours is None:
        raise ValueError(
            f"got groups of {group_size} columns; a 4-bit weight here has groups of 32, 64, 128 or "
            "256, or of a multiple of these, so quantize the original weight with one of them"
        )
    if ours != group_size:
        groups = torch.arange(-(-codes.shape[-1] // ours)) * ours // group_size
        scale, zero = scale[:, groups], zero[:, groups]
    if act_order is not None:
        codes = codes[:, act_order.long()]
    return GroupwiseInt4(codes.contiguous(), scale.contiguous(), zero.contiguous(), ours, act_order)
