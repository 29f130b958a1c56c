"""The README's promises: its snippets run, its commands are the ones CI runs, its length."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_snippets_run(tmp_path: Path) -> None:
    """In order, as one session, in an empty folder."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 5
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "weight=Int4OpaqueTensor(shape=[512, 1000], group_size=64" in done.stdout
    assert "torch.Size([3, 100])" in done.stdout
    assert "True Qwen3MoeExperts(\n  gate_up_proj=Int4OpaqueTensor(shape=[8, 1536, 64]" in done.stdout
    assert "torch.Size([512, 1000]) torch.Size([512, 16])" in done.stdout


def test_there_are_two_commands_and_ci_runs_the_second() -> None:
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert [command.count("\n") for command in commands] == [0, 0]
    assert "torchao_int4cpu demo" in commands[0]
    assert "pytest" in commands[1]
    ci = (ROOT / ".ci" / "run").read_text()
    extract = re.search(r"command=\$\((sed .*)\)", ci)
    assert extract is not None
    found = subprocess.run(
        ["bash", "-c", extract[1]], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout.strip() == commands[1]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 210
    assert len((ROOT / ".github" / "CONTRIBUTING.md").read_text().splitlines()) <= 45


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert local
    for link in local:
        assert (ROOT / link).exists(), link


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git; this is no checkout")
def test_the_top_level_holds_what_the_card_lists() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.splitlines()
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top == {"torchao_int4cpu", "tests", "pyproject.toml", "README.md", "LICENSE"}
