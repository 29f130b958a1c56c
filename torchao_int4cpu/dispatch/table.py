"""The tables of what torch may do with a 4-bit weight, one for each class: how handlers get into them.

A handler takes the arguments of its op, bound by name and position as the op's schema has them, so its
signature says what it supports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor, Int4Weight

Handler = TypeVar("Handler", bound=Callable[..., Any])

#: The classes that share most handlers.
CLASSES: tuple[type[Any], ...] = (Int4OpaqueTensor, Int4TransposedTensor)

#: By class: handlers of ops that other libraries define, by name. They may be defined later, or never.
NAMED: dict[type[Any], dict[str, Callable[..., Any]]] = {cls: {} for cls in CLASSES}


def named_handlers(cls: type[Any]) -> dict[str, Callable[..., Any]]:
    """`NAMED` of a class, or of the one it is derived from."""
    return next(NAMED[base] for base in cls.__mro__ if base in NAMED)


def implements(*ops: Any, classes: Sequence[type[Any]] = CLASSES) -> Callable[[Handler], Handler]:
    """Register a handler for ops, given themselves or as ``"library::op"``."""

    def register(handler: Handler) -> Handler:
        for cls in classes:
            for op in ops:
                if isinstance(op, str):
                    NAMED[cls][op] = _bound(handler)
                else:
                    cls.implements(op)(_bound(handler))
        return handler

    return register


def implements_on_weight(*ops: Any) -> Callable[[Handler], Handler]:
    """Register a handler that takes the weight ``[N, K]``; of a transposed view, that behind it.

    For ops whose other arguments do not name dimensions.
    """

    def register(handler: Handler) -> Handler:
        def handle_view(view: Int4TransposedTensor, *args: Any, **kwargs: Any) -> Any:
            return on_weight(view, lambda weight: handler(weight, *args, **kwargs))

        implements(*ops, classes=[Int4OpaqueTensor])(handler)
        implements(*ops, classes=[Int4TransposedTensor])(handle_view)
        return handler

    return register


def implements_function(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for functions of torch's Python API."""

    def register(handler: Handler) -> Handler:
        for cls in CLASSES:
            cls.implements_torch_function(list(functions))(_bound(handler))
        return handler

    return register


def on_weight(t: Int4Weight, change: Callable[[Int4OpaqueTensor], Any]) -> Any:
    """Apply ``change`` to the weight, or to that behind a transposed view, and transpose the result."""
    if not isinstance(t, Int4TransposedTensor):
        return change(t)
    result = change(t.untransposed())
    return Int4TransposedTensor(result) if isinstance(result, Int4OpaqueTensor) else result


def _bound(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with the signature that torchao's tables call."""

    def handle(func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return handler(*args, **kwargs)

    handle.__name__ = handle.__qualname__ = handler.__name__
    return handle
