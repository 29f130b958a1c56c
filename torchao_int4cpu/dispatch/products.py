"""Handlers of the products other than `linear`: mm, addmm, mv, bmm, baddbmm, matmul, grouped_mm.

A 4-bit weight ``W`` ``[N, K]`` may stand on either side, as it is or transposed. With ``act_pre_scale``
``s`` the matrix that multiplies is ``W · diag(s)``, as in `linear`. With ``act_order`` the columns of x
are put into the order of the codes, or those of the result out of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.dispatch.table import implements, implements_function
from torchao_int4cpu.format.act_order import in_act_order, out_of_act_order
from torchao_int4cpu.format.checks import check_dense_memory, cure_of_devices
from torchao_int4cpu.format.groupwise import FLOAT_DTYPES
from torchao_int4cpu.kernels.ops.experts import (
    traceable_bmm,
    traceable_bmm_transposed,
    traceable_grouped_mm,
    traceable_grouped_mm_transposed,
)
from torchao_int4cpu.kernels.ops.products import traceable_int4_mm, traceable_int4_mm_transposed
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

aten = torch.ops.aten


@implements(aten.mm.default)
def handle_mm(a: Tensor, b: Tensor) -> Tensor:
    """``mm`` with a 4-bit weight on one side; the result has the dtype of the other."""
    return _product("mm", a, b, ndim=2)


@implements(aten.mv.default)
def handle_mv(a: Tensor, vector: Tensor) -> Tensor:
    """``weight @ vector``."""
    return _product("mv", a, vector.unsqueeze(-1), ndim=2).squeeze(-1)


@implements(aten.addmm.default)
def handle_addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * (a @ b)``; the product is rounded before the bias is added."""
    return _plus("addmm", bias, _product("addmm", a, b, ndim=2), beta, alpha)


@implements(aten.bmm.default)
def handle_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``bmm`` with a stack of 4-bit weights on one side."""
    return _product("bmm", a, b, ndim=3)


@implements(aten.baddbmm.default)
def handle_baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * bmm(a, b)``."""
    return _plus("baddbmm", bias, _product("baddbmm", a, b, ndim=3), beta, alpha)


@implements(aten.matmul.default)
@implements_function(torch.matmul, Tensor.matmul)
def handle_matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``matmul`` of any number of dimensions. Torch's own would flatten a stack, which no view can."""
    if out is not None:  # torch takes it apart, as far as that goes
        return torch.matmul(input, other, out=out)
    return _matmul(input, other)


@implements_function(Tensor.__matmul__)
def handle_matmul_operator(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``: as `handle_matmul`, but Python hides what a TypeError of an operator says."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return NotImplemented  # Python's way to ask the other side
    try:
        return _matmul(a, b)
    except TypeError as error:
        raise ValueError(str(error)) from error


@implements_function(Tensor.__rmatmul__)
def handle_reflected_matmul_operator(b: Tensor, a: Tensor) -> Tensor:
    """``a @ b``, asked of b."""
    return handle_matmul_operator(a, b)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if isinstance(b, Int4Weight):
        return _rows_times("matmul", a, b)
    if b.ndim == 1:
        return _rows_times("matmul", b, a.transpose(-2, -1))
    if b.ndim == 2 and a.ndim == 2:
        return torch.mm(a, b)
    return (
        _rows_times("matmul", b.transpose(-2, -1), a.transpose(-2, -1)).transpose(-2, -1).contiguous()
    )


def _rows_times(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """x ``[..., M, K]`` or ``[K]`` times ``[K, N]`` or ``[E, K, N]``, as `torch.matmul` broadcasts."""
    if isinstance(x, Int4Weight) or x.ndim == 0 or x.shape[-1] != weight.shape[-2]:
        return _product(name, x, weight, weight.ndim)  # which says what is wrong
    if x.ndim == 1:
        return _rows_times(name, x.unsqueeze(0), weight).squeeze(-2)
    rows, (k, n) = x.shape[-2], weight.shape[-2:]
    experts = weight.shape[0] if weight.ndim == 3 else 1
    if weight.ndim == 3 and experts == 1:
        y = _rows_times(name, x, weight.select(0, 0))
        return y if x.ndim > 2 else y.unsqueeze(0)
    if weight.ndim == 2:
        y = torch.mm(x if x.ndim == 2 else x.reshape(-1, k), weight)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], n)
    batch = (*x.shape[:-3], experts)
    if x.ndim > 2 and x.shape[-3] not in (1, experts):
        return _product(name, x, weight, 3)
    of_each = x.expand(*batch, rows, k).movedim(-3, 0)
    y = torch.bmm(of_each.reshape(experts, math.prod(batch[:-1]) * rows, k), weight)
    return y.view(experts, *batch[:-1], rows, n).movedim(0, -3).contiguous()


@implements(aten._grouped_mm.default)
def handle_grouped_mm(
    x: Tensor,
    experts: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.grouped_mm`: rows of x in groups, each times an expert of its own."""
    if bias is not None:
        raise ValueError("grouped_mm got a bias, which torch does not add either; add it afterwards")
    if offs is None:
        y = _product("grouped_mm", x, experts, ndim=3)
    else:
        y = grouped_product(x, experts, offs)
    return y if out_dtype is None else y.to(out_dtype)


@implements("transformers::grouped_mm_fallback_backward")
def handle_grouped_mm_fallback_backward(
    x: Tensor, experts: Tensor, offs: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the grouped product of transformers 5: for x.

    The weight is frozen, and what stands for its gradient is never read.
    """
    grad_x = grouped_product(grad, experts.transpose(-2, -1), offs)
    return grad_x.to(x.dtype), grad.new_empty(0)


@implements("transformers::grouped_mm_fallback")  # which transformers 5 calls where it cannot torch's
def grouped_product(x: Tensor, experts: Tensor, offs: Tensor) -> Tensor:
    """Rows ``offs[e - 1]:offs[e]`` of x times expert e: ``[S, K] · [E, K, N]`` gives ``[S, N]``."""
    if not isinstance(experts, Int4Weight):
        raise TypeError(
            "grouped_mm got a 4-bit tensor as its first argument; only the experts can be 4-bit, "
            "so call .dequantize() on the other"
        )
    weight = weight_of(experts)
    if x.ndim != 2 or experts.ndim != 3 or x.shape[1] != experts.shape[1]:
        raise ValueError(
            f"grouped_mm got x of shape {list(x.shape)} and 4-bit experts of shape "
            f"{list(experts.shape)}; they must be [S, K] and [E, K, N], so transpose(-2, -1) the "
            "experts if they are [E, N, K]"
        )
    _check_operand("grouped_mm", x, weight)
    if isinstance(experts, Int4TransposedTensor):
        y = traceable_grouped_mm(_as_codes_lie(x, weight), weight.packed_experts(), offs)
        return y.to(x.dtype)
    y = traceable_grouped_mm_transposed(x, weight.packed_experts(), offs)
    return _as_columns_were(y, weight).to(x.dtype)


def _product(name: str, a: Tensor, b: Tensor, ndim: int) -> Tensor:
    """``a @ b`` where one is a 4-bit weight, or a stack for 3 dimensions."""
    if isinstance(a, Int4Weight) and isinstance(b, Int4Weight):
        raise TypeError(
            f"{name} got two 4-bit weights; one side must be a plain tensor, "
            "so call .dequantize() on it"
        )
    if a.ndim != ndim or b.ndim != ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"{name} got shapes {list(a.shape)} and {list(b.shape)}; they must be "
            + ("[M, K] and [K, N]" if ndim == 2 else "[E, M, K] and [E, K, N]")
            + ", so check whether the 4-bit weight is to be transposed"
        )
    if isinstance(b, Int4Weight):
        return _times(name, a, b)
    if not isinstance(a, Int4Weight):
        raise TypeError(
            f"{name} got a 4-bit tensor that is not a side of its product; "
            "only one of the sides can be one, so call .dequantize() on the other"
        )
    # W · x is (xᵀ · Wᵀ)ᵀ, so that the codes are on the side where the kernels have them.
    weight: Any = a.transpose(-2, -1)
    y = _times(name, b.transpose(-2, -1), weight)
    return y.transpose(-2, -1).contiguous()  # as torch gives it: callers take a view of it


def _times(name: str, x: Tensor, weight: Int4Weight) -> Tensor:
    """``x @ weight``, for the weight and for its transposed view."""
    if isinstance(weight, Int4TransposedTensor):
        packed = weight.untransposed()
        _check_operand(name, x, packed)
        activation = _as_codes_lie(x, packed)
        if x.ndim == 2:
            return traceable_int4_mm(activation, packed.packed()).to(x.dtype)
        return traceable_bmm(activation, packed.packed_experts()).to(x.dtype)
    _check_operand(name, x, weight)
    if x.ndim == 2:
        y = traceable_int4_mm_transposed(x, weight.packed())
    else:
        y = traceable_bmm_transposed(x, weight.packed_experts())
    return _as_columns_were(y, weight).to(x.dtype)


def _plus(name: str, bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    if isinstance(bias, Int4Weight):
        raise TypeError(
            f"{name} got a 4-bit tensor to add to the product; only one of the sides of the product "
            "can be one, so call .dequantize() on the other"
        )
    lengths = list(zip(bias.shape[::-1], product.shape[::-1]))
    if bias.ndim > product.ndim or any(a not in (1, b) for a, b in lengths):
        raise ValueError(
            f"{name} got a bias of shape {list(bias.shape)} for a product of shape "
            f"{list(product.shape)}; it must be one that broadcasts to that, so check its shape"
        )
    if alpha != 1:
        product = product * alpha
    if beta == 0:  # then torch ignores even a NaN in the bias
        return product
    return torch.add(product, bias, alpha=beta).to(product.dtype)


def _scaled(x: Tensor, weight: Int4OpaqueTensor) -> Tensor:
    """``x · diag(s)``, perhaps in a wider dtype: what is computed of it is rounded once, later."""
    scale = weight.act_pre_scale
    return x if scale is None else x * scale.reshape(-1)


def _as_codes_lie(x: Tensor, weight: Int4OpaqueTensor) -> Tensor:
    """What multiplies the codes for an activation ``x`` ``[..., K]``."""
    return in_act_order(_scaled(x, weight), weight.act_order)


def _as_columns_were(y: Tensor, weight: Int4OpaqueTensor) -> Tensor:
    """The result ``[..., K]`` of a product with the codes from the other side."""
    return _scaled(out_of_act_order(y, weight.act_order), weight)


def _check_operand(name: str, x: Tensor, weight: Int4OpaqueTensor) -> None:
    check_dense_memory(name, x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} got a {x.dtype} tensor beside a 4-bit weight; "
            "convert it to bfloat16, float16 or float32"
        )
    if x.device != weight.device:
        raise ValueError(
            f"{name} got a tensor on {x.device} and a 4-bit weight on {weight.device}; both must be on "
            f"'cpu', so {cure_of_devices(weight)}"
        )
