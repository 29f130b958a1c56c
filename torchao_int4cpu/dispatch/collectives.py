"""Handlers of `torch.distributed`: a 4-bit weight travels as its parts and the name of its layout.

The layout travels along because the processes may run on CPUs with different instruction sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.table import Args, Kwargs, Weight, implements, implements_named
from torchao_int4cpu.dispatch.views import turned
from torchao_int4cpu.groupwise import FLOAT_DTYPES
from torchao_int4cpu.layout import LAYOUTS, layout_named
from torchao_int4cpu.slicing import Rows, traceable_join_rows
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor, weight_of

_LAYOUT_NAMES = list(LAYOUTS)

#: One part of a weight, as it is sent.
_Part = Callable[[Int4OpaqueTensor], Tensor]


def handle_scatter_(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Any:
    """``c10d::scatter_``, by which `distribute_tensor` hands out shards of equal shape."""
    (output,), inputs, *rest = args
    sources = [[weight_of(t) for t in some] for some in inputs]

    def scatter(buffer: Tensor, part: _Part) -> Any:
        return func([buffer], [[part(t) for t in some] for some in sources], *rest, **kwargs)

    return args[0], _receive(weight_of(output), scatter)


def handle_broadcast_(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Any:
    """``c10d::broadcast_``, by which `distribute_tensor` replicates."""
    (tensor,), *rest = args
    weight = weight_of(tensor)

    def broadcast(buffer: Tensor, part: _Part) -> Any:
        buffer.copy_(part(weight))  # what the root sends
        return func([buffer], *rest, **kwargs)

    return args[0], _receive(weight, broadcast)


def _receive(target: Int4OpaqueTensor, communicate: Callable[[Tensor, _Part], Any]) -> Any:
    """Communicate every part into a buffer, then write them to ``target``, in its layout.

    Args:
        target: of the shape, in the groups and with the ``act_pre_scale`` of what is sent.
        communicate: starts to fill a buffer with a part of what is sent; returns (_, work).

    Returns:
        The last work, done.

    Raises:
        ValueError: what is sent does not fit into the target.
    """
    header = torch.empty(5, dtype=torch.int64)
    work = _wait(communicate(header, _header))
    mine, sent = _header(target)[1:].tolist(), header[1:].tolist()
    if mine != sent:
        raise ValueError(
            "this process has a 4-bit weight of [bytes, group_size, act_pre_scale elements, its dtype] "
            f"{mine}, and the sending one {sent}; all must quantize the model alike, so give all the "
            "same config, or build the model from one checkpoint everywhere"
        )
    qdata = torch.empty(target.qdata.shape, dtype=torch.uint8)
    qparams = torch.empty(target.scale_and_zero.shape, dtype=target.scale_and_zero.dtype)
    work = _wait(communicate(qdata, lambda t: t.qdata.contiguous()))
    work = _wait(communicate(qparams, lambda t: t.scale_and_zero.contiguous()))
    if target.act_pre_scale is not None:
        scale = torch.empty(target.act_pre_scale.shape, dtype=target.act_pre_scale.dtype)
        work = _wait(communicate(scale, _scale_of))
        target.act_pre_scale.copy_(scale)
    source = layout_named(_LAYOUT_NAMES[int(header[0])])
    stack = qdata if target.ndim == 3 else qdata[None]
    for matrix, received in zip(target.matrices(), stack):
        piece = Rows(received, source, matrix.n, 0, matrix.n)
        matrix.qdata.copy_(traceable_join_rows([piece], matrix.layout))
    target.scale_and_zero.copy_(qparams)
    return work


def _wait(result: Any) -> Any:
    _, work = result
    if work is not None:
        work.wait()
    return work


def _header(t: Int4OpaqueTensor) -> Tensor:
    """int64 ``[5]``: the layout, and what must agree on both sides."""
    scale = t.act_pre_scale
    numbers = [_LAYOUT_NAMES.index(t.qdata_layout), t.qdata.numel(), t.group_size]
    if scale is None:
        return torch.tensor([*numbers, 0, 0])
    return torch.tensor([*numbers, scale.numel(), FLOAT_DTYPES.index(scale.dtype)])


def _scale_of(t: Int4OpaqueTensor) -> Tensor:
    assert t.act_pre_scale is not None, "target has one, and shards are cut from one weight"
    return t.act_pre_scale.contiguous()


@implements_named("_c10d_functional::all_gather_into_tensor")
def handle_all_gather(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """All shards below each other, for ``DTensor.full_tensor()`` and ``redistribute``.

    For shards along another dimension torch then splits the result into the shards again.
    """
    t, size, group = args
    weight = weight_of(t)

    def gather(part: Tensor) -> list[Tensor]:
        gathered: Tensor = func(part.contiguous(), size, group)
        return list(torch.ops._c10d_functional.wait_tensor(gathered).chunk(size))

    codes = gather(torch.tensor([_LAYOUT_NAMES.index(weight.qdata_layout)]))
    qdata, qparams = gather(weight.qdata), gather(weight.scale_and_zero)
    scales: list[Tensor | None] = [None] * size
    if weight.act_pre_scale is not None:
        shape = weight.act_pre_scale.shape
        scales = [scale.view(shape) for scale in gather(weight.act_pre_scale.reshape(-1))]
    shards = [
        Int4OpaqueTensor(
            data,
            pairs,
            weight.block_size,
            weight.shape,
            _LAYOUT_NAMES[int(code)],
            weight.dtype,
            scale,
        )
        for code, data, pairs, scale in zip(codes, qdata, qparams, scales)
    ]
    if isinstance(t, Int4TransposedTensor):
        return _joined([turned(shard) for shard in shards])
    first = scales[0]
    if first is None or all(torch.equal(first, scale) for scale in scales if scale is not None):
        for shard in shards:
            shard.act_pre_scale = first
        return _joined(shards)
    # Shards along K scale other columns of the activation: below each other they are no weight. What
    # stands for it is good for being split again only, and NaN everywhere else.
    nan = torch.full_like(first, float("nan"))
    for shard in shards:
        shard.act_pre_scale = nan
    joined = _joined(shards)
    for shard, scale in zip(shards, scales):
        shard.act_pre_scale = scale
    joined.gathered = tuple(shards)
    return joined


def _joined(shards: list[Any]) -> Weight:
    joined: Weight = torch.cat(shards, dim=0)  # type: ignore[assignment]
    return joined


@implements_named("_c10d_functional::wait_tensor")
@implements_named("_c10d_functional::_wrap_tensor_autograd")
def handle_wait(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Weight:
    """Nothing to wait for: `handle_all_gather` did."""
    t: Weight = args[0]
    return t


if torch.distributed.is_available():
    implements([torch.ops.c10d.scatter_.default])(handle_scatter_)
    implements([torch.ops.c10d.broadcast_.default])(handle_broadcast_)
