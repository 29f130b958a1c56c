"""The native kernels again, built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native_variants import OTHER_LIBRARY
from tests.processes import ROOT
from torchao_int4cpu.kernels.native.build import EMULATE_AMX, SANITIZE, BuildError, compile_library

CASES = (
    "bound or exact or special or disturb or finite or infinite or shape or unaligned or once "
    "or equals or leaves"
)


def _preload() -> str:
    """The libraries that must be loaded before Python's memory and torch's exceptions."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*compiler, f"-print-file-name={name}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no compiler: {error}")
        paths.append(done.stdout.strip())
        if not os.path.isabs(paths[-1]):
            pytest.skip(f"this compiler has no {name}")
    return " ".join(paths)


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    library = tmp_path / "libint4cpu.so"
    preload = _preload()
    try:
        compile_library(library, [*SANITIZE, *EMULATE_AMX])
    except BuildError as error:
        pytest.skip(str(error))
    environment = os.environ | {
        OTHER_LIBRARY: str(library),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = [
        f"tests/test_{name}.py"
        for name in ("native", "native_threads", "transposed_kernels", "op_function", "plain_products")
    ]
    # One in three, all over the files: all of them take eight minutes.
    options = ("-q", "-p", "no:cacheprovider", "-k", CASES, "--every", "3")
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
