"""4-bit weights in processes that import torchao or transformers, and not this package.

Most tests describe the installation to a child by a folder of their own on ``PYTHONPATH``, so that they
need none: the entry point as pyproject.toml has it, and the folder that is installed at the top.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hugging_face_models import int4_names, llama, logits, quantized, written
from tests.processes import ROOT

CHILDREN = ROOT / "tests" / "children"
HOOK = ROOT / "torchao_int4cpu" / "integrations" / "torchao_int4cpu_on_import"
GROUP = "torch.backends"

#: What the environment that runs the tests has installed.
HERE = [e.value for e in importlib.metadata.entry_points(group=GROUP) if "int4cpu" in e.name]
installed = pytest.mark.skipif(not HERE, reason="this package's entry point is not installed")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that has of an installation what `import torch` looks for, and not the package."""
    text = (ROOT / "pyproject.toml").read_text()
    (entry,) = re.findall(rf'\n\[project\.entry-points\."{GROUP}"\].*\n(\S+) = "(.*)"\n', text)
    folder = tmp_path / "site"
    described = folder / "torchao_int4cpu-0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao_int4cpu\nVersion: 0\n")
    (described / "entry_points.txt").write_text(f"[{GROUP}]\n{entry[0]} = {entry[1]}\n")
    shutil.copytree(HOOK, folder / HOOK.name)
    return folder


def child(
    *arguments: str, path: list[Path], options: tuple[str, ...] = (), autoload: str = "1"
) -> subprocess.CompletedProcess[str]:
    here = {"PYTHONPATH": os.pathsep.join(map(str, path)), "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    return subprocess.run(
        [sys.executable, *options, str(CHILDREN / arguments[0]), *arguments[1:]],
        env=os.environ | here,
        cwd=path[0],
        capture_output=True,
        text=True,
    )


def imported(*modules: str, path: list[Path], autoload: str = "1") -> dict[str, Any]:
    done = child("import_in_order.py", *modules, path=path, autoload=autoload)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed to add" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(["torch", "torchao"], marks=pytest.mark.slow),
        pytest.param(["torchao"], marks=pytest.mark.slow),  # which imports torch as it runs
        pytest.param(["torchao.quantization.quant_api"], marks=pytest.mark.slow),
        pytest.param(["torchao_int4cpu"], marks=pytest.mark.slow),  # which imports torch, and torchao
        pytest.param(["transformers.quantizers.quantizer_torchao"], marks=pytest.mark.slow),
        pytest.param(["torch", "transformers.modeling_utils"], marks=pytest.mark.slow),
        pytest.param(["transformers.modeling_utils"], marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_the_package_comes_with_torchao_in_whatever_order(modules: list[str], site: Path) -> None:
    found = imported(*modules, path=[site, ROOT])
    transformers = "transformers" in modules[-1]
    assert found == {"hook": True, "package": True, "patched": transformers}


def test_import_torch_alone_imports_neither_torchao_nor_the_package(site: Path) -> None:
    assert imported("torch", path=[site, ROOT]) == {"hook": True, "package": False, "patched": False}


@pytest.mark.slow
def test_autoload_can_be_switched_off(site: Path) -> None:
    without = imported("torch", "transformers.modeling_utils", path=[site, ROOT], autoload="0")
    assert without == {"hook": False, "package": False, "patched": False}
    asked = imported("transformers.modeling_utils", "torchao_int4cpu", path=[site, ROOT], autoload="0")
    assert asked == {"hook": False, "package": True, "patched": True}


STUB = "import torch\n__version__ = '0.9.0'\n"  # of a torchao that has nothing of what is needed


@pytest.mark.parametrize(
    ("torchao", "package", "words"),
    [
        (STUB, None, "(ModuleNotFoundError: No module named 'torchao.utils')"),
        pytest.param(
            STUB, "raise KeyError('damaged')\n", "(KeyError: 'damaged')", marks=pytest.mark.slow
        ),
    ],
)
def test_a_package_that_cannot_be_imported_breaks_no_import(
    torchao: str, package: str | None, words: str, site: Path, tmp_path: Path
) -> None:
    """Not even where warnings are errors: it is said in a line of the log."""
    path = [site, ROOT]
    for name, text in (("torchao", torchao), ("torchao_int4cpu", package)):
        if text is not None:
            (site / name).mkdir()
            (site / name / "__init__.py").write_text(text)
    done = child(
        "import_in_order.py", "torch", "torchao", path=path, options=("-W", "error::UserWarning")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["package"] is False
    (line,) = done.stderr.splitlines()
    assert line.startswith("torchao is imported, but torchao_int4cpu failed to add its 4-bit weights")
    assert words in line
    assert "`pip install -U torchao_int4cpu torchao`" in line


@pytest.mark.slow
def test_without_torchao_nothing_happens(site: Path, tmp_path: Path) -> None:
    (site / "torchao.py").write_text("raise ModuleNotFoundError(\"No module named 'torchao'\")\n")
    assert imported("torch", path=[site, ROOT])["hook"] is True
    done = child("import_in_order.py", "torch", "torchao", path=[site, ROOT])
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'torchao'"
    assert "failed to add" not in done.stderr


@pytest.mark.slow
def test_an_entry_point_without_its_module_is_named_by_torch(site: Path) -> None:
    """A clone that was installed with -e and is gone: the one thing that is not in our hands."""
    shutil.rmtree(site / HOOK.name)
    # -S: no editable installation, which would find the module still; so torch's folder has to be said
    packages = Path(torch.__file__).parent.parent
    done = child("import_in_order.py", "torch", path=[site, packages], options=("-S",))
    message = done.stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: Failed to load the backend extension: torchao_int4cpu.")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in message
    done = child("import_in_order.py", "torch", path=[site, packages], options=("-S",), autoload="0")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_clone_names_no_entry_point_to_whoever_is_started_in_it() -> None:
    """An installation from it must not leave its metadata at the top, where no module is beside it."""
    found = importlib.metadata.distributions(path=[str(ROOT)])
    left = [str(d) for each in found for d in each.entry_points if d.group == GROUP]
    assert left == [], "remove torchao_int4cpu.egg-info at the top of the clone"


@installed
def test_the_installed_entry_point_is_that_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'torchao_int4cpu = "{HERE[0]}"' in text
    assert len(HERE) == 1


@installed
@pytest.mark.slow
def test_transformers_loads_and_quantizes_without_our_import(tmp_path: Path) -> None:
    """In the installed environment, from another folder; bit for bit what a process with it gives."""
    source = written(llama(), tmp_path / "source")
    model = quantized(source)
    model.save_pretrained(tmp_path / "out")
    expected, count = logits(model), len(int4_names(model))
    assert count > 0
    for what, folder in (("load", "out"), ("quantize", "source")):
        done = child("use_unasked.py", what, str(tmp_path / folder), path=[tmp_path])
        assert done.returncode == 0, done.stderr[-3000:]
        y, found = torch.load(tmp_path / f"{folder}.{what}.pt")
        assert torch.equal(y, expected), what
        assert found == count
