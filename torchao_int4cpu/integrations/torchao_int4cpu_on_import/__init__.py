"""Calling a function when a library is imported, without importing it.

That is how patches wait for their libraries, and how this package itself waits for torchao: `import
torch` calls `import_with_torchao`, an entry point of the group ``torch.backends`` (pyproject.toml). For
that the folder is installed a second time, as a package at the top of its own: a name below
``torchao_int4cpu`` would import all of it, and with it torchao, into every process that uses torch.
Hence only the standard library is imported here, nothing may be raised, and pyproject.toml has two
roots for packages, which work the same in a wheel and in an editable installation.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], object]

_PATCHES: dict[str, list[Patch]] = {}


def import_with_torchao() -> None:
    """Have ``torchao_int4cpu`` imported whenever torchao is, once that is done; never raise.

    Whoever loads 4-bit weights, or quantizes, imports torchao: so transformers, vLLM and peft need no
    import of this package. It adds a twentieth to the time that torchao takes to import.
    """
    when_imported("torchao", lambda torchao: importlib.import_module("torchao_int4cpu"))


def when_imported(name: str, patch: Patch) -> None:
    """Call ``patch`` with the module of that name once it has run: now, if it has run already.

    If the patch raises, the module is imported all the same, and a line is logged.
    """
    module = sys.modules.get(name)
    if module is None:
        _PATCHES.setdefault(name, []).append(patch)
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    elif getattr(module.__spec__, "_initializing", False):
        _when_it_has_run(module, patch)
    else:
        _apply(patch, module)


def _apply(patch: Patch, module: ModuleType) -> None:
    try:
        patch(module)
    except Exception as error:
        # A log and no warning, which can be made an exception: here it would break a foreign import.
        logging.getLogger("torchao_int4cpu").warning(
            "%s is imported, but torchao_int4cpu failed to add its 4-bit weights to it (%s: %s), so "
            "they may not load; `pip install -U torchao_int4cpu %s` brings versions that fit, and "
            "`pip uninstall torchao_int4cpu` ends this message",
            module.__name__,
            type(error).__name__,
            error,
            module.__name__.partition(".")[0],
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_PATCHES` as the other finders do, and has them patched once they ran."""

    def __init__(self) -> None:
        self._searches = threading.local()  # by thread, as attributes: the names that are searched for

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PATCHES or hasattr(self._searches, fullname):
            return None
        setattr(self._searches, fullname, True)
        try:
            spec = importlib.util.find_spec(fullname)  # by the other finders
        finally:
            delattr(self._searches, fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # for those who look for a module and do not import it
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader  # what others ask for it gets
        self._loader.exec_module(module)
        for patch in _PATCHES.pop(module.__name__, ()):
            _apply(patch, module)


def _when_it_has_run(module: ModuleType, patch: Patch) -> None:
    """Patch a module that is running now: it imports torchao or torch, and so came first.

    No hook tells when such a module is done. Python notes it at its spec, as CPython 3.10 to 3.14 do by
    ``spec._initializing = False``; that assignment is waited for.
    """
    spec = module.__spec__
    assert spec is not None
    kind: Any = type(spec)

    class Running(kind):  # type: ignore[misc]  # whatever class the spec has
        def __setattr__(self, name: str, value: object) -> None:
            if name == "_initializing" and not value:
                self.__class__ = kind
                setattr(self, name, value)
                when_imported(self.name, patch)  # at once; or at the next try, if it failed
            else:
                super().__setattr__(name, value)

    spec.__class__ = Running
