"""Compile the native kernel: plain C++ into one shared library, without torch's headers.

Python's headers are used where they are installed: with them, small layers take half the time.

This file is also loaded alone, while the package is being built: it imports nothing of it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY_PATH = Path(__file__).parent / "libint4cpu.so"

FLAGS = [
    "-std=c++2a",
    "-O3",  # one row of a 4096 x 4096 weight: 0.30 ms, with -O2 0.36 (GCC 12)
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",  # the kernels that promise the same bits everywhere round each operation
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC says this of its own AVX-512 headers
    "-Wno-maybe-uninitialized",
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl"]
_BF16 = [*_AVX512, "-mavx512vbmi", "-mavx512bf16"]

#: Instruction sets that each source may use; `driver` asks the CPU before it calls the others.
INSTRUCTION_SETS = {
    "driver": [],
    "python": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _BF16,
    "int16_avx2": _AVX2,
    "int16_avx512": _AVX512,
    "int16_vbmi": [*_AVX512, "-mavx512vbmi"],
    "int8_amx": [*_AVX512, "-mavx512vbmi", "-mavx512vbmi2"],
    "dynamic_amx": [*_AVX512, "-mavx512vbmi"],
    "transposed_amx": _BF16,
    "amx": _BF16,  # the tile instructions are written as assembly
}
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
]
EMULATE_AMX = ["-DINT4CPU_EMULATE_AMX"]


class BuildError(Exception):
    """The library cannot be compiled here, and why."""


def supported_platform() -> bool:
    """Whether there are kernels for this system and architecture."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def python_headers() -> list[str]:
    """The flags to find Python's headers; none where they do not offer the limited API."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return []
    return [f"-I{sysconfig.get_path('include')}"]


def source_digest(sources: Path = SOURCES) -> str:
    """Digest of the sources, which a library built from them carries."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compile_library(
    output: Path, extra_flags: Sequence[str] = (), headers: Sequence[str] | None = None
) -> None:
    """Compile ``output`` with the compiler in the environment variable CXX, else ``c++``.

    Args:
        output: path of the library.
        extra_flags: for compiling and linking.
        headers: flags to find Python's headers; those of `python_headers` if None.

    Raises:
        BuildError: another system or architecture, no compiler, or one that fails (GCC 11 or newer
            and Clang 14 or newer know all instructions).
    """
    if not supported_platform():
        raise BuildError(
            f"the kernels are for Linux on x86-64, not {sys.platform} {platform.machine()}"
        )
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    common = [*FLAGS, *(python_headers() if headers is None else headers), *extra_flags]
    digest = f'-DINT4CPU_DIGEST="{source_digest()}"'
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder, f"{name}.o") for name in INSTRUCTION_SETS]

        def compile_one(item: tuple[Path, Sequence[str]]) -> None:
            target, flags = item
            source = SOURCES / f"{target.stem}.cpp"
            _run([*compiler, *common, digest, *flags, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(objects, INSTRUCTION_SETS.values())))
        linked = Path(folder, LIBRARY_PATH.name)
        _run(
            [
                *compiler,
                "-shared",
                *extra_flags,
                *map(str, objects),
                "-Wl,--as-needed",
                "-o",
                str(linked),
            ]
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        # A new file: a process that has the old one mapped must not see it change.
        output.unlink(missing_ok=True)
        output.write_bytes(linked.read_bytes())
        output.chmod(0o755)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"no C++ compiler: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr}") from error
