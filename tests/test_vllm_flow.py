"""The life of a torchao weight in vLLM 0.32, as plain torch calls: allocate, load, process, multiply.

Each function is one of vLLM's, by name and by what it does; nothing here imports vLLM. They are put
into a module of the name that vLLM's has, with the method that we patch there: it is the one call that
gives us memory which nobody has written yet.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.prototype.tensor_conversion.api import (
    convert_to_packed_tensor_based_on_current_hardware,
)
from torchao.quantization import quantize_

from tests.numerics import assert_int4, assert_product, native
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.integrations import vllm as patch

CONFIG = Int4WeightOnlyConfig(group_size=32)
HIDDEN = 96

# --- vLLM ---------------------------------------------------------------------------------------


def torchao_quantize_param_data(param: Tensor, torchao_config: Any) -> Parameter:
    with torch.device("meta"):
        dummy_linear: Any = nn.Sequential(nn.Linear(param.shape[1], param.shape[0], bias=False))
    dummy_linear[0].weight = param
    quantize_(dummy_linear, torchao_config)
    weight: Parameter = dummy_linear[0].weight
    return weight


def create_weights(layer: Any, heights: list[int], k: int, serialized: bool, **extra: Any) -> None:
    weight = Parameter(torch.empty(sum(heights), k, dtype=torch.bfloat16), requires_grad=False)
    if serialized:
        weight = torchao_quantize_param_data(weight, CONFIG)
    set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
    layer.register_parameter("weight", weight)
    set_weight_attrs(weight, extra)


def process_weights_after_loading(layer: Any, serialized: bool) -> None:
    recorded = dict(vars(layer.weight))  # every attribute of the instance, the parts too
    if serialized:
        packed = convert_to_packed_tensor_based_on_current_hardware(layer.weight)
        layer.weight = Parameter(packed, requires_grad=layer.weight.requires_grad)
        restore_weight_attrs(layer.weight, recorded)
        return
    weight = torchao_quantize_param_data(layer.weight, CONFIG)
    weight = Parameter(convert_to_packed_tensor_based_on_current_hardware(weight), weight.requires_grad)
    restore_weight_attrs(weight, recorded)
    layer.register_parameter("weight", weight)


def set_weight_attrs(weight: Tensor, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        assert not hasattr(weight, name), f"overwriting {name}"
        setattr(weight, name, value)


def restore_weight_attrs(weight: Tensor, recorded: dict[str, Any]) -> None:
    set_weight_attrs(weight, {k: v for k, v in recorded.items() if not hasattr(weight, k)})


def to_meta_tensor(tensor: Tensor) -> Tensor:
    meta_tensor = tensor.data.to("meta")
    meta_tensor.__class__ = tensor.__class__
    meta_tensor.__dict__ = tensor.__dict__.copy()
    return meta_tensor


def qkv_loader(param: Tensor, loaded: Tensor, start: int, height: int, rank: int) -> None:
    """The rows of one of q, k and v that are this rank's go to their place in the fused weight."""
    data = param.data.narrow(0, start, height)
    loaded = loaded.narrow(0, rank * height, height)
    assert data.shape == loaded.shape
    data.copy_(loaded)


def row_loader(param: Tensor, loaded: Tensor, rank: int) -> None:
    """The columns of a weight that are this rank's."""
    data = param.data
    loaded = loaded.narrow(1, rank * data.shape[1], data.shape[1])
    assert data.shape == loaded.shape
    data.copy_(loaded)


# --- around it ----------------------------------------------------------------------------------


def in_module(name: str, *functions: Callable[..., Any]) -> Any:
    """A module of that name with copies of the functions that call each other there."""
    module = types.ModuleType(name)
    vars(module).update({k: v for k, v in globals().items() if not k.startswith("__")})
    vars(module)["__builtins__"] = builtins
    for function in functions:
        copied = types.FunctionType(function.__code__, vars(module), function.__name__)
        setattr(module, function.__name__, copied)
    return module


OURS = (torchao_quantize_param_data, create_weights, process_weights_after_loading)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, patched as `torchao_int4cpu` patches it: its method allocates, and nothing else."""
    module = in_module(patch.MODULE, *OURS)
    method = type("TorchAOLinearMethod", (), {"create_weights": staticmethod(module.create_weights)})
    module.TorchAOLinearMethod = method
    monkeypatch.setitem(sys.modules, patch.MODULE, module)
    importlib.reload(patch)
    module.create_weights = method.create_weights  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=[True, False], ids=["poison", "as it comes"])
def _uninitialised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        poison(monkeypatch)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` at its worst: every byte is 255, which makes every number a NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        new = empty(*args, **kwargs)
        if new.device.type == "cpu" and new.numel():
            new.view(-1).view(torch.uint8).fill_(255)
        return new

    monkeypatch.setattr(torch, "empty", poisoned)


def checkpoint(**weights: Tensor) -> dict[str, Int4OpaqueTensor]:
    """Each projection quantized alone, through a safetensors file's tensors and metadata."""
    state = {f"l.{name}.weight": Int4OpaqueTensor.from_hp(w, [1, 32]) for name, w in weights.items()}
    loaded, rest = unflatten_tensor_state_dict(*flatten_tensor_state_dict(state))
    assert rest == {}
    return {name: loaded[f"l.{name}.weight"] for name in weights}


def codes(t: Tensor) -> Tensor:
    assert isinstance(t, Int4OpaqueTensor)
    return t.to_groupwise().codes


# --- the flow -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_uninitialised")
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("head", [64, 40, 24, 7])
def test_a_quantized_checkpoint_is_loaded_into_fused_weights(vllm: Any, tp: int, head: int) -> None:
    """Heads of 40, 24 or 7 rows: q, k and v meet within a block of every layout, and within a byte."""
    heads, kv_heads = 8, 4
    q, kv = heads * head // tp, kv_heads * head // tp  # rows of one rank
    loaded = checkpoint(
        q=torch.randn(heads * head, HIDDEN).bfloat16(),
        k=torch.randn(kv_heads * head, HIDDEN).bfloat16(),
        v=torch.randn(kv_heads * head, HIDDEN).bfloat16(),
        o=torch.randn(HIDDEN, 256).bfloat16(),
    )
    for rank in range(tp):
        qkv: Any = nn.Module()
        o: Any = nn.Module()
        vllm.create_weights(qkv, [q, kv, kv], HIDDEN, True, weight_loader=qkv_loader)
        vllm.create_weights(o, [HIDDEN], 256 // tp, True, weight_loader=row_loader)
        assert_int4(qkv.weight, (q + 2 * kv, HIDDEN), 32)
        for name, start, height in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
            qkv.weight.weight_loader(qkv.weight, loaded[name], start, height, rank)
        o.weight.weight_loader(o.weight, loaded["o"], rank)
        for layer in (qkv, o):
            vllm.process_weights_after_loading(layer, True)
            assert layer.weight.input_dim == 1
            assert callable(layer.weight.weight_loader)
            assert isinstance(layer.weight, Parameter)
            assert not layer.weight.requires_grad
        rows = [(name, slice(rank * n, rank * n + n)) for name, n in (("q", q), ("k", kv), ("v", kv))]
        expected = torch.cat([codes(loaded[name])[some] for name, some in rows])
        w = assert_int4(qkv.weight, (q + 2 * kv, HIDDEN), 32)
        assert w.qdata_layout == native().name
        assert torch.equal(codes(w), expected)
        numbers = torch.cat([loaded[name].dequantize()[some] for name, some in rows])
        assert torch.equal(w.dequantize(), numbers)
        columns = slice(rank * 256 // tp, (rank + 1) * 256 // tp)
        part = assert_int4(o.weight, (HIDDEN, 256 // tp), 32)
        assert torch.equal(codes(part), codes(loaded["o"])[:, columns])
        assert torch.equal(part.dequantize(), loaded["o"].dequantize()[:, columns])
        for weight in (w, part):
            x = torch.randn(3, weight.shape[1]).bfloat16()
            assert_product(F.linear(x, weight), x, weight.packed())


def test_columns_within_a_group_cannot_be_loaded(vllm: Any) -> None:
    """A row-parallel layer whose share of K is no multiple of the group size: refused with a cure."""
    layer: Any = nn.Module()
    vllm.create_weights(layer, [HIDDEN], 40, True)
    loaded = checkpoint(o=torch.randn(HIDDEN, 80).bfloat16())["o"]
    with pytest.raises(ValueError, match=r"along K at 40; .* cut at a multiple of 32"):
        row_loader(layer.weight, loaded, 0)


@pytest.mark.usefixtures("_uninitialised")
def test_real_numbers_are_quantized_when_they_are_loaded(vllm: Any) -> None:
    layer: Any = nn.Module()
    vllm.create_weights(layer, [70], HIDDEN, False)
    numbers = torch.randn(70, HIDDEN).bfloat16()
    layer.weight.data.copy_(numbers)
    vllm.process_weights_after_loading(layer, False)
    assert layer.weight.output_dim == 0
    w = assert_int4(layer.weight, (70, HIDDEN), 32)
    assert torch.equal(codes(w), codes(Int4OpaqueTensor.from_hp(numbers, [1, 32])))


def test_what_was_allocated_is_zero_until_it_is_loaded(vllm: Any) -> None:
    """Nobody's memory is not kept as if it were numbers."""
    layer: Any = nn.Module()
    vllm.create_weights(layer, [70], HIDDEN, True)
    assert not bool(layer.weight.dequantize().any())


# --- NaN elsewhere ------------------------------------------------------------------------------


def quantize_nan_after_loading(vllm: Any) -> None:
    """As `process_weights_after_loading` does with the numbers of a damaged checkpoint."""
    layer: Any = nn.Module()
    vllm.create_weights(layer, [32], 64, False)
    layer.weight.data.fill_(torch.nan)
    vllm.process_weights_after_loading(layer, False)


def quantize_nan_directly(vllm: Any) -> None:
    vllm.torchao_quantize_param_data(Parameter(torch.full((32, 64), torch.nan)), CONFIG)


def allocate_in_another_module(vllm: Any) -> None:
    module = in_module("somebody.elses.torchao", *OURS)
    module.torch = types.SimpleNamespace(**vars(torch) | {"empty": _full_of_nan})
    module.create_weights(nn.Module(), [32], 64, True)


def allocate_by_another_name(vllm: Any) -> None:
    def torchao_quantize(param: Tensor, config: Any) -> None:
        vllm.quantize_(nn.Sequential(_with_weight(param)), config)

    def create_weights() -> None:
        torchao_quantize(Parameter(_full_of_nan(32, 64)), CONFIG)

    create_weights()


def quantize_nan_below_an_allocation(vllm: Any) -> None:
    """`create_weights` is further up, but does not make this call."""

    def create_weights() -> None:
        between()

    def between() -> None:
        quantize_nan_directly(vllm)

    create_weights()


def _full_of_nan(*shape: int, **options: Any) -> Tensor:
    return torch.full(shape, torch.nan, **options)


def _with_weight(param: Tensor) -> Any:
    layer: Any = nn.Linear(param.shape[1], param.shape[0], bias=False)
    layer.weight = param
    return layer


@pytest.mark.parametrize(
    "call",
    [
        quantize_nan_after_loading,
        quantize_nan_directly,
        allocate_in_another_module,
        allocate_by_another_name,
        quantize_nan_below_an_allocation,
    ],
)
def test_nan_is_refused_everywhere_else(call: Callable[[Any], None], vllm: Any) -> None:
    with pytest.raises(ValueError, match="weight has NaN or infinite values; every value must be"):
        call(vllm)


def test_nan_is_accepted_where_vllm_allocates(vllm: Any) -> None:
    """The control of the test above: the same memory, by vLLM's own call."""
    vllm.torch = types.SimpleNamespace(**vars(torch) | {"empty": _full_of_nan})
    layer: Any = nn.Module()
    vllm.create_weights(layer, [32], 64, True)
    assert_int4(layer.weight, (32, 64), 32)


# --- reloading ----------------------------------------------------------------------------------


@pytest.fixture
def loaded(vllm: Any) -> Any:
    layer: Any = nn.Module()
    vllm.create_weights(layer, [70], HIDDEN, True, weight_loader=row_loader)
    row_loader(layer.weight, checkpoint(o=torch.randn(70, HIDDEN).bfloat16())["o"], 0)
    vllm.process_weights_after_loading(layer, True)
    return layer


def test_a_copy_on_meta_with_the_attributes(loaded: Any) -> None:
    """vLLM keeps one of each weight, with its class and attributes; the weight stays as it is."""
    weight = loaded.weight
    x = torch.randn(3, HIDDEN).bfloat16()
    y = F.linear(x, weight)
    kept: Any = to_meta_tensor(weight)
    assert type(kept) is type(weight)
    assert (kept.shape, kept.dtype, kept.device.type) == (weight.shape, weight.dtype, "meta")
    assert kept.weight_loader is row_loader
    assert isinstance(kept, Parameter)
    assert torch.equal(F.linear(x, weight), y)
    assert weight.qdata.device.type == "cpu"
    assert weight.numel() == kept.numel() == 70 * HIDDEN
