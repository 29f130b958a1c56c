"""The promises of the README and the reference: snippets run, commands parse, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchao_int4cpu import __main__ as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.stem: path.read_text() for path in (ROOT / ".github" / "docs").glob("*.md")}

#: Where the links of the README lead, which is shown elsewhere too.
BASE = "https://github.com/torchao-int4cpu/torchao_int4cpu/blob/main/"


def run_snippets(text: str, folder: Path) -> str:
    """The Python snippets, in order, as one session in an empty folder: what they print."""
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippets
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_snippets_run(tmp_path: Path) -> None:
    printed = run_snippets(README, tmp_path)
    assert "weight=Int4OpaqueTensor(shape=[512, 1000], group_size=64" in printed
    assert "torch.Size([3, 100])" in printed


EXPECTED = {
    "huggingface": "Linear(in_features=384, out_features=384, bias=True)",
    "experts-and-views": "True Qwen3MoeExperts(\n  gate_up_proj=Int4OpaqueTensor(shape=[8, 1536, 64]",
    "performance": "aten\n",
    "formats": "torch.Size([512, 1000]) torch.Size([512, 16])",
    "weights": "torch.Size([5, 48, 5, 64])",
    "export": "(7, 96)\n",
    "calibration": "2 of 2 matrices are quantized for their inputs: their outputs are",
}


@pytest.mark.parametrize(
    "name",
    ["formats", *(pytest.param(n, marks=pytest.mark.slow) for n in EXPECTED if n != "formats")],
)
def test_the_snippets_of_the_reference_run(name: str, tmp_path: Path) -> None:
    if name == "export":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module)
    assert EXPECTED[name] in run_snippets(DOCS[name], tmp_path)


def test_every_snippet_is_run() -> None:
    assert {name for name, text in DOCS.items() if "```python" in text} == set(EXPECTED)


def test_there_are_two_commands_and_ci_runs_the_second() -> None:
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert [command.count("\n") for command in commands] == [0, 0]
    assert "torchao-int4cpu demo" in commands[0]
    assert "pytest" in commands[1]
    ci = (ROOT / ".ci" / "run").read_text()
    extract = re.search(r"command=\$\((sed .*)\)", ci)
    assert extract is not None
    found = subprocess.run(
        ["bash", "-c", extract[1]], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout.strip() == commands[1]


@pytest.mark.parametrize("name", ["README", *DOCS])
def test_commands_that_are_shown_parse(name: str) -> None:
    lines = ({"README": README} | DOCS)[name].splitlines()
    shown = [line.strip().split() for line in lines if line.startswith("    torchao-int4cpu ")]
    for _, *arguments in shown:
        assert cli.parser().parse_args(arguments).run is not None
    assert shown or name not in ("README", "command-line")


def test_they_are_short() -> None:
    assert len(README.splitlines()) <= 120
    assert len((ROOT / ".github" / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_links_lead_somewhere() -> None:
    for folder, text in (
        (ROOT, README),
        *((ROOT / ".github" / "docs", text) for text in DOCS.values()),
    ):
        links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)
        for link in links:
            if link.startswith(BASE):
                assert (ROOT / link.removeprefix(BASE)).is_file(), link
            elif not link.startswith("http"):
                assert (folder / link).exists(), link
    named = set(re.findall(r"\]\[(\w+)\]", README))
    assert named == set(re.findall(r"^\[(\w+)\]: ", README, re.MULTILINE))
    assert README.count(BASE) == len(DOCS)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git; this is no checkout")
def test_the_top_level_holds_what_the_card_lists() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.splitlines()
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top == {"torchao_int4cpu", "tests", "pyproject.toml", "README.md", "LICENSE"}
