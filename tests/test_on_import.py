"""Patches of libraries that may never be imported."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from torchao_int4cpu.integrations.torchao_int4cpu_on_import import when_imported

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


def test_several_patches_wait_for_one_module(library: str) -> None:
    when_imported(library, double)
    when_imported(library, double)
    assert importlib.import_module(library).value == 4


def test_looking_for_a_module_imports_nothing_and_forgets_nothing(library: str) -> None:
    """As transformers looks for torchao, to see whether it is installed."""
    when_imported(library, double)
    for _ in range(2):
        spec = importlib.util.find_spec(library)
        assert spec is not None
        assert spec.loader is not None
        assert spec.loader.get_source(library).startswith("value")  # type: ignore[attr-defined]
    assert library not in sys.modules
    assert importlib.import_module(library).value == 2


def test_a_module_that_is_running_is_patched_once_it_has_run(library: str, tmp_path: Path) -> None:
    """As transformers' module that imports torchao, which imports this package."""
    inner = tmp_path / "library_of_the_tests" / "inner.py"
    inner.write_text("import sys\nsys.hook_of_the_tests()\nvalue = 1\n")
    seen: list[bool] = []

    def hook() -> None:
        seen.append(hasattr(sys.modules[library], "value"))
        when_imported(library, double)
        when_imported(library, double)  # another copy of the hook may wait for the same module

    sys.hook_of_the_tests = hook  # type: ignore[attr-defined]
    try:
        module = importlib.import_module(library)
    finally:
        del sys.hook_of_the_tests  # type: ignore[attr-defined]
    assert seen == [False]
    assert module.value == 4
    assert type(module.__spec__) is ModuleSpec


def test_a_module_that_fails_is_patched_at_the_next_try(library: str, tmp_path: Path) -> None:
    inner = tmp_path / "library_of_the_tests" / "inner.py"
    inner.write_text("import sys\nsys.hook_of_the_tests()\nraise KeyError('of the library')\n")
    sys.hook_of_the_tests = lambda: when_imported(library, double)  # type: ignore[attr-defined]
    try:
        with pytest.raises(KeyError, match="of the library"):
            importlib.import_module(library)
    finally:
        del sys.hook_of_the_tests  # type: ignore[attr-defined]
    inner.write_text("value = 111\n")  # of another length, or Python takes the bytecode it has
    assert importlib.import_module(library).value == 222


@pytest.mark.parametrize("imported", [False, True])
def test_a_patch_that_fails_breaks_no_import(
    imported: bool, library: str, caplog: pytest.LogCaptureFixture
) -> None:
    def patch(module: ModuleType) -> None:
        raise AttributeError("no such method")

    if imported:
        importlib.import_module(library)
    when_imported(library, patch)
    with caplog.at_level(logging.WARNING, "torchao_int4cpu"):
        assert importlib.import_module(library).value == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{library} is imported, but torchao_int4cpu failed to add")
    assert "(AttributeError: no such method)" in record.getMessage()
    assert "`pip install -U torchao_int4cpu library_of_the_tests`" in record.getMessage()


def test_a_module_that_there_is_not_stays_so(library: str) -> None:
    when_imported(f"{library}_else", double)
    with pytest.raises(ModuleNotFoundError, match="inner_else"):
        importlib.import_module(f"{library}_else")
