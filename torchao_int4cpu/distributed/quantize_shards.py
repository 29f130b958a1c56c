"""A weight that is sharded already (DTensor) and is to be quantized: each process does its own piece.

Groups run along K, so pieces of rows have the codes of the whole weight whatever N is, and pieces of
columns have them if they end where groups end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchao_int4cpu.format.slicing import legal_pieces


def is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor, sharded or replicated."""
    if type(weight) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # not before there may be one: it takes a while

    return isinstance(weight, DTensor)


def piece_of(model: nn.Module | None, weight: Any, group_size: int, k_dim: int) -> Tensor:
    """What this process has of a DTensor in ``model``.

    Raises:
        ValueError: on all processes alike, if one has no piece, a piece ends within a group, pieces are
            to be added up, or FSDP2 manages the model.
    """
    if model is not None and _uses_fsdp(model):
        raise ValueError(
            "fully_shard has sharded this model, and FSDP2 takes no other kind of weight afterwards; "
            "quantize the model first, then call fully_shard"
        )
    for placement in weight.placements:
        if not placement.is_replicate() and type(placement).__name__ != "Shard":
            raise ValueError(
                f"its placements are {weight.placements}; only Shard and Replicate can be quantized, "
                "so quantize the model before it is sharded"
            )
    for dim in range(weight.ndim):
        _check_pieces(weight, dim, group_size if dim == k_dim % weight.ndim else 1)
    piece: Tensor = weight.to_local()
    return piece


def sharded_like(weight: Any, piece: Tensor) -> Tensor:
    """A DTensor of the pieces of all processes, in the places of those of ``weight``."""
    made: Tensor = type(weight).from_local(
        piece,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return made


def _uses_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _check_pieces(weight: Any, dim: int, unit: int) -> None:
    """Check that every process has a piece, and that the pieces end at multiples of ``unit``."""
    size = weight.shape[dim]
    for count, placement in zip(weight.device_mesh.shape, weight.placements):
        if not placement.is_shard(dim) or count == 1:
            continue
        piece = -(-size // count)
        if piece % unit or -(-size // piece) != count:
            raise ValueError(
                f"dimension {dim} of {size} is shared by {count} processes in pieces of {piece}, "
                + (f"and groups of {unit} share a scale" if unit > 1 else "and none may be empty")
                + f"; use {legal_pieces(size, unit)} processes"
            )
        size = piece
