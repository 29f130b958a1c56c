"""Functions that read the memory of a tensor: refused, as a weight of several parts has none.

``data_ptr`` and ``untyped_storage`` stay: torch and other libraries ask for them to see what is shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from torchao_int4cpu.dispatch.table import implements_function


def _refuse(name: str, cure: str) -> Callable[..., NoReturn]:
    def handle(*args: object, **kwargs: object) -> NoReturn:
        raise TypeError(f"{name} got a 4-bit weight, which has no memory of its own; {cure}")

    return handle


_NUMBERS = "call it on .dequantize(), or on the parts: .qdata and .scale_and_zero"
_NAMES: tuple[str, ...] = (
    "__array__",
    "__cuda_array_interface__",
    "__dlpack__",
    "__dlpack_device__",
    "apply_",
    "map_",
    "map2_",
    "numpy",
    "resize_",
    "resize_as_",
    "set_",
    "tolist",
)

for _name in _NAMES:
    _function: Any = inspect.getattr_static(torch.Tensor, _name, None)
    if _function is not None:
        implements_function(getattr(torch.Tensor, _name))(_refuse(_name, _NUMBERS))
