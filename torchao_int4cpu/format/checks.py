"""The contract of the parts: the shapes, dtypes and strides that kernels rely on, and the messages.

Kernels read as many bytes as the shape says, so parts from a damaged file must never get that far.
Parts are checked when a tensor is made of them (`check_parts`), and when an op gets them from anywhere
else (`check_packed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from torchao_int4cpu.format.groupwise import FLOAT_DTYPES, QPARAMS_DTYPES, check_group_size
from torchao_int4cpu.format.layout import LAYOUTS, layout_named, padded_shape
from torchao_int4cpu.format.packed import PackedInt4


def check_parts(
    qdata: object,
    scale_and_zero: object,
    block_size: object,
    shape: object,
    qdata_layout: object,
    dtype: object,
    act_pre_scale: object = None,
    act_order: object = None,
) -> None:
    """Check that the parts make an `Int4OpaqueTensor`; the numbers of an order: `check_act_order`.

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
    for name, part, dtypes, cure in (
        ("qdata", qdata, (torch.uint8,), ""),
        ("scale_and_zero", scale_and_zero, QPARAMS_DTYPES, _CURE_OF_QPARAMS),
    ):
        if not isinstance(part, Tensor) or part.dtype not in dtypes:
            got = getattr(part, "dtype", type(part).__name__)
            raise TypeError(f"{name} is {got}; it must be a {_either(dtypes)} tensor{cure}")
        _check_memory(name, part)
        if part.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name} is on {part.device}; a 4-bit CPU weight lives on 'cpu' (or 'meta'), "
                "so load it with map_location='cpu'"
            )
    assert isinstance(qdata, Tensor)
    assert isinstance(scale_and_zero, Tensor)
    parts = {"qdata": qdata, "scale_and_zero": scale_and_zero}
    check_geometry(qdata, scale_and_zero, shape, group_size)
    if act_pre_scale is not None:
        if not isinstance(act_pre_scale, Tensor) or act_pre_scale.dtype not in FLOAT_DTYPES:
            got = getattr(act_pre_scale, "dtype", type(act_pre_scale).__name__)
            raise TypeError(f"act_pre_scale is {got}; it must be a bfloat16, float16 or float32 tensor")
        _check_memory("act_pre_scale", act_pre_scale)
        if act_pre_scale.numel() != 1 and list(act_pre_scale.shape) != [shape[-1]]:
            raise ValueError(
                f"act_pre_scale has shape {list(act_pre_scale.shape)}; "
                f"it must have one element or shape [{shape[-1]}]"
            )
        parts["act_pre_scale"] = act_pre_scale
    if act_order is not None:
        if not isinstance(act_order, Tensor) or act_order.dtype != torch.int32:
            got = getattr(act_order, "dtype", type(act_order).__name__)
            raise TypeError(f"act_order is {got}; it must be a torch.int32 tensor, so convert it")
        _check_memory("act_order", act_order)
        if list(act_order.shape) != [shape[-1]]:
            raise ValueError(
                f"act_order has shape {list(act_order.shape)}; it must have shape [{shape[-1]}], a "
                "number for each column, so take it from the checkpoint that the codes are from"
            )
        parts["act_order"] = act_order
    devices = [part.device.type for part in parts.values()]
    if len(set(devices)) > 1:
        raise ValueError(
            f"{', '.join(parts)} are on {', '.join(devices)}; all must be on one "
            "device, so load them with map_location='cpu'"
        )


def check_geometry(
    qdata: Tensor, scale_and_zero: Tensor, shape: Sequence[int], group_size: int
) -> None:
    """Check that the codes and their scales have the shapes and strides that kernels read by.

    Args:
        qdata: uint8 ``[N', K'/2]``, in a stack ``[E, N', K'/2]``.
        scale_and_zero: ``[K'/group_size, N', 2]``, in a stack one dimension more in front.
        shape: ``[N, K]`` or ``[E, N, K]``, each 1 or more.
        group_size: 32, 64, 128 or 256.

    Raises:
        ValueError: one of them has another shape, or its numbers lie apart.
    """
    *stack, n, k = shape
    padded_n, padded_k = padded_shape(n, k, group_size)
    groups = padded_k // group_size
    for name, part, expected in (
        ("qdata", qdata, (*stack, padded_n, padded_k // 2)),
        ("scale_and_zero", scale_and_zero, (*stack, groups, padded_n, 2)),
    ):
        if part.shape != expected:
            raise ValueError(
                f"{name} has shape {list(part.shape)}; a weight of shape {list(shape)} in groups of "
                f"{group_size} needs {list(expected)}, so take the parts from one Int4OpaqueTensor"
            )
    if qdata.stride()[-2:] != (padded_k // 2, 1):
        raise ValueError(
            f"qdata has strides {list(qdata.stride())}; the bytes of a weight must follow each "
            f"other, strides {[padded_k // 2, 1]} in the last two dimensions, so call .contiguous() "
            "on it"
        )
    strides = scale_and_zero.stride()
    apart = groups == 1 or (strides[-3] % 2 == 0 and strides[-3] >= 2 * padded_n)
    if strides[-2:] != (2, 1) or not apart:
        raise ValueError(
            f"scale_and_zero has strides {list(strides)}; the pairs of a group must follow each other, "
            "strides [even, 2, 1] in the last three dimensions, so call .contiguous() on it"
        )


FREED_MESSAGE = (
    "got a 4-bit weight whose memory was freed (resize_(0) of the storage of a part); "
    "load or quantize it again"
)


def check_not_freed(weight: PackedInt4) -> None:
    """Check that the parts have memory, because PyTorch's op would read the address 0.

    Raises:
        ValueError: the storage of a part was resized to nothing.
    """
    for part in (weight.qdata, weight.scale_and_zero):
        if type(part) is Tensor and part.is_cpu and part.data_ptr() == 0:
            raise ValueError(FREED_MESSAGE)


def check_packed(weight: PackedInt4, ndim: int, *others: Tensor) -> None:
    """Check the arguments of an op, which may have been read from a file, before a kernel reads memory.

    Args:
        weight: a matrix or a stack.
        ndim: which of them the op takes: 2 or 3.
        others: whatever else the op is given; all must be on one device.

    Raises:
        ValueError: the parts of the weight do not fit together, or are not where the others are.
    """
    qdata, scale_and_zero, group_size, _, n, k = weight
    check_group_size(group_size)
    shape = (*weight.stack, n, k)
    if len(shape) != ndim or min(shape) < 1:
        wanted = "[N, K]" if ndim == 2 else "[E, N, K]"
        raise ValueError(
            f"got the parts of a weight of shape {list(shape)}; it must be {wanted}, every number 1 or "
            "more, so take them from such an Int4OpaqueTensor"
        )
    fits = qdata.dtype == torch.uint8 and scale_and_zero.dtype in QPARAMS_DTYPES
    if not fits or qdata.is_neg() or scale_and_zero.is_neg():
        raise ValueError(
            f"got qdata {qdata.dtype} and scale_and_zero {scale_and_zero.dtype}; they must be "
            f"torch.uint8 and {_either(QPARAMS_DTYPES)}, no negative views, so take them from an "
            "Int4OpaqueTensor"
        )
    check_geometry(qdata, scale_and_zero, shape, group_size)
    device = qdata.device
    if scale_and_zero.device != device or any(other.device != device for other in others):
        check_one_device(
            qdata=qdata,
            scale_and_zero=scale_and_zero,
            **{f"argument {i}": t for i, t in enumerate(others)},
        )


def check_activation(x: Tensor, *sizes: int | None) -> None:
    """Check the dtype and the shape of an activation; None stands for any size.

    Raises:
        ValueError: it is another one.
    """
    if x.dtype not in FLOAT_DTYPES or x.ndim != len(sizes) or not all(map(_fits, x.shape, sizes)):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"got an activation {x.dtype} {list(x.shape)}; it must be bfloat16, float16 or float32 "
            f"[{wanted}], so convert or reshape it"
        )


def cure_of_devices(weight: Tensor) -> str:
    """What to do where a weight and an activation are on two devices."""
    if weight.device.type == "meta":  # a copy of it would have no numbers
        return "load the numbers of the weight with load_state_dict(state_dict, assign=True)"
    return "move the activation with .to('cpu')"


def check_dense_memory(name: str, x: Tensor) -> None:
    """Check that the numbers of an activation lie in memory one by one.

    Raises:
        TypeError: it is a sparse, oneDNN or nested tensor.
    """
    if x.is_nested and x.layout is torch.strided:
        raise TypeError(
            f"{name} got a nested activation of layout torch.strided beside a 4-bit weight; only one "
            "of layout torch.jagged can be multiplied, so make it with that"
        )
    if x.layout not in (torch.strided, torch.jagged):
        raise TypeError(
            f"{name} got an activation of layout {x.layout} beside a 4-bit weight; only dense ones are "
            "multiplied, so call .to_dense() on it"
        )


#: Of scales and zeros in any other dtype.
_CURE_OF_QPARAMS = (
    ", so make the weight with Int4OpaqueTensor.from_groupwise, which rounds them to one of the two"
)


def _either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(str, dtypes))


def check_qparams_dtype(dtype: object) -> None:
    """Check the dtype that scales and zeros are to be stored in.

    Raises:
        TypeError: it is not one of `QPARAMS_DTYPES`.
    """
    if dtype not in QPARAMS_DTYPES:
        raise TypeError(f"qparams_dtype is {shown(dtype)}; choose {_either(QPARAMS_DTYPES)}")


def check_same_qparams(name: str, wanted: Tensor, got: Tensor, cure: str = "") -> None:
    """Check that two weights have scale and zero in one dtype, so that ``name`` rounds none of them.

    Args:
        name: of the function, for the message.
        wanted, got: ``scale_and_zero`` of the weights.
        cure: what to do rather than convert the weight of ``got``.

    Raises:
        ValueError: they have two dtypes.
    """
    if wanted.dtype != got.dtype:
        raise ValueError(
            f"{name} got a 4-bit weight w with scale_and_zero in {got.dtype} where {wanted.dtype} is "
            f"needed; both must agree, because {name} rounds nothing, so {cure}convert it with "
            "Int4OpaqueTensor.from_groupwise(w.to_groupwise(), dtype=w.dtype, "
            f"act_pre_scale=w.act_pre_scale, qparams_dtype={wanted.dtype})"
        )


def _fits(size: int, wanted: int | None) -> bool:
    return wanted is None or size == wanted


def check_one_device(**arguments: Tensor) -> None:
    """Check that all arguments of an op are on one device.

    Fake kernels ask: if any argument is on meta, torch runs the fake kernel, even for real numbers.

    Raises:
        ValueError: there are several devices.
    """
    if len({argument.device for argument in arguments.values()}) > 1:
        got = ", ".join(f"{name} on {argument.device}" for name, argument in arguments.items())
        raise ValueError(f"got {got}; all must be on one device, so move them there")


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
