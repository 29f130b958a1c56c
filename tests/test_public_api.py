"""The names that users write, and what importing the package does not do."""

from __future__ import annotations

import pickle

import pytest

import torchao_int4cpu
from tests.processes import run_child


def test_public_names() -> None:
    assert sorted(torchao_int4cpu.__all__) == [
        "Calibration",
        "GPTQConfig",
        "GroupwiseInt4",
        "Int4OpaqueTensor",
        "Int4TransposedTensor",
        "Int4WeightOnlyConfig",
        "SUPPORTED_OPS",
        "__version__",
        "calibrate",
        "filter_fn",
        "get_activations",
        "get_kernel",
        "import_checkpoints",
        "load_prototype",
        "load_torchao_checkpoint",
        "native_layout",
        "register",
        "set_kernel",
    ]
    for name in torchao_int4cpu.__all__:
        assert getattr(torchao_int4cpu, name) is not None


def test_old_names_stay() -> None:
    assert torchao_int4cpu.load_prototype is torchao_int4cpu.load_torchao_checkpoint


@pytest.mark.parametrize("path", ["config.Int4WeightOnlyConfig", "groupwise.GroupwiseInt4"])
def test_classes_are_pickled_by_the_package_and_found_where_they_were(path: str) -> None:
    """The modules of version 0.1.0 before they moved; those of tensors: see `test_old_files`."""
    module, _, name = path.partition(".")
    cls = getattr(torchao_int4cpu, name)
    new = pickle.dumps(cls, protocol=0)
    assert new.startswith(f"ctorchao_int4cpu\n{name}\n".encode())
    old = new.replace(b"ctorchao_int4cpu\n", f"ctorchao_int4cpu.{module}\n".encode())
    assert pickle.loads(old) is pickle.loads(new) is cls


def test_the_core_needs_torch_and_torchao_only() -> None:
    """And a failing import would be noticed: see the last line of the program."""
    done = run_child("core_without_extras")
    assert done.stdout == "torch.Size([1, 64])\n", done.stderr
    assert "ModuleNotFoundError: import of transformers halted" in done.stderr


@pytest.mark.slow
def test_importing_leaves_torchs_settings_alone() -> None:
    done = run_child("settings_before_and_after")
    assert done.returncode == 0, done.stderr
