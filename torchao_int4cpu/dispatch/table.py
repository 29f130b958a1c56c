"""The table of what torch may do with a 4-bit weight: how handlers get into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torchao_int4cpu.tensor import Int4OpaqueTensor
from torchao_int4cpu.transposed import Int4TransposedTensor, Int4Weight

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Handler = TypeVar("Handler", bound=Callable[..., Any])
Weight = Int4Weight

#: Handlers of ops that other libraries define, by name: they may be defined later, or never.
NAMED: dict[str, Callable[..., Any]] = {}


def implements(ops: Sequence[Any]) -> Callable[[Handler], Handler]:
    """Register a handler ``(func, types, args, kwargs)`` for aten ops on either class."""
    register: Callable[[Handler], Handler] = Int4OpaqueTensor.implements(ops)
    return register


def implements_named(name: str) -> Callable[[Handler], Handler]:
    """Register a handler for an op of another library, as ``"library::op"``."""

    def register(handler: Handler) -> Handler:
        NAMED[name] = handler
        return handler

    return register


def implements_function(functions: Sequence[Any]) -> Callable[[Handler], Handler]:
    """Register a handler for functions of torch's Python API, on either class."""
    register: Callable[[Handler], Handler] = Int4OpaqueTensor.implements_torch_function(functions)
    return register


def on_weight(handler: Handler) -> Handler:
    """Let a handler see the weight ``[N, K]`` for the transposed view, and turn its result.

    For handlers whose other arguments do not name dimensions.
    """

    def handle(func: Any, types: Args, args: Args, kwargs: Kwargs) -> Any:
        if not isinstance(args[0], Int4TransposedTensor):
            return handler(func, types, args, kwargs)
        result = handler(func, types, (args[0].back(), *args[1:]), kwargs)
        return Int4TransposedTensor(result) if isinstance(result, Int4OpaqueTensor) else result

    handle.__name__ = handle.__qualname__ = handler.__name__
    handle.__doc__ = handler.__doc__
    return handle  # type: ignore[return-value]  # the same signature
