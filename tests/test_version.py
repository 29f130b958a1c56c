"""What differs between versions of torch and torchao, and what is said of those that nobody tried."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao

from torchao_int4cpu import version

ROOT = Path(__file__).parent.parent


def test_the_versions_here_are_tested_ones() -> None:
    assert version.untested({"torch": torch.__version__, "torchao": torchao.__version__}) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"torch": "2.15.3+cpu"}, []),
        ({"torch": "2.16.0a0+git1234"}, ["torch 2.16.0a0+git1234"]),
        ({"torch": "3.0.0", "torchao": "0.18.0"}, ["torch 3.0.0"]),
        ({"torch": "2.12.1", "torchao": "0.19.0.dev1"}, ["torchao 0.19.0.dev1"]),
        ({"torch": "unknown"}, []),
    ],
)
def test_newer_versions_are_recognised(found: dict[str, str], expected: list[str]) -> None:
    assert version.untested(found) == expected


@pytest.mark.slow
def test_a_newer_version_warns_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.1")
    with pytest.warns(
        UserWarning, match=r"was not tested with torch 2\.99\.1; .* so compare an output"
    ):
        version.warn_of_untested()
    program = (
        "import torch; torch.__version__ = '2.99.1'; "
        "import torchao_int4cpu as t; print(t.native_layout())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("NibbleLayout("), done.stderr
    assert done.stderr.count("was not tested with torch 2.99.1") == 1


def test_old_transformers_are_told() -> None:
    version.warn_of_old_transformers("5.16.0")
    version.warn_of_old_transformers("6.0.0.dev0")
    with pytest.warns(UserWarning, match=r"transformers 5\.9\.1 loses .* install transformers 5\.16"):
        version.warn_of_old_transformers("5.9.1")


def test_the_build_reads_the_version_without_torch() -> None:
    text = (ROOT / "torchao_int4cpu" / "version.py").read_text()
    assert f'__version__ = "{version.__version__}"' in text
    assert re.search(r"^import torch|^from torch", text, re.MULTILINE) is None


def test_no_requirement_has_an_upper_bound() -> None:
    """Or to install this package could replace the torch that a user has by an older one."""
    text = (ROOT / "pyproject.toml").read_text()
    (dependencies,) = re.findall(r"^dependencies = (\[.*\])$", text, re.MULTILINE)
    assert dependencies == '["torch>=2.13", "torchao>=0.17"]'


def test_dynamo_compiles_no_part_of_a_hidden_function() -> None:
    """The control: the same function, not hidden, is compiled where a graph breaks before it."""
    compiled: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph.code)
        return graph.forward

    def visible(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    def hidden(x: torch.Tensor) -> torch.Tensor:
        return visible(x) * 5

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def between(x: torch.Tensor, call: Any) -> torch.Tensor:
        result: torch.Tensor = call(x)
        return result

    def program(x: torch.Tensor, call: Any) -> torch.Tensor:
        result: torch.Tensor = between(x + 1, call) + 7
        return result

    version.hide_from_dynamo(hidden)
    x = torch.ones(2)
    for call, factor, parts in ((visible, 3, "* 3"), (hidden, 15, "* 5")):
        compiled.clear()
        torch._dynamo.reset()
        y = torch.compile(program, backend=backend)(x, call)
        assert torch.equal(y, (x + 1) * factor + 7)
        assert any(parts in code for code in compiled) == (call is visible)
        assert any("+ 7" in code for code in compiled)


def test_memory_for_results_without_inductors_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A newer torch may not have it; a default device is not asked, either way."""
    quick = version.empty_strided()
    monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    other = version.empty_strided()
    assert other is not quick
    with torch.device("meta"):
        for empty in (quick, other):
            made = empty((2, 3), (4, 1), torch.float16)
            assert made.shape == (2, 3)
            assert made.stride() == (4, 1)
            assert made.dtype == torch.float16
            assert made.device.type == "cpu"
