"""``from_pretrained(..., gguf_file=...)`` against the dense model of the same file."""

from __future__ import annotations

import contextlib
import resource
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig

from tests.test_foreign_models import IDS, logits
from torchao_int4cpu import Int4OpaqueTensor, import_checkpoints
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.convert.gguf import convert_gguf
from torchao_int4cpu.importers.gguf import KINDS
from torchao_int4cpu.importers.survey import survey_of_gguf

HIDDEN, INTERMEDIATE, VOCABULARY = 256, 512, 320


def blocks(kind: str, n: int, k: int, generator: np.random.Generator) -> Any:
    """Random ones, small enough for a model: uint8 ``[n, bytes of a row]``."""
    columns, size, _ = KINDS[kind]
    found = generator.integers(0, 256, (n, k // columns, size), dtype=np.uint8)
    scales = generator.uniform(1e-3, 2e-3, (n, k // columns, 2)).astype(np.float16)
    if kind == "Q4_1":
        scales[..., 1] *= -7.5  # so that weights are around 0
    elif kind == "Q4_K":
        scales[..., 0] /= 32
        scales[..., 1] /= 4
    halves = scales.view(np.uint8).reshape(n, -1, 4)
    width = 2 if kind == "Q4_0" else 4
    found[..., :width] = halves[..., :width]
    return found.reshape(n, -1)


def write(path: Path, kind: str, *, architecture: str = "llama") -> None:
    """A model of two layers: projections in ``kind``, the embedding in Q8_0, the rest float32."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN // 2, HIDDEN),
        "attn_v": (HIDDEN // 2, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
    }
    type_of_blocks = getattr(gguf.GGMLQuantizationType, kind)
    for layer in range(2):
        for name, (n, k) in shapes.items():
            data = blocks(kind, n, k, generator)
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=type_of_blocks)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    embedding = generator.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", gguf.quantize(embedding, q8_0), raw_dtype=q8_0)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=KINDS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any, str]]:
    """With 4-bit weights, and dense as without this package."""
    write(tmp_path / "model.gguf", request.param)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    import_checkpoints(False)
    try:
        dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
        yield ours, dense, request.param
    finally:
        import_checkpoints(True)


def test_each_weight_is_that_of_transformers(models: tuple[Any, Any, str], tmp_path: Path) -> None:
    """Rows of queries and keys among them, which have another order in the file."""
    ours, dense, kind = models
    expected = dict(dense.named_parameters())
    found = {n: p for n, p in ours.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    linear = {f"{n}.weight" for n, m in ours.named_modules() if isinstance(m, nn.Linear)}
    assert found.keys() == linear - {"lm_head.weight"}
    assert len(found) == 14
    for name, weight in found.items():
        assert (weight.group_size, weight.scale_and_zero.dtype) == (32, torch.float16)
        exact = expected[name].detach().double()
        error = float((weight.dequantize().double() - exact).norm() / exact.norm())
        # Zeros, and scales of Q4_K, have more bits than float16; 0 is one of Q4_0.
        assert error < (1e-7 if kind == "Q4_0" else 5e-4)
    for name, parameter in ours.named_parameters():
        if name not in found:
            assert torch.equal(parameter, expected[name])

    a, b = logits(ours), logits(dense)
    assert float((a - b).norm() / b.norm()) < 5e-3
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")  # the fixture: without importers
    assert torch.equal(logits(again), a)


def test_dense_if_asked(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "Q4_0")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True)
    )
    assert not any(isinstance(p, Int4OpaqueTensor) for p in model.parameters())
    assert logits(model).shape == (1, IDS.shape[1], VOCABULARY)


@pytest.mark.parametrize("size", [0, 3, 24, 100, 1000, 50_000, 400_000])
def test_a_cut_off_file_is_an_error(size: int, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "Q4_0")
    whole = (tmp_path / "model.gguf").read_bytes()
    assert size < len(whole)
    (tmp_path / "model.gguf").write_bytes(whole[:size])
    with pytest.raises((ValueError, OSError, IndexError, struct.error)):  # of those who read headers
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_what_of_a_file_is_kept(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "model.gguf", kind)
    assert cli.main(["inspect", str(tmp_path / "model.gguf")]) == 0
    printed = capsys.readouterr().out
    assert "GGUF, read by the command convert, and by transformers' from_pretrained" in printed
    assert (
        "4-bit weights  14, once it is converted or loaded\nother tensors  5 F32, 1 Q8_0\n" in printed
    )
    assert f"lost           {'nothing' if kind == 'Q4_0' else f'{kind}: zeros are rounded'}" in printed
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert cli.main(["inspect", str(tmp_path / "model.gguf")]) == 1
    assert "is no whole GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize("count", [6, pytest.param(80, marks=pytest.mark.slow)])
def test_absurd_numbers_in_a_header(count: int, tmp_path: Path) -> None:
    """Counts, lengths, sizes, offsets: an error, or what the file says still; no crash, no memory."""
    write(tmp_path / "model.gguf", "Q4_1")
    whole = (tmp_path / "model.gguf").read_bytes()
    end = whole.index(b"output_norm.weight") + 60
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        start = 4 + number * (end - 12) // count
        for value in (2**62, 2**64 - 1, 2**31, 0):
            damaged = bytearray(whole)
            damaged[start : start + 8] = struct.pack("<Q", value)
            (tmp_path / "model.gguf").write_bytes(damaged)
            for read in (
                lambda: survey_of_gguf(tmp_path / "model.gguf"),
                lambda: convert_gguf(
                    tmp_path / "model.gguf", tmp_path / "out", lambda name, done: None
                ),
            ):
                with contextlib.suppress(ValueError):
                    read()
            for made in tmp_path.glob("out*"):
                shutil.rmtree(made)
    # KiB; the file has 0.8 MB, its model 1.3.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024
