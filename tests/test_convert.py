"""``convert SRC OUT``: checkpoints of other tools as ours, equal to what from_pretrained reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from tests.foreign_checkpoints import Foreign, foreign, save_foreign
from tests.hugging_face_models import llama, written
from tests.test_foreign_gguf import write as write_gguf
from tests.test_foreign_models import assert_is, change_config, logits, tiny_experts, tiny_llama
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig, import_checkpoints
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.checkpoint.inspect import inspect
from torchao_int4cpu.checkpoint.safetensors import read_header
from torchao_int4cpu.convert import shards
from torchao_int4cpu.convert.foreign import convert_directory
from torchao_int4cpu.convert.gguf import convert_gguf

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "mlx")


def nothing(name: str, done: int) -> None:
    """No progress is shown."""


def loaded(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Without the importers: the directory is one of ours."""
    import_checkpoints(False)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    finally:
        import_checkpoints(True)


# --- Hugging Face directories -------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_directory(
    format: str, symmetric: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_foreign(tmp_path / "foreign", tiny_llama(), format, 32, symmetric)
    (tmp_path / "foreign/quantize_config.json").write_text("{}")
    (tmp_path / "foreign/tokenizer.json").write_text("{}")
    assert cli.main(["convert", str(tmp_path / "foreign"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4-bit weights         14, ")
    assert "dense in the file" in printed
    model = loaded(tmp_path / "out")
    assert_is(model, weights)
    assert model.dtype == torch.float16
    if format != "mlx":
        model_of_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign")
        assert torch.equal(logits(model), logits(model_of_transformers))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert "quantization" not in config
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/quantize_config.json").exists()
    contents = inspect(tmp_path / "out", verify=True)
    assert (len(contents.weights), contents.problems, contents.unverified) == (14, [], 0)


def test_act_order_groups_and_the_head(tmp_path: Path) -> None:
    own = {"down_proj": 160, "o_proj": 64}
    weights = save_foreign(
        tmp_path / "foreign", tiny_llama(), "gptq", 32, False, head=True, own_groups=own, act_order=True
    )
    convert_directory(tmp_path / "foreign", tmp_path / "out", nothing)
    model = loaded(tmp_path / "out")
    assert_is(model, weights)
    assert torch.equal(
        logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "foreign"))
    )


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_experts_become_stacks(format: str, tmp_path: Path) -> None:
    """As `from_pretrained` has them, in a file of ours."""
    save_foreign(tmp_path / "foreign", tiny_experts(), format)
    report = convert_directory(tmp_path / "foreign", tmp_path / "out", nothing)
    names = {tensor.name for tensor in report.quantized}
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"} < names
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign")
    model = loaded(tmp_path / "out")
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(experts, name)
        assert isinstance(stack, Int4OpaqueTensor)
        other = getattr(expected.model.layers[0].mlp.experts, name)
        assert torch.equal(stack.to_groupwise().codes, other.to_groupwise().codes)
    assert torch.equal(logits(model), logits(expected))


def test_an_embedding_of_mlx(tmp_path: Path) -> None:
    """MLX quantizes it with the rest; and bfloat16 is asked for."""
    weights = save_foreign(
        tmp_path / "foreign", tiny_llama(), "mlx", 64, False, head=True, embeddings=True
    )
    assert "model.embed_tokens.weight" in weights
    convert_directory(tmp_path / "foreign", tmp_path / "out", nothing, torch.bfloat16)
    model = loaded(tmp_path / "out")
    assert_is(model, weights)
    assert model.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


class Stopped(Exception):
    """Stands for Ctrl-C."""


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    save_foreign(tmp_path / "foreign", tiny_llama(), "gptq")
    whole = convert_directory(tmp_path / "foreign", tmp_path / "whole", nothing)
    assert whole.shards > 2
    seen: list[str] = []

    def stop(name: str, done: int) -> None:
        seen.extend([name] if done else [])
        if len(seen) == len(whole.tensors) // 2:
            raise Stopped

    with pytest.raises(Stopped):
        convert_directory(tmp_path / "foreign", tmp_path / "out", stop)
    report = convert_directory(tmp_path / "foreign", tmp_path / "out", nothing)
    assert 0 < report.resumed < report.shards
    assert report.tensors == whole.tensors
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        one, other = (tmp_path / folder / name for folder in ("whole", "out"))
        if not name.endswith(".safetensors"):
            assert one.read_bytes() == other.read_bytes()
            continue
        with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
            assert a.metadata() == b.metadata()
            assert a.offset_keys() == b.offset_keys()
            assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.offset_keys())


def test_a_run_that_stops_as_files_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    weights = save_foreign(tmp_path / "foreign", tiny_llama(), "gptq")
    named = read_header
    calls: list[Path] = []

    def stop(file: Path) -> Any:
        calls.append(file)
        if len(calls) == 3:
            raise Stopped
        return named(file)

    monkeypatch.setattr(shards, "read_header", stop)
    with pytest.raises(Stopped):
        convert_directory(tmp_path / "foreign", tmp_path / "out", nothing)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shards, "read_header", named)
    report = convert_directory(tmp_path / "foreign", tmp_path / "out", nothing)
    assert report.resumed == report.shards
    assert_is(loaded(tmp_path / "out"), weights)
    assert inspect(tmp_path / "out", verify=True).problems == []


def of_other_bits(folder: Path) -> None:
    save_foreign(folder, tiny_llama(), "gptq")
    change_config(folder, bits=8)


def of_mlx_with_other_bits(folder: Path) -> None:
    save_foreign(folder, tiny_llama(), "mlx")
    change_config(folder, bits=8)


def of_a_tool_not_known(folder: Path) -> None:
    save_foreign(folder, tiny_llama(), "gptq")
    change_config(folder, quant_method="bitsandbytes")


def of_another_model(folder: Path) -> None:
    save_foreign(folder, tiny_llama(), "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 352}))


def without_zeros(folder: Path) -> None:
    save_foreign(folder, tiny_llama(), "gptq")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.self_attn.q_proj.scales"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def of_falcon(folder: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320}
    save_foreign(folder, FalconForCausalLM(FalconConfig(**sizes)), "awq")


def without_an_expert(folder: Path) -> None:
    save_foreign(folder, tiny_experts(), "gptq")
    state = load_file(folder / "model.safetensors")
    state = {key: part for key, part in state.items() if "experts.2.up_proj" not in key}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def of_ordered_experts(folder: Path) -> None:
    save_foreign(folder, tiny_experts(), "gptq", act_order=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "is not a Hugging Face directory"),
        (lambda folder: written(llama(), folder), "is not quantized, its config.json says"),
        (of_other_bits, "weights of 8 bits; only those of 4"),
        (of_mlx_with_other_bits, "the MLX checkpoint has 8 bits, mode 'affine'; only"),
        (of_a_tool_not_known, "is quantized by 'bitsandbytes'; these are converted: gptq, awq"),
        (of_falcon, "AWQ scales the activations of falcon"),
        (of_another_model, "down_proj.weight: qweight has 40 rows for 352 inputs, 3.64 bits a weight"),
        (without_zeros, "q_proj.weight: the file has no scales beside g_idx, qweight"),
        (without_an_expert, "the file has not all of the 4 experts of model.layers.0.mlp.experts.gate"),
        (of_ordered_experts, "in orders of their own"),
    ],
)
def test_what_is_refused(
    make: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "source")
    assert cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    assert re.search(message, capsys.readouterr().err)


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_a_gguf_file(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", kind)
    report = convert_gguf(tmp_path / "model.gguf", tmp_path / "out", nothing)
    assert len(report.quantized) == 14
    model = loaded(tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16
    )
    assert model.dtype == torch.bfloat16
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert sum(isinstance(p, Int4OpaqueTensor) for p in model.parameters()) == 14
    assert torch.equal(logits(model), logits(expected))


def test_the_rest_of_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedding, which the file has in 8 bits, becomes 4-bit: as by `quantize_`."""
    write_gguf(tmp_path / "model.gguf", "Q4_1")
    arguments = ["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]
    assert cli.main([*arguments, "--rest", "64"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4-bit weights         15, ")
    assert "(model.embed_tokens.weight)" in printed
    model = loaded(tmp_path / "out")
    embedding = model.model.embed_tokens.weight
    assert isinstance(embedding, Int4OpaqueTensor)
    assert model.lm_head.weight is embedding
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16
    ).model.embed_tokens.weight
    expected = Int4OpaqueTensor.from_hp(dense.detach(), [1, 64], "mse")
    assert torch.equal(embedding.qdata, expected.qdata)
    assert torch.equal(embedding.scale_and_zero, expected.scale_and_zero)
    assert logits(model).isfinite().all()
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "other"), "--rest", "64"]) == 1
    assert "--rest is for .gguf files" in capsys.readouterr().err


def test_a_gguf_file_without_4_bits(tmp_path: Path) -> None:
    """Refused before anything is written, unless it is to be quantized."""
    write_gguf(tmp_path / "model.gguf", "Q4_0")
    dense = tmp_path / "dense.gguf"
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(dense, "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"has no weight in Q4_0, Q4_1 or Q4_K; give --rest"):
        convert_gguf(dense, tmp_path / "out", nothing)
    assert not list(tmp_path.glob("out*"))
    config = Int4WeightOnlyConfig(group_size=32)
    assert len(convert_gguf(dense, tmp_path / "out", nothing, rest=config).quantized) == 15


def test_a_damaged_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "model.gguf", "Q4_0")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    assert "error: " in capsys.readouterr().err


# --- ONNX ---------------------------------------------------------------------------------------


def onnx_of(weight: Foreign, path: Path, symmetric: bool, **changes: Any) -> None:
    """A file with one MatMulNBits, whose groups are 32 columns."""
    n, k = weight.codes.shape
    groups = weight.scale.shape[1]
    codes = torch.nn.functional.pad(weight.codes, (0, groups * 32 - k), value=8)
    pairs = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(n, groups, 16)
    points = torch.nn.functional.pad(weight.points.to(torch.uint8), (0, groups % 2))
    initializers = {"layers.0.proj.Q4": pairs.numpy(), "scales": weight.scale.float().numpy()}
    if not symmetric:
        initializers["points"] = (points[:, 0::2] | (points[:, 1::2] << 4)).numpy()
    initializers |= changes.pop("initializers", {})
    attributes = {"N": n, "K": k, "bits": 4, "block_size": 32, "accuracy_level": 1} | changes
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *initializers], ["y"], domain="com.microsoft", **attributes
    )
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["m", size])
        for name, size in (("x", k), ("y", n))
    ]
    arrays = {name: np.ascontiguousarray(array) for name, array in initializers.items()}
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], constants)
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=10), path)


def weights_of(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        whole: dict[str, Tensor]
        whole, rest = unflatten_tensor_state_dict(state, opened.metadata())
    assert rest == {}
    return whole


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("k", [64, 96, 150])
def test_an_onnx_file(symmetric: bool, k: int, tmp_path: Path) -> None:
    """The weight is that of the file, and so is the product that onnxruntime makes of it."""
    torch.manual_seed(0)
    weight = foreign(torch.randn(48, k), 32, symmetric)
    onnx_of(weight, tmp_path / "model.onnx", symmetric)
    arguments = ["convert", str(tmp_path / "model.onnx"), str(tmp_path / "out.safetensors")]
    assert cli.main([*arguments, "--dtype", "fp32"]) == 0
    (found,) = weights_of(tmp_path / "out.safetensors").values()
    assert isinstance(found, Int4OpaqueTensor)
    assert torch.equal(found.to_groupwise().codes, weight.codes)
    error = found.dequantize().double() - weight.dense()
    assert float(error.norm() / weight.dense().norm()) < (1e-7 if symmetric else 1.5e-4)
    x = torch.randn(3, k)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {"x": x.numpy()})
    exact, terms = x.double() @ weight.dense().t(), x.double().abs() @ weight.dense().abs().t()
    # float32 sums of codes and of zero points, which are a few times as large as what is left of them.
    assert bool(((torch.from_numpy(y).double() - exact).abs() <= 2.0**-24 * 8 * k * terms).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits=8"),
        ({"block_size": 16}, r"B has shape \[48, 3, 16\].*must be \[48, 6, 8\]"),
        ({"initializers": {"scales": np.ones((48, 2), np.float32)}}, r"scales has shape \[96\]"),
        ({"initializers": {"points": np.ones((48, 2), np.float32)}}, "zero_points is torch.float32"),
    ],
)
def test_a_damaged_onnx_file(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = foreign(torch.randn(48, 96), 32, False)
    onnx_of(weight, tmp_path / "model.onnx", False, **changes)
    assert cli.main(["convert", str(tmp_path / "model.onnx"), str(tmp_path / "out.safetensors")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_inspect_says_what_of_an_onnx_file_is_kept(
    symmetric: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_of(foreign(torch.randn(48, 96), 32, symmetric), tmp_path / "model.onnx", symmetric)
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "norm"))
    onnx.save(model, tmp_path / "model.onnx")
    assert cli.main(["inspect", str(tmp_path / "model.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "format         ONNX, read by the command convert\n" in printed
    assert "4-bit weights  1, once it is converted or loaded\nother tensors  1 dense\n" in printed
    assert "lost           the graph and its dense tensors" in printed
    assert ("lost           zeros are rounded" in printed) is not symmetric


def test_inspect_promises_nothing_of_an_onnx_file_in_8_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_of(foreign(torch.randn(48, 96), 32, True), tmp_path / "model.onnx", True, bits=8)
    assert cli.main(["inspect", str(tmp_path / "model.onnx")]) == 1
    assert "a MatMulNBits of 8 bits; only those of 4" in capsys.readouterr().err


def test_no_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    assert cli.main(["convert", str(tmp_path / "model.onnx"), str(tmp_path / "out")]) == 1
    assert "cannot be read as ONNX" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "model.onnx")]) == 1
    assert "cannot be read as ONNX" in capsys.readouterr().err
