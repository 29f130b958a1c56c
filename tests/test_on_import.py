"""Patches of libraries that may never be imported."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from torchao_int4cpu.integrations.on_import import when_imported

NAME = "library_of_the_tests.inner"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module, neither of which is imported yet."""
    folder = tmp_path / "library_of_the_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text("value = 1\n\ndef function():\n    return value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield NAME
    for name in (NAME, NAME.partition(".")[0]):
        sys.modules.pop(name, None)


def double(module: ModuleType) -> None:
    module.value *= 2  # type: ignore[attr-defined]


def test_a_module_is_patched_when_it_is_imported(library: str) -> None:
    when_imported(library, double)
    assert library not in sys.modules
    module = importlib.import_module(library)
    assert module.function() == 2
    # As if nothing had been in between: who looks for the source or the loader finds it.
    assert "return value" in inspect.getsource(module.function)
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert module.__loader__ is module.__spec__.loader
    assert importlib.reload(module).value == 1  # a patch is made once


def test_a_module_that_is_imported_already_is_patched_at_once(library: str) -> None:
    module = importlib.import_module(library)
    when_imported(library, double)
    assert module.value == 2


def test_a_module_that_there_is_not_stays_so(library: str) -> None:
    when_imported(f"{library}_else", double)
    with pytest.raises(ModuleNotFoundError, match="inner_else"):
        importlib.import_module(f"{library}_else")
