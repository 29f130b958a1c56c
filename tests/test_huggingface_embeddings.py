"""Embeddings of Hugging Face models in 4 bits, alone and tied to the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.hugging_face_models import (
    EMBEDDING,
    IDS,
    MODELS,
    TIED,
    assert_equal_in_a_fresh_process,
    embeddings_too,
    file_bytes,
    int4_names,
    keys,
    linear_names,
    llama,
    logits,
    quantized,
    written,
)
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.checkpoint.inspect import inspect


def test_dense_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    """transformers keeps them dense, and applies a plain config to linear layers only."""
    source = written(MODELS["qwen3-tied"](), tmp_path / "source")
    for options in ({}, {"include_input_output_embeddings": True}):
        model = quantized(source, **options)
        model.save_pretrained(tmp_path / "out")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        for either in (model, back):
            assert either.lm_head.weight is either.model.embed_tokens.weight
            assert type(either.lm_head.weight) is nn.Parameter  # one dense weight for both
        assert torch.equal(logits(back), logits(model))


@pytest.mark.slow
def test_a_tied_embedding_in_4_bit(tmp_path: Path) -> None:
    """One parameter in memory and one in the file; equal to `quantize_`, also in a fresh process."""
    expected = {}
    for name, build in TIED.items():
        source = written(build(), tmp_path / name)
        model = quantized(source, **embeddings_too())
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert int4_names(model) == linear_names(model) - {"lm_head.weight"} | {EMBEDDING}
        by_hand = AutoModelForCausalLM.from_pretrained(source)
        choose = lambda module, name: isinstance(module, (nn.Linear, nn.Embedding))  # noqa: E731
        quantize_(by_hand, Int4WeightOnlyConfig(32), filter_fn=choose)
        assert torch.equal(logits(by_hand), logits(model))

        out = tmp_path / f"{name}-out"
        model.save_pretrained(out)
        assert [key for key in keys(out / "model.safetensors") if "head" in key] == []
        assert inspect(out, verify=True).problems == []
        back = AutoModelForCausalLM.from_pretrained(out)
        assert back.lm_head.weight is back.model.embed_tokens.weight
        assert int4_names(back) == int4_names(model)
        assert torch.equal(logits(back), logits(model))
        prompt, options = IDS[:1], {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
        assert torch.equal(back.generate(prompt, **options), model.generate(prompt, **options))
        back.save_pretrained(tmp_path / f"{name}-again", save_original_format=False)
        assert file_bytes(tmp_path / f"{name}-again") == file_bytes(out)
        for folder in (out, tmp_path / f"{name}-again"):
            expected[str(folder)] = (logits(model), len(int4_names(model)))
    assert_equal_in_a_fresh_process(expected)


def test_an_untied_embedding_in_4_bit(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    both = quantized(source, **embeddings_too())
    assert int4_names(both) == linear_names(both) | {EMBEDDING}
    config = Int4WeightOnlyConfig(group_size=32)
    default = FqnToConfig({"_default": config})
    same = quantized(source, default, include_input_output_embeddings=True)
    assert int4_names(same) == int4_names(both)
    assert torch.equal(logits(same), logits(both))
    one = quantized(source, FqnToConfig({"model.embed_tokens": config}))
    assert int4_names(one) == {EMBEDDING}
    for name, model in (("both", both), ("one", one)):
        model.save_pretrained(tmp_path / name)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert int4_names(back) == int4_names(model)
        assert torch.equal(logits(back), logits(model))


def test_a_tie_that_transformers_breaks(tmp_path: Path) -> None:
    """``untie_embedding_weights``: the embedding in 4 bits, the head as it was, in the file as well."""
    source = written(llama(tie_word_embeddings=True), tmp_path / "source")
    torchao = TorchAoConfig(
        FqnToConfig({"model.embed_tokens": Int4WeightOnlyConfig(group_size=32)}),
        include_input_output_embeddings=True,
        untie_embedding_weights=True,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=torchao)
    model.save_pretrained(tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for either in (model, back):
        assert int4_names(either) == {EMBEDDING}
        assert type(either.lm_head.weight) is nn.Parameter
    assert torch.equal(logits(back), logits(model))


def test_what_the_loading_side_will_not_tie_is_saved_twice(tmp_path: Path) -> None:
    """The config decides there: without the tie, a head that is left out would be random numbers."""
    model = quantized(written(TIED["llama"](), tmp_path / "source"), **embeddings_too())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.lm_head.weight is not back.model.embed_tokens.weight
    assert {EMBEDDING, "lm_head.weight"} <= int4_names(back)
    assert torch.equal(logits(back), logits(model))


def test_two_weights_that_transformers_would_tie_are_both_saved(tmp_path: Path) -> None:
    model = quantized(written(TIED["llama"](), tmp_path / "source"), **embeddings_too())
    other = Int4OpaqueTensor.from_hp(torch.randn(120, 64).bfloat16(), [1, 32])
    model.lm_head.weight = nn.Parameter(other, requires_grad=False)
    model.save_pretrained(tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # transformers warns, and ties not
    assert {EMBEDDING, "lm_head.weight"} <= int4_names(back)
    assert torch.equal(logits(back), logits(model))


def test_the_scale_of_gemmas_embedding(tmp_path: Path) -> None:
    """transformers 5.24 alone leaves it as whatever was in that memory, on both ways to load."""
    source = written(TIED["gemma3"](), tmp_path / "source")
    model = quantized(source, **embeddings_too())
    model.save_pretrained(tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for either in (model, back, quantized(source, include_input_output_embeddings=True)):
        assert float(either.model.embed_tokens.embed_scale) == 8  # the root of the hidden size


def test_a_tie_broken_by_quantize_is_told_and_tie_weights_drops_the_head(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written(TIED["qwen3"](), tmp_path / "source"))
    dense = model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match=r"lm_head\.weight and model\.embed_tokens\.weight were one"):
        quantize_(model, Int4WeightOnlyConfig(32))
    assert isinstance(model.lm_head.weight, Int4OpaqueTensor)
    model.tie_weights()  # as the warning says
    assert model.lm_head.weight is dense
