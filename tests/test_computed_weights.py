"""Weights that are no parameters: computed by torch before each use, buffers, plain attributes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as new
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch.nn.utils import prune
from torchao.quantization import FqnToConfig, quantize_

import torchao_int4cpu
from tests.module_twins import int4_names
from torchao_int4cpu import Int4WeightOnlyConfig

CONFIG = Int4WeightOnlyConfig(group_size=32)

REMOVE = "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"


def both(module: nn.Module) -> None:
    new.spectral_norm(new.weight_norm(module))


def pruned_twice(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)
    prune.random_unstructured(module, "weight", 0.2)


#: How a weight comes to be computed, by what it says it is, and the call that it says ends that.
KINDS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "weight_norm": (new.weight_norm, "a parametrization (WeightNorm)", REMOVE),
    "spectral_norm": (new.spectral_norm, "a parametrization (SpectralNorm)", REMOVE),
    "orthogonal": (new.orthogonal, "a parametrization (Orthogonal)", REMOVE),
    "two": (both, "a parametrization (WeightNorm, SpectralNorm)", REMOVE),
    "old weight_norm": (
        nn.utils.weight_norm,
        "torch.nn.utils.weight_norm",
        "torch.nn.utils.remove_weight_norm(module, 'weight')",
    ),
    "old spectral_norm": (
        nn.utils.spectral_norm,
        "torch.nn.utils.spectral_norm",
        "torch.nn.utils.remove_spectral_norm(module, 'weight')",
    ),
    "pruned": (
        lambda module: prune.random_unstructured(module, "weight", 0.5),
        "torch.nn.utils.prune",
        "torch.nn.utils.prune.remove(module, 'weight')",
    ),
    "pruned twice": (
        pruned_twice,
        "torch.nn.utils.prune",
        "torch.nn.utils.prune.remove(module, 'weight')",
    ),
}


def net() -> Any:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96))


def layer_two(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model[2](x)
    return y.detach()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_computed_weight_is_left_until_it_is_computed_no_more(kind: str, by_name: bool) -> None:
    compute, what, cure = KINDS[kind]
    model = net().eval()
    compute(model[2])
    x = torch.randn(5, 96)
    before, state = layer_two(model, x), {k: v.clone() for k, v in model[2].state_dict().items()}
    config: Any = FqnToConfig({r"re:[024]": CONFIG}) if by_name else CONFIG
    with pytest.warns(UserWarning, match=r"^2\.weight is left as it was: it is computed by") as caught:
        quantize_(model, config, filter_fn=None)
    (message,) = [str(w.message) for w in caught if w.category is UserWarning]
    assert what in message
    assert f"; call {cure} first" in message
    assert int4_names(model) == {"0.weight", "4.weight"}
    assert torch.equal(layer_two(model, x), before)
    after = model[2].state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert model(torch.randn(3, 64)).isfinite().all()

    exec(cure, {"torch": torch, "module": model[2]})  # as a user would do who reads the message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, config, filter_fn=None)
    assert int4_names(model) == {"0.weight", "2.weight", "4.weight"}
    assert model(torch.randn(3, 64)).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_a_weight_is_computed_from_is_left_too(kind: str) -> None:
    """A pattern that finds every parameter finds ``weight_v``, ``weight_orig``, ``original0``."""
    compute, _, _ = KINDS[kind]
    model = net().eval()
    compute(model[2])
    x = torch.randn(5, 96)
    before = layer_two(model, x)
    config = FqnToConfig({r"re:2\..*(_|original).*": CONFIG, r"re:[04]\.weight": CONFIG})
    with pytest.warns(UserWarning, match=r"is left as it was: .*computed from it by"):
        quantize_(model, config, filter_fn=None)
    assert int4_names(model) == {"0.weight", "4.weight"}
    assert torch.equal(layer_two(model, x), before)


def test_reading_nothing_that_computes() -> None:
    """In training a spectral norm takes a step with each look at the weight. torchao's filter looks."""
    model = net().train()
    new.spectral_norm(model[2])
    state = {key: value.clone() for key, value in model[2].state_dict().items()}
    with pytest.warns(UserWarning, match=r"^2\.weight is left as it was"):
        quantize_(model, CONFIG, filter_fn=lambda module, name: name == "2")
    assert all(torch.equal(model[2].state_dict()[key], value) for key, value in state.items())


def test_a_computed_bias_is_no_obstacle() -> None:
    model = net()
    prune.l1_unstructured(model[0], "bias", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, CONFIG)
    assert int4_names(model) == {f"{i}.weight" for i in (0, 2, 4)}
    assert int((model(torch.zeros(1, 64)) != 0).sum()) > 0


def test_a_computed_projection_of_attention() -> None:
    model: Any = nn.Sequential(nn.MultiheadAttention(64, 4, batch_first=True))
    new.weight_norm(model[0], "in_proj_weight")
    with pytest.warns(UserWarning, match=r"^0\.in_proj_weight is left as it was: .*'in_proj_weight'\)"):
        quantize_(model, CONFIG, filter_fn=torchao_int4cpu.filter_fn)
    assert int4_names(model) == {"0.out_proj.weight"}


class WithBuffer(nn.Linear):
    """The weight is a buffer, as of a layer that is never trained."""

    def __init__(self) -> None:
        super().__init__(64, 96)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class WithAttribute(nn.Linear):
    """The weight is a plain tensor that something may put there anew."""

    def __init__(self) -> None:
        super().__init__(64, 96)
        weight = self.weight.detach()
        del self.weight
        self.weight = weight


class WithProperty(nn.Linear):
    """The weight is computed from a parameter whenever it is read, as with an equalized rate."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.raw * 2

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = 64, 96
        self.raw = nn.Parameter(torch.randn(96, 64))
        self.bias = nn.Parameter(torch.zeros(96))


OTHERS = {"a buffer": WithBuffer, "a plain attribute": WithAttribute, "a property": WithProperty}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_a_weight_that_is_no_parameter(kind: str) -> None:
    model: Any = nn.Sequential(OTHERS[kind](), nn.Linear(96, 64))
    x = torch.randn(3, 64)
    before = model[0](x).detach()
    with pytest.warns(UserWarning, match=rf"^0\.weight is left as it was: it is {kind}") as caught:
        quantize_(model, CONFIG)
    assert int4_names(model) == {"1.weight"}
    assert torch.equal(model[0](x), before)
    if kind == "a property":
        return
    cure = re.search(r"write (module.*) first", str(caught[0].message))
    assert cure is not None
    exec(cure[1], {"torch": torch, "module": model[0]})
    quantize_(model, CONFIG)
    assert int4_names(model) == {"0.weight", "1.weight"}
