"""The names that users write, and what importing the package does not do."""

from __future__ import annotations

import pytest

import torchao_int4cpu
from tests.processes import run_child


def test_public_names() -> None:
    assert sorted(torchao_int4cpu.__all__) == [
        "GroupwiseInt4",
        "Int4OpaqueTensor",
        "Int4TransposedTensor",
        "Int4WeightOnlyConfig",
        "__version__",
        "get_kernel",
        "load_prototype",
        "load_torchao_checkpoint",
        "native_layout",
        "set_kernel",
    ]
    for name in torchao_int4cpu.__all__:
        assert getattr(torchao_int4cpu, name) is not None


def test_the_core_needs_torch_and_torchao_only() -> None:
    """And a failing import would be noticed: see the last line of the program."""
    done = run_child("core_without_extras")
    assert done.stdout == "torch.Size([1, 64])\n", done.stderr
    assert "ModuleNotFoundError: import of transformers halted" in done.stderr


@pytest.mark.slow
def test_importing_leaves_torchs_settings_alone() -> None:
    done = run_child("settings_before_and_after")
    assert done.returncode == 0, done.stderr
