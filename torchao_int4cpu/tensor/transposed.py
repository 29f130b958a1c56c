"""`Int4TransposedTensor`: what ``weight.t()`` gives, a view that reads the weight the other way round.

A second class and not a flag: every shape of `Int4OpaqueTensor` means ``[N, K]``, every shape here
``[K, N]``. What torch may do with it is in `dispatch`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


class Int4TransposedTensor(TorchAOBaseTensor):  # type: ignore[misc]  # torchao has no annotations
    """``weight.transpose(-2, -1)``: shape ``[K, N]``, or ``[E, K, N]`` of a stack.

    It is what ``x @ weight.t()`` multiplies with, and how modules keep experts that are stored input
    first (gpt-oss). Groups run along K still.

    Data:
        weight: the `Int4OpaqueTensor` it is a view of.

    Raises:
        TypeError: ``weight`` is something else.
    """

    __module__ = "torchao_int4cpu"  # as pickles name it

    tensor_data_names = Int4OpaqueTensor.tensor_data_names  # as files have them
    optional_tensor_data_names = Int4OpaqueTensor.optional_tensor_data_names

    weight: Int4OpaqueTensor
    #: `Provenance.split_from` of this view, in its own dimensions.
    split_from: tuple[int, int] | None = None

    def __new__(cls, weight: Int4OpaqueTensor) -> Int4TransposedTensor:
        _check(weight)
        *stack, n, k = weight.shape
        strides = ([n * k] if stack else []) + [1, k]
        tensor: Int4TransposedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            torch.Size([*stack, k, n]),
            strides=strides,
            dtype=weight.dtype,
            device=weight.device,
            requires_grad=False,
        )
        return tensor

    def __init__(self, weight: Int4OpaqueTensor) -> None:
        super().__init__()
        self.weight = weight

    def untransposed(self) -> Int4OpaqueTensor:
        """The weight ``[N, K]``, once more checked: anyone can assign to ``weight``, and so can a file.

        Raises:
            TypeError, ValueError: ``weight`` is none, or not of this shape, dtype and device.
        """
        weight = self.weight
        _check(weight)
        transposed = weight.shape[:-2] + weight.shape[:-3:-1]
        mine = (self.shape, self.dtype, self.device.type)
        if (transposed, weight.dtype, weight.device.type) != mine:
            raise ValueError(
                f"weight is {weight.dtype} of shape {list(weight.shape)} on {weight.device}, and its "
                f"transposed view {self.dtype} of shape {list(self.shape)} on {self.device}; "
                "make the view with weight.transpose(-2, -1)"
            )
        return weight

    def dequantize(self) -> Tensor:
        """The plain ``[K, N]`` tensor."""
        if torch.compiler.is_exporting():  # as `Int4OpaqueTensor.dequantize`
            exported: Tensor = torch.ops.aten.dequantize.self(self)
            return exported
        return self.dense()

    def dense(self) -> Tensor:
        """`dequantize`, by ops on the parts."""
        return self.untransposed().dense().transpose(-2, -1)

    def parts(self) -> dict[str, Tensor]:
        """Of the weight: see `Int4OpaqueTensor.parts`."""
        return self.untransposed().parts()

    @property
    def qdata(self) -> Tensor:
        """Of the weight."""
        return self.untransposed().qdata

    @property
    def scale_and_zero(self) -> Tensor:
        """Of the weight."""
        return self.untransposed().scale_and_zero

    @property
    def act_pre_scale(self) -> Tensor | None:
        """Of the weight."""
        return self.untransposed().act_pre_scale

    @property
    def act_order(self) -> Tensor | None:
        """Of the weight."""
        return self.untransposed().act_order

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["weight"], {}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: object, outer_size: object, outer_stride: object
    ) -> Int4TransposedTensor:
        return cls(inner["weight"])  # type: ignore[arg-type]  # checked in __new__

    def _quantization_type(self) -> str:  # torchao's name; printed with the module
        return self.weight._quantization_type()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Int4TransposedTensor(shape={list(self.shape)}, of {self.weight!r})"


#: A 4-bit weight, as it is or transposed.
Int4Weight = Int4OpaqueTensor | Int4TransposedTensor


def weight_of(t: Int4Weight) -> Int4OpaqueTensor:
    """The weight ``[N, K]`` itself, also of a transposed view."""
    return t.untransposed() if isinstance(t, Int4TransposedTensor) else t


def _check(weight: object) -> None:
    if not isinstance(weight, Int4OpaqueTensor):
        raise TypeError(
            f"weight is a {type(weight).__name__}; an Int4TransposedTensor is a view of an "
            "Int4OpaqueTensor, so make it with weight.transpose(-2, -1)"
        )
