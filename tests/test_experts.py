"""Mixture of experts: transformers 5 with stacks of 4-bit experts, in each of its implementations."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TorchAoConfig,
)

import torchao_int4cpu.quantize.config
from tests.numerics import UNDERFLOW, UNIT, assert_int4
from tests.test_isa import CAPABILITIES, SUPPORTED, _param, run
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.dispatch.table import NAMED
from torchao_int4cpu.quantize.parameter import quantize_parameter
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
IDS = torch.arange(24).view(2, 12)
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 120}
Stack = Int4OpaqueTensor | Int4TransposedTensor

#: By family: the class of the model, its config, and sizes. K is 64 or more and 48, 80, 72 and 104: in
#: groups of 32 the last is short.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"hidden_size": 64, "intermediate_size": 80, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"hidden_size": 72, "intermediate_size": 104, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def build(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model with random weights, biases and routers."""
    cls, config, sizes = FAMILIES[family]
    model = cls(config(**(SIZES | {"num_hidden_layers": 2} | sizes | changes))).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "sinks" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def config_for_experts(group_size: int = 32) -> FqnToConfig:
    return FqnToConfig(
        {r"re:.*\.experts\.(gate_up|down)_proj": Int4WeightOnlyConfig(group_size=group_size)}
    )


def quantized(model: Any, group_size: int = 32) -> Any:
    """The same model with 4-bit experts; every other weight stays."""
    quantize_(model, config_for_experts(group_size), filter_fn=None)
    return model


def stacks(model: nn.Module) -> dict[str, Stack]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, Stack)}


def dequantized_into(dense: Any, model: Any) -> Any:
    """``dense`` with the numbers that the 4-bit experts of ``model`` stand for."""
    for name, stack in stacks(model).items():
        dense.get_parameter(name).data.copy_(stack.dequantize())
    return dense


def pair(family: str, dtype: torch.dtype, group_size: int = 32, **changes: Any) -> tuple[Any, Any]:
    """A model with 4-bit experts, and the dense one that it must agree with."""
    model = build(family, dtype, **changes)
    dense = copy.deepcopy(model)
    return quantized(model, group_size), dequantized_into(dense, model)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def typical(a: Tensor, b: Tensor) -> float:
    """The `distance` of the median token: near ties between experts may fall either way for some."""
    distances = [distance(*both) for both in zip(a.flatten(0, 1), b.flatten(0, 1))]
    return float(torch.tensor(distances).median())


def assert_stack(
    weight: object, shape: tuple[int, int, int], group_size: int, *, turned: bool
) -> Int4OpaqueTensor:
    """The guard: a stack of matrices ``[N, K]`` in 4 bits, or the transposed view of one."""
    assert isinstance(weight, Int4TransposedTensor if turned else Int4OpaqueTensor)
    e, n, k = shape
    assert tuple(weight.shape) == ((e, k, n) if turned else shape)
    stack = weight.untransposed() if isinstance(weight, Int4TransposedTensor) else weight
    assert stack.block_size == [1, 1, group_size]
    one = [assert_int4(stack[i], (n, k), group_size) for i in range(e)]
    assert stack.qdata.nbytes == e * one[0].qdata.nbytes
    assert stack.scale_and_zero.nbytes == e * one[0].scale_and_zero.nbytes
    return stack


# --- what quantize_ makes of them ----------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_becomes_of_the_experts(family: str) -> None:
    """Types, bytes and codes: those of each expert alone, in groups along what a product sums over."""
    model = build(family)
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized(model)
        quantized(model)  # again: nothing to do
    found = stacks(model)
    assert set(found) == {
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    }
    turned = family == "gpt_oss"
    for name, weight in found.items():
        original = dense.get_parameter(name).mT if turned else dense.get_parameter(name)
        e, n, k = original.shape
        stack = assert_stack(weight, (e, n, k), 32, turned=turned)
        assert isinstance(weight, nn.Parameter)
        assert not weight.requires_grad
        value = stack.to_groupwise()
        for i in range(e):
            alone = choose_qparams(original[i], 32)
            assert torch.equal(value.codes[i], alone.codes)
            assert torch.equal(value.scale[i], alone.scale.bfloat16())
            assert torch.equal(value.zero[i], alone.zero.bfloat16())
    for name, parameter in model.named_parameters():
        if name not in found:
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, dense.get_parameter(name))
    kind = "Int4TransposedTensor" if turned else "Int4OpaqueTensor"
    assert str(model).count(f"down_proj={kind}(shape=") == 1  # of two layers alike


def test_a_pattern_that_finds_the_biases_too_leaves_them() -> None:
    """They are ``[E, N]`` and would pass for a weight; a product would fail, or worse."""
    model = build("gpt_oss")
    everything = FqnToConfig({r"re:.*\.experts\..*": Int4WeightOnlyConfig(32)})
    with pytest.warns(UserWarning, match=r"experts\.down_proj_bias is left as it was: it is a bias"):
        quantize_(model, everything, filter_fn=None)
    assert len(stacks(model)) == 4
    assert logits(model).isfinite().all()


# --- one block of experts, against a derived bound ------------------------------------------------

#: Largest slope of z·sigmoid(z), and so of z·sigmoid(az) for any a.
SLOPE = 1.1


class Exact:
    """What a block of experts computes, in float64, and how far a product of ours may be from it.

    The bounds are those of `numerics.product_bound`, on the numbers of a `GroupwiseInt4`.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        values = [weight.to_groupwise() for weight in map(_opaque, self._weights())]
        self.matrices = [value.dequantize(torch.float64) for value in values]
        units = [_with_largest(value) for value in values]
        self.largest = [unit.dequantize(torch.float64) for unit in units]

    def _weights(self) -> Iterator[Stack]:
        yield self.module.gate_up_proj
        yield self.module.down_proj

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The output ``[T, H]`` of ``x`` by the experts ``index`` ``[T, top_k]``, and its bound."""
        u = UNIT[self.dtype]
        total, error = torch.zeros(x.shape).double(), torch.zeros(x.shape).double()
        size = torch.zeros(x.shape).double()
        for token, (experts, shares) in enumerate(zip(index.tolist(), weights.double().tolist())):
            for expert, share in zip(experts, shares):
                h, off = self._product(0, expert, x[token].double(), torch.zeros(x.shape[1]).double())
                h, off = self._gate(h, off)
                y, off = self._product(1, expert, h, off)
                total[token] += share * y
                error[token] += abs(share) * (off + 2 * u * (y.abs() + off))
                size[token] += abs(share) * (y.abs() + off)
        return total, error + (index.shape[1] + 1) * u * size

    def _product(self, which: int, expert: int, x: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        """``x · Wᵀ + bias`` where x is known up to ``off``."""
        w, largest = self.matrices[which][expert].abs(), self.largest[which][expert]
        y = self.matrices[which][expert] @ x
        u, e, k = UNIT[torch.bfloat16], UNIT[torch.float32], w.shape[1]
        terms, flat = w @ (x.abs() + off), largest @ (x.abs() + off)
        error = (2 * u + u * u) * terms + (k + 4) * e * flat
        error = error + (u + UNIT[self.dtype]) * (terms + error) + w @ off
        error = error + k * (UNDERFLOW[torch.bfloat16] + UNDERFLOW[self.dtype]) * (1 + flat)
        bias = getattr(self.module, ("gate_up_proj_bias", "down_proj_bias")[which], None)
        if bias is not None:
            y = y + bias[expert].double()
            error = error + UNIT[self.dtype] * (y.abs() + error)
        return y, error

    def _gate(self, h: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        """The product of the two halves, one through an activation; six operations round."""
        interleaved = hasattr(self.module, "limit")  # gpt-oss
        half = h.shape[0] // 2
        halves = (slice(half), slice(half, None))
        if interleaved:
            halves = (slice(0, None, 2), slice(1, None, 2))
        (gate, up), (gate_off, up_off) = (h[s] for s in halves), (off[s] for s in halves)
        if interleaved:
            gate = gate.clamp(max=self.module.limit)
            up = up.clamp(-self.module.limit, self.module.limit) + 1
            active = gate * torch.sigmoid(gate * self.module.alpha)
        else:
            active = F.silu(gate)
        active_off = SLOPE * gate_off
        error = active_off * up.abs() + active.abs() * up_off + active_off * up_off
        rounded = (active.abs() + active_off + gate.abs() * UNIT[self.dtype]) * (1 + up.abs() + up_off)
        return active * up, error + 6 * UNIT[self.dtype] * rounded


def _opaque(weight: Stack) -> Int4OpaqueTensor:
    return weight.untransposed() if isinstance(weight, Int4TransposedTensor) else weight


def _with_largest(value: GroupwiseInt4) -> GroupwiseInt4:
    """Every number as large as what is added up to make one: 16 |scale| + |zero|."""
    zero = 16 * value.scale.double().abs() + value.zero.double().abs()
    codes = torch.full_like(value.codes, 8)
    return GroupwiseInt4(codes, value.scale.float(), zero.float() * (1 + 2**-20), value.group_size)


def routed(tokens: int, experts: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random activations, and two experts for each, never the last: it has no rows."""
    index = torch.stack([torch.randperm(experts - 1)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2) + 0.2
    return torch.randn(tokens, hidden).to(dtype), index, weights.to(dtype)


def check_block(model: Any, dtype: torch.dtype, tokens: int) -> None:
    module = model.model.layers[0].mlp.experts
    arguments = routed(tokens, module.num_experts, model.config.hidden_size, dtype)
    expected, bound = Exact(module, dtype)(*arguments)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            y = module(*arguments)
        assert y.dtype == dtype
        error = (y.double() - expected).abs()
        assert bool((error <= bound).all()), (implementation, float((error / bound).max()))
        # The bound is that of the worst case. At the root mean square each of four roundings to
        # bfloat16 is 2^-9, and all others are less; without any it would be no product of ours.
        assert 2.0**-14 < distance(y, expected) < 4 * 2.0**-9
    x, index, weights = arguments
    with torch.no_grad():
        other = module(x, (index + 1) % module.num_experts, weights)
    assert distance(other, expected) > 0.5, "the experts are too much alike for this test"


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 11])
def test_a_block_of_experts_is_within_the_derived_bound(
    family: str, dtype: torch.dtype, tokens: int, kernel: str
) -> None:
    check_block(quantized(build(family, dtype, num_hidden_layers=1)), dtype, tokens)


# --- the whole model ------------------------------------------------------------------------------

#: What transformers calls on the 4-bit weights of two layers, by implementation; ``eager`` calls them
#: for each expert that is hit.
CALLS: dict[str, Callable[[str], Counter[str]]] = {
    "batched_mm": lambda family: Counter({"__getitem__": 4, "bmm": 4}),
    "grouped_mm": lambda family: Counter(
        {"_grouped_mm": 4} | ({} if family == "gpt_oss" else {"transpose": 4})
    ),
}


class Calls(TorchFunctionMode):
    """Counts the torch functions that get a 4-bit weight, but for attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(cls, Stack) for cls in types) and func.__name__ != "__get__":
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def check_calls(found: Counter[str], family: str, implementation: str) -> None:
    if implementation != "eager":
        assert found == CALLS[implementation](family)
        return
    product = "matmul" if family == "gpt_oss" else "linear"
    assert set(found) == {"__getitem__", product}
    assert found["__getitem__"] == found[product] >= 8  # two experts a layer at least


#: Products that follow each other in a model of two layers: q or v, o, router, gate_up and down in
#: each, and the head.
PRODUCTS = 11

#: How far two such models may be apart, by dtype: in bfloat16 each product rounds, on either side, by
#: 2^-9 at the root mean square; in float32 only our four round, what they get and what they give.
ROUNDING = {torch.bfloat16: 2 * PRODUCTS * 2.0**-9, torch.float32: 8 * 2.0**-9}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_every_implementation_agrees_with_the_dense_model(family: str, dtype: torch.dtype) -> None:
    model, dense = pair(family, dtype)
    for implementation in IMPLEMENTATIONS:
        for either in (model, dense):
            either.set_experts_implementation(implementation)
        with Calls() as calls:
            y = logits(model)
        check_calls(calls.found, family, implementation)
        assert 2.0**-14 < typical(y, logits(dense)) < ROUNDING[dtype]


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_hidden_size_of_gpt_oss(group_size: int) -> None:
    """2880 = 22 · 128 + 64: the last group is short."""
    sizes: dict[str, Any] = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 3}
    model = build("gpt_oss", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **sizes)
    quantized(model, group_size)
    experts = model.model.layers[0].mlp.experts
    assert_stack(experts.gate_up_proj, (3, 5760, 2880), group_size, turned=True)
    stack = assert_stack(experts.down_proj, (3, 2880, 2880), group_size, turned=True)
    assert stack.scale_and_zero.shape == (3, -(-2880 // group_size), 2880, 2)
    check_block(model, torch.bfloat16, 3)
    assert logits(model, IDS[:, :2]).isfinite().all()


def test_generate() -> None:
    """Token by token with a cache, as without one; and every implementation writes the same."""
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for family in ("qwen3_moe", "gpt_oss"):
        model = quantized(build(family, torch.float32, num_hidden_layers=1))
        written = [model.generate(IDS[:1], use_cache=False, **options)]
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            written.append(model.generate(IDS[:1], **options))
        assert written[0].shape == (1, 18)
        assert all(torch.equal(text, written[0]) for text in written)


# --- compiled -------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    ("qwen3_moe", "grouped_mm", torch.bfloat16),
    ("qwen3_moe", "batched_mm", torch.float32),
    ("gpt_oss", "grouped_mm", torch.float32),
    ("gpt_oss", "batched_mm", torch.bfloat16),
    ("mixtral", "grouped_mm", torch.bfloat16),
]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("family", "implementation", "dtype"), COMPILED)
def test_compiled_in_one_graph(
    family: str, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph; in float32 transformers calls an op of its own for what torch cannot compile."""
    fallback = Counter[str]()
    name = "transformers::grouped_mm_fallback"
    named = NAMED[Int4TransposedTensor]
    handler = named[name]

    def counting(*args: Any) -> Any:
        fallback[name] += 1
        return handler(*args)

    monkeypatch.setitem(named, name, counting)
    model, dense = pair(family, dtype, num_hidden_layers=1)
    for either in (model, dense):
        either.set_experts_implementation(implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's, of a cache in transformers
        y = logits(torch.compile(model, fullgraph=True))
    expected = logits(dense)
    assert 2.0**-14 < typical(y, expected) < ROUNDING[dtype]
    assert (fallback[name] > 0) == (implementation == "grouped_mm" and dtype == torch.float32)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_graph_calls_what_the_implementation_says() -> None:
    """One that inductor has not seen yet; for any number of tokens."""
    seen: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append({getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes})
        return graph

    for implementation, product in (("grouped_mm", "_grouped_mm"), ("batched_mm", "bmm")):
        model, dense = pair("gpt_oss", torch.bfloat16, num_hidden_layers=1)
        for either in (model, dense):
            either.set_experts_implementation(implementation)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for ids in (IDS, IDS[:, :5]):
                assert 2.0**-14 < typical(logits(compiled, ids), logits(dense, ids)) < 0.05
        assert any(product in name for name in seen[-1])


@pytest.mark.usefixtures("_fresh_dynamo")
def test_the_eager_implementation_compiles_around_its_loop() -> None:
    """Its loop over the experts that are hit is no graph, with dense experts neither."""
    model, dense = pair("qwen3_moe", torch.float32, num_hidden_layers=1)
    for either in (model, dense):
        either.set_experts_implementation("eager")
    y = logits(torch.compile(model, backend="aot_eager"))
    assert 2.0**-14 < typical(y, logits(dense)) < ROUNDING[torch.float32]
    for either in (model, dense):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
            logits(torch.compile(either, fullgraph=True, backend="eager"))


# --- training beside them -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_gradients_flow_through_to_the_hidden_states(
    family: str, implementation: str, dtype: torch.dtype
) -> None:
    model, dense = pair(family, dtype, num_hidden_layers=1)
    module, twin = (either.model.layers[0].mlp.experts for either in (model, dense))
    x, index, weights = routed(11, module.num_experts, model.config.hidden_size, dtype)
    direction = torch.randn(x.shape).to(dtype)
    gradients = []
    for either, experts in ((model, module), (dense, twin)):
        either.set_experts_implementation(implementation)
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        experts(inputs[0], index, inputs[1]).backward(direction)
        gradients.append([part.grad for part in inputs])
    for mine, other in zip(*gradients):
        # four products and the activation on the way there and back, on either side in bfloat16
        assert 2.0**-14 < distance(mine, other) < 10 * 2.0**-9 * (1 + (dtype == torch.bfloat16))
    assert all(weight.grad is None for weight in stacks(model).values())


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_gradients_of_a_compiled_block(dtype: torch.dtype) -> None:
    """The grouped product and its backward in one graph each, also those of transformers' own op."""
    model = quantized(build("qwen3_moe", dtype, num_hidden_layers=1))
    model.set_experts_implementation("grouped_mm")
    module = model.model.layers[0].mlp.experts
    x, index, weights = routed(11, module.num_experts, model.config.hidden_size, dtype)
    gradients = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        inputs = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(inputs, index, weights).float().square().sum().backward()
        gradients.append(inputs.grad)
    assert distance(gradients[1], gradients[0]) < 2.0**-7  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_lora_beside_frozen_experts_trains(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = quantized(build(family, torch.float32, num_hidden_layers=1))
    base.set_experts_implementation("grouped_mm")
    before = {name: weight.qdata.clone() for name, weight in stacks(base).items()}
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3  # A and B of three projections
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(weight.qdata, before[name]) for name, weight in stacks(base).items())
    model.save_pretrained(str(tmp_path))
    back = PeftModel.from_pretrained(fresh, str(tmp_path))
    assert torch.equal(logits(back.eval()), logits(model.eval()))


def test_peft_cannot_adapt_the_experts_themselves() -> None:
    """``target_parameters`` adds to the dense weight, which there is none of: refused, not ignored."""
    from peft import LoraConfig, get_peft_model

    base = quantized(build("qwen3_moe", torch.float32, num_hidden_layers=1))
    adapters = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, adapters)
    with pytest.raises(TypeError, match=r"got a 4-bit tensor .* call \.dequantize\(\)"):
        model(input_ids=IDS, labels=IDS)


# --- Hugging Face files ---------------------------------------------------------------------------


def written(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    build(family, dtype, **changes).save_pretrained(folder)
    return folder


def from_file(folder: Path, group_size: int = 32) -> Any:
    quantization = TorchAoConfig(config_for_experts(group_size))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_loading_quantizes_the_merged_stack_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has each expert alone, transformers merges them; no dense stack outlives it."""
    source = written(family, tmp_path)
    with safe_open(source / "model.safetensors", "pt") as file:
        alone = [key for key in file.keys() if ".experts.0." in key]  # noqa: SIM118
    assert (alone == []) == (family == "gpt_oss")
    calls: list[str] = []
    dense: list[weakref.ref[Tensor]] = []

    def watching(module: nn.Module, parameter_name: str, *options: Any) -> bool:
        assert not any(weight() is not None for weight in dense), "a dense stack is alive still"
        dense.append(weakref.ref(getattr(module, parameter_name)))
        calls.append(parameter_name)
        return quantize_parameter(module, parameter_name, *options)

    monkeypatch.setattr(torchao_int4cpu.quantize.config, "quantize_parameter", watching)
    model = from_file(source)
    assert sorted(calls) == ["down_proj"] * 2 + ["gate_up_proj"] * 2
    assert not any(weight() is not None for weight in dense)
    monkeypatch.undo()
    expected = stacks(quantized(AutoModelForCausalLM.from_pretrained(source)))
    assert expected.keys() == stacks(model).keys()
    for name, weight in stacks(model).items():
        assert torch.equal(weight.qdata, expected[name].qdata)
        assert torch.equal(weight.scale_and_zero, expected[name].scale_and_zero)


FRESH = """
import sys, torch
import torchao_int4cpu
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor
from transformers import AutoModelForCausalLM

stacks = (torchao_int4cpu.Int4OpaqueTensor, Int4TransposedTensor)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = [p for p in model.parameters() if isinstance(p, stacks)]
    opaque = [p.untransposed() if isinstance(p, Int4TransposedTensor) else p for p in found]
    assert {p.qdata_layout for p in opaque} == {torchao_int4cpu.native_layout().name}
    results = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            results[implementation] = model(torch.arange(24).view(2, 12)).logits
    torch.save((results, len(found)), folder + ".logits.pt")
"""


def test_quantize_save_and_load_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for family in FAMILIES:
        for dtype in ROUNDING:
            model = from_file(written(family, tmp_path / f"{family}-{dtype}", dtype))
            out = tmp_path / f"out-{family}-{dtype}"
            model.save_pretrained(out)
            results = {}
            for implementation in IMPLEMENTATIONS:
                model.set_experts_implementation(implementation)
                results[implementation] = logits(model)
            expected[str(out)] = results
    done = subprocess.run([sys.executable, "-c", FRESH, *expected], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, results in expected.items():
        found, count = torch.load(f"{folder}.logits.pt")
        assert count == 4
        for implementation, y in results.items():
            assert torch.equal(found[implementation], y), (folder, implementation)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_bytes_on_disk(family: str, tmp_path: Path) -> None:
    """Experts take 4 bits and, in groups of 128, a quarter of a bit for scale and zero."""
    width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    sizes: dict[str, Any] = {"hidden_size": 256, width: 384, "num_hidden_layers": 1, "vocab_size": 32}
    source = written(family, tmp_path / "source", **sizes)
    model = from_file(source, 128)
    model.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["model.layers.0.mlp.experts.down_proj"])["_data"]
    assert (said["format_version"], said.get("transposed", False)) == (2, family == "gpt_oss")
    elements = sum(weight.numel() for weight in stacks(model).values())
    packed = [part for key, part in stored.items() if "_proj_qdata" in key or "_scale_and_zero" in key]
    assert len(packed) == 4
    assert sum(part.nbytes for part in packed) * 8 == elements * (4 + 0.25)
    files = [tmp_path / name / "model.safetensors" for name in ("out", "source")]
    others = sum(p.nbytes for p in model.parameters() if not isinstance(p, Stack))
    quantized_size, dense_size = (file.stat().st_size - others for file in files)
    assert quantized_size < 0.27 * dense_size


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_sharded(family: str, tmp_path: Path) -> None:
    model = from_file(written(family, tmp_path / "source"))
    model.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stacks(back).keys() == stacks(model).keys()
    assert torch.equal(logits(back), logits(model))
    back.save_pretrained(tmp_path / "again", save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


WRITE = """
import sys
import torchao_int4cpu
from tests.test_experts import from_file

for source in sys.argv[2:]:
    from_file(source).save_pretrained(f"{sys.argv[1]}/{source.rpartition('/')[2]}")
"""


@pytest.fixture(scope="module")
def by_capability(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    sources = [str(written(family, folder / family)) for family in ("qwen3_moe", "gpt_oss")]
    for writer in [name for name in CAPABILITIES if SUPPORTED[name]]:
        run(writer, "-c", WRITE, str(folder / writer), *sources, PYTHONPATH=os.getcwd())
    return folder


@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_saved_under_one_instruction_set_loaded_under_another(reader: str, by_capability: Path) -> None:
    """The same codes and scales whoever wrote them, so the reader's logits agree bit for bit."""
    writers = [name for name in CAPABILITIES if SUPPORTED[name]]
    for family in ("qwen3_moe", "gpt_oss"):
        folders = [str(by_capability / writer / family) for writer in writers]
        run(reader, "-c", FRESH, *folders)
        results = [torch.load(f"{folder}.logits.pt")[0] for folder in folders]
        model = AutoModelForCausalLM.from_pretrained(folders[0])
        dense = dequantized_into(AutoModelForCausalLM.from_pretrained(by_capability / family), model)
        for implementation, y in results[0].items():
            assert all(torch.equal(result[implementation], y) for result in results)
            dense.set_experts_implementation(implementation)
            assert 2.0**-14 < typical(y, logits(dense)) < ROUNDING[torch.bfloat16]
