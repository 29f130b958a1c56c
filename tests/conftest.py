"""Seeds, the hypothesis profile, and a header that says what CPU the results are from."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from torchao_int4cpu.kernels.prefill import DENSE_DTYPE
from torchao_int4cpu.layout import native_layout

# The same examples in every run: a failure is to be seen by whoever runs the suite next.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_report_header() -> str:
    layout = native_layout()
    return (
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"layout {layout.name if layout else None}, dense product in {DENSE_DTYPE}"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
