"""Under every instruction set that PyTorch can be told to use, and from each to each.

``ATEN_CPU_CAPABILITY`` picks PyTorch's kernels, and with them the layout, when a process starts; so
each of these tests runs subprocesses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchao_int4cpu import native_layout

CAPABILITIES = ("avx512", "avx2", "default")
SUPPORTED = {
    "avx512": torch.cpu._is_avx512_supported(),
    "avx2": torch.cpu._is_avx2_supported(),
    "default": True,
}


def _param(*names: str, marks: tuple[pytest.MarkDecorator, ...] = ()) -> object:
    missing = [name for name in names if not SUPPORTED[name]]
    reason = f"this CPU has no {' and no '.join(missing)}"
    return pytest.param(*names, marks=[pytest.mark.skipif(bool(missing), reason=reason), *marks])


def run(capability: str, *command: str, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability} | extra,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


#: This process's own: what runs under it anyway need not run in a child.
OWN = torch.backends.cpu.get_cpu_capability().lower()
OTHERS = [name for name in CAPABILITIES if name != OWN]


def readers() -> list[object]:
    """Every capability, for a test that reads what all of them wrote; fast is this process's own."""
    slow = pytest.mark.slow
    return [name if name == OWN else _param(name, marks=(slow,)) for name in CAPABILITIES]


def test_the_layout_here_is_that_of_the_capability() -> None:
    layout = native_layout()
    assert layout is not None
    assert layout.name == OWN


def run_tests(capability: str, names: tuple[str, ...], without: str) -> None:
    tests = [f"tests/test_{name}.py" for name in names]
    # One in two, all over the files: they are the same tests that run in this process.
    options = ("-p", "no:cacheprovider", "--all", "--every", "2", "-k", without)
    output = run(capability, "-m", "pytest", *options, *tests)
    assert f", layout {capability}, " in output  # the header: see conftest


@pytest.mark.slow
@pytest.mark.parametrize("capability", [_param(name) for name in OTHERS])
def test_layout_and_weight_hold(capability: str) -> None:
    """The layout against the op, what a weight is, and its product, with that instruction set."""
    names = ("layout", "tensor", "slicing", "kernels", "float16_scales", "act_order")
    without = "not memory and not compil and not opcheck and not every_cut_of_rows"
    run_tests(capability, names, without + " and not ranks and not tests_hold and not else_holds")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [_param(name) for name in OTHERS])
def test_every_kernel_and_handler_holds(capability: str) -> None:
    kernels = ("kernels", "kernel_limits", "expert_kernels", "expert_ops", "native", "native_threads")
    names = ("slicing", *kernels, "dispatch", "algebra")
    # The rest is slow, and the same everywhere.
    run_tests(capability, names, "not memory and not opcheck and not sanitizers and not build")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for name in CAPABILITIES:
        if SUPPORTED[name]:
            run(name, "-m", "tests.children.save_model", str(folder), name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_written_under_one_read_under_another(reader: str, written: Path) -> None:
    """All ordered pairs, nine ways to save and load each; no warning, so nothing is slow."""
    writers = [name for name in CAPABILITIES if SUPPORTED[name]]
    output = run(
        reader,
        "-W",
        "error::UserWarning:torchao_int4cpu",
        "-m",
        "tests.children.load_models",
        str(written),
        reader,
        *writers,
    )
    assert int(output) == 9 * len(writers)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [_param("avx512", "avx2"), _param("avx2", "default")])
def test_compiled_graphs_are_not_shared_between_layouts(
    first: str, second: str, tmp_path: Path
) -> None:
    """One cache on disk, one tensor: PyTorch's op under the first, not under the second."""
    for kernel in ("aten", "auto"):
        for capability in (first, second):
            environment = {
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                "TORCHAO_INT4CPU_KERNEL": kernel,
            }
            found = run(capability, "-m", "tests.children.foreign_layout", first, **environment)
            assert found.strip() == capability
