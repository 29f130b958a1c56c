"""Handlers that multiply a weight by a number: scale and zero carry it, and codes stay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.copies import copy_into
from torchao_int4cpu.dispatch.reads import elementwise
from torchao_int4cpu.dispatch.table import implements
from torchao_int4cpu.dispatch.transposition import same_parts
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

aten = torch.ops.aten


@implements(aten.mul.Tensor, aten.mul.Scalar)
def handle_mul(a: Any, b: Any) -> Tensor:
    """``weight * 2**k`` is a 4-bit weight; times a tensor, a plain one."""
    weight, factor = (a, b) if isinstance(a, Int4Weight) else (b, a)
    if not _is_number(factor):
        product: Tensor = elementwise(aten.mul.Tensor, (a, b), {})
        return product
    return _times(weight, float(factor), "mul")


@implements(aten.div.Tensor, aten.div.Scalar)
def handle_div(a: Any, b: Any) -> Tensor:
    """``weight / 2**k`` is a 4-bit weight; by or of a tensor, a plain one."""
    if not _is_number(b) or b == 0:
        quotient: Tensor = elementwise(aten.div.Tensor, (a, b), {})
        return quotient
    return _times(a, 1.0 / float(b), "div")


@implements(aten.neg.default)
def handle_neg(t: Int4Weight) -> Tensor:
    """``-weight``: a 4-bit weight."""
    return _times(t, -1.0, "neg")


@implements(aten.mul_.Tensor, aten.mul_.Scalar)
def handle_mul_(t: Int4Weight, other: Any) -> Int4Weight:
    """``weight.mul_(2**k)``."""
    return _replaced(t, other, "mul_")


@implements(aten.div_.Tensor, aten.div_.Scalar)
def handle_div_(t: Int4Weight, other: Any) -> Int4Weight:
    """``weight.div_(2**k)``."""
    return _replaced(t, other, "div_")


def _replaced(t: Int4Weight, other: Any, name: str) -> Int4Weight:
    if not isinstance(t, Int4Weight) or not _is_number(other) or other == 0:
        # No TypeError: an operator would hide it, and multiply a dense copy instead.
        raise ValueError(
            f"{name} got a 4-bit weight and {type(other).__name__}; in place it takes a power of two, "
            "so multiply .dequantize() and quantize that again"
        )
    factor = float(other) if name == "mul_" else 1.0 / float(other)
    copy_into(weight_of(t), weight_of(_times(t, factor, name)))
    return t


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or (value.ndim == 0 and not isinstance(value, Int4Weight))


def _times(t: Int4Weight, factor: float, name: str) -> Int4Weight:
    """The weight times a power of two, which a float holds exactly.

    Raises:
        ValueError: it is no power of two, or some scale or zero becomes too large or too small.
    """
    weight = weight_of(t)
    scaled = weight.scale_and_zero * factor
    # Of any other factor each scale would be rounded once more, and each weight would change with it.
    is_exact = torch.equal(scaled.double(), weight.scale_and_zero.double() * factor)
    if not is_exact or not math.isfinite(factor):
        raise ValueError(
            f"{name} of a 4-bit weight by {factor} would round its scales; only a power of two within "
            f"the range of {str(scaled.dtype).removeprefix('torch.')} is exact, so multiply the "
            "activation or the result instead, or multiply .dequantize() and quantize that again"
        )
    parts = same_parts(weight).parts() | {"scale_and_zero": scaled}
    parts["qdata"] = weight.qdata.clone()
    product: Int4OpaqueTensor = weight.with_parts(parts, weight.shape)
    return Int4TransposedTensor(product) if isinstance(t, Int4TransposedTensor) else product
