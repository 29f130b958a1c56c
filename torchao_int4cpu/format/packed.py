"""The packed weight as plain tensors, what its parts are, and the readable twin of every kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, QPARAMS_DTYPE
from torchao_int4cpu.format.layout import NibbleLayout, padded_shape, unpack

#: `Part.k_unit` of a part that has one entry for each group.
GROUP = 0


class Part(NamedTuple):
    """One tensor of a weight ``[N, K]``, and where rows and columns of the weight lie in it.

    A tensor class declares its parts; whatever cuts, joins, copies, sends or saves a weight loops over
    them. Dimensions are counted from the last, so that they hold for a stack ``[E, N, K]`` as well.

    Attributes:
        name: of the field, in files too.
        n_dim: the dimension that has an entry for each row; None if all rows share the part.
        k_dim: the dimension that follows the columns; None if a cut along K must be refused, because
            the part says something about all columns together.
        k_unit: the number of columns that an entry along ``k_dim`` stands for, or `GROUP`.
        packed: whether it holds the codes, whose order is that of a layout.
        stacked: whether a stack has one of it for each matrix; else all matrices share it.
        default: for an optional part, the number that stands for a missing one.
        identity: of an optional part, whether 0, 1 and so on stand for a missing one instead.
    """

    name: str
    n_dim: int | None = None
    k_dim: int | None = None
    k_unit: int = 1
    packed: bool = False
    stacked: bool = False
    default: float | None = None
    identity: bool = False

    @property
    def optional(self) -> bool:
        """Whether a weight may be without it."""
        return self.identity or self.default is not None

    def missing(self, like: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
        """What a weight without this optional part has in its place, in the dtype of ``like``."""
        if self.identity:
            return torch.arange(math.prod(shape), dtype=like.dtype, device=device).view(shape)
        assert self.default is not None
        return torch.full(shape, self.default, dtype=like.dtype, device=device)

    def k_slice(self, start: int, stop: int, group_size: int) -> slice:
        """The entries along ``k_dim`` that stand for columns ``start:stop``."""
        unit = self.k_unit or group_size
        return slice(start // unit, -(-stop // unit))


#: The parts of `Int4OpaqueTensor`. The names are what Hugging Face and vLLM load, and no others.
INT4_PARTS = (
    Part("qdata", n_dim=-2, k_dim=-1, k_unit=2, packed=True, stacked=True),
    Part("scale_and_zero", n_dim=-2, k_dim=-3, k_unit=GROUP, stacked=True),
    Part("act_pre_scale", k_dim=-1, default=1.0),
    Part("act_order", identity=True),
)


class PackedInt4(NamedTuple):
    """A packed weight ``[N, K]`` as plain tensors; or a stack of E such, one dimension more in front.

    Attributes:
        qdata: uint8 ``[N', K'/2]`` in the order of ``layout``, contiguous; in a stack
            ``[E, N', K'/2]`` with strides ``(any, K'/2, 1)``.
        scale_and_zero: bfloat16 or float16 ``[K'/group_size, N', 2]``, strides ``(even, 2, 1)``: at
            least 2 N' from group to group, and more if these are some rows of a larger weight. In a
            stack ``[E, K'/group_size, N', 2]``.
        group_size: 32, 64, 128 or 256.
        layout: order of the codes in ``qdata``.
        n: N, the rows of a matrix that are no padding.
        k: K, the columns that are no padding.
    """

    qdata: Tensor
    scale_and_zero: Tensor
    group_size: int
    layout: NibbleLayout
    n: int
    k: int

    @property
    def stack(self) -> tuple[int, ...]:
        """``(E,)`` of a stack, ``()`` of a single matrix."""
        return tuple(self.qdata.shape[:-2])

    def expert(self, index: int) -> PackedInt4:
        """One matrix of a stack: views."""
        return self._replace(
            qdata=self.qdata.select(0, index), scale_and_zero=self.scale_and_zero.select(0, index)
        )

    def matrices(self) -> Iterator[PackedInt4]:
        """The matrix itself, or each of a stack."""
        if not self.stack:
            yield self
            return
        for index in range(self.qdata.shape[0]):
            yield self.expert(index)


def packed_bytes(shape: Sequence[int], group_size: int) -> int:
    """Bytes of codes, scales and zeros of a weight ``[N, K]`` or ``[E, N, K]``, with their padding."""
    *stack, n, k = shape
    rows, columns = padded_shape(n, k, group_size)
    codes = rows * columns // 2
    scales_and_zeros = columns // group_size * rows * 2 * QPARAMS_DTYPE.itemsize
    return math.prod(stack) * (codes + scales_and_zeros)


def int4_mm_reference(x: Tensor, weight: PackedInt4) -> Tensor:
    """The readable twin: ``x · Wᵀ`` in float64 with the exact dequantized weight. ``[M, N]``."""
    return x.to(torch.float64) @ dense_reference(weight).t()


def dense_reference(weight: PackedInt4) -> Tensor:
    """The exact dequantized weight, float64 ``[N, K]``."""
    codes = unpack(weight.qdata, weight.layout).to(torch.float64)
    qparams = weight.scale_and_zero.to(torch.float64).repeat_interleave(weight.group_size, dim=0)
    w = (codes - CODE_OFFSET) * qparams[..., 0].t() + qparams[..., 1].t()
    return w[: weight.n, : weight.k]
