"""Quantizing a directory tensor by tensor: as in memory, with little memory, safe to interrupt."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import quantize_
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.hugging_face_models import (
    MODELS,
    SIZES,
    int4_items,
    int4_names,
    llama,
    llama_config,
    logits,
    written,
)
from tests.processes import run_child
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.checkpoint.inspect import inspect
from torchao_int4cpu.convert import directory as quantize_directory
from torchao_int4cpu.convert import shards
from torchao_int4cpu.convert.directory import sqnr
from torchao_int4cpu.convert.plan import MERGED, Plan, make_plan
from torchao_int4cpu.convert.shards import Report
from torchao_int4cpu.extras import MissingExtra

CONFIG = Int4WeightOnlyConfig(group_size=32)


def nothing(name: str, done: int) -> None:
    """No progress is shown."""


def quantized(source: Path, out: Path, **options: Any) -> tuple[Plan, Report]:
    plan = make_plan(source, options.pop("config", CONFIG), **options)
    return plan, quantize_directory.quantize_directory(plan, out, nothing)


def assert_equal_in_memory(plan: Plan, out: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """`from_pretrained` of the result equals `from_pretrained` of the source with the same config."""
    options = {"quantization_config": plan.model_config.quantization_config}
    memory = auto.from_pretrained(plan.folder, dtype=plan.model_config.dtype, **options)
    back = auto.from_pretrained(out)
    assert back.dtype == memory.dtype
    expected, found = dict(memory.named_parameters()), dict(back.named_parameters())
    assert found.keys() == expected.keys()
    assert int4_names(back) == int4_names(memory) != set()
    for name, weight in int4_items(memory):
        assert torch.equal(found[name].qdata, weight.qdata)
        assert torch.equal(found[name].scale_and_zero, weight.scale_and_zero)
        assert found[name].dtype == weight.dtype
        assert found[name].block_size == weight.block_size
    for name in expected.keys() - int4_names(memory):
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name
    return back


def mixtral() -> nn.Module:
    sizes: dict[str, Any] = SIZES | {"hidden_size": 64, "intermediate_size": 48, "vocab_size": 100}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*sorted(MODELS), "mixtral"])
def test_equal_to_quantizing_in_memory(name: str, tmp_path: Path) -> None:
    source = written(MODELS.get(name, mixtral)(), tmp_path / "source")
    plan, report = quantized(source, tmp_path / "out")
    back = assert_equal_in_memory(plan, tmp_path / "out")
    assert {tensor.name for tensor in report.quantized} == int4_names(back)
    assert torch.isfinite(logits(back)).all()


def test_other_kinds_of_models(tmp_path: Path) -> None:
    """Encoders, and modules that transformers holds in float32 whatever the model's dtype."""
    bert = BertForMaskedLM(
        BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    )
    source = written(bert, tmp_path / "bert", torch.float16)
    plan, _ = quantized(source, tmp_path / "bert-out")
    assert_equal_in_memory(plan, tmp_path / "bert-out", AutoModelForMaskedLM)
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=100)
    )
    source = written(t5, tmp_path / "t5", torch.float32)
    plan, _ = quantized(source, tmp_path / "t5-out", dtype=torch.float16)
    back = assert_equal_in_memory(plan, tmp_path / "t5-out", AutoModelForSeq2SeqLM)
    assert back.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_tensors_that_transformers_takes_apart(tmp_path: Path) -> None:
    """Queries, keys and values of nomic-bert are one tensor in the file, which is no expert."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 100}
    model = NomicBertModel(NomicBertConfig(**sizes, num_attention_heads=2))
    source = written(model, tmp_path / "source")
    _, report = quantized(source, tmp_path / "out")
    merged = [tensor.name for tensor in report.kept[MERGED]]
    assert merged
    assert all("Wqkv" in name for name in merged)
    back = AutoModel.from_pretrained(tmp_path / "out")
    assert int4_names(back) == {tensor.name for tensor in report.quantized} != set()
    original = AutoModel.from_pretrained(source)
    (q,) = (name for name, _ in back.named_parameters() if name.endswith("0.self_attn.q_proj.weight"))
    assert torch.equal(back.get_parameter(q), original.get_parameter(q))


@pytest.mark.parametrize("algorithm", ["hqq", "mse"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_options(algorithm: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    config = Int4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm=algorithm)
    plan, report = quantized(
        source,
        tmp_path / "out",
        config=config,
        dtype=dtype,
        skip=["model.layers.0", r".*\.v_proj"],
        head=True,
    )
    back = assert_equal_in_memory(plan, tmp_path / "out")
    assert back.dtype == (dtype or torch.bfloat16)
    names = int4_names(back) - {"lm_head.weight"}
    assert len(names) == len(int4_names(back)) - 1  # the head is there as well
    assert all("layers.1" in name and "v_proj" not in name for name in names)
    assert len(report.kept["skipped, as asked for"]) == 8


def test_the_head(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    plan, _ = quantized(source, tmp_path / "out", head=True)
    assert "lm_head.weight" in int4_names(assert_equal_in_memory(plan, tmp_path / "out"))


@pytest.mark.parametrize("name", [*sorted(MODELS), "llama-tied", "mixtral"])
@pytest.mark.parametrize("head", [False, True])
def test_embeddings(name: str, head: bool, tmp_path: Path) -> None:
    """The input embedding too; a tied head shares its 4-bit weight, another one is as asked for."""
    builds = {**MODELS, "mixtral": mixtral, "llama-tied": lambda: llama(tie_word_embeddings=True)}
    build: Any = builds[name]
    source = written(build(), tmp_path / "source")
    plan, report = quantized(source, tmp_path / "out", embeddings=True, head=head)
    back = assert_equal_in_memory(plan, tmp_path / "out")
    embedding, output = back.get_input_embeddings(), back.get_output_embeddings()
    tied = name in ("qwen3-tied", "gemma3", "llama-tied")
    assert isinstance(embedding.weight, Int4OpaqueTensor)
    assert isinstance(output.weight, Int4OpaqueTensor) == (tied or head)
    assert (output.weight is embedding.weight) == tied
    assert {tensor.name for tensor in report.quantized} == int4_names(back)
    assert inspect(tmp_path / "out", verify=True).problems == []

    by_hand: Any = AutoModelForCausalLM.from_pretrained(source)
    names = {tensor.name.removesuffix(".weight") for tensor in report.quantized}
    names |= {"lm_head"} if tied else set()
    quantize_(by_hand, CONFIG, filter_fn=lambda module, name: name in names)
    assert torch.equal(logits(back), logits(by_hand))


def test_embeddings_of_other_kinds_of_models(tmp_path: Path) -> None:
    """Word embeddings of an encoder, not its positions; three modules with one weight in T5."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    bert = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4, vocab_size=100))
    source = written(bert, tmp_path / "bert")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*left as it was")  # a bias is no weight
        plan, report = quantized(source, tmp_path / "bert-out", embeddings=True)
        back = assert_equal_in_memory(plan, tmp_path / "bert-out", AutoModelForMaskedLM)
    embeddings = [tensor.name for tensor in report.quantized if "embeddings" in tensor.name]
    assert embeddings == ["bert.embeddings.word_embeddings.weight"]
    assert back.cls.predictions.decoder.weight is back.bert.embeddings.word_embeddings.weight
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=100)
    )
    plan, _ = quantized(written(t5, tmp_path / "t5"), tmp_path / "t5-out", embeddings=True)
    back = assert_equal_in_memory(plan, tmp_path / "t5-out", AutoModelForSeq2SeqLM)
    assert isinstance(back.shared.weight, Int4OpaqueTensor)
    assert back.encoder.embed_tokens.weight is back.decoder.embed_tokens.weight is back.shared.weight
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        assert torch.isfinite(back(input_ids=ids, decoder_input_ids=ids).logits).all()


def test_embeddings_with_skipped_layers(tmp_path: Path) -> None:
    source = written(llama(tie_word_embeddings=True), tmp_path / "source")
    plan, _ = quantized(source, tmp_path / "out", embeddings=True, skip=["model.layers.0"])
    back = assert_equal_in_memory(plan, tmp_path / "out")
    assert "model.embed_tokens.weight" in int4_names(back)
    assert not any("layers.0" in name for name in int4_names(back))
    plan, report = quantized(source, tmp_path / "dense", embeddings=True, skip=["model.embed_tokens"])
    assert "model.embed_tokens.weight" not in int4_names(
        assert_equal_in_memory(plan, tmp_path / "dense")
    )
    assert [t.name for t in report.kept["skipped, as asked for"]] == ["model.embed_tokens.weight"]
    untied = written(llama(), tmp_path / "untied")
    plan, _ = quantized(untied, tmp_path / "no-head", head=True, skip=["lm_head"])
    assert "lm_head.weight" not in int4_names(assert_equal_in_memory(plan, tmp_path / "no-head"))


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_end_of_a_name_is_skipped(embeddings: bool, tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    plan, report = quantized(source, tmp_path / "out", embeddings=embeddings, skip=["k_proj"])
    names = int4_names(assert_equal_in_memory(plan, tmp_path / "out"))
    assert not any("k_proj" in name for name in names)
    assert any("v_proj" in name for name in names)
    kept = [tensor.name for tensor in report.kept["skipped, as asked for"]]
    assert kept
    assert all(name.endswith("k_proj.weight") for name in kept)


def test_a_tied_pair_that_the_source_holds_twice(tmp_path: Path) -> None:
    """As files of other tools do: both are written, equal, so that transformers ties them."""
    source = written(llama(tie_word_embeddings=True), tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    plan, _ = quantized(source, tmp_path / "out", embeddings=True)
    back = assert_equal_in_memory(plan, tmp_path / "out")
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_several_shards_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    llama().bfloat16().save_pretrained(source, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    plan, report = quantized(source, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert report.shards == len(files) > 2
    assert_equal_in_memory(plan, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.bytes_after for tensor in report.tensors)
    # no shard is larger than the largest tensor of the source
    largest = max(tensor.source.nbytes for tensor in plan.tensors)
    assert all(sum(part.nbytes for part in load_file(file).values()) <= largest for file in files)


def test_other_files_are_copied(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"weights again")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / ".cache").mkdir()
    quantized(source, tmp_path / "deep" / "out")
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "1_Pooling",
    }
    assert (tmp_path / "deep" / "out" / "1_Pooling" / "config.json").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


class Stopped(Exception):
    """Stands for Ctrl-C, or the end of the machine."""


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    source = written(llama(), tmp_path / "source")
    _, whole = quantized(source, tmp_path / "whole")
    count = len(whole.tensors)
    out = tmp_path / "out"
    for stop_after in (1, count // 2, count):
        seen: list[str] = []

        def stop(name: str, done: int, seen: list[str] = seen, limit: int = stop_after) -> None:
            seen.extend([name] if done else [])
            if len(seen) == limit:
                raise Stopped

        with pytest.raises(Stopped):
            quantize_directory.quantize_directory(make_plan(source, CONFIG), out, stop)
        assert not out.exists()
    plan = make_plan(source, CONFIG)
    report = quantize_directory.quantize_directory(plan, out, nothing)
    assert 1 < report.resumed < report.shards == whole.shards
    assert report.tensors == whole.tensors
    for file in (tmp_path / "whole").glob("*.safetensors"):
        with safe_open(file, "pt") as one, safe_open(out / file.name, "pt") as other:
            assert one.metadata() == other.metadata()
            assert one.offset_keys() == other.offset_keys()
            for key in one.offset_keys():
                assert torch.equal(one.get_tensor(key), other.get_tensor(key))
    assert_equal_in_memory(plan, out)


def test_an_unfinished_run_of_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")

    def stop(name: str, done: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        quantize_directory.quantize_directory(make_plan(source, CONFIG), tmp_path / "out", stop)
    for plan in (
        make_plan(source, Int4WeightOnlyConfig(group_size=64)),
        make_plan(written(llama(), source), CONFIG),
    ):
        with pytest.raises(ValueError, match="other settings or another source; repeat that run"):
            quantize_directory.quantize_directory(plan, tmp_path / "out", nothing)


def test_what_cannot_be_done_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is not a Hugging Face directory"):
        make_plan(tmp_path, CONFIG)
    source = written(llama(), tmp_path / "source")
    with pytest.raises(ValueError, match=r"skip pattern '\(' is no regular expression"):
        make_plan(source, CONFIG, skip=["("])
    with pytest.raises(ValueError, match="has no weight to quantize: LlamaForCausalLM"):
        make_plan(source, CONFIG, skip=["model"])
    tied = written(llama(tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM is tied to its input embedding, .* --embeddings"
    ):
        make_plan(tied, CONFIG, head=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        quantize_directory.quantize_directory(make_plan(source, CONFIG), tmp_path / "out", nothing)
    quantized(source, tmp_path / "done")
    with pytest.raises(ValueError, match="is quantized already"):
        make_plan(tmp_path / "done", CONFIG)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'torchao_int4cpu\[hf\]'"):
        make_plan(source, CONFIG)
    monkeypatch.undo()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="the class 'NoSuchModel', which transformers"):
        make_plan(source, CONFIG)
    (source / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"cannot be read .* the file is damaged"):
        make_plan(source, CONFIG)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model: Any = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
    source = written(model, tmp_path / "source")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: weight has NaN"):
        quantized(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_model_does_not_have_are_kept(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    state = load_file(source / "model.safetensors")
    extra = {"rotary.inv_freq": torch.ones(3), "count": torch.tensor(7)}
    save_file(state | extra, source / "model.safetensors", {"format": "pt"})
    _, report = quantized(source, tmp_path / "out")
    assert {tensor.name for tensor in report.kept["not in the model"]} == set(extra)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("count"), extra["count"])


def test_sqnr() -> None:
    w = torch.randn(70, 100)
    value = choose_qparams(w, 32)
    error = (value.dequantize() - w).double()
    expected = 10 * math.log10(float(w.double().square().sum() / error.square().sum()))
    assert sqnr(w, value) == pytest.approx(expected, rel=1e-5)
    assert sqnr(torch.zeros(4, 4), choose_qparams(torch.zeros(4, 4), 32)) == math.inf


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor_not_of_the_model(tmp_path: Path) -> None:
    """The peak rises by three times the largest tensor: as read, its codes and their packed form, and
    the shard that is being filled; then what libraries keep. The model is 12 times the largest."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 100, "head_dim": 128}
    config = llama_config(**sizes, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=16)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).state_dict()
    state = {name: torch.randn(part.shape).bfloat16() for name, part in empty.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    done = run_child("quantize_directory_memory", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    risen, largest, total = map(int, done.stdout.split())
    assert total > 11 * largest
    assert risen < 3 * largest + 64 * 2**20 < total / 2
