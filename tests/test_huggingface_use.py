"""What is done with a 4-bit Hugging Face model: generate, in a pipeline, compiled, train."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.hugging_face_models import (
    IDS,
    int4_items,
    int4_names,
    keys,
    llama,
    logits,
    quantized,
    written,
)


@pytest.mark.slow
def test_generate_with_a_static_cache_compiled(tmp_path: Path) -> None:
    model = quantized(written(llama(), tmp_path / "source", torch.float32))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    prompt = IDS[:1]
    eager = model.generate(prompt, **options)
    static = model.generate(prompt, cache_implementation="static", **options)
    model.forward = torch.compile(model.forward, fullgraph=True)
    compiled = model.generate(prompt, cache_implementation="static", **options)
    assert eager.shape == (1, 24)
    assert torch.equal(static, eager)
    assert torch.equal(compiled, eager)


def test_the_pipeline(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = quantized(written(llama(), tmp_path / "source"))
    model.save_pretrained(out)
    words(out)
    generate = transformers.pipeline("text-generation", model=str(out))
    assert int4_names(generate.model) == int4_names(model)
    text = generate("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)[0]
    assert re.findall(r"w(\d+)", text) == [str(int(token)) for token in expected]


def words(folder: Path) -> None:
    """A tokenizer with one token a word: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(120)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_lora_on_top_trains(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    source = written(llama(), tmp_path / "source", torch.float32)
    quantized(source).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: weight.qdata.clone() for name, weight in int4_items(base)}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2  # A and B of three projections in two layers
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(30):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1  # from log(120) = 4.8
    for name, weight in int4_items(base):
        assert torch.equal(weight.qdata, before[name.replace("base_layer.", "")])
    model.save_pretrained(str(tmp_path / "adapter"))
    assert not any("qdata" in key for key in keys(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    back = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    assert torch.equal(logits(back.eval()), logits(model.eval()))
