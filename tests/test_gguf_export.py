"""``export SRC OUT --format gguf``: the file holds the codes, and is read by gguf and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.foreign_checkpoints import save_foreign
from tests.numerics import random_groupwise
from tests.test_convert import loaded, nothing
from tests.test_foreign_models import logits
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.foreign import convert_directory
from torchao_int4cpu.convert.gguf import convert_gguf
from torchao_int4cpu.convert.gguf_export import export_gguf
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.importers.gguf import gguf_of_groupwise
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 320,
    "dtype": "bfloat16",
}
TEXT = "the quick brown fox jumps over the lazy dog 1234"


def tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE of a few merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )


def model_of(architecture: str) -> Any:
    torch.manual_seed(0)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).bfloat16()
    if architecture == "qwen2":  # with biases of queries, keys and values; a tied head
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).bfloat16()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        return model
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=False)).bfloat16()


def quantized(folder: Path, model: Any, group_size: int = 32, **options: Any) -> Path:
    model.save_pretrained(folder / "dense")
    tokenizer().save_pretrained(folder / "dense")
    plan = make_plan(folder / "dense", Int4WeightOnlyConfig(group_size=group_size), **options)
    quantize_directory(plan, folder / "int4", nothing)
    return folder / "int4"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_blocks_are_what_the_package_gguf_reads(kind: str, group_size: int) -> None:
    value = random_groupwise(24, 256, group_size)
    scale, zero = value.scale.half().float(), value.zero.float()
    if kind == "Q4_0":
        zero = torch.zeros_like(zero)
    value = GroupwiseInt4(value.codes, scale, zero, group_size)
    blocks, stands_for = gguf_of_groupwise(value, kind)
    read = gguf.dequantize(blocks.numpy(), getattr(gguf.GGMLQuantizationType, kind))
    assert torch.equal(torch.from_numpy(read), stands_for.dequantize())
    assert torch.equal(stands_for.codes, value.codes)
    error = (stands_for.dequantize() - value.dequantize()).abs()
    minimum = (zero - 8 * scale).abs().repeat_interleave(group_size, 1)
    if kind == "Q4_0":
        assert not error.any()
    else:  # the minimum alone is rounded
        assert bool(
            (error <= 2.0**-11 * minimum + 2.0**-22 * 16 * scale.repeat_interleave(group_size, 1)).all()
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_file_is_the_model(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by transformers with our weights: the codes, and nearly the logits; with its tokenizer."""
    dense = model_of(architecture)
    source = quantized(tmp_path, dense, 64)
    out = tmp_path / "model.gguf"
    assert cli.main(["export", str(source), str(out), "--format", "gguf"]) == 0
    # Minima of scales and zeros in bfloat16 have few enough bits for float16.
    assert "zeros              exact" in capsys.readouterr().out
    ours = loaded(source)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.bfloat16)
    found = {n: p for n, p in read.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    assert len(found) == 14
    for name, weight in found.items():
        assert torch.equal(weight.to_groupwise().codes, ours.get_parameter(name).to_groupwise().codes)
    # All else is the same, so that with the same weights the logits are, too, bit for bit.
    for name, weight in found.items():
        module, _, last = name.rpartition(".")
        exact = ours.get_parameter(name)
        largest = (
            8 * exact.scale_and_zero.float()[..., 0].abs() + exact.scale_and_zero.float()[..., 1].abs()
        )
        moved = (weight.dequantize().double() - exact.dequantize().double()).abs().max()
        assert float(moved) <= (2.0**-11 + 2.0**-8) * float(
            largest.max()
        )  # pairs, and rounding to bfloat16
        setattr(read.get_submodule(module), last, exact)
    assert torch.equal(logits(read), logits(ours))
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    mine = AutoTokenizer.from_pretrained(tmp_path, gguf_file=out.name)
    theirs = AutoTokenizer.from_pretrained(source)
    # Not of whole texts: transformers does not ask the file how it splits words.
    assert mine.convert_ids_to_tokens(range(290)) == theirs.convert_ids_to_tokens(range(290))
    assert mine.eos_token == theirs.eos_token == "<|end|>"


def test_a_gguf_file_and_back(tmp_path: Path) -> None:
    """A file that was exported, converted and exported again has the same weights, byte for byte."""
    source = quantized(tmp_path, model_of("llama"), embeddings=True)
    export_gguf(source, tmp_path / "one.gguf", nothing)
    convert_gguf(tmp_path / "one.gguf", tmp_path / "again", nothing, torch.float16)
    export_gguf(tmp_path / "again", tmp_path / "two.gguf", nothing)
    one, other = (
        {t.name: t for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("one.gguf", "two.gguf")
    )
    assert one.keys() == other.keys()
    kinds = {name: tensor.tensor_type.name for name, tensor in one.items()}
    assert kinds["token_embd.weight"] == "Q4_1"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    for name, tensor in one.items():
        if name == "token_embd.weight":
            continue  # transformers loads it dense
        assert tensor.tensor_type == other[name].tensor_type, name
        assert (tensor.data == other[name].data).all(), name


def test_symmetric_weights_take_less(tmp_path: Path) -> None:
    model = model_of("llama")
    save_foreign(tmp_path / "foreign", model, "gptq", 32, True)
    tokenizer().save_pretrained(tmp_path / "foreign")
    convert_directory(tmp_path / "foreign", tmp_path / "ours", nothing)
    report = export_gguf(tmp_path / "ours", tmp_path / "model.gguf", nothing)
    assert {t.sqnr for t in report.quantized} == {torch.inf}
    kinds = [t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert kinds.count("Q4_0") == 14


LIKE_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def by_regex(digits: str) -> Any:
    return pre_tokenizers.Split(Regex(LIKE_LLAMA.replace("DIGITS", digits)), "isolated")


@pytest.mark.parametrize(
    ("splitting", "use_regex", "name"),
    [
        (pre_tokenizers.Digits(individual_digits=True), True, "smollm"),
        (by_regex(r"\p{N}{1,3}"), False, "llama-bpe"),
        (by_regex(r"\p{N}"), False, "qwen2"),
        # Of models that llama.cpp has other names for: each differs in one thing.
        (pre_tokenizers.Digits(individual_digits=True), False, None),
        (pre_tokenizers.Digits(individual_digits=False), True, None),
        (by_regex(r"\p{N}{1,3}"), True, None),
        (by_regex(r"\p{N}{1,2}"), False, None),
        (pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), False, None),
        (pre_tokenizers.Whitespace(), True, None),
    ],
)
def test_how_words_are_split(splitting: Any, use_regex: bool, name: str | None, tmp_path: Path) -> None:
    """By the names of llama.cpp; a token at the beginning where the tokenizer adds one."""
    source = quantized(tmp_path, model_of("llama"))
    fast = tokenizer()
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitting, own])
    begins = processors.TemplateProcessing(
        single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", 0)]
    )
    fast.backend_tokenizer.post_processor = begins
    fast.save_pretrained(source)
    if name is None:
        with pytest.raises(ValueError, match="splits words in another way than GPT-2"):
            export_gguf(source, tmp_path / "model.gguf", nothing)
        return
    export_gguf(source, tmp_path / "model.gguf", nothing)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(source: Path) -> str:
        arguments = ["export", str(source), str(tmp_path / "out.gguf"), "--format", "gguf"]
        assert cli.main(arguments) == 1
        assert not (tmp_path / "out.gguf").exists()
        return capsys.readouterr().err

    source = quantized(tmp_path / "a", model_of("llama"))
    file = source / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"BPE"', '"Unigram"'))
    assert "of kind Unigram; only byte-level BPE" in refused(source)
    file.write_text(
        text.replace('"use_regex":true', '"use_regex":false').replace(
            '"use_regex": true', '"use_regex": false'
        )
    )
    assert "splits words in another way than GPT-2" in refused(source)
    file.unlink()
    assert "tokenizer.json' is not there; only byte-level BPE" in refused(source)
    file.write_text(text)
    config = json.loads((source / "config.json").read_text())
    scaled = config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    (source / "config.json").write_text(json.dumps(scaled))
    assert "rope_type 'linear'" in refused(source)
    other = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=320))
    assert "no Hugging Face directory with 4-bit weights" in refused(tmp_path / "a/dense")
    plan_source = quantized(tmp_path / "b", other, head=True, embeddings=True)
    assert "the model is a GPT2LMHeadModel; these become GGUF" in refused(plan_source)


def test_what_is_interrupted_or_cannot_be_held_leaves_nothing(tmp_path: Path) -> None:
    source = quantized(tmp_path, model_of("llama"))

    def stop(name: str, done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, tmp_path / "model.gguf", stop)
    assert not list(tmp_path.glob("model.gguf*"))
    save_foreign(tmp_path / "theirs", model_of("llama"), "gptq", 32, False, act_order=True)
    convert_directory(tmp_path / "theirs", tmp_path / "ordered", nothing)
    tokenizer().save_pretrained(tmp_path / "ordered")
    with pytest.raises(ValueError, match="has act_order, which llama"):
        export_gguf(tmp_path / "ordered", tmp_path / "model.gguf", nothing)
    assert not list(tmp_path.glob("model.gguf*"))
