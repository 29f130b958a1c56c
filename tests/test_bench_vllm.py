"""The rows of ``bench --vllm`` are what its processes say; here those are played."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.hugging_face_models import llama, written
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.bench import vllm as bench_vllm
from torchao_int4cpu.bench.vllm import BF16, INT4, W4A8, W4A16
from torchao_int4cpu.extras import MissingExtra

CONFIG = Int4WeightOnlyConfig(group_size=32)
STUB = [sys.executable, str(Path(__file__).parent / "children" / "vllm_worker_stub.py")]


def nothing(step: str, done: int, total: int) -> None:
    """No progress is shown."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench_vllm, "WORKER", STUB)
    monkeypatch.setattr(bench_vllm, "has_vllm", lambda: True)
    return written(llama(), tmp_path / "source")


def test_rows(source: Path) -> None:
    served = bench_vllm.run(source, CONFIG, nothing, prompts=[256], sequences=[1, 8], passes=2)
    assert served.vllm == "1.2"
    assert served.refused[W4A16] == "AttributeError: there is no op for it"
    assert "no AMX" in served.refused[W4A8] or "no op" in served.refused[W4A8]
    assert [(row.weights, row.step, row.sequences) for row in served.rows] == [
        (BF16, "prefill", 1),
        (INT4, "prefill", 1),
        (BF16, "decode", 1),
        (INT4, "decode", 1),
        (BF16, "decode", 8),
        (INT4, "decode", 8),
    ]
    for row in served.rows:
        share = 1.0 if row.weights == BF16 else 0.5
        assert row.weight_bytes == 1000 * share
        assert row.int4_weights == (0 if row.weights == BF16 else 7)
        assert row.resident_bytes == 5000
        assert row.vs_bf16 == pytest.approx(1 / share)
        seconds = share * (0.26 if row.step == "prefill" else row.sequences * 4e-3)
        tokens = 256 if row.step == "prefill" else row.sequences
        assert row.ms == pytest.approx(1e3 * seconds)
        assert row.tokens_per_s == pytest.approx(tokens / seconds)


def test_the_command(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--vllm", str(source), "--group-size", "32", "--passes", "1"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "there is no op for it" in printed[0]
    assert len(printed) == 2 + 2 * (2 + 3)
    assert cli.main([*command, "--json", "--prompts", "64", "--sequences", "2"]) == 0
    where, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert where["vLLM"] == "1.2"
    assert [row["prompt_tokens"] for row in rows] == [64, 64, 16, 16]


def test_what_cannot_be_done(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"prompts has \[0\]; give numbers of 1 and more"):
        bench_vllm.run(source, CONFIG, nothing, prompts=[0])
    with pytest.raises(ValueError, match=r"while bf16 .* for 99 .*: RuntimeError: no more"):
        bench_vllm.run(source, CONFIG, nothing, sequences=[99])
    with pytest.raises(ValueError, match=r"is not a Hugging Face directory"):
        bench_vllm.run(source / "missing", CONFIG, nothing)
    monkeypatch.undo()
    with pytest.raises(MissingExtra, match=r"vLLM is not installed .* call bench --vllm there"):
        bench_vllm.run(source, CONFIG, nothing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vllm", "DIR", "--moe"], "--moe, which has no effect here"),
        (["--vllm", "DIR", "--rows", "3"], "--rows, which has no effect here"),
        (["--prompts", "3"], "--prompts, which has no effect here; leave it out, or add --vllm"),
    ],
)
def test_options_without_an_effect(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err
