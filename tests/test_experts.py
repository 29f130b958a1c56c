"""Mixture of experts: transformers 5 with stacks of 4-bit experts, in each of its implementations."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchao.quantization import FqnToConfig, quantize_

from tests.moe_models import (
    FAMILIES,
    IDS,
    IMPLEMENTATIONS,
    ROUNDING,
    Stack,
    assert_stack,
    build,
    distance,
    logits,
    pair,
    quantized,
    stacks,
    typical,
)
from tests.numerics import UNDERFLOW, UNIT
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.algorithms.choose_qparams import choose_qparams
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

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
    with pytest.warns(
        UserWarning,
        match=r"experts\.gate_up_proj_bias is left as it was: it is a bias.*3 more: .*down_proj_bias",
    ):
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
        assert 2.0**-20 < distance(y, expected) < 4 * 2.0**-9
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
        assert 2.0**-20 < typical(y, logits(dense)) < ROUNDING[dtype]


@pytest.mark.parametrize("group_size", [pytest.param(32, marks=pytest.mark.slow), 128])
@pytest.mark.slow
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
        assert 2.0**-20 < distance(mine, other) < 10 * 2.0**-9 * (1 + (dtype == torch.bfloat16))
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
