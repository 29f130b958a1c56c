"""Handlers that make a weight of another dtype, device or size, and what stays as it is for ever."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchao_int4cpu.dispatch.table import (
    Args,
    Kwargs,
    Weight,
    implements,
    implements_function,
    on_weight,
)
from torchao_int4cpu.groupwise import CODE_OFFSET
from torchao_int4cpu.parts import legal_pieces
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor, Int4Weight, weight_of

aten = torch.ops.aten


@implements([aten._to_copy.default])
@on_weight
def handle_to_copy(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """``.to``, ``.half``, ``.float``, ``.bfloat16``: change the logical dtype, or go to 'meta'."""
    return _converted(args[0], kwargs, lambda part, device: part.to(device=device, copy=True))


@implements([aten.dequantize.self])
def handle_dequantize(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """`torch.dequantize`: the only op that gives the whole weight as a plain tensor."""
    weight: Weight = args[0]
    return weight.dense()


@implements([aten._assert_tensor_metadata.default])
def handle_assert_tensor_metadata(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> None:
    """What `torch.export` puts before each ``to``. The logical dtype is all that can differ."""

    def check(
        t: Tensor,
        size: Any = None,
        stride: Any = None,
        dtype: torch.dtype | None = None,
        *,
        device: Any = None,
        layout: Any = None,
    ) -> None:
        if dtype not in (None, t.dtype):
            raise ValueError(
                f"an exported program got a 4-bit weight of dtype {t.dtype} that was {dtype} when it "
                "was exported; export it again"
            )

    check(*args, **kwargs)


@implements_function([torch.Tensor.cuda, torch.Tensor.xpu])
def handle_accelerator(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> None:
    """``.cuda()`` and ``.xpu()`` would ask the driver before they ask us."""
    raise _wrong_device(func.__name__)


@implements_function([torch.Tensor.to])
def handle_to(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """``.to("cuda")`` would, too, ask the driver first; everything else goes on to `handle_to_copy`."""
    target = kwargs.get("device", args[1] if len(args) > 1 else None)
    if isinstance(target, (str, torch.device)) and torch.device(target).type not in ("cpu", "meta"):
        raise _wrong_device(target)
    result: Tensor = func(*args, **kwargs)
    return result


_SET_REQUIRES_GRAD: Any = torch.Tensor.requires_grad  # annotated as bool; it is a descriptor


@implements_function([torch.Tensor.requires_grad_, _SET_REQUIRES_GRAD.__set__])
def handle_requires_grad_(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """Stay frozen, so that ``requires_grad`` tells the truth to optimizers and to whoever counts.

    `torch.nn.Parameter` asks for a gradient by default, and transformers does so for what it loads:
    that is no wish of the user. To ask a parameter for one is, and gets a warning.
    """
    weight: Int4OpaqueTensor = args[0]
    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    if wanted and isinstance(weight, torch.nn.Parameter):
        warnings.warn(
            "a 4-bit weight stays frozen whatever requires_grad is set to; "
            "train an adapter beside it (LoRA), or the original weight",
            stacklevel=3,
        )
    return weight


@implements([aten.empty_like.default])
@on_weight
def handle_empty_like(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """`torch.empty_like`, which ``module.to_empty(device=...)`` calls."""
    return _converted(args[0], kwargs, lambda part, device: _empty_like(part, device))


@implements([aten.new_zeros.default, aten.new_empty.default])
def handle_new_zeros(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Int4Weight:
    """``new_zeros(size)``: a 4-bit weight of that size in the groups of this one, every number 0.

    It is made to be filled piece by piece, as sharding code does: whatever is copied into a cut of it
    is written back, on block borders or not.

    Raises:
        ValueError: the size has no element.
    """
    t, size = args[0], list(args[1])
    if 0 in size or len(size) not in (2, 3):
        raise ValueError(_empty(t, f"{func.__name__.split('.')[0]} got size {size}"))
    transposed = isinstance(t, Int4TransposedTensor)
    weight = weight_of(t)
    if transposed:
        size[-1], size[-2] = size[-2], size[-1]
    device = torch.device(kwargs.get("device") or weight.device)
    if device.type not in ("cpu", "meta"):
        raise _wrong_device(device)
    dtype = kwargs.get("dtype") or weight.dtype
    scale = weight.act_pre_scale
    if scale is not None:  # of its own: what is copied into the new weight changes it
        shape = size[-1:] if scale.numel() > 1 else scale.shape
        scale = scale.new_ones(shape, device=device)
    new = Int4OpaqueTensor.empty(size, weight.group_size, dtype, device=device, act_pre_scale=scale)
    new.qdata.fill_(CODE_OFFSET * 17)  # both nibbles
    new.scale_and_zero.zero_()
    new.filled_by_cuts = True
    return Int4TransposedTensor(new) if transposed else new


def _empty(t: Int4Weight, got: str) -> str:
    """Say that a weight cannot be empty, as sharding code asks for where a process gets no piece."""
    if t.split_from is None:
        return f"{got}; a 4-bit weight is [N, K] or [E, N, K], and none of them 0, so leave it out"
    dim, total = t.split_from
    size = t.shape[dim]
    weight = weight_of(t)
    along_k = dim == t.ndim - (2 if t is not weight else 1)
    legal = legal_pieces(total, weight.group_size if along_k else 1)
    return (
        f"cannot give every process a piece of a 4-bit weight: its dimension {dim} of {total} makes "
        f"{-(-total // size)} pieces of {size}, and none may be empty; use {legal} processes, "
        "or do not shard this weight"
    )


@implements([aten.is_pinned.default])
@on_weight
def handle_is_pinned(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> bool:
    """``is_pinned``, which `torch.distributed.checkpoint` asks before it saves."""
    pinned: bool = args[0].qdata.is_pinned()
    return pinned


@implements([aten.pin_memory.default, aten._pin_memory.default])
def handle_pin_memory(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> None:
    """Refuse: pinned memory serves copies to an accelerator."""
    raise ValueError(
        "a 4-bit CPU weight cannot be pinned; it never leaves the CPU, so leave pin_memory out"
    )


@implements([aten.detach.default, aten.alias.default])
@on_weight
def handle_detach(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """``detach``, ``.data``: the same parts in another tensor."""
    return alias(func, args, kwargs)


@implements([aten.clone.default])
@on_weight
def handle_clone(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Int4OpaqueTensor:
    """``clone``: parts of its own, one byte behind the other."""
    t: Int4OpaqueTensor = args[0]
    return _converted(t, {}, lambda part, device: part.clone(memory_format=torch.contiguous_format))


@implements([aten.contiguous.default])
@on_weight
def handle_contiguous(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Int4OpaqueTensor:
    """``contiguous``: the weight itself where its bytes follow each other, else a copy."""
    t: Int4OpaqueTensor = args[0]
    if t.qdata.is_contiguous() and t.scale_and_zero.is_contiguous():
        return t
    return handle_clone(aten.clone.default, types, (t,), {})


@implements_function([torch.Tensor.contiguous])
def handle_contiguous_function(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> Tensor:
    """``.contiguous()``, which torch answers by itself, by the strides of the outer tensor."""
    made: Tensor = handle_contiguous(aten.contiguous.default, types, args[:1], {})
    return made


def alias(func: Any, args: Args, kwargs: Kwargs) -> Int4OpaqueTensor:
    """`same_parts`, as the output of a view op."""
    viewed: Int4OpaqueTensor = return_and_correct_aliasing(func, args, kwargs, same_parts(args[0]))
    return viewed


def same_parts(t: Int4OpaqueTensor) -> Int4OpaqueTensor:
    """The same parts in another tensor."""
    new = Int4OpaqueTensor(
        t.qdata.detach(),
        t.scale_and_zero.detach(),
        t.block_size,
        t.shape,
        t.qdata_layout,
        t.dtype,
        None if t.act_pre_scale is None else t.act_pre_scale.detach(),
        t.read_only,
    )
    new.filled_by_cuts, new.cut_from = t.filled_by_cuts, t.cut_from
    new.split_from, new.gathered = t.split_from, t.gathered
    return new


def _empty_like(part: Tensor, device: torch.device) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, device=device)


def _converted(
    t: Int4OpaqueTensor, kwargs: Kwargs, convert: Callable[[Tensor, torch.device], Tensor]
) -> Int4OpaqueTensor:
    """A tensor of converted parts, with the ``device`` and the logical ``dtype`` of ``kwargs``."""
    device = torch.device(kwargs.get("device") or t.device)
    if device.type not in ("cpu", "meta"):
        raise _wrong_device(device)
    scale = t.act_pre_scale
    return Int4OpaqueTensor(
        convert(t.qdata, device).contiguous(),
        convert(t.scale_and_zero, device).contiguous(),
        t.block_size,
        t.shape,
        t.qdata_layout,
        kwargs.get("dtype") or t.dtype,
        None if scale is None else convert(scale, device),
    )


def _wrong_device(device: object) -> ValueError:
    return ValueError(
        f"a 4-bit CPU weight cannot move to {str(device)!r}; it runs on 'cpu' only, "
        "so keep the model there, or call .dequantize() and move that"
    )
