"""``convert DIR --layout native``: a directory of another CPU's layout, rewritten in place."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
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
from torchao_int4cpu.convert import native
from torchao_int4cpu.convert.native import to_native_layout
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


def layouts_of(files: Iterable[Path]) -> set[str]:
    """All that any of these says."""
    return {
        json.loads(entry)["_data"]["qdata_layout"]
        for file in files
        for name, entry in metadata_of(file).items()
        if "qdata_layout" in entry
    }


def files_of(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.safetensors")}


def indexed_by(folder: Path) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return set(index["weight_map"].values())


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
    assert layouts_of(folder.glob("*.safetensors")) == {OTHER.name}
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
    assert layouts_of(tmp_path.glob("*.safetensors")) == {NATIVE.name}
    assert files_of(tmp_path) == indexed_by(tmp_path)
    tell_of_repacking.cache_clear()
    caplog.clear()
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert caplog.records == []
    assert cli.main(["inspect", str(tmp_path), "--verify"]) == 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert to_native_layout(tmp_path, nothing) == (0, count)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "at", ["first file", "second file", "index", "first removed", "second removed"]
)
def test_an_interrupted_call_is_made_good(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is stopped, the model loads as it was or as it is to be."""
    model = saved(llama(), tmp_path)
    before = indexed_by(tmp_path)
    (tmp_path / "other.safetensors").write_bytes((tmp_path / min(before)).read_bytes())
    count = 0

    def stopping(original: Callable[..., Any], when: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == when:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    number = 2 if at.startswith("second") else 1
    with monkeypatch.context() as patched:
        if at.endswith("file"):
            patched.setattr(native, "_write", stopping(native._write, number))
        elif at == "index":
            patched.setattr(native, "_switch", stopping(native._switch, 1))
        else:
            patched.setattr(Path, "unlink", stopping(Path.unlink, number))
        with pytest.raises(KeyboardInterrupt):
            to_native_layout(tmp_path, nothing)
    switched = indexed_by(tmp_path) != before
    assert switched == at.endswith("removed")
    used = [tmp_path / name for name in indexed_by(tmp_path)]
    assert layouts_of(used) == {NATIVE.name if switched else OTHER.name}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    to_native_layout(tmp_path, nothing)
    assert files_of(tmp_path) == indexed_by(tmp_path) | {"other.safetensors"}  # which is not its own
    assert layouts_of([tmp_path / name for name in indexed_by(tmp_path)]) == {NATIVE.name}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_there_and_back_again(tmp_path: Path) -> None:
    """Files get no longer names each time, and an only one keeps its own."""
    model = saved(llama(), tmp_path / "several")
    names = []
    for _ in range(3):
        to_native_layout(tmp_path / "several", nothing)
        names.append(indexed_by(tmp_path / "several"))
        in_the_other_layout(tmp_path / "several")
    assert names[0] == names[2] != names[1]
    assert {len(name) for name in names[0]} == {len(name) for name in names[1]}
    model.save_pretrained(tmp_path / "one")
    in_the_other_layout(tmp_path / "one")
    to_native_layout(tmp_path / "one", nothing)
    assert files_of(tmp_path / "one") == {"model.safetensors"}
    assert layouts_of([tmp_path / "one" / "model.safetensors"]) == {NATIVE.name}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), model)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"safetensors files and no index .* save it again"):
        to_native_layout(tmp_path, nothing)


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
