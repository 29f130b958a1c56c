"""A patch of torch's own `to_dlpack`, which asks no tensor class and would give out a null pointer."""

from __future__ import annotations

import functools
from typing import Any

import torch

from torchao_int4cpu.tensor.transposed import Int4Weight


def _patch() -> None:
    modules: list[Any] = [torch.utils.dlpack, torch]  # their annotations do not name it
    original = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def to_dlpack(tensor: Any) -> Any:
        if isinstance(tensor, Int4Weight):
            tensor.__dlpack__()  # which refuses, by name
        return original(tensor)

    to_dlpack.torchao_int4cpu = True  # type: ignore[attr-defined]
    for module in modules:
        module.to_dlpack = to_dlpack


_patch()
