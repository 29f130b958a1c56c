"""A patch of TorchScript: it keeps a weight as a tensor without memory, and saves zeros or crashes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from torchao_int4cpu.dispatch.entry import TORCHSCRIPT_MESSAGE
from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.tensor.transposed import Int4Weight


def _refuse_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function of a module refuse one with 4-bit weights."""

    @functools.wraps(original)
    def refuse_weights(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in module.named_parameters():
            if isinstance(parameter, Int4Weight):
                raise ValueError(f"{name}: {TORCHSCRIPT_MESSAGE}")
        return original(module, *args, **kwargs)

    refuse_weights.torchao_int4cpu = True  # type: ignore[attr-defined]
    return refuse_weights


def _wrap(owner: Any, name: str) -> None:
    original = getattr(owner, name, None)
    if original is not None and not hasattr(original, "torchao_int4cpu"):
        setattr(owner, name, _refuse_weights(original))


def _patch(module: Any) -> None:
    """Have ``script``, ``trace``, and the saving of a module that got a weight later, refused."""
    _wrap(module, "create_script_module")
    for name in ("save", "save_to_buffer", "_save_for_lite_interpreter"):
        _wrap(module.torch.jit.RecursiveScriptModule, name)


when_imported("torch.jit._recursive", _patch)
