"""Patches of transformers and accelerate, which take a 4-bit weight to be as large as a dense one.

They multiply the number of elements by the size of an element, which is that of the logical dtype.
"""

from __future__ import annotations

import functools
import sys
from contextvars import ContextVar
from typing import Any

import torch

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.tensor.transposed import Int4Weight

#: Whether accelerate is adding up sizes.
_counting: ContextVar[bool] = ContextVar("counting", default=False)


def nbytes(t: Int4Weight) -> int:
    """The bytes of a weight's parts, padding included."""
    return sum(part.nbytes for part in t.parts().values())


def _patch_transformers(module: Any) -> None:
    """Have ``PreTrainedModel.get_memory_footprint`` count the bytes of the parts."""
    original = module.PreTrainedModel.get_memory_footprint
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def get_memory_footprint(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = [p for p in self.parameters() if isinstance(p, Int4Weight)]
        saved = sum(weight.nelement() * weight.element_size() - nbytes(weight) for weight in weights)
        return original(self, *args, **kwargs) - saved

    get_memory_footprint.torchao_int4cpu = True  # type: ignore[attr-defined]
    module.PreTrainedModel.get_memory_footprint = get_memory_footprint


def _patch_accelerate(module: Any) -> None:
    """Have ``compute_module_sizes`` find plain bytes in the place of a 4-bit weight."""
    tensors, sizes = module.named_module_tensors, module.compute_module_sizes
    if hasattr(tensors, "torchao_int4cpu"):
        return

    @functools.wraps(tensors)
    def named_module_tensors(*args: Any, **kwargs: Any) -> Any:
        found = tensors(*args, **kwargs)
        return ((name, _bytes_like(tensor)) for name, tensor in found) if _counting.get() else found

    @functools.wraps(sizes)
    def compute_module_sizes(*args: Any, **kwargs: Any) -> Any:
        token = _counting.set(True)
        try:
            return sizes(*args, **kwargs)
        finally:
            _counting.reset(token)

    named_module_tensors.torchao_int4cpu = True  # type: ignore[attr-defined]
    module.named_module_tensors = named_module_tensors
    owners: list[Any] = [module, sys.modules.get("accelerate.utils"), sys.modules.get("accelerate")]
    for owner in owners:
        if getattr(owner, "compute_module_sizes", None) is sizes:
            owner.compute_module_sizes = compute_module_sizes


def _bytes_like(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, Int4Weight):
        return tensor
    return torch.empty(nbytes(tensor), dtype=torch.uint8, device="meta")


when_imported("transformers.modeling_utils", _patch_transformers)
when_imported("accelerate.utils.modeling", _patch_accelerate)
