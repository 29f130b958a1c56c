"""A patch of `torch.nn.parallel.DistributedDataParallel`, which at first sends parameters as memory.

A weight of several parts has none, and it is frozen, so gradients never concern it: DDP leaves it out,
and here it is made that of the first rank, in the layout of each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchao_int4cpu.dispatch.copies import copy_into
from torchao_int4cpu.distributed.collectives import DTYPE_NUMBERS
from torchao_int4cpu.format.layout import layout_named, layout_numbered
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4Weight, weight_of


def _patch() -> None:
    original = DistributedDataParallel.__init__
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def init(self: DistributedDataParallel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        weights = {
            name: parameter
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if isinstance(parameter, Int4Weight)
        }
        if weights:
            ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
            names: Any = [*ignored, *weights]
            module._ddp_params_and_buffers_to_ignore = names
        original(self, module, *args, **kwargs)
        if kwargs.get("init_sync", True):
            for parameter in weights.values():
                _take_from_first(weight_of(parameter), self.process_group)

    init.torchao_int4cpu = True  # type: ignore[attr-defined]
    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


def _take_from_first(weight: Int4OpaqueTensor, group: Any) -> None:
    """Replace the parts by those of the first rank, repacked if that has another layout.

    Raises:
        ValueError: the ranks have weights of other shapes, groups or dtypes.
    """
    mine = _description(weight)
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_ranks, mine, group=group)
    # Every rank sees it, so that none waits for another that has given up.
    if not all(torch.equal(other[1:], mine[1:]) for other in all_ranks):
        shown = [other[1:].tolist() for other in all_ranks]
        raise ValueError(
            f"DistributedDataParallel got a 4-bit weight of {shown} (shape, group size, dtype of "
            "scales, parts) on its ranks; all must hold the same model, so quantize it the same way on "
            "each"
        )
    received = {}
    for name, part in weight.parts().items():
        received[name] = part.contiguous().clone()
        dist.broadcast(received[name], group=group, group_src=0)
    layout = layout_numbered(int(all_ranks[0][0])).name
    copy_into(weight, weight.with_parts(received, weight.shape, layout=layout))


def _description(weight: Int4OpaqueTensor) -> Tensor:
    """int64: the layout, and what has to be the same on all ranks, of one length for every weight."""
    shape = [0] * (3 - weight.ndim) + list(weight.shape)
    sizes = [part.numel() for part in weight.parts().values()]
    number = layout_named(weight.qdata_layout).number
    qparams = DTYPE_NUMBERS[weight.scale_and_zero.dtype]
    return torch.tensor([number, *shape, weight.group_size, qparams, len(sizes), sum(sizes)])


_patch()
