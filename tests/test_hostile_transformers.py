"""What transformers makes of damaged 4-bit checkpoints: it refuses them, or loads other codes."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests.numerics import (
    assert_int4,
)

PROJECTION = "model.layers.0.self_attn.q_proj"
Header = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, saved by transformers."""
    from tests.hugging_face_models import llama, quantized, written

    folder = tmp_path_factory.mktemp("hostile")
    model = quantized(written(llama(num_hidden_layers=1), folder / "source"))
    model.save_pretrained(folder / "good")
    return folder / "good"


def entry(**changes: Any) -> Callable[[Header], None]:
    """Change what the metadata says of one weight."""

    def change(header: Header) -> None:
        metadata = header["__metadata__"]
        said = json.loads(metadata[f"{PROJECTION}.weight"])
        for name, new in changes.items():
            (said if name.startswith("_") else said["_data"])[name] = new
        metadata[f"{PROJECTION}.weight"] = json.dumps(said)

    return change


def tensor(part: str, **changes: Any) -> Callable[[Header], None]:
    """Change what the header says of one part."""
    return lambda header: header[f"{PROJECTION}._weight_{part}"].update(changes)


def damaged(folder: Path, good: Path, change: Callable[[Header], None], flips: bytes = b"") -> Path:
    """A copy of a checkpoint with another header; ``flips`` are applied to the first codes."""
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = (good / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    start = header[f"{PROJECTION}._weight_qdata"]["data_offsets"][0]
    for i, flip in enumerate(flips):
        data[start + i] ^= flip
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(qdata_layout="avx1024"), "layout 'avx1024' is not known; choose"),
        (entry(format_version=6), "install a newer one"),
        (entry(shape=[2**40, 64]), "qdata has shape"),
        (entry(block_size=[1, 64]), r"scale_and_zero has shape \[2, 64, 2\]; .* needs \[1, 64, 2\]"),
        (entry(_type="Int4Tensor"), "Int4Tensor"),
        (entry(_type="NoSuchTensor"), "Invalid torchao safetensors metadata"),
        (tensor("scale_and_zero", shape=[1, 64, 4]), "scale_and_zero has shape"),
        (tensor("scale_and_zero", dtype="F16"), "scale_and_zero in torch.float16; that version"),
        (tensor("qdata", dtype="I8"), "qdata is torch.int8; it must be"),
        (tensor("qdata", data_offsets=[0, 2048]), "invalid offset"),
        (lambda header: header["__metadata__"].pop("tensor_names"), "Invalid torchao safetensors"),
    ],
)
def test_transformers_refuses(
    change: Callable[[Header], None],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is wrong is in the exception, or in the report that transformers logs before it."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = damaged(tmp_path, checkpoint, change)
    with pytest.raises((RuntimeError, ValueError, SafetensorError)) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    told = f"{caught.value}\n{caplog.text}"
    assert re.search(message, told), told[-3000:]


def test_transformers_loads_other_codes(checkpoint: Path, tmp_path: Path) -> None:
    """A flip in a code is another code; `inspect --verify` tells, loading does not."""
    from transformers import AutoModelForCausalLM

    from tests.hugging_face_models import logits

    folder = damaged(tmp_path, checkpoint, lambda header: None, flips=b"\x88" * 512)
    good, other = map(AutoModelForCausalLM.from_pretrained, (checkpoint, folder))
    weight = other.get_parameter(f"{PROJECTION}.weight")
    assert_int4(weight, (64, 64), 32)
    assert not torch.equal(weight.qdata, good.get_parameter(f"{PROJECTION}.weight").qdata)
    assert bool(logits(other).isfinite().all())
    assert not torch.equal(logits(other), logits(good))
