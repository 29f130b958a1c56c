"""Optional dependencies: import one, or say in a line how to install it."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(Exception):
    """An optional dependency is not installed; the message is the line to show."""


def import_extra(module: str, extra: str) -> Any:
    """Import a module that the extra ``torchao_int4cpu[extra]`` brings.

    Raises:
        MissingExtra: it, or what it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{error.name or module} is not installed: pip install 'torchao_int4cpu[{extra}]'"
        ) from error
