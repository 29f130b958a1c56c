"""`torch.nn.functional.linear` with a 4-bit weight: in eager calls, traces and exported programs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from torchao_int4cpu.dispatch.table import implements
from torchao_int4cpu.format.act_order import in_act_order
from torchao_int4cpu.format.checks import check_dense_memory, cure_of_devices
from torchao_int4cpu.format.groupwise import FLOAT_DTYPES
from torchao_int4cpu.kernels.ops.products import traceable_int4_mm
from torchao_int4cpu.kernels.ops.register import LIBRARY, is_transformed, is_watched
from torchao_int4cpu.kernels.selection import plain_int4_mm
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

aten = torch.ops.aten


@implements(aten.linear.default)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a 4-bit weight.

    Args:
        input: ``[..., K]``, bfloat16, float16 or float32 whatever the dtype of the weight is.
        weight: ``[N, K]``.
        bias: ``[N]``, any floating dtype.

    Returns:
        ``[..., N]`` in the dtype of ``input`` (under autocast: in that of autocast). The product is
        rounded to that dtype before the bias is added.

    Raises:
        TypeError: ``weight`` is no 4-bit weight, or ``input`` has another dtype.
        ValueError: shapes or devices do not match.
    """
    if not isinstance(weight, Int4OpaqueTensor):
        return _linear_of_view(input, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        input = input.to(torch.get_autocast_dtype("cpu"))
    check_dense_memory("linear", input)
    packed = weight.packed()
    shape = input.shape
    if not (
        input.dtype in FLOAT_DTYPES
        and shape
        and shape[-1] == packed.k
        and input.device == packed.qdata.device
    ):
        raise _misfit(input, weight)

    activation = input
    if weight.act_pre_scale is not None:
        activation = activation * weight.act_pre_scale.reshape(-1)  # may widen it: rounded once, later
    activation = in_act_order(activation, weight.act_order)
    if len(shape) != 2:
        activation = activation.reshape(-1, packed.k)
    y = traceable_int4_mm(activation, packed)
    if weight.act_pre_scale is not None:
        y = y.to(input.dtype)
    if bias is not None:
        y = y.add_(bias)  # y is ours alone, so no second [M, N] is needed
    return y if len(shape) == 2 else y.reshape(*shape[:-1], packed.n)


def eager_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`linear` with as few steps as there can be, or None where one more is needed.

    Small layers cost what the way to their kernel costs: a 64 x 64 layer multiplies for 0.2 of 4
    microseconds.
    """
    if is_watched() or _is_any_autocast_enabled() or type(weight) is not Int4OpaqueTensor:
        return None
    packed = weight._packed  # None: to be checked first
    if packed is None or weight.act_pre_scale is not None or weight.act_order is not None:
        return None
    return plain_int4_mm(input, packed, bias)


def watched_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` as whoever compiles, traces, transforms or differentiates it needs to see it.

    Raises:
        TypeError, ValueError: as `linear`, or for a call of `torch.jit.trace`.
    """
    if torch.compiler.is_exporting():
        return exported_linear(input, weight, bias)
    if is_transformed():
        return F.linear(
            input, weight, bias
        )  # torch takes it apart, and has rules for each of these ops
    return linear(input, weight, bias)


def _linear_of_view(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``input · view + bias`` for the transposed view of a weight: a view of a view is the weight."""
    if not isinstance(weight, Int4TransposedTensor):
        raise TypeError(
            "linear got a 4-bit tensor that is not its weight; "
            "only the weight can be one, so call .dequantize() on the other"
        )
    y = torch.matmul(_cast_by_autocast(input), weight.untransposed())
    return y if bias is None else y + bias.to(y.dtype)


def _cast_by_autocast(input: Tensor) -> Tensor:
    return input.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else input


LIBRARY.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.impl("linear", linear, "CompositeImplicitAutograd")


def exported_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` as one op on the 4-bit weight, which `torch.export` keeps whole in its graph.

    A graph on the parts of the weight would name their layout, but the weights of a saved program are
    repacked for the process that loads them. ``run_decompositions`` and AOTInductor take the op apart,
    and make the parts plain tensors, which are not repacked.
    """
    y: Tensor = torch.ops.torchao_int4cpu.linear.default(_cast_by_autocast(input), weight, bias)
    return y


def _misfit(input: Tensor, weight: Int4OpaqueTensor) -> Exception:
    """Say which condition of `linear` does not hold."""
    k = weight.shape[-1]
    if input.dtype not in FLOAT_DTYPES:
        return TypeError(
            f"linear got a {input.dtype} activation; convert it to bfloat16, float16 or float32"
        )
    if input.ndim == 0 or input.shape[-1] != k:
        return ValueError(
            f"linear got an activation of shape {list(input.shape)} for a 4-bit weight of shape "
            f"{list(weight.shape)}; the last dimension must be K={k}"
        )
    return ValueError(
        f"linear got an activation on {input.device} and a 4-bit weight on {weight.device}; "
        f"both must be on 'cpu', so {cure_of_devices(weight)}"
    )
