"""Handlers of `torch.distributed`: a 4-bit weight travels as its parts and the number of its layout.

The layout travels along because the processes may run on CPUs with different instruction sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.cuts import same_numbers
from torchao_int4cpu.dispatch.table import implements
from torchao_int4cpu.dispatch.transposition import transposed
from torchao_int4cpu.format.layout import LAYOUTS, layout_numbered
from torchao_int4cpu.kernels.ops.slicing import traceable_repack
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.provenance import Provenance
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

#: The dtypes of parts, as they are sent; 0 stands for no such part.
DTYPE_NUMBERS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.int32: 4}

#: One tensor of a weight, as it is sent.
_Send = Callable[[Int4OpaqueTensor], Tensor]


def handle_scatter_(
    output_tensors: list[Int4Weight], input_tensors: list[list[Int4Weight]], *args: Any, **kwargs: Any
) -> Any:
    """``c10d::scatter_``, by which `distribute_tensor` hands out shards of equal shape."""
    (output,) = output_tensors
    sources = [[weight_of(t) for t in some] for some in input_tensors]

    def scatter(buffer: Tensor, send: _Send) -> Any:
        inputs = [[send(t) for t in some] for some in sources]
        return torch.ops.c10d.scatter_.default([buffer], inputs, *args, **kwargs)

    return output_tensors, _receive(weight_of(output), scatter)


def handle_broadcast_(tensors: list[Int4Weight], *args: Any, **kwargs: Any) -> Any:
    """``c10d::broadcast_``, by which `distribute_tensor` replicates."""
    (tensor,) = tensors
    weight = weight_of(tensor)

    def broadcast(buffer: Tensor, send: _Send) -> Any:
        buffer.copy_(send(weight))  # what the root sends
        return torch.ops.c10d.broadcast_.default([buffer], *args, **kwargs)

    return tensors, _receive(weight, broadcast)


def _receive(target: Int4OpaqueTensor, communicate: Callable[[Tensor, _Send], Any]) -> Any:
    """Communicate every part into a buffer, then write them to ``target``, in its layout.

    Args:
        target: of the shape, in the groups and with the optional parts of what is sent.
        communicate: starts to fill a buffer with a tensor of what is sent; returns (_, work).

    Returns:
        The last work, done.

    Raises:
        ValueError: what is sent does not fit into the target.
    """
    mine = _header(target)
    sent = torch.empty_like(mine)
    work = _wait(communicate(sent, _header))
    if not torch.equal(mine[1:], sent[1:]):
        raise ValueError(
            "this process has a 4-bit weight of [bytes, group_size, dtype of scales, elements and "
            "dtype of act_pre_scale, the same of act_order] "
            f"{mine[1:].tolist()}, and the sending one {sent[1:].tolist()}; all must quantize the "
            "model alike, so give all the same config, or build the model from one checkpoint "
            "everywhere"
        )
    received = {
        name: torch.empty(part.shape, dtype=part.dtype) for name, part in target.parts().items()
    }
    for name, buffer in received.items():
        work = _wait(communicate(buffer, lambda t, name=name: t.parts()[name].contiguous()))  # type: ignore[misc]
    source = layout_numbered(int(sent[0]))
    for part in target.PARTS:
        if part.packed:
            stack = received[part.name] if target.ndim == 3 else received[part.name][None]
            for matrix, codes in zip(target.matrices(), stack):
                matrix.qdata.copy_(traceable_repack(codes, source, matrix.layout))
        elif part.name in received:
            target.parts()[part.name].copy_(received[part.name])
    return work


def _wait(result: Any) -> Any:
    _, work = result
    if work is not None:
        work.wait()
    return work


def _header(t: Int4OpaqueTensor) -> Tensor:
    """int64: the layout, and what must agree on both sides."""
    numbers = [LAYOUTS[t.qdata_layout].number, t.qdata.numel(), t.group_size]
    numbers.append(DTYPE_NUMBERS[t.scale_and_zero.dtype])
    parts = t.parts()
    for part in t.PARTS:
        if part.optional:
            sent = parts.get(part.name)
            numbers += [0, 0] if sent is None else [sent.numel(), DTYPE_NUMBERS[sent.dtype]]
    return torch.tensor(numbers)


@implements("_c10d_functional::all_gather_into_tensor")
def handle_all_gather(t: Int4Weight, group_size: int, group_name: Any) -> Int4Weight:
    """All shards joined along the first dimension, for ``DTensor.full_tensor()`` and ``redistribute``.

    For shards along another dimension torch then splits the result into the shards again.
    """
    weight = weight_of(t)
    processes = group_size

    def gather(part: Tensor) -> Sequence[Tensor]:
        """The tensor of each process."""
        flat = part.contiguous().view(-1)
        functional = torch.ops._c10d_functional
        gathered = functional.all_gather_into_tensor.default(flat, processes, group_name)
        pieces: Tensor = functional.wait_tensor.default(gathered)
        return pieces.view(processes, *part.shape).unbind()

    qparams = DTYPE_NUMBERS[weight.scale_and_zero.dtype]
    numbers, dtypes = zip(*gather(torch.tensor([LAYOUTS[weight.qdata_layout].number, qparams])))
    check_gathered_qparams(dtypes)
    gathered = {name: gather(part) for name, part in weight.parts().items()}
    shards = [
        weight.with_parts(
            {name: pieces[rank] for name, pieces in gathered.items()},
            weight.shape,
            layout=layout_numbered(int(number)).name,
        )
        for rank, number in enumerate(numbers)
    ]
    if isinstance(t, Int4TransposedTensor):
        return _joined([transposed(shard) for shard in shards])
    return _joined_along_n(shards)


def check_gathered_qparams(numbers: Sequence[Tensor | int]) -> None:
    """Check that the shards of all ranks have their scales in one dtype: both take two bytes.

    Raises:
        ValueError: on all ranks alike, there are two.
    """
    found = [int(number) for number in numbers]
    if len(set(found)) > 1:
        names = {number: str(dtype) for dtype, number in DTYPE_NUMBERS.items()}
        raise ValueError(
            "the shards of a 4-bit weight have scale_and_zero in "
            f"{', '.join(names[number] for number in found)} on the ranks, in their order; all must "
            "have one dtype, so load every shard from the same checkpoint"
        )


def _joined_along_n(shards: list[Int4OpaqueTensor]) -> Int4OpaqueTensor:
    """Shards joined along the first dimension, even if they are pieces along K of one weight.

    Those form no valid weight when they are joined along N, because each has optional parts for other
    columns of the activation. What stands for it can only be split into the shards again: the optional
    parts are NaN, so that nothing else gives a number.
    """
    shared = {part.name for part in shards[0].PARTS if part.optional and part.n_dim is None}
    own = [{name: getattr(shard, name) for name in shared} for shard in shards]
    first = own[0]
    alike = all(same_numbers(first[name], each[name]) for each in own for name in shared)
    replaced = first if alike else {name: _nan_like(part) for name, part in first.items()}
    joined = _joined([shard.with_parts(shard.parts() | replaced, shard.shape) for shard in shards])
    assert isinstance(joined, Int4OpaqueTensor)
    if not alike:
        joined.provenance = Provenance(gathered=tuple(shards))
    return joined


def _nan_like(part: Tensor | None) -> Tensor | None:
    if part is None or not part.is_floating_point():
        return part  # an order, which has no pieces along K: joining says so if there are two
    return torch.full_like(part, float("nan"))


def _joined(shards: Sequence[Int4Weight]) -> Int4Weight:
    joined: Any = torch.cat(list(shards), dim=0)
    weight: Int4Weight = joined
    return weight


@implements("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
def handle_wait(t: Int4Weight) -> Int4Weight:
    """Nothing to wait for: `handle_all_gather` did."""
    return t


if torch.distributed.is_available():
    implements(torch.ops.c10d.scatter_.default)(handle_scatter_)
    implements(torch.ops.c10d.broadcast_.default)(handle_broadcast_)
