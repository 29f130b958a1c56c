"""What torch calls for an op or a function on a 4-bit weight, and which graph a cache may reuse.

An op without a handler is refused by name; `SUPPORTED_OPS` are those with one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torchao_int4cpu.dispatch.linear import eager_linear, watched_linear
from torchao_int4cpu.dispatch.reads import elementwise, is_elementwise
from torchao_int4cpu.dispatch.table import CLASSES, NAMED, named_handlers
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.kernels.selection import decode_max_rows, native_kernel
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor
from torchao_int4cpu.version import hide_from_dynamo

#: Raised whenever a handler traces other ops than before, so that no graph in a cache is reused.
TRACE_REVISION = 4

#: What torch says when it is asked for the memory of a tensor that wraps others.
_NO_MEMORY = re.compile("data is not allocated yet|doesn't have storage|invalid python storage")

TORCHSCRIPT_MESSAGE = (
    "TorchScript cannot hold a 4-bit weight; use torch.export.export or torch.compile, and for ONNX "
    "torch.onnx.export(..., dynamo=True)"
)


def handle_op(
    cls: Any,
    func: Any,
    types: object,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``__torch_dispatch__``: look the op up; take composite ops apart; refuse the rest by name.

    Composite ops (``aten.to.dtype`` for one) arrive whole in `torch.inference_mode`.

    Raises:
        NotImplementedError: there is no handler.
    """
    kwargs = kwargs or {}
    _refuse_torchscript()
    table, named = cls._ATEN_OP_TABLE[cls], named_handlers(cls)
    handler = table.get(func) or named.get(func.name())
    if handler is not None:
        if torch.is_inference_mode_enabled() and func.is_view and not args[0].is_inference():
            # Torch's own views of a tensor from outside of this mode are none of the mode, either.
            with torch.inference_mode(False):
                return handler(func, types, args, kwargs)
        return handler(func, types, args, kwargs)
    if is_elementwise(func):
        return elementwise(func, args, kwargs)
    result = func.decompose(*args, **kwargs)
    if result is not NotImplemented:
        return result
    if func._schema.is_mutable:
        cure = "it is frozen, so change .dequantize() and quantize that again"
    else:
        cure = "call .dequantize() for a plain tensor"
    raise NotImplementedError(
        f"{func} has no implementation for a 4-bit weight; {cure} (torchao_int4cpu.SUPPORTED_OPS "
        "lists the ops that have one)"
    )


def _refuse_torchscript() -> None:
    if torch._C._get_tracing_state() is not None:
        raise ValueError(TORCHSCRIPT_MESSAGE)


def handle_function(
    cls: Any,
    func: Callable[..., Any],
    types: object,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``__torch_function__``: look the function up, else run it as it is.

    Torch functions are off inside, or each ``weight.shape`` would come back here (8 microseconds in a
    `linear`).
    """
    if func is F.linear:  # the hot path: ahead of the table and its wrappers
        y = eager_linear(*args, **kwargs) if kwargs else eager_linear(*args)
        if y is not None:
            return y
    kwargs = kwargs or {}
    with torch._C.DisableTorchFunctionSubclass():
        _refuse_torchscript()
        if func is F.linear:
            return watched_linear(*args, **kwargs)
        handler = cls._TORCH_FN_TABLE[cls].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if _NO_MEMORY.search(str(error)) is None:
                raise
            raise TypeError(
                f"{getattr(func, '__name__', func)} reads the memory of a tensor, and a 4-bit weight "
                "has none of its own; call it on .dequantize()"
            ) from error


def stable_hash(t: Int4OpaqueTensor) -> str:
    """``_stable_hash_for_caching``: all that decides which ops a trace of ``t`` consists of.

    torch keeps traced graphs on disk. Which op a product traces depends on this process too, on its
    layout and on `set_kernel`: without them in the key, a graph made under AVX-512 would be reused
    under AVX2, on bytes in another order.
    """
    weight = next(t.packed_experts().matrices())
    host = (
        TRACE_REVISION,
        native_layout(),
        native_kernel(weight.layout) is not None,
        decode_max_rows(weight),
    )
    outer = (t.shape, t.dtype, t.device, t.requires_grad, t.block_size, t.qdata_layout, t.read_only)
    parts = [(name, part.dtype, tuple(part.shape), part.stride()) for name, part in t.parts().items()]
    return f"{type(t).__qualname__}{host}{outer}{parts}"


def stable_hash_of_view(t: Int4TransposedTensor) -> str:
    """`stable_hash` of the transposed view."""
    return f"{type(t).__qualname__}({stable_hash(t.untransposed())})"


#: The ops that a 4-bit weight has a handler for. Elementwise ones that only read need none.
SUPPORTED_OPS: tuple[str, ...] = tuple(
    sorted(
        {str(op) for cls in CLASSES for op in cls._ATEN_OP_TABLE[cls]}
        | {*itertools.chain(*NAMED.values())}
    )
)

for _cls in CLASSES:
    _cls.__torch_dispatch__ = classmethod(handle_op)
    _cls.__torch_function__ = classmethod(handle_function)
hide_from_dynamo(handle_op)  # else it compiles parts of a handler that runs between two graphs
Int4OpaqueTensor._stable_hash_for_caching = stable_hash
Int4TransposedTensor._stable_hash_for_caching = stable_hash_of_view
