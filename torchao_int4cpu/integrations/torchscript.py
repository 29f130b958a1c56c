"""A patch of TorchScript: it keeps a weight as a tensor without memory, and saves zeros or crashes."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from torchao_int4cpu.dispatch.entry import TORCHSCRIPT_MESSAGE
from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.tensor.transposed import Int4Weight


def _patch(module: Any) -> None:
    """Have `torch.jit.script` and ``trace`` of a module with 4-bit weights refused."""
    original = module.create_script_module
    if hasattr(original, "torchao_int4cpu"):
        return

    @functools.wraps(original)
    def create_script_module(nn_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in nn_module.named_parameters():
            if isinstance(parameter, Int4Weight):
                raise ValueError(f"{name}: {TORCHSCRIPT_MESSAGE}")
        return original(nn_module, *args, **kwargs)

    create_script_module.torchao_int4cpu = True  # type: ignore[attr-defined]
    module.create_script_module = create_script_module


when_imported("torch.jit._recursive", _patch)
