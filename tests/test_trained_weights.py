"""`quantize_` on a model that is being trained: adapters and what somebody chose to train are left."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_

import torchao_int4cpu
from tests.module_twins import dense_twin, int4_names
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig

SIZE = 64
CONFIG = Int4WeightOnlyConfig(group_size=32)
ADAPTER = "it is an adapter of PEFT, which is trained, saved and merged as it is"
TRAINED = r"it is trainable while other weights are frozen \(as {} is\), so it is being trained"


def net() -> Any:
    return nn.Sequential(nn.Linear(SIZE, 96), nn.ReLU(), nn.Linear(96, SIZE))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def told_by(quantize: Callable[[], None]) -> str:
    """The one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize()
    (message,) = [str(warning.message) for warning in caught]
    return message


def assert_trains(model: Any, forward: Callable[[Any, Tensor], Tensor] | None = None) -> None:
    """The loss falls, every trainable weight changes, and no 4-bit weight does."""
    forward = forward or (lambda module, x: module(x))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = {n: [t.clone() for t in p.parts().values()] for n, p in items_in_4_bit(model)}
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(32, SIZE, generator=generator) for _ in range(2))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        loss = (forward(model, x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    changed = {
        n for n, p in model.named_parameters() if n not in parts and not torch.equal(p, before[n])
    }
    assert changed == trainable(model)
    for name, weight in items_in_4_bit(model):
        assert all(torch.equal(a, b) for a, b in zip(weight.parts().values(), parts[name]))


def items_in_4_bit(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, model.get_parameter(name)) for name in sorted(int4_names(model))]


# --- adapters of PEFT -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, FqnToConfig({r"re:.*weight": CONFIG})])
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": False, "bias": "lora_only"}, {"init_lora_weights": False}]
)
def test_adapters_are_left_and_train(options: dict[str, Any], config: Any) -> None:
    model = get_peft_model(net(), LoraConfig(r=32, target_modules=["0", "2"], **options))
    expected = trainable(model)
    weights = {name: model.get_parameter(name) for name in expected}
    choose = torchao_int4cpu.filter_fn if config is CONFIG else None
    message = told_by(lambda: quantize_(model, config, filter_fn=choose))
    first = r"base_model\.model\.0\.lora_A\.default\.weight"
    assert re.match(rf"^{first} is left as it was: {ADAPTER}.* \(and so are 3 more: ", message)
    assert int4_names(model) == {f"base_model.model.{i}.base_layer.weight" for i in (0, 2)}
    assert trainable(model) == expected != set()
    assert all(model.get_parameter(name) is weight for name, weight in weights.items())
    assert_trains(model)


def test_adapters_that_are_frozen_are_left_too() -> None:
    """``inference_mode``, and the inactive one of two: PEFT saves and activates them later."""
    model = get_peft_model(net(), LoraConfig(r=32, target_modules=["0"], inference_mode=True))
    assert trainable(model) == set()
    assert f"lora_A.default.weight is left as it was: {ADAPTER}" in told_by(
        lambda: quantize_(model, CONFIG)
    )
    assert int4_names(model) == {"base_model.model.0.base_layer.weight", "base_model.model.2.weight"}

    model = get_peft_model(net(), LoraConfig(r=32, target_modules=["0"]))
    model.add_adapter("second", LoraConfig(r=32, target_modules=["0"]))
    told_by(lambda: quantize_(model, CONFIG))
    model.set_adapter("second")
    assert trainable(model) == {f"base_model.model.0.lora_{i}.second.weight" for i in "AB"}
    assert_trains(model)


def test_modules_to_save() -> None:
    """A whole layer that is trained beside the adapters; the original below it becomes 4-bit."""
    config = LoraConfig(r=32, target_modules=["0"], modules_to_save=["2"])
    model = get_peft_model(net(), config)
    expected = trainable(model)
    message = told_by(lambda: quantize_(model, CONFIG))
    assert "base_model.model.2.modules_to_save.default.weight" in message
    assert int4_names(model) == {
        "base_model.model.0.base_layer.weight",
        "base_model.model.2.original_module.weight",
    }
    assert trainable(model) == expected
    assert_trains(model)


def test_the_cure_for_adapters() -> None:
    model = get_peft_model(net(), LoraConfig(r=32, target_modules=["0"], init_lora_weights=False))
    merged = model.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(merged, CONFIG)
    assert int4_names(merged) == {"0.weight", "2.weight"}


def test_attention_with_adapters() -> None:
    """PEFT computes its weights in each forward; that it cannot with 4-bit ones."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(SIZE, SIZE)
            self.attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.up(x)[:, None]
            y: Tensor = self.attention(h, h, h, need_weights=False)[0][:, 0]
            return y + h[:, 0]

    model = get_peft_model(Net(), LoraConfig(r=32, target_modules=["up", "attention"]))
    before = model(torch.ones(3, SIZE)).detach()
    message = told_by(lambda: quantize_(model, CONFIG, filter_fn=torchao_int4cpu.filter_fn))
    assert "attention.base_layer.in_proj_weight is left as it was: PEFT adds adapters to" in message
    assert int4_names(model) == {"base_model.model.up.base_layer.weight"}
    assert model(torch.ones(3, SIZE)).shape == before.shape
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(torch.ones(3, SIZE)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(torch.ones(3, SIZE)), before)


# --- what somebody chose to train -----------------------------------------------------------------


class ByHand(nn.Module):
    """Low-rank adapters as people write them: layers beside a layer, or parameters in it."""

    base: Any
    a: Any
    b: Any

    def __init__(self, layers: bool) -> None:
        super().__init__()
        self.base = nn.Linear(SIZE, SIZE)
        if layers:
            self.a, self.b = nn.Linear(SIZE, 32, bias=False), nn.Linear(32, SIZE, bias=False)
        else:
            self.base.a = nn.Parameter(torch.randn(32, SIZE) / 8)
            self.base.b = nn.Parameter(torch.randn(SIZE, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if hasattr(self, "a"):
            return y + self.b(self.a(x))  # type: ignore[no-any-return]
        return y + x @ self.base.a.t() @ self.base.b.t()  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [True, False])
def test_adapters_made_by_hand(layers: bool) -> None:
    model = nn.Sequential(ByHand(layers), nn.Linear(SIZE, SIZE))
    model.requires_grad_(False)
    names = ["0.a.weight", "0.b.weight"] if layers else ["0.base.a", "0.base.b"]
    for name in names:
        model.get_parameter(name).requires_grad_()
    everything = FqnToConfig({r"re:.*(weight|\.a|\.b)": CONFIG})
    message = told_by(lambda: quantize_(model, everything, filter_fn=None))
    reason = TRAINED.format(r"1\.weight")
    assert re.match(rf"^{re.escape(names[0])} is left as it was: {reason}.*1 more: {names[1]}", message)
    assert int4_names(model) == {"0.base.weight", "1.weight"}
    assert trainable(model) == set(names)
    assert_trains(model)


def test_a_head_on_a_frozen_backbone() -> None:
    """Nothing but convolutions is frozen: the head is the only layer that could be 4-bit."""
    model: Any = nn.Sequential(
        nn.Conv1d(1, 64, 33, padding=16), nn.Flatten(), nn.Linear(64 * SIZE, SIZE)
    )
    model[0].requires_grad_(False)
    quantize_(model, CONFIG)  # 0.8% of the numbers: a model may have so much that is never trained
    assert int4_names(model) == {"2.weight"}

    model[0] = nn.Conv1d(1, 64, 63, padding=31).requires_grad_(False)
    model[2] = nn.Linear(64 * SIZE, 32)  # 3%
    message = told_by(lambda: quantize_(model, CONFIG))
    assert re.match(rf"^2\.weight is left as it was: {TRAINED.format(r'0.weight')}", message)
    assert "None of 2 matrices is 4-bit" in message
    assert trainable(model) == {"2.weight", "2.bias"}
    model[2].weight.requires_grad_(False)  # the cure
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, CONFIG)
    assert int4_names(model) == {"2.weight"}
    assert trainable(model) == {"2.bias"}


def test_lower_layers_frozen() -> None:
    model: Any = nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(12)])
    model[0].requires_grad_(False)
    told_by(lambda: quantize_(model, CONFIG))
    assert int4_names(model) == {"0.weight"}
    quantize_(model[5], CONFIG)  # asked for alone, it is as any other layer
    assert int4_names(model) == {"0.weight", "5.weight"}


def test_an_ordinary_model_is_quantized_whatever_its_gradients() -> None:
    """All trainable, all frozen, tables of positions frozen, only biases or norms on one side."""
    frozen_table = nn.Embedding(40, SIZE).requires_grad_(False)

    def build(change: Callable[[Any], object]) -> Any:
        model = nn.Sequential(frozen_table, nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE))
        change(model)
        return model

    for change in (
        lambda model: None,
        lambda model: model.requires_grad_(False),
        lambda model: [model[1].bias.requires_grad_(False), model[2].bias.requires_grad_(False)],
        lambda model: [p.requires_grad_(p.ndim < 2) for p in model.parameters()],
        lambda model: model[1].weight.requires_grad_(False),
    ):
        model = build(change)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_(model, CONFIG)
        assert int4_names(model) == {"1.weight"}


def test_two_calls_after_each_other() -> None:
    """What the first made 4-bit is frozen by that, not by somebody who trains the rest."""
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, CONFIG, filter_fn=lambda module, name: name == "0")
        quantize_(model, Int4WeightOnlyConfig(64), filter_fn=lambda module, name: name == "2")
    assert int4_names(model) == {"0.weight", "2.weight"}


def test_peft_merges_into_a_single_layer() -> None:
    """It hands over a plain tensor in a layer whose bias is frozen, and wants it 4-bit again."""
    layer: Any = nn.Linear(SIZE, SIZE)
    layer.bias.requires_grad_(False)
    quantize_(layer, CONFIG)
    merged = layer.weight.dequantize() + 1
    del layer.weight
    layer.weight = merged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(layer, CONFIG)
    assert torch.equal(layer.weight, Int4OpaqueTensor.from_hp(merged, [1, 32]))


def test_adapters_of_a_frozen_4_bit_model_by_hand() -> None:
    """The base is 4-bit before the adapters come, and somebody calls `quantize_` once more."""
    model = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE))
    quantize_(model, CONFIG)
    model.requires_grad_(False)
    model.append(nn.Linear(SIZE, 32, bias=False)).append(nn.Linear(32, SIZE, bias=False))
    told_by(lambda: quantize_(model, CONFIG))
    assert trainable(model) == {"3.weight", "4.weight"}
    twin = dense_twin(model, torch.float32)
    assert type(twin[1].weight) is nn.Parameter
    assert_trains(model)
