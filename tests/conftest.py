"""Seeds, the hypothesis profile, and a header that says what CPU the results are from."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.scales import SCALES
from torchao_int4cpu import get_kernel, set_kernel
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.kernels.portable.prefill import DENSE_DTYPE
from torchao_int4cpu.kernels.selection import native_kernel, native_unavailable

# The same examples in every run: a failure is to be seen by whoever runs the suite next.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the slow tests, too")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one test of N")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        config.option.markexpr = ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every])
    items[:] = items[::every]


def pytest_report_header() -> str:
    layout = native_layout()
    kernel = native_kernel(layout) if layout else None
    return (
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"layout {layout.name if layout else None}, dense product in {DENSE_DTYPE}, "
        f"native kernel {kernel or native_unavailable()}, scales in {SCALES}"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    """No graph of another test, and none for the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def aten() -> Iterator[None]:
    """PyTorch's op and the dense prefill, whether or not there is a native kernel."""
    before = get_kernel()
    set_kernel("aten")
    yield
    set_kernel(before)


@pytest.fixture(params=["auto", "aten"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to multiply that this machine has."""
    if request.param == "auto" and native_unavailable() is not None:
        pytest.skip(f"no native kernel: {native_unavailable()}")
    before = get_kernel()
    set_kernel(request.param)
    yield request.param
    set_kernel(before)
