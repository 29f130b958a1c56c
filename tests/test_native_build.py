"""Compiling the native kernels, and the compiled libraries that are not used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from torchao_int4cpu.kernels import selection as choice
from torchao_int4cpu.kernels.native import library as native_module
from torchao_int4cpu.kernels.native.build import BuildError, compile_library, source_digest
from torchao_int4cpu.kernels.native.library import NativeLibrary, Unavailable


def test_build_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        compile_library(tmp_path / "out.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="failed"):
        compile_library(tmp_path / "out.so")
    assert not (tmp_path / "out.so").exists()


def test_build_of_another_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BuildError, match="the kernels are for Linux on x86-64, not darwin"):
        compile_library(tmp_path / "out.so")
    unavailable = native_module.load()
    assert isinstance(unavailable, Unavailable)
    assert "there is none for darwin" in str(unavailable)


def test_a_missing_or_stale_build_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "LIBRARY_PATH", tmp_path / "none.so")
    missing = native_module.load()
    assert isinstance(missing, Unavailable)
    assert "not compiled; install g++" in str(missing)
    (tmp_path / "none.so").write_text("no library")
    broken = native_module.load()
    assert isinstance(broken, Unavailable)
    assert "cannot load" in str(broken)
    if not isinstance(choice.LIBRARY, Unavailable):
        monkeypatch.setattr(native_module, "source_digest", lambda: "0123456789abcdef")
        with pytest.raises(Unavailable, match="built from other sources; install the package again"):
            NativeLibrary(choice.LIBRARY.path)


def test_the_build_digest_covers_every_source(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("int a;")
    first = source_digest(tmp_path)
    (tmp_path / "b.h").write_text("int b;")
    second = source_digest(tmp_path)
    (tmp_path / "b.h").write_text("int c;")
    assert len({first, second, source_digest(tmp_path)}) == 3
