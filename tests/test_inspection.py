"""What `inspect` finds in whole and in damaged checkpoints, and that it reads no more than it must."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.hugging_face_models import int4_items, llama, quantized, written
from tests.moe_models import build, from_file, stacks
from tests.numerics import random_groupwise
from tests.test_old_files import FILES, GROUP_SIZE, SETS, K, N, stack
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.checkpoint import inspect as inspection
from torchao_int4cpu.checkpoint.inspect import inspect
from torchao_int4cpu.checkpoint.safetensors import metadata_of, part_key


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return quantized(written(llama(), tmp_path_factory.mktemp("source")))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_directory(model: Any, shard: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard)
    contents = inspect(tmp_path, verify=True)
    weights = dict(int4_items(model))
    assert contents.problems == []
    assert {weight.name for weight in contents.weights} == set(weights)
    for found in contents.weights:
        weight = weights[found.name]
        assert found.shape == tuple(weight.shape)
        assert found.group_size == weight.block_size[1]
        assert found.qdata_layout == weight.qdata_layout
        assert found.dtype == "bfloat16"
        assert found.nbytes == weight.qdata.nbytes + weight.scale_and_zero.nbytes
    assert {tensor.key for tensor in contents.others} == set(model.state_dict()) - set(weights)
    assert (contents.verified, contents.unverified) == (2 * len(weights), 0)
    assert contents.quantization is not None
    assert contents.quantization["quant_method"] == "torchao"
    assert (len(contents.files) > 1) == (shard == "20KB")


#: The weights in the files of each version; `turned` is a transposed view.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "v1": {"layer.weight": (N, K)},
    "v2": {"layer.weight": (2, N, K), "layer.turned": (2, K, N)},
    "v3": {"layer.weight": (N, K), "layer.stack": (2, N, K), "layer.turned": (2, K, N)},
    "v4": {"layer.weight": (N, K), "layer.stack": (2, N, K), "layer.turned": (2, K, N)},
    "v5": {"layer.weight": (N, K), "layer.stack": (2, N, K), "layer.turned": (2, K, N)},
}


@pytest.mark.parametrize("name", SETS)
def test_the_layout_is_that_of_the_file_not_of_this_cpu(name: str) -> None:
    contents = inspect(FILES / name / "model.safetensors", verify=True)
    assert {weight.name: weight.shape for weight in contents.weights} == SHAPES[name[:2]]
    for weight in contents.weights:
        assert weight.qdata_layout == name.partition("-")[2]
        assert (weight.group_size, weight.dtype) == (GROUP_SIZE, "float16")
        assert weight.qparams_dtype == ("float16" if name.startswith("v4") else "bfloat16")
        matrices = 1 if len(weight.shape) == 2 else 2
        # codes and scales in groups of 32, where K = 40 takes two; act_pre_scale, and in v5 act_order
        shared = K * 4 * (2 if name.startswith("v5") else 1)
        assert weight.nbytes == matrices * (N * 64 // 2 + N * 2 * 4) + shared
    parts = (4 if name.startswith("v5") else 3) * len(contents.weights)
    assert (contents.verified, contents.others, contents.problems) == (parts, [], [])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("file", ["state.pt", "parameter.pt"])
def test_a_file_of_torch_save(name: str, file: str) -> None:
    contents = inspect(FILES / name / file, verify=True)
    shapes = SHAPES[name[:2]]
    if file == "parameter.pt":
        shapes = {"": list(shapes.values())[-1]}
    assert {weight.name: weight.shape for weight in contents.weights} == shapes
    for weight in contents.weights:
        assert weight.qdata_layout == name.partition("-")[2]
        assert (weight.group_size, weight.dtype) == (GROUP_SIZE, "float16")
        assert weight.qparams_dtype == ("float16" if name.startswith("v4") else "bfloat16")
    assert contents.verified > 3
    assert (contents.others, contents.problems) == ([], [])


def test_a_damaged_file_of_torch_save(tmp_path: Path) -> None:
    data = bytearray((FILES / SETS[0] / "state.pt").read_bytes())
    codes = torch.load(FILES / SETS[0] / "state.pt")["layer.weight"].scale_and_zero
    data[data.index(bytes(codes.flatten().view(torch.uint8).tolist()))] ^= 1
    (tmp_path / "state.pt").write_bytes(data)
    assert inspect(tmp_path / "state.pt").problems == []
    (problem,) = inspect(tmp_path / "state.pt", verify=True).problems
    assert "the checksum differs" in problem


def test_a_nested_file_with_other_tensors_and_one_of_the_prototype(tmp_path: Path) -> None:
    t = Int4OpaqueTensor.from_groupwise(random_groupwise(80, 70, 32))
    torch.save({"model": [{"w": t}], "step": torch.tensor(3)}, tmp_path / "a.pt")
    contents = inspect(tmp_path / "a.pt")
    assert [weight.name for weight in contents.weights] == ["model.0.w"]
    assert [(other.key, other.shape) for other in contents.others] == [("step", ())]
    (problem,) = inspect(FILES / "upstream" / "prototype-0.16.0-default.pt").problems
    assert "is read by torchao_int4cpu.load_torchao_checkpoint" in problem


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_directory_with_experts(family: str, tmp_path: Path) -> None:
    """Stacks, and the transposed views of gpt-oss by the shape that the model has."""
    build(family, num_hidden_layers=1).save_pretrained(tmp_path / "source")
    model = from_file(tmp_path / "source")
    model.save_pretrained(tmp_path / "out")
    contents = inspect(tmp_path / "out", verify=True)
    assert contents.problems == []
    expected = {name: tuple(weight.shape) for name, weight in stacks(model).items()}
    assert {weight.name: weight.shape for weight in contents.weights} == expected
    assert {weight.group_size for weight in contents.weights} == {32}
    assert (contents.verified, contents.unverified) == (2 * len(expected), 0)
    for found in contents.weights:
        weight = stacks(model)[found.name]
        assert found.nbytes == weight.qdata.nbytes + weight.scale_and_zero.nbytes
    assert {other.key for other in contents.others} == set(model.state_dict()) - set(expected)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": [3, N, K]}, r"qdata has shape \[2, 64, 32\]; .* needs \[3, 64, 32\]"),
        ({"shape": [N, K]}, "block_size is"),
        ({"transposed": 1}, "transposed=1; it must be true or absent"),
        ({"block_size": [1, 1, 64]}, "needs"),
    ],
)
def test_problems_of_a_stack_are_told(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    t = stack()
    entry = metadata_of(t)
    entry["_data"] |= changes
    tensors = {part_key("a.weight", part): value for part, value in t.parts().items()}
    save_file(tensors, tmp_path / "a.safetensors", {"a.weight": json.dumps(entry)})
    contents = inspect(tmp_path / "a.safetensors")
    assert contents.weights == []
    (found,) = contents.problems
    assert re.search(problem, found)


def file_of(folder: Path, changes: dict[str, Any] | None = None, **parts: Tensor) -> Path:
    """A file with one weight of two parts, whose metadata or parts are changed."""
    t = Int4OpaqueTensor.from_groupwise(random_groupwise(80, 70, 32))
    entry = metadata_of(t)
    entry["_data"] |= changes or {}
    tensors = {part_key("a.weight", part): value for part, value in (t.parts() | parts).items()}
    save_file(tensors, folder / "a.safetensors", {"a.weight": json.dumps(entry), "format": "pt"})
    return folder / "a.safetensors"


def test_a_flipped_bit_is_seen_by_verify_alone(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    with safe_open(path, "pt") as file:
        qdata = file.get_tensor("a._weight_qdata")
    data = bytearray(path.read_bytes())
    at = data.index(bytes(qdata.flatten()[:64].tolist()))
    data[at] ^= 1
    path.write_bytes(data)
    assert inspect(path).problems == []
    contents = inspect(path, verify=True)
    assert contents.problems == [
        "a._weight_qdata: the checksum differs, so its bytes are damaged; fetch a.safetensors again"
    ]
    assert contents.verified == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": [80, 700]}, r"a\.weight: qdata has shape \[80, 48\]; .* needs"),
        ({"qdata_layout": "avx1024"}, "layout 'avx1024' is not known"),
        ({"format_version": 9}, "install a newer one"),
        ({"block_size": "x"}, "block_size is 'x'"),
        ({"dtype": {"_type": "torch.dtype", "_data": "nothing"}}, "nothing"),
    ],
)
def test_problems_are_told(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    contents = inspect(file_of(tmp_path, changes), verify=True)
    (found,) = contents.problems
    assert re.search(problem, found)
    assert contents.weights == []
    assert len(contents.others) == 2  # the parts that no weight has taken


def test_a_missing_shard_is_told(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[2].unlink()
    problems = inspect(tmp_path).problems
    assert problems
    assert all("is missing; the checkpoint is not complete" in problem for problem in problems)


def test_a_file_without_checksums(tmp_path: Path) -> None:
    contents = inspect(file_of(tmp_path, {"crc32": None}), verify=True)
    assert (contents.problems, contents.verified, contents.unverified) == ([], 0, 2)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no safetensors file; give one"):
        inspect(tmp_path)
    with pytest.raises(ValueError, match="has no safetensors file"):
        inspect(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"cannot be read .* the file is damaged"):
        inspect(tmp_path)
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="is no JSON object"):
        inspect(tmp_path)


def test_without_verify_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path)
    monkeypatch.setattr(inspection, "crc32", None)  # the only thing that looks into a part
    assert inspect(path).problems == []
    with pytest.raises(TypeError):
        inspect(path, verify=True)
