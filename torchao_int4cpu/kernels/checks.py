"""What ops refuse before a kernel reads memory: parts that do not fit together, other activations.

Whoever calls an op may have read its arguments from a file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.groupwise import FLOAT_DTYPES, check_group_size
from torchao_int4cpu.kernels.packed import PackedExperts, PackedInt4
from torchao_int4cpu.layout import ROW_MULTIPLE


def check_weight(weight: PackedInt4 | PackedExperts, *others: Tensor) -> None:
    """Check that the parts are as their class says, strides too, and on the device of ``others``.

    Raises:
        ValueError: they are not.
    """
    qdata, scale_and_zero, group_size, _, n, k = weight
    check_group_size(group_size)
    padded_n, groups = -(-n // ROW_MULTIPLE) * ROW_MULTIPLE, -(-k // group_size)
    half_k = groups * group_size // 2
    stack: tuple[int, ...] = tuple(qdata.shape[:1]) if isinstance(weight, PackedExperts) else ()
    if not (
        n >= 1
        and k >= 1
        and 0 not in stack
        and qdata.dtype == torch.uint8
        and scale_and_zero.dtype == torch.bfloat16
        and not (qdata.is_neg() or scale_and_zero.is_neg())
        and all(part.device == qdata.device for part in (scale_and_zero, *others))
        and qdata.shape == (*stack, padded_n, half_k)
        and scale_and_zero.shape == (*stack, groups, padded_n, 2)
        and qdata.stride()[-2:] == (half_k, 1)
        and scale_and_zero.stride()[-2:] == (2, 1)
        and (groups == 1 or _holds_pairs(scale_and_zero.stride(-3), padded_n))
    ):
        of_experts = f" and {stack[0]} experts" if isinstance(weight, PackedExperts) else ""
        raise ValueError(
            f"got {_described('qdata', qdata)} and {_described('scale_and_zero', scale_and_zero)} for "
            f"N={n}, K={k}, group_size={group_size}{of_experts}; they must be uint8 "
            f"{[*stack, padded_n, half_k]} with last strides {[half_k, 1]} and bfloat16 "
            f"{[*stack, groups, padded_n, 2]} with last strides [even, 2, 1], the even one at least "
            f"{2 * padded_n}, on one device with all else, so take them from Int4OpaqueTensor"
        )


def _described(name: str, part: Tensor) -> str:
    shape, strides = list(part.shape), list(part.stride())
    return f"{name} {part.dtype} {shape} with strides {strides} on {part.device}"


def _holds_pairs(stride: int, padded_n: int) -> bool:
    """Whether groups so far apart do not overlap, and are whole pairs of (scale, zero) apart."""
    return stride >= 2 * padded_n and stride % 2 == 0


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


def _fits(size: int, wanted: int | None) -> bool:
    return wanted is None or size == wanted


def check_one_device(**parts: Tensor) -> None:
    """For fake kernels: one part on meta brings a call with real numbers to them.

    Raises:
        ValueError: there are several devices.
    """
    if len({part.device for part in parts.values()}) > 1:
        got = ", ".join(f"{name} on {part.device}" for name, part in parts.items())
        raise ValueError(f"got {got}; all must be on one device, so move them there")
