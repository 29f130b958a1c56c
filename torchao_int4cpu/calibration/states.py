"""The activations between two blocks, one tensor for each batch, in memory or in mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class States:
    """A list of tensors that can be replaced one by one.

    Args:
        tensors: the first ones.
        folder: for a file of each, which the system may drop from memory; None for memory.
    """

    def __init__(self, tensors: Sequence[Tensor | None], folder: Path | None = None) -> None:
        self._folder = folder
        self._tensors: list[Tensor | None] = [None] * len(tensors)
        for i, tensor in enumerate(tensors):
            self[i] = tensor

    def __getitem__(self, i: int) -> Tensor | None:
        return self._tensors[i]

    def __setitem__(self, i: int, tensor: Tensor | None) -> None:
        if self._folder is None or tensor is None:
            self._tensors[i] = tensor
            return
        held = self._tensors[i]
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            path = self._folder / f"activations-{i:05}.bin"
            path.unlink(missing_ok=True)
            size = tensor.numel()
            mapped = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
            held = self._tensors[i] = mapped.view(tensor.shape)
        held.copy_(tensor)
