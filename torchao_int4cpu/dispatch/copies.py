"""Handlers that compare two weights, or copy one into the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.cuts import cut, same_scale, write_back
from torchao_int4cpu.dispatch.table import Args, Kwargs, Weight, implements, implements_function
from torchao_int4cpu.groupwise import GROUP_SIZES
from torchao_int4cpu.kernels import traceable_dequantize
from torchao_int4cpu.layout import LAYOUTS
from torchao_int4cpu.slicing import Rows, traceable_join_rows
from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor

aten = torch.ops.aten

#: Weights that are expanded at a time to be compared.
COMPARE_ELEMENTS = 1 << 20

MAX_GROUP_SIZE = max(GROUP_SIZES)


@implements([aten.copy_.default])
def handle_copy_(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """``copy_`` between 4-bit weights, as ``load_state_dict`` does; the layouts may differ.

    Raises:
        TypeError: one side is not a 4-bit weight.
        ValueError: shape, group size or ``act_pre_scale`` differ, or the target is a repacked copy.
    """
    target, source = args[0], args[1]
    for name, side in (("source", source), ("target", target)):
        if not isinstance(side, Weight):
            raise TypeError(
                f"copy_ got a {name} that is {side.dtype} of class {type(side).__name__} and not "
                "4-bit as the other side is; quantize_ the model before you load a 4-bit state dict, "
                "or load it with load_state_dict(..., assign=True)"
            )
    if type(target) is not type(source):
        raise TypeError(
            f"copy_ got a {type(source).__name__} for a {type(target).__name__}; both must be turned "
            "the same way, so call .transpose(-2, -1) on one"
        )
    copied: Tensor = target
    if isinstance(target, Int4TransposedTensor):
        copy_into(target.back(), source.back())
    else:
        copy_into(target, source)
    return copied


def copy_into(target: Int4OpaqueTensor, source: Int4OpaqueTensor) -> None:
    """Replace every part of ``target``, and of what it was cut from."""
    for name, mine, other in (
        ("shape", list(target.shape), list(source.shape)),
        ("block_size", target.block_size, source.block_size),
        ("act_pre_scale", _shape_or_none(target), _shape_or_none(source)),
    ):
        if mine != other:
            raise ValueError(
                f"copy_ got {name} {other} for a 4-bit weight with {name} {mine}; both must agree, "
                "or load it with load_state_dict(..., assign=True)"
            )
    if target.read_only:
        block = LAYOUTS[target.qdata_layout].rows_per_block
        raise ValueError(
            f"copy_ got a target of shape {list(target.shape)} that was cut inside a block of rows or "
            f"along K, so it is a repacked copy and the weight would not change; cut along N at "
            f"multiples of {block}, copy into the whole weight, or into a clone() if the copy is meant"
        )
    if target.shape[0] > 1 and target.qdata.stride(0) == 0:
        raise ValueError(
            f"copy_ got a target of shape {list(target.shape)} that was expanded, so all its matrices "
            "are the same one; copy into the weight that was expanded, or into a clone()"
        )
    if target.qdata_layout == source.qdata_layout:
        target.qdata.copy_(source.qdata)
    else:
        layout = LAYOUTS[target.qdata_layout]
        for to, packed in zip(target.matrices(), source.matrices()):
            piece = Rows(packed.qdata, packed.layout, packed.n, 0, packed.n)
            to.qdata.copy_(traceable_join_rows([piece], layout))
    target.scale_and_zero.copy_(source.scale_and_zero)
    if target.act_pre_scale is not None and source.act_pre_scale is not None:
        target.act_pre_scale.copy_(source.act_pre_scale)
    if target.cut_from is not None:
        write_back(target.cut_from, target)


@implements([aten.equal.default])
def handle_equal(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> bool:
    """`torch.equal`: whether every number of two weights is equal, some rows at a time."""
    a, b = args[:2]
    if not same_scale(getattr(a, "act_pre_scale", None), getattr(b, "act_pre_scale", None)):
        return False
    return _compare(torch.equal, a, b)


@implements([aten.allclose.default])
@implements_function([torch.allclose, torch.Tensor.allclose])
def handle_allclose(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> bool:
    """`torch.allclose` of the numbers of two weights, or of one and a plain tensor."""

    def call(
        input: Tensor,
        other: Tensor,
        rtol: float = 1e-5,
        atol: float = 1e-8,
        equal_nan: bool = False,
    ) -> bool:
        return _compare(
            lambda a, b: torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=equal_nan), input, other
        )

    return call(*args, **kwargs)


def _compare(same: Callable[[Tensor, Tensor], bool], a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not any(isinstance(side, Int4OpaqueTensor) for side in (a, b)):
        a, b = a.transpose(-2, -1), b.transpose(-2, -1)  # the transposed view of one is enough
    return all(same(_expanded(a, *piece), _expanded(b, *piece)) for piece in _pieces(a.shape))


def _pieces(shape: Sequence[int]) -> Iterator[tuple[int | None, int, int]]:
    """The matrix of a stack, and the first and last row of a piece."""
    *stack, n, k = shape
    # Whole blocks of every layout, and, where the rows are the columns of a weight, whole groups.
    rows = max(MAX_GROUP_SIZE, COMPARE_ELEMENTS // k // MAX_GROUP_SIZE * MAX_GROUP_SIZE)
    for index in range(stack[0]) if stack else (None,):
        for start in range(0, n, rows):
            yield index, start, min(n, start + rows)


def _expanded(t: Tensor, index: int | None, start: int, stop: int) -> Tensor:
    matrix = t if index is None else t.select(0, index)
    if isinstance(matrix, Int4TransposedTensor):
        part = cut(matrix.back(), 1, start, stop)
        return traceable_dequantize(part.packed(), part.dtype).t()
    if isinstance(matrix, Int4OpaqueTensor):
        part = cut(matrix, 0, start, stop)
        return traceable_dequantize(part.packed(), part.dtype)
    return matrix[start:stop]


def _shape_or_none(t: Int4OpaqueTensor) -> list[int] | None:
    return None if t.act_pre_scale is None else list(t.act_pre_scale.shape)
