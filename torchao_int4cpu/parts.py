"""What the parts of a packed weight must be to fit together: shapes, dtypes, memory, and the messages.

Kernels read as many bytes as the shape says, so parts from a damaged file must never get that far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from torchao_int4cpu.choose_qparams import QPARAMS_DTYPE
from torchao_int4cpu.groupwise import FLOAT_DTYPES, check_group_size
from torchao_int4cpu.layout import LAYOUTS, ROW_MULTIPLE, layout_named


def padded_shape(n: int, k: int, group_size: int) -> tuple[int, int]:
    """``(N', K')``: N rounded up to a multiple of 16, K to a multiple of ``group_size``."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE, -(-k // group_size) * group_size


def legal_pieces(total: int, unit: int = 1) -> str:
    """For a message: for how many processes `torch.chunk` cuts ``total`` into pieces.

    None of them is empty, and every border is a multiple of ``unit``.
    """
    sizes = [(count, -(-total // count)) for count in range(1, 257)]
    legal = [
        str(count)
        for count, size in sizes
        if count == 1 or (size % unit == 0 and -(-total // size) == count)
    ]
    return ", ".join(legal[:12] + ["..."] * (len(legal) > 12))


def check_parts(
    qdata: object,
    scale_and_zero: object,
    block_size: object,
    shape: object,
    qdata_layout: object,
    dtype: object,
    act_pre_scale: object = None,
) -> None:
    """Check that the parts make an `Int4OpaqueTensor`.

    PyTorch's op reads as many groups as ``qdata`` calls for, whatever ``scale_and_zero`` has, so
    parts from a damaged file must never get as far as the op.

    Raises:
        TypeError: a part has the wrong class or dtype.
        ValueError: the parts do not fit together.
    """
    if (
        not isinstance(shape, Sequence)
        or len(shape) not in (2, 3)
        or not all(_is_int(size) and size >= 1 for size in shape)
    ):
        raise ValueError(
            f"shape is {shown(shape)}; it must be [N, K], or [E, N, K] for a stack, "
            "all of them 1 or more"
        )
    group_size = group_size_of(block_size, len(shape))
    if not isinstance(qdata_layout, str):
        names = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"layout {shown(qdata_layout)} is not known; choose {names}")
    layout_named(qdata_layout)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        got = dtype if isinstance(dtype, str) else shown(dtype)
        raise TypeError(f"dtype is {got}; choose torch.bfloat16, torch.float16 or torch.float32")
    *stack, n, k = shape
    padded_n, padded_k = padded_shape(n, k, group_size)
    expected = [*stack, padded_n, padded_k // 2]
    parts = [_check_part("qdata", qdata, torch.uint8, expected, shape)]
    if parts[0].stride()[-2:] != (padded_k // 2, 1):
        raise ValueError(
            f"qdata has strides {list(parts[0].stride())}; the bytes of a weight must follow each "
            f"other, strides {[padded_k // 2, 1]} in the last two dimensions, so call .contiguous() "
            "on it"
        )
    groups = padded_k // group_size
    expected = [*stack, groups, padded_n, 2]
    parts.append(_check_part("scale_and_zero", scale_and_zero, QPARAMS_DTYPE, expected, shape))
    strides = parts[1].stride()
    apart = groups == 1 or (strides[-3] % 2 == 0 and strides[-3] >= 2 * padded_n)
    if strides[-2:] != (2, 1) or not apart:
        raise ValueError(
            f"scale_and_zero has strides {list(strides)}; the pairs of a group must follow each other, "
            "strides [even, 2, 1] in the last three dimensions, so call .contiguous() on it"
        )
    if act_pre_scale is not None:
        if not isinstance(act_pre_scale, Tensor) or act_pre_scale.dtype not in FLOAT_DTYPES:
            got = getattr(act_pre_scale, "dtype", type(act_pre_scale).__name__)
            raise TypeError(f"act_pre_scale is {got}; it must be a bfloat16, float16 or float32 tensor")
        _check_memory("act_pre_scale", act_pre_scale)
        if act_pre_scale.numel() != 1 and list(act_pre_scale.shape) != [k]:
            raise ValueError(
                f"act_pre_scale has shape {list(act_pre_scale.shape)}; "
                f"it must have one element or shape [{k}]"
            )
        parts.append(act_pre_scale)
    devices = [part.device.type for part in parts]
    if len(set(devices)) > 1:
        raise ValueError(
            f"qdata, scale_and_zero and act_pre_scale are on {', '.join(devices)}; all must be on one "
            "device, so load them with map_location='cpu'"
        )


def _check_part(
    name: str, part: object, dtype: torch.dtype, expected: list[int], shape: Sequence[int]
) -> Tensor:
    if not isinstance(part, Tensor) or part.dtype != dtype:
        got = getattr(part, "dtype", type(part).__name__)
        raise TypeError(f"{name} is {got}; it must be a {dtype} tensor")
    _check_memory(name, part)
    if list(part.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(part.shape)}; a weight of shape {list(shape)} needs {expected}"
        )
    if part.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"{name} is on {part.device}; a 4-bit CPU weight lives on 'cpu' (or 'meta'), "
            "so load it with map_location='cpu'"
        )
    return part


def _check_memory(name: str, part: Tensor) -> None:
    """Check that the bytes at ``part.data_ptr()`` are the numbers of ``part``: kernels read those.

    A tensor subclass may have none: torch makes a "wrapper" of any shape, with a null pointer.
    """
    if type(part) not in _PLAIN and not isinstance(part, _TRACED):
        raise TypeError(
            f"{name} is of class {type(part).__name__}; it must be a plain tensor, "
            "so take the parts from an Int4OpaqueTensor"
        )
    if part.is_nested or part.layout != torch.strided or part.is_neg():
        raise ValueError(
            f"{name} is nested, sparse or a negative view; it must be a dense tensor, "
            "so take the parts from an Int4OpaqueTensor"
        )


#: Classes whose values lie in their own memory, and those that stand for such while torch traces.
_PLAIN = (Tensor, torch.nn.Parameter)
_TRACED = (FakeTensor, FunctionalTensor)


def group_size_of(block_size: object, ndim: int = 2) -> int:
    """The group size in ``[1, group_size]``, or ``[1, 1, group_size]`` for a weight of 3 dimensions.

    Raises:
        TypeError, ValueError: it is anything else.
    """
    ones = [1] * (ndim - 1)
    if (
        not isinstance(block_size, (list, tuple))
        or len(block_size) != ndim
        or not all(_is_int(size) for size in block_size[:-1])
        or list(block_size[:-1]) != ones
        or not isinstance(block_size[-1], (int, float, str, type(None)))
    ):
        raise ValueError(
            f"block_size is {shown(block_size)}; it must be [{', '.join(map(str, ones))}, group_size] "
            "with a group_size of 32, 64, 128 or 256"
        )
    return check_group_size(block_size[-1])


def _is_int(value: object) -> bool:
    # A length is symbolic where torch.compile traces an index of unknown length.
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def shown(value: object, depth: int = 2) -> str:
    """``value`` as a message shows it, whatever it is: in a file it may be of any type and size.

    Its `repr` may not end: a list of ten times a list of ten times a list takes a file few bytes.
    """
    if isinstance(value, (list, tuple)) and depth > 0:
        items = [shown(item, depth - 1) for item in value[:8]] + ["..."] * (len(value) > 8)
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)})"
    if isinstance(value, str):
        return repr(value if len(value) <= 100 else value[:100] + "...")
    if isinstance(value, (bool, float, type(None), torch.dtype)) or _is_short_int(value):
        return repr(value)
    return f"a {type(value).__name__}"


def _is_short_int(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() <= 128
