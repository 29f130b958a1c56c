"""What setuptools runs, by pyproject.toml, to put the native kernel into an installation.

setuptools loads this file alone, so `build` is loaded by its path. Where it cannot compile, the package
is installed without the library, and PyTorch's op is used.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_spec = importlib.util.spec_from_file_location("_build_native", Path(__file__).with_name("build.py"))
assert _spec is not None
assert _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

PACKAGE = Path("torchao_int4cpu", "kernels", "native")


class BuildPy(build_py):
    """Copies the package, then compiles the library beside it if that can be done."""

    def run(self) -> None:
        super().run()
        output = self._library()
        output.unlink(missing_ok=True)  # one that no longer fits its sources is worse than none
        try:
            build.compile_library(output)
        except build.BuildError as error:
            self.announce(f"installing without the native kernel: {error}", level=3)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        library = self._library()
        return [*outputs, str(library)] if library.exists() else outputs

    def _library(self) -> Path:
        if self.editable_mode:
            return Path(build.LIBRARY_PATH)
        return Path(self.build_lib, PACKAGE, build.LIBRARY_PATH.name)


class BdistWheel(bdist_wheel):
    """With the library a wheel is for this platform and every Python; without it, for any platform."""

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        built = Path(self.get_finalized_command("build_py").build_lib, PACKAGE, build.LIBRARY_PATH.name)
        return ("py3", "none", f"linux_{platform.machine()}") if built.exists() else tag
