"""Adapters of PEFT over a 4-bit model: as over its dense twin, or refused with what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hugging_face_models import llama
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.tensor.transposed import Int4Weight

peft = pytest.importorskip("peft")

IDS = torch.arange(12)[None]

CONFIGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4},
    "LoraConfig, DoRA": {"r": 4, "use_dora": True},
    "IA3Config": {"feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "AdaLoraConfig": {"total_step": 10},
    "HRAConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 10},
    "RoadConfig": {},
}


def with_adapters(model: nn.Module, name: str, **options: Any) -> Any:
    config = getattr(peft, name.partition(",")[0])(
        target_modules=["q_proj", "down_proj"], **(CONFIGS[name] | options)
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15)
    return adapted


def dense_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, Int4Weight):
                setattr(module, name, nn.Parameter(parameter.dequantize(), requires_grad=False))
    return twin


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    from torchao.quantization import quantize_

    made = llama(vocab_size=320).float().eval()
    quantize_(made, Int4WeightOnlyConfig(group_size=32))
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_compute_what_they_do_over_the_twin(model: Any, name: str) -> None:
    """Within what the model itself differs from its twin by, which rounds activations to bfloat16.

    That is some roundings of 2^-9 a layer; twice as much leaves room for those of the adapters.
    """
    adapted, twin = with_adapters(model, name), with_adapters(dense_twin(model), name)
    base = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(base.weight, Int4OpaqueTensor)
    ours, expected = logits(adapted), logits(twin)
    error = (logits(model) - logits(dense_twin(model))).norm() / logits(model).norm()
    assert float((ours - expected).norm() / expected.norm()) <= 2 * float(error) + 2.0**-9
    assert float((ours - logits(model)).norm() / expected.norm()) > 2.0**-6  # it does something


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["IA3Config", "LoHaConfig", "HRAConfig"])
def test_what_cannot_be_merged_is_refused_and_changes_nothing(model: Any, name: str) -> None:
    adapted = with_adapters(model, name)
    before = logits(adapted)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=r"4-bit weight"):
        copy.deepcopy(adapted).merge_and_unload()
    assert torch.equal(logits(adapted), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cure_for_merging(model: Any, name: str) -> None:
    """Merge into a float model, and quantize the result."""
    from torchao.quantization import quantize_

    adapted = with_adapters(dense_twin(model), name)
    before = logits(adapted)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), before, rtol=1e-3, atol=1e-3)
    quantize_(merged, Int4WeightOnlyConfig(group_size=32))
    assert isinstance(merged.model.layers[0].self_attn.q_proj.weight, Int4OpaqueTensor)


def test_more_tokens(model: Any) -> None:
    """A larger head is a float one: it must be made one before, which the message says."""
    resized = copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"layer\.weight = torch\.nn\.Parameter\(layer\.weight\.deq"):
        resized.resize_token_embeddings(330, mean_resizing=False)
    resized = copy.deepcopy(model)
    layer = resized.lm_head
    layer.weight = torch.nn.Parameter(layer.weight.dequantize())  # the cure
    resized.resize_token_embeddings(330, mean_resizing=False)
    expected = dense_twin(model)(IDS).logits
    assert torch.allclose(resized(IDS).logits[..., :320], expected, atol=0.05, rtol=0.05)


def test_a_model_on_meta_says_what_works(model: Any) -> None:
    empty = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match=r"load them with load_state_dict\(state_dict, assign=True\)"):
        empty.lm_head.weight.to("cpu")
    with pytest.raises(ValueError, match=r"load_state_dict\(state_dict, assign=True\)"):
        nn.functional.linear(torch.ones(1, empty.lm_head.in_features), empty.lm_head.weight)
    with pytest.raises(ValueError, match=r"assign=True"):
        Int4OpaqueTensor.from_hp(torch.empty(48, 64, device="meta"), [1, 32])
    layer = nn.Linear(model.lm_head.in_features, 320, bias=False, device="meta")
    layer.load_state_dict(model.lm_head.state_dict(), assign=True)  # the cure
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(x), model.lm_head(x))
