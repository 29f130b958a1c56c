"""``convert DIR --layout native``: a directory of another CPU's layout, rewritten in place."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import FqnToConfig, quantize_
from transformers import AutoModelForCausalLM

from tests.hugging_face_models import llama
from tests.test_calibrate import assert_same
from tests.test_vllm_configs import experts
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig, native_layout
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.checkpoint.safetensors import crc32, tell_of_repacking
from torchao_int4cpu.convert.native import ENDING, to_native_layout
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.format.slicing import repack, stacked

NATIVE = LAYOUTS[getattr(native_layout(), "name", "default")]
OTHER = next(layout for layout in LAYOUTS.values() if layout is not NATIVE)

CHOSEN = (r"re:.*\.experts\.(gate_up_proj|down_proj)", r"re:.*self_attn\.(q|k|v|o)_proj")


def nothing(name: str, done: int) -> None:
    pass


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
        return found


def layouts_of(folder: Path) -> set[str]:
    """All that any file says."""
    return {
        json.loads(entry)["_data"]["qdata_layout"]
        for file in folder.glob("*.safetensors")
        for name, entry in metadata_of(file).items()
        if "qdata_layout" in entry
    }


def in_the_other_layout(folder: Path) -> None:
    """As if another CPU had written it."""
    files = sorted(folder.glob("*.safetensors"))
    sums: dict[str, str] = {}
    for file in files:
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if key.endswith("_qdata"):
                matrices = [tensor] if tensor.ndim == 2 else list(tensor)
                repacked = [repack(matrix, NATIVE, OTHER) for matrix in matrices]
                tensors[key] = stacked(repacked, tensor.shape[:-2])
                sums[crc32(tensor)] = crc32(tensors[key])
        save_file(tensors, file.with_suffix(".part"), metadata_of(file))
        file.with_suffix(".part").rename(file)
    for file in files:
        metadata = metadata_of(file)
        for name, text in metadata.items():
            if "qdata_layout" in text:
                entry: Any = json.loads(text)
                data = entry["_data"]
                data["qdata_layout"] = OTHER.name
                data["crc32"]["qdata"] = sums[data["crc32"]["qdata"]]
                metadata[name] = json.dumps(entry)
        save_file(load_file(file), file, metadata)


def saved(model: Any, folder: Path) -> Any:
    """A 4-bit model in several files of the other layout."""
    config = Int4WeightOnlyConfig(group_size=32)
    quantize_(model, FqnToConfig(dict.fromkeys(CHOSEN, config)), filter_fn=None)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    in_the_other_layout(folder)
    assert layouts_of(folder) == {OTHER.name}
    return model


@pytest.mark.parametrize("make", [llama, experts])
def test_it_is_the_same_model(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(make(), tmp_path)
    tell_of_repacking.cache_clear()
    with caplog.at_level(logging.WARNING, "torchao_int4cpu"):
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    (said,) = [record.message for record in caplog.records]
    assert f"are repacked from layout {OTHER.name} to {NATIVE.name} as they are loaded" in said
    assert cli.main(["convert", str(tmp_path), "--layout", "native"]) == 0
    count = sum(isinstance(p, Int4OpaqueTensor) for p in model.parameters())
    assert f"{count} of {count} 4-bit weights repacked" in capsys.readouterr().out
    assert layouts_of(tmp_path) == {NATIVE.name}
    assert not list(tmp_path.glob(f"*{ENDING}"))
    tell_of_repacking.cache_clear()
    caplog.clear()
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert caplog.records == []
    assert cli.main(["inspect", str(tmp_path), "--verify"]) == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert to_native_layout(tmp_path, nothing) == (0, count)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_an_interrupted_call_is_made_good(
    renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it writes, or between the first names."""
    model = saved(llama(), tmp_path)
    rename, count = Path.rename, 0

    def stop(self: Path, target: Path) -> Path:
        nonlocal count
        if count == renamed:
            raise KeyboardInterrupt
        count += 1
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            to_native_layout(tmp_path, nothing)
    to_native_layout(tmp_path, nothing)
    assert layouts_of(tmp_path) == {NATIVE.name}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert cli.main(["inspect", str(tmp_path), "--verify"]) == 0


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "dense")
    dense = str(tmp_path / "dense")
    for command, message in (
        ([dense, "--layout", "native"], "has no 4-bit weights of this package; quantize or convert"),
        (
            [dense, str(tmp_path / "out"), "--layout", "native"],
            "in place and takes no out; leave it out",
        ),
        ([dense], "there is no OUT; give the directory to make, or --layout native"),
    ):
        assert cli.main(["convert", *command]) == 1
        assert message in capsys.readouterr().err


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("_weight_qdata"))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, file, metadata_of(file))
    before = {each: each.read_bytes() for each in tmp_path.glob("*.safetensors")}
    with pytest.raises((TypeError, ValueError), match=key.replace("._weight_qdata", ".weight")):
        to_native_layout(tmp_path, nothing)
    assert before == {each: each.read_bytes() for each in tmp_path.glob("*.safetensors")}
