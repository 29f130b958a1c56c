"""A patch of torch's ONNX exporter: 4-bit weights become initializers of 4 bits, in ONNX's own order.

Three functions are wrapped: the two exporters, by `_export` and `_export_torchscript`, and what makes a
graph of a decomposed program, by `_translate`. torch has a table of functions for custom ops, but they
never see the numbers of a weight.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch.export import ExportedProgram

from torchao_int4cpu.integrations.onnx_nodes import (
    BLOCKED_OPSET,
    Nodes,
    OnnxWeight,
    UnsupportedOnnx,
)
from torchao_int4cpu.integrations.onnx_program import METHODS, lower
from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported
from torchao_int4cpu.kernels.selection import set_kernel
from torchao_int4cpu.tensor.transposed import Int4Weight

EXPORTER_MODULE = "torch.onnx._internal.exporter._compat"
TORCHSCRIPT_EXPORTER_MODULE = "torch.onnx._internal.torchscript_exporter.utils"

_standard: ContextVar[bool] = ContextVar("standard", default=False)


@contextmanager
def standard_operators() -> Iterator[None]:
    """Export to ONNX's standard operators only, for runtimes that do not know ``MatMulNBits``.

    Products then expand the whole weight in each run, by ``DequantizeLinear``, which is slow::

        with standard_operators():
            torch.onnx.export(model, (x,), "model.onnx", dynamo=True)
    """
    token = _standard.set(True)
    try:
        yield
    finally:
        _standard.reset(token)


def _export(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Take the opset that has 4-bit numbers, unless one is asked for; and show our errors plainly."""
    if kwargs.get("opset_version") is None and _holds_int4(model):
        kwargs["opset_version"] = BLOCKED_OPSET
    try:
        with set_kernel("auto"):  # under "aten" few rows are an op of PyTorch's on its own bytes
            return original(model, *args, **kwargs)
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UnsupportedOnnx):
            cause = cause.__cause__
        if cause is None:
            raise
        raise ValueError(str(cause)) from None


def _translate(
    original: Callable[..., Any], program: ExportedProgram, *, registry: Any, **kwargs: Any
) -> Any:
    """Translate a decomposed program, and give the graph its weights."""
    lowered = lower(program)
    if lowered is None:
        return original(program, registry=registry, **kwargs)
    nodes = Nodes(registry.opset_version, _standard.get())
    for target, method in METHODS.items():
        registry.register_op(target, _translation(getattr(nodes, method), lowered.weights))
    onnx_program = original(lowered.program, registry=registry, **kwargs)
    initializers = onnx_program.model.graph.initializers
    for name in lowered.unused:
        initializers.pop(name, None)
    for weight in lowered.weights:
        initializers.update(weight.initializers)
    onnx_program.exported_program = program  # that can be run, as ``verify=True`` does
    return onnx_program


def _translation(method: Callable[..., Any], weights: list[OnnxWeight]) -> Callable[..., Any]:
    """What torch's exporter calls for an op, with the number of its weight in front."""

    def translate(number: int, *args: Any) -> Any:
        return method(weights[number], *args)

    return translate


def _export_torchscript(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    if _holds_int4(model):
        raise ValueError(
            "torch.onnx.export got dynamo=False and a model with 4-bit weights, which TorchScript "
            "cannot trace; export with dynamo=True"
        )
    return original(model, *args, **kwargs)


def _holds_int4(model: object) -> bool:
    if isinstance(model, ExportedProgram):
        if any(node.target in METHODS for node in model.graph.nodes):  # it is decomposed already
            return True
        tensors: Iterable[object] = model.state_dict.values()
    elif isinstance(model, torch.nn.Module):
        tensors = itertools.chain(model.parameters(), model.buffers())
    else:
        return False
    return any(isinstance(tensor, Int4Weight) for tensor in tensors)


def _wrap(module: ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper(original, *args, **kwargs)`` in place of a function, once."""
    original = getattr(module, name, None)
    if original is None or hasattr(original, "torchao_int4cpu"):
        return  # None: another torch, which will say that it does not know our ops

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.torchao_int4cpu = True  # type: ignore[attr-defined]
    setattr(module, name, wrapped)


def _patch(module: ModuleType) -> None:
    _wrap(module, "export_compat", _export)
    _wrap(module._core, "_exported_program_to_onnx_program", _translate)


def _patch_torchscript(module: ModuleType) -> None:
    _wrap(module, "export", _export_torchscript)


when_imported(EXPORTER_MODULE, _patch)
when_imported(TORCHSCRIPT_EXPORTER_MODULE, _patch_torchscript)
