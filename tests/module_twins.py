"""A model's dense twin, and how far a 4-bit model may be from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchao_int4cpu import Int4OpaqueTensor, Int4TransposedTensor


def int4_names(model: nn.Module) -> set[str]:
    """Of the parameters that are 4-bit, after a look at the bytes: less than 7 bits a number."""
    found = set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if isinstance(weight, (Int4OpaqueTensor, Int4TransposedTensor)):
            assert sum(part.nbytes for part in weight.parts().values()) * 8 < 7 * weight.numel(), name
            assert not weight.requires_grad
            found.add(name)
    return found


def dense_twin(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """A copy in which every 4-bit weight is replaced by what it stands for."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, (Int4OpaqueTensor, Int4TransposedTensor)):
                setattr(module, name, nn.Parameter(weight.dequantize(), requires_grad=False))
    assert not int4_names(twin)
    return twin.to(dtype)


def assert_like_the_twin(model: nn.Module, compute: Callable[[Any, torch.dtype], Tensor]) -> None:
    """Check what a 4-bit model in float32 computes.

    Its products round activations to bfloat16 at most, and nothing else. The dense twin in bfloat16
    rounds these, and every result and weight beside, so it is farther from the twin in float64. Both
    distances are a sum over many roundings, of which the norm is compared.

    Args:
        model: in float32.
        compute: gives numbers of the model in a dtype; called for the model and both twins.
    """
    assert int4_names(model)
    exact = compute(dense_twin(model), torch.float64)
    rough = compute(dense_twin(model, torch.bfloat16), torch.bfloat16)
    found = compute(model, torch.float32)
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    error, allowed = float((found.double() - exact).norm()), float((rough.double() - exact).norm())
    assert error <= allowed, f"error is {error / allowed:.2f} of that of bfloat16"
