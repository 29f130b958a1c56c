"""Handlers that make a weight of another dtype, device or size, and what stays as it is for ever."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.table import (
    implements,
    implements_function,
    implements_on_weight,
    on_weight,
)
from torchao_int4cpu.dispatch.transposition import aliased
from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES
from torchao_int4cpu.format.slicing import legal_pieces
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.provenance import Filling, Provenance
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

aten = torch.ops.aten

#: What a part becomes on a device.
Convert = Callable[[Tensor, torch.device], Tensor]


@implements_on_weight(aten._to_copy.default)
def handle_to_copy(
    t: Int4OpaqueTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Int4OpaqueTensor:
    """``.to``, ``.half``, ``.float``, ``.bfloat16``: change the logical dtype, or go to 'meta'."""
    return _converted(t, dtype, device, lambda part, device: part.to(device=device, copy=True))


@implements(aten.to.dtype_layout)
def handle_to_dtype_layout(
    t: Int4Weight,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """``.to`` with a memory layout among its arguments; the weight itself if nothing changes."""
    if not copy and dtype in (None, t.dtype) and device in (None, t.device):
        return t
    converted: Tensor = aten._to_copy.default(t, dtype=dtype, device=device)
    return converted


@implements(aten.dequantize.self)
def handle_dequantize(t: Int4Weight) -> Tensor:
    """`torch.dequantize`: the only op that gives the whole weight as a plain tensor."""
    return t.dense()


@implements(aten._assert_tensor_metadata.default)
def handle_assert_tensor_metadata(
    t: Int4Weight,
    size: Any = None,
    stride: Any = None,
    dtype: torch.dtype | None = None,
    *,
    device: Any = None,
    layout: Any = None,
) -> None:
    """What `torch.export` puts before each ``to``. The logical dtype is all that can differ."""
    if dtype not in (None, t.dtype):
        raise ValueError(
            f"an exported program got a 4-bit weight of dtype {t.dtype} that was {dtype} when it "
            "was exported; export it again"
        )


@implements_function(torch.Tensor.cuda)
def handle_cuda(t: Int4Weight, *args: Any, **kwargs: Any) -> None:
    """``.cuda()`` would ask the driver before it asks us."""
    raise _wrong_device("cuda")


@implements_function(torch.Tensor.xpu)
def handle_xpu(t: Int4Weight, *args: Any, **kwargs: Any) -> None:
    """``.xpu()`` would, too."""
    raise _wrong_device("xpu")


@implements_function(torch.Tensor.to)
def handle_to(t: Int4Weight, *args: Any, **kwargs: Any) -> Tensor:
    """``.to("cuda")`` would, too; everything else goes on to `handle_to_copy`."""
    target = kwargs.get("device", args[0] if args else None)
    if isinstance(target, (str, torch.device)) and torch.device(target).type not in ("cpu", "meta"):
        raise _wrong_device(target)
    converted: Tensor = t.to(*args, **kwargs)
    return converted


@implements_function(torch._has_compatible_shallow_copy_type)
def handle_has_compatible_shallow_copy_type(a: Tensor, b: Tensor) -> bool:
    """Whether ``module.to`` may put one into the place of the other by ``.data``."""
    return type(a) is type(b) and a.shape == b.shape


_DATA: Any = torch.Tensor.data  # annotated as a tensor; it is a descriptor


@implements_function(_DATA.__set__)
def handle_set_data(t: Int4Weight, value: Tensor) -> None:
    """``weight.data = other``: take over the parts of another 4-bit weight of this shape.

    Raises:
        TypeError, ValueError: it is something else.
    """
    cure = "assign the parameter itself: layer.weight = torch.nn.Parameter(value, requires_grad=False)"
    if type(value) is not type(t):
        raise TypeError(
            f".data of an {type(t).__name__} got a {value.dtype} {type(value).__name__}; only another "
            f"4-bit weight of its class and shape can take its place, so {cure}"
        )
    if value.shape != t.shape:
        raise ValueError(
            f".data of a 4-bit weight of shape {list(t.shape)} got one of shape {list(value.shape)}; "
            f"both must agree, so {cure}"
        )
    taken = aliased(value)
    _DATA.__set__(t, taken)  # the dtype and the device; the rest are attributes
    t.__dict__ = t.__dict__ | {name: kept for name, kept in taken.__dict__.items() if name != "_packed"}


_SET_REQUIRES_GRAD: Any = torch.Tensor.requires_grad  # annotated as bool; it is a descriptor


@implements_function(torch.Tensor.requires_grad_, _SET_REQUIRES_GRAD.__set__)
def handle_requires_grad_(t: Int4Weight, requires_grad: bool = True) -> Int4Weight:
    """Stay frozen, so that ``requires_grad`` tells the truth to optimizers and to whoever counts.

    `torch.nn.Parameter` asks for a gradient by default, and transformers does so for what it loads:
    that is no wish of the user. To ask a parameter for one is, and gets a warning.
    """
    if requires_grad and isinstance(t, torch.nn.Parameter):
        warnings.warn(
            "a 4-bit weight stays frozen whatever requires_grad is set to; "
            "train an adapter beside it (LoRA), or the original weight",
            stacklevel=4,
        )
    return t


@implements_on_weight(aten.empty_like.default)
def handle_empty_like(
    t: Int4OpaqueTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> Int4OpaqueTensor:
    """`torch.empty_like`, which ``module.to_empty(device=...)`` calls."""
    return _converted(t, dtype, device, _empty_like)


@implements(aten.new_zeros.default, aten.new_empty.default)
def handle_new_zeros(
    t: Int4Weight,
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Int4Weight:
    """``new_zeros(size)``, ``new_empty(size)``: a weight of that size in the groups of this one, zeros.

    It is made to be filled piece by piece, as sharding code does: whatever is copied into a cut of it
    is written back, on block borders or not. Its scales get the dtype of what is first copied into it.

    Raises:
        ValueError: the size has no element.
    """
    shape = list(size)
    if 0 in shape or len(shape) not in (2, 3):
        raise ValueError(_no_empty_message(t, f"new_zeros got size {shape}"))
    weight = weight_of(t)
    if isinstance(t, Int4TransposedTensor):
        shape[-1], shape[-2] = shape[-2], shape[-1]
    zeros = zeros_like(weight, shape, dtype, torch.device(device or weight.device))
    return Int4TransposedTensor(zeros) if isinstance(t, Int4TransposedTensor) else zeros


def zeros_like(
    weight: Int4OpaqueTensor, shape: list[int], dtype: torch.dtype | None, device: torch.device
) -> Int4OpaqueTensor:
    """Zeros of another shape in the groups of ``weight``, to be filled by cuts.

    Optional parts are those that ``weight`` has, of their own: what is copied into the new one changes
    them.
    """
    _check_device(device)
    optional = {}
    for part in weight.PARTS:
        of_weight = getattr(weight, part.name)
        if part.optional and of_weight is not None:
            entries = shape[-1:] if of_weight.numel() > 1 or part.identity else of_weight.shape
            optional[part.name] = part.missing(of_weight, entries, device)
    empty = type(weight).empty(
        shape,
        weight.group_size,
        dtype or weight.dtype,
        device=device,
        qparams_dtype=weight.scale_and_zero.dtype,
    )
    zeros = empty.with_parts(
        empty.parts() | optional,
        shape,
        provenance=Provenance(filled_by_cuts=True, filling=Filling()),
    )
    zeros.qdata.fill_(CODE_OFFSET * 17)  # both nibbles
    zeros.scale_and_zero.zero_()
    return zeros


def _no_empty_message(t: Int4Weight, got: str) -> str:
    """Say that a weight cannot be empty, as sharding code asks for where a process gets no piece."""
    split_from = t.split_from if isinstance(t, Int4TransposedTensor) else t.provenance.split_from
    if split_from is None:
        return f"{got}; a 4-bit weight is [N, K] or [E, N, K], and none of them 0, so leave it out"
    dim, total = split_from
    size = t.shape[dim]
    weight = weight_of(t)
    along_k = dim == t.ndim - (2 if t is not weight else 1)
    legal = legal_pieces(total, weight.group_size if along_k else 1)
    return (
        f"cannot give every process a piece of a 4-bit weight: its dimension {dim} of {total} makes "
        f"{-(-total // size)} pieces of {size}, and none may be empty; use {legal} processes, "
        "or do not shard this weight"
    )


@implements_on_weight(aten.is_pinned.default)
def handle_is_pinned(t: Int4OpaqueTensor, device: torch.device | None = None) -> bool:
    """``is_pinned``, which `torch.distributed.checkpoint` asks before it saves."""
    return t.qdata.is_pinned()


@implements(aten.pin_memory.default, aten._pin_memory.default)
def handle_pin_memory(t: Int4Weight, device: torch.device | None = None) -> None:
    """Refuse: pinned memory serves copies to an accelerator."""
    raise ValueError(
        "a 4-bit CPU weight cannot be pinned; it never leaves the CPU, so leave pin_memory out"
    )


@implements(aten.detach.default, aten.alias.default)
def handle_detach(t: Int4Weight) -> Int4Weight:
    """``detach``, ``.data``: the same parts in another tensor."""
    return aliased(t)


@implements_on_weight(aten.clone.default)
def handle_clone(
    t: Int4OpaqueTensor, *, memory_format: torch.memory_format | None = None
) -> Int4OpaqueTensor:
    """``clone``: parts of its own, one byte behind the other."""
    return _converted(
        t, None, None, lambda part, device: part.clone(memory_format=torch.contiguous_format)
    )


@implements_on_weight(aten.contiguous.default)
def handle_contiguous(
    t: Int4OpaqueTensor, *, memory_format: torch.memory_format | None = None
) -> Int4OpaqueTensor:
    """``contiguous``: the weight itself where its bytes follow each other, else a copy."""
    if t.qdata.is_contiguous() and t.scale_and_zero.is_contiguous():
        return t
    return handle_clone(t)


@implements_function(torch.Tensor.contiguous)
def handle_contiguous_function(
    t: Int4Weight, memory_format: torch.memory_format | None = None
) -> Tensor:
    """``.contiguous()``, which torch answers by itself, by the strides of the outer tensor."""
    made: Tensor = on_weight(t, handle_contiguous)
    return made


def _empty_like(part: Tensor, device: torch.device) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, device=device)


def _converted(
    t: Int4OpaqueTensor, dtype: torch.dtype | None, device: torch.device | None, convert: Convert
) -> Int4OpaqueTensor:
    """A weight of converted parts, with another logical ``dtype`` or ``device`` if given."""
    device = torch.device(device or t.device)
    _check_device(device)
    if t.device.type == "meta" and device.type != "meta" and convert is not _empty_like:
        raise ValueError(
            f"cannot move a 4-bit weight from meta to {str(device)!r}, as it has no numbers; load them "
            "with load_state_dict(state_dict, assign=True), or make room with .to_empty(device='cpu')"
        )
    if dtype not in (None, *FLOAT_DTYPES):
        raise TypeError(
            f"cannot convert a 4-bit weight to {dtype}; its dtype is bfloat16, float16 or float32, so "
            "call .dequantize() and convert that"
        )
    parts = {}
    for part in t.PARTS:
        of_weight = getattr(t, part.name)
        if of_weight is not None:
            if part.identity and convert is _empty_like:  # any number would be none
                converted = part.missing(of_weight, of_weight.shape, device)
            else:
                converted = convert(of_weight, device)
            parts[part.name] = converted if part.optional else converted.contiguous()
    return t.with_parts(parts, t.shape, dtype=dtype)


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        raise _wrong_device(device)


def _wrong_device(device: object) -> ValueError:
    return ValueError(
        f"a 4-bit CPU weight cannot move to {str(device)!r}; it runs on 'cpu' only, "
        "so keep the model there, or call .dequantize() and move that"
    )
