"""``compare``: what 4 bits cost a model, measured as it can be by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchao.quantization import quantize_

from tests.hugging_face_models import llama
from tests.test_calibrated_directory import SIZES, bert, saved, text
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.bench.compare import compare
from torchao_int4cpu.convert.text import read_text, sequences, tokenizer_of


def nothing(name: str, done: int, total: int) -> None:
    """No progress is shown."""


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """For evaluation, and for calibration."""
    words = text(9000).replace(" lazy ", "\n")
    (tmp_path / "evaluation.txt").write_text(words[:5000])
    (tmp_path / "calibration.txt").write_text(words[5000:])
    return tmp_path / "evaluation.txt", tmp_path / "calibration.txt"


def test_losses_of_a_language_model(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    torch.manual_seed(0)
    model = llama(**SIZES).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # logits of which the loss depends on
    source = saved(model, tmp_path / "source")
    evaluation, calibration = texts
    rows = compare(
        source,
        evaluation,
        calibration,
        nothing,
        group_sizes=[32, 64],
        algorithms=["tinygemm", "gptq"],
        target_bits=[4.8],
        tokens=2048,
        evaluation_tokens=512,
    )
    assert [(row.algorithm, row.group_size) for row in rows] == [
        ("", 0),
        ("tinygemm", 32),
        ("gptq", 32),
        ("tinygemm", 64),
        ("gptq", 64),
        ("gptq", 0),
    ]
    ids = sequences(read_text(evaluation), tokenizer_of(source), 512, 64)
    assert ids.shape == (8, 64)
    quantized = copy.deepcopy(model)
    quantize_(
        quantized,
        Int4WeightOnlyConfig(64),
        lambda m, n: isinstance(m, torch.nn.Linear) and n != "lm_head",
    )
    nll, divergence = [], []
    with torch.no_grad():
        for row in ids:
            ours, theirs = (m(row[None]).logits[0, :-1].double() for m in (quantized, model))
            nll.append(float(F.cross_entropy(ours, row[1:])))
            p = theirs.softmax(-1)
            divergence.append(float((p * (p / ours.softmax(-1)).log()).sum(-1).mean()))
    assert rows[3].perplexity == pytest.approx(math.exp(sum(nll) / 8), rel=1e-4)
    assert rows[3].divergence == pytest.approx(sum(divergence) / 8, rel=1e-3)
    floats, *losses = [row.divergence for row in rows]
    assert floats == 0.0
    tinygemm_32, gptq_32, tinygemm_64, gptq_64, mixed = (loss or 0.0 for loss in losses)
    assert 0 < gptq_32 < tinygemm_32
    assert 0 < gptq_64 < tinygemm_64
    assert gptq_32 < mixed < tinygemm_64
    assert rows[4].bits < rows[5].bits <= 4.8
    assert rows[0].bits == 32
    assert rows[1].bits == 5.0
    # 64 and 160 columns in groups of 64: 1 and 2.5 of them, of which the last are padded
    assert 4.5 <= rows[3].bits < 5.0
    assert rows[0].nbytes > rows[1].nbytes > rows[3].nbytes
    assert rows[1].cosine is None
    assert (rows[1].sqnr or 0) > (rows[3].sqnr or 0) > 15


def test_an_encoder(
    tmp_path: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    source = saved(bert(), tmp_path / "source")
    arguments = ["--evaluation", str(texts[0]), "--calibration", str(texts[1]), "--tokens", "2048"]
    command = ["compare", str(source), *arguments, "--evaluation-tokens", "256", "--group-sizes", "64"]
    assert cli.main([*command, "--json", "--algorithms", "mse", "gptq"]) == 0
    where, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert where["evaluation tokens"] == 256
    floats, mse, gptq = rows
    assert abs(floats["cosine"] - 1) < 1e-6
    assert 0.9 < mse["cosine"] < gptq["cosine"] < 1 - 1e-7
    assert mse["perplexity"] is None
    plot = ["--target-bits", "5", "--plot", str(tmp_path / "a.svg")]
    assert cli.main([*command, "--algorithms", "mse", *plot]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "algorithm",
        "group",
        "bits",
        "MB",
        "1",
        "-",
        "cosine",
        "SQNR",
        "dB",
        "seconds",
    ]
    assert lines[2].startswith("float")
    assert lines[3].startswith("mse          64")
    assert lines[4].startswith("gptq      mixed")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_what_is_refused(
    tmp_path: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source: Any = saved(llama(**SIZES), tmp_path / "source")
    assert cli.main(["compare", str(source), "--evaluation", str(texts[0])]) == 1
    assert "gptq needs a text for calibration; give --calibration" in capsys.readouterr().err
    with pytest.raises(ValueError, match="int4_choose_qparams_algorithm='best' is not known"):
        compare(source, texts[0], None, nothing, algorithms=["best"])
