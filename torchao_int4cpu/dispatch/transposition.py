"""Which dimension of the weight is meant, as it is or transposed; and transposing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight, weight_of

aten = torch.ops.aten


def dim_of(t: Tensor, dim: int) -> int:
    """``dim`` counted from the front.

    Raises:
        IndexError: there is no such dimension.
    """
    if not -t.ndim <= dim < t.ndim:
        raise IndexError(
            f"dimension {dim} is out of range for a 4-bit weight of shape {list(t.shape)}; "
            f"choose {-t.ndim} to {t.ndim - 1}"
        )
    return dim % t.ndim


def weight_dim(t: Int4Weight, dim: int) -> int:
    """The dimension of the weight that is ``dim`` (counted from the front) of ``t``."""
    if isinstance(t, Int4TransposedTensor) and dim >= t.ndim - 2:
        return int(2 * t.ndim - 3 - dim)  # the other of the last two
    return dim


def same_parts(weight: Int4OpaqueTensor) -> Int4OpaqueTensor:
    """The same parts in another tensor."""
    parts = {name: part.detach() for name, part in weight.parts().items()}
    return weight.with_parts(parts, weight.shape, provenance=weight.provenance)


def aliased(t: Int4Weight) -> Int4Weight:
    """The same parts in another tensor, as torch wants the output of an op that changes nothing."""
    if isinstance(t, Int4TransposedTensor):
        return Int4TransposedTensor(same_parts(t.untransposed()))
    view: Int4OpaqueTensor = return_and_correct_aliasing(aten.alias.default, (t,), {}, same_parts(t))
    return view


def transposed(t: Int4Weight) -> Int4Weight:
    """The other of ``[N, K]`` and ``[K, N]``.

    A new tensor either way, because autograd marks the output of a view op as a view.
    """
    weight = same_parts(weight_of(t))
    return weight if isinstance(t, Int4TransposedTensor) else Int4TransposedTensor(weight)
