"""``export SRC OUT --format F``: what other tools read of a directory of ours, and what it costs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.foreign_checkpoints import foreign, parts_of, save_foreign
from tests.test_foreign_models import logits, tiny_experts, tiny_llama
from tests.test_foreign_weights import read
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.export import FORMATS, export_directory
from torchao_int4cpu.convert.foreign import convert_directory
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.importers.points import nearest_points
from torchao_int4cpu.importers.words import pack_words, unpack_words
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

formats = pytest.mark.parametrize("format", sorted(FORMATS))
#: Formats, and whether columns are in another order.
ROADS = [("gptq", False), ("gptq", True), ("compressed-tensors", False)]
#: As the writer of the tests calls them.
WRITTEN_AS = {"gptq": "gptq_v2", "compressed-tensors": "compressed-tensors"}


def nothing(name: str, done: int) -> None:
    """No progress is shown."""


# --- weights ------------------------------------------------------------------------------------


@given(n=st.integers(1, 30), k=st.integers(1, 30), dim=st.integers(0, 1), seed=st.integers(0, 999))
def test_words_are_packed_as_they_are_unpacked(n: int, k: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    words = pack_words(codes, dim)
    assert words.dtype == torch.int32
    assert words.shape[dim] == -(-codes.shape[dim] // 8)
    back = unpack_words(words, dim)
    assert torch.equal(back.narrow(dim, 0, codes.shape[dim]), codes)
    assert not back.narrow(dim, codes.shape[dim], back.shape[dim] - codes.shape[dim]).any()


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize(("format", "ordered"), ROADS)
def test_a_weight_of_the_tool_comes_back_as_it_was(format: str, group_size: int, ordered: bool) -> None:
    """Bit for bit, also after its zeros were rounded to float16. Groups may be finer than they were."""
    order = torch.randperm(256) if ordered else None
    weight = foreign(torch.randn(48, 256), group_size, False, order)
    stored = Int4OpaqueTensor.from_groupwise(
        read(WRITTEN_AS[format], weight), qparams_dtype=torch.float16
    )
    parts, stands_for = FORMATS[format].write(stored.to_groupwise())
    assert torch.equal(stands_for.dequantize(torch.float64), weight.dense())
    expected = parts_of(WRITTEN_AS[format], weight, False)
    assert parts.keys() == expected.keys()
    for name, part in expected.items():
        if name == "g_idx" and not ordered:
            continue  # the groups of the same columns may have other numbers
        assert torch.equal(parts[name], part), name


@formats
def test_other_weights_move_by_half_a_scale_at_most(format: str) -> None:
    value = GroupwiseInt4(
        torch.randint(0, 16, (64, 128), dtype=torch.uint8),
        (torch.rand(64, 4) + 0.1).half().float(),
        torch.randn(64, 4),
        32,
    )
    _, stands_for = FORMATS[format].write(value)
    moved = (stands_for.dequantize(torch.float64) - value.dequantize(torch.float64)).abs()
    scale = value.scale.double().repeat_interleave(32, 1)
    in_reach = value.zero.abs().repeat_interleave(32, 1) <= 7 * scale
    assert bool((moved <= 0.5 * scale * (1 + 2.0**-20))[in_reach].all())
    assert bool((moved > 0.1 * scale).any())


def test_what_cannot_be_held() -> None:
    codes = torch.full((8, 32), 8, dtype=torch.uint8)
    level = GroupwiseInt4(codes, torch.zeros(8, 1), torch.ones(8, 1), 32)
    with pytest.raises(ValueError, match="8 of 8 groups have equal numbers"):
        nearest_points(level)
    large = GroupwiseInt4(codes, torch.full((8, 1), 1e5), torch.zeros(8, 1), 32)
    with pytest.raises(ValueError, match=r"scales reach 1e\+05, and float16"):
        nearest_points(large)
    nought = GroupwiseInt4(codes, torch.zeros(8, 1), torch.zeros(8, 1), 32)
    assert not nearest_points(nought).value.dequantize().any()
    odd = GroupwiseInt4(codes[:7], torch.ones(7, 1), torch.zeros(7, 1), 32)
    with pytest.raises(ValueError, match=r"shape \[7, 32\], and GPTQ packs eight rows"):
        FORMATS["gptq"].write(odd)
    ordered = replace(nought, act_order=torch.arange(32).flip(0).int())
    with pytest.raises(ValueError, match="compressed-tensors does not read any more"):
        FORMATS["compressed-tensors"].write(ordered)


# --- directories --------------------------------------------------------------------------------


def quantized(folder: Path, **options: Any) -> Path:
    tiny_llama().save_pretrained(folder / "dense")
    plan = make_plan(folder / "dense", Int4WeightOnlyConfig(group_size=32), **options)
    quantize_directory(plan, folder / "int4", nothing)
    return folder / "int4"


@pytest.mark.parametrize(("format", "act_order"), ROADS)
def test_there_and_back_is_exact(
    format: str, act_order: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of the tool, as ours, as the tool's again: the same model."""
    own = {"down_proj": 160, "o_proj": 64}
    save_foreign(
        tmp_path / "theirs",
        tiny_llama(),
        WRITTEN_AS[format],
        32,
        False,
        own_groups=own,
        act_order=act_order,
    )
    convert_directory(tmp_path / "theirs", tmp_path / "ours", nothing)
    arguments = ["export", str(tmp_path / "ours"), str(tmp_path / "again"), "--format", format]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    # Zeros were rounded to float16 in between, and come back as they were in the file.
    assert float(re.findall(r"worst SQNR ([0-9.]+) dB", said)[0]) > 70
    config = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == format
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert sum(isinstance(p, Int4OpaqueTensor) for p in again.parameters()) == 14
    assert torch.equal(logits(again), logits(theirs))
    for file in (tmp_path / "again").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # nothing of torchao's


@formats
def test_what_was_quantized_here_is_said_to_move(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is measured between the two, and the model of the file is the one that was measured."""
    source = quantized(tmp_path, embeddings=True, head=True, skip=["k_proj"])
    report = export_directory(source, tmp_path / "out", format, nothing)
    ours = AutoModelForCausalLM.from_pretrained(source)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = {n: p for n, p in theirs.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    assert found.keys() == {tensor.name for tensor in report.quantized}
    assert len(found) == 2 * 6 + 1
    for tensor in report.quantized:
        exact = ours.get_parameter(tensor.name).to_groupwise().dequantize(torch.float64)
        error = found[tensor.name].to_groupwise().dequantize(torch.float64) - exact
        sqnr = 10 * torch.log10(exact.square().sum() / error.square().sum())
        assert tensor.sqnr == pytest.approx(float(sqnr), abs=0.05)
        assert 10 < tensor.sqnr < 60
    embedding: Tensor = theirs.model.embed_tokens.weight
    assert torch.equal(embedding, ours.model.embed_tokens.weight.dequantize())
    assert type(theirs.model.layers[0].self_attn.k_proj.weight) is torch.nn.Parameter
    arguments = ["export", str(source), str(tmp_path / "again"), "--format", format]
    assert cli.main(arguments) == 0
    assert "zeros              rounded: worst SQNR " in capsys.readouterr().out


def of_experts(folder: Path) -> Path:
    save_foreign(folder / "theirs", tiny_experts(), "gptq", 32, True)
    model = AutoModelForCausalLM.from_pretrained(folder / "theirs")
    model.save_pretrained(folder / "ours")
    return folder / "ours"


def of_an_embedding(folder: Path) -> Path:
    return quantized(folder, embeddings=True, skip=[r".*_proj"])


def of_nothing(folder: Path) -> Path:
    tiny_llama().save_pretrained(folder / "dense")
    return folder / "dense"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_nothing, "with 4-bit weights of this package; make one"),
        (of_experts, "is a stack of experts"),
        (of_an_embedding, "has no linear layer in 4 bits, only embeddings"),
    ],
)
def test_what_is_refused(
    make: Callable[[Path], Path],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make(tmp_path)
    assert cli.main(["export", str(source), str(tmp_path / "out"), "--format", "gptq"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
