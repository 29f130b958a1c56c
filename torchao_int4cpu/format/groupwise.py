"""The plain value in the middle: a group-wise 4-bit matrix, as codes, scales and zeros.

Whatever quantizes (min-max, HQQ, least squares, a foreign checkpoint) makes a `GroupwiseInt4`;
whatever consumes (packing, dequantizing, saving) takes one. It knows nothing of packed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchao_int4cpu.format.act_order import check_act_order, out_of_act_order

#: Group sizes that PyTorch's int4 op accepts.
GROUP_SIZES = (32, 64, 128, 256)

#: Floating dtypes a weight, an activation or a bias may have.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Quantizing stores scale and zero in this dtype: the only one PyTorch's x86 kernel reads with vectors.
QPARAMS_DTYPE = torch.bfloat16

#: What a packed weight may have them in: a checkpoint of another tool keeps its float16 as it is.
QPARAMS_DTYPES = (torch.bfloat16, torch.float16)

#: Offset between the stored code 0..15 and the signed value -8..7 that the scale multiplies.
CODE_OFFSET = 8


def check_group_size(group_size: object) -> int:
    """Return ``group_size`` if PyTorch's op can use it.

    Raises:
        TypeError: it is not an int.
        ValueError: it is not one of `GROUP_SIZES`.
    """
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(
            f"group_size={group_size!r} is a {type(group_size).__name__}; "
            "give one of the ints 32, 64, 128 or 256"
        )
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} is not supported; choose 32, 64, 128 or 256")
    return group_size


@dataclass(frozen=True, eq=False)
class GroupwiseInt4:
    """A matrix ``w`` of shape ``[N, K]`` held in 4 bits, one (scale, zero) per row and group.

    These always hold (`__post_init__` checks them)::

        w[n, k]  ≈  (codes[n, k] - 8) * scale[n, k // group_size] + zero[n, k // group_size]

        codes: uint8 [N, K], values 0..15, N >= 1, K >= 1
        scale: float [N, G], finite         G = ceil(K / group_size)
        zero:  float [N, G], finite, dtype and device of scale
        group_size: 32, 64, 128 or 256
        act_order: int32 [K], a permutation, or None: column k of all this is column act_order[k] of
                   the matrix that is meant

    A stack of E such matrices has one dimension more in front: codes ``[E, N, K]`` and so on.

    ``zero`` is in weight units, the convention of PyTorch's own int4 op: it is the value that
    code 8 stands for. The last group of a row is short when ``group_size`` does not divide K.

    Raises:
        TypeError: a part has the wrong class or dtype.
        ValueError: parts do not fit together, or a value is out of range.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    act_order: Tensor | None = None

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if self.codes.dtype != torch.uint8:
            raise TypeError(f"codes are {self.codes.dtype}; they must be torch.uint8 with values 0..15")
        if self.codes.ndim not in (2, 3) or self.codes.numel() == 0:
            raise ValueError(
                f"codes have shape {list(self.codes.shape)}; they must be [N, K] with N >= 1 and "
                "K >= 1, or a stack [E, N, K] of such"
            )
        expected = (*self.codes.shape[:-1], -(-self.codes.shape[-1] // self.group_size))
        for name, part in (("scale", self.scale), ("zero", self.zero)):
            if part.dtype not in FLOAT_DTYPES or part.dtype != self.scale.dtype:
                raise TypeError(
                    f"{name} is {part.dtype}; scale and zero must both be bfloat16, float16 or float32"
                )
            if part.shape != expected:
                raise ValueError(
                    f"{name} has shape {list(part.shape)}; codes of shape {list(self.codes.shape)} "
                    f"in groups of {self.group_size} need {list(expected)}"
                )
            if not bool(torch.isfinite(part).all()):
                raise ValueError(
                    f"{name} has NaN or infinite values; every one must be finite, "
                    "so check that the weight is, and that its range fits the dtype"
                )
        if int(self.codes.amax()) > 15:
            raise ValueError(f"codes reach {int(self.codes.amax())}; the largest is 15")
        if self.act_order is not None:
            k = self.codes.shape[-1]
            if self.act_order.dtype != torch.int32 or list(self.act_order.shape) != [k]:
                raise TypeError(
                    f"act_order is {self.act_order.dtype} {list(self.act_order.shape)}; it must be "
                    f"torch.int32 [{k}], a number for each column"
                )
            check_act_order(self.act_order, k)

    @property
    def shape(self) -> torch.Size:
        """``[N, K]`` or ``[E, N, K]``."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``[N, K]`` (or ``[E, N, K]``) in ``dtype``, columns as they were before ``act_order``.

        The equation of the class is evaluated in float32 (float64 if asked for) and rounded once.
        """
        k = self.codes.shape[-1]
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        out = torch.empty(self.codes.shape, dtype=dtype)
        scale, zero = self.scale.to(exact), self.zero.to(exact)
        for group in range(scale.shape[-1]):
            columns = slice(group * self.group_size, min(k, (group + 1) * self.group_size))
            centred = self.codes[..., columns].to(exact) - CODE_OFFSET
            out[..., columns] = centred * scale[..., group, None] + zero[..., group, None]
        return out_of_act_order(out, self.act_order)

    def in_groups_of(self, group_size: int) -> GroupwiseInt4:
        """The same numbers in smaller groups, each with the scale and zero of the larger one it is of.

        Raises:
            ValueError: the size does not divide that of the groups, or is not supported.
        """
        check_group_size(group_size)
        if self.group_size % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide {self.group_size}, so a group would have "
                "several scales; choose a smaller one, or quantize the weight again"
            )
        count = -(-self.codes.shape[-1] // group_size)
        scale, zero = (
            part.repeat_interleave(self.group_size // group_size, dim=-1)[..., :count].contiguous()
            for part in (self.scale, self.zero)
        )
        return replace(self, scale=scale, zero=zero, group_size=group_size)


GroupwiseInt4.__module__ = "torchao_int4cpu"  # as pickles name it, wherever this file is
