"""`torchao_int4cpu.filter_fn`: attention of torch and layers of GPT-2, against their dense twins."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.quantization import FqnToConfig, quantize_

from tests.module_twins import assert_like_the_twin, dense_twin, int4_names
from torchao_int4cpu import Int4OpaqueTensor, Int4TransposedTensor, Int4WeightOnlyConfig, filter_fn
from torchao_int4cpu.integrations import transformers_conv1d
from torchao_int4cpu.quantize.filters import is_input_first

E, HEADS = 96, 4
CONFIG = Int4WeightOnlyConfig(group_size=32)

#: The last two tokens of the second sequence are padding.
PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
CAUSAL = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)


def quantized(module: nn.Module, choose: Any = filter_fn, config: Any = CONFIG) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(module, config, filter_fn=choose)
    return module


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, E, generator=torch.Generator().manual_seed(1))


def test_what_is_chosen() -> None:
    attention = nn.MultiheadAttention(E, HEADS)
    chosen: list[nn.Module] = [nn.Linear(E, E), attention]
    left = [attention.out_proj, nn.Embedding(9, E), nn.Conv1d(E, E, 1), nn.LSTM(E, E), nn.Sequential()]
    assert all(filter_fn(module, "a name") and filter_fn(module) for module in chosen)
    assert not any(filter_fn(module, "a name") for module in left)


# --- torch.nn.MultiheadAttention ------------------------------------------------------------------

#: Arguments of the module, and how it is called with x.
ATTENTIONS: dict[str, tuple[dict[str, Any], Callable[[Any, Tensor], Any]]] = {
    "self": ({}, lambda m, x: m(x, x, x)),
    "padding": ({}, lambda m, x: m(x, x, x, key_padding_mask=PADDING)),
    "causal": ({}, lambda m, x: m(x, x, x, attn_mask=CAUSAL, need_weights=False)),
    "memory": ({}, lambda m, x: m(x, x[:, :3] + 1, x[:, :3] + 1)),
    "three": ({}, lambda m, x: m(x, x + 1, x - 1, average_attn_weights=False)),
    "sequence first": ({"batch_first": False}, lambda m, x: m(x, x, x)),
    "one sequence": ({}, lambda m, x: m(x[0], x[0], x[0])),
    "no bias": ({"bias": False}, lambda m, x: m(x, x, x)),
    "more keys": ({"add_bias_kv": True, "add_zero_attn": True}, lambda m, x: m(x, x, x)),
    "other sizes": ({"kdim": 64, "vdim": 64}, lambda m, x: m(x, x[..., :64], x[..., 32:])),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", list(ATTENTIONS))
def test_attention(kind: str, grad: bool, mode: str) -> None:
    """In eval and without grad torch would hand plain weights to an op of its own."""
    options, call = ATTENTIONS[kind]
    attention = quantized(nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **options}))
    attention.train(mode == "train")
    own = (
        ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if "kdim" in options else ["in_proj_weight"]
    )
    assert int4_names(attention) == {*own, "out_proj.weight"}
    assert all(f"{name}=Int4OpaqueTensor" in str(attention) for name in own)
    for which in range(1 if kind == "causal" else 2):  # the result, and the attention's weights

        def compute(module: Any, dtype: torch.dtype, which: int = which) -> Tensor:
            with torch.set_grad_enabled(grad):
                result: Tensor = call(module, batch(2, 7).to(dtype))[which]
            return result.detach()

        assert_like_the_twin(attention, compute)


def test_gradients_reach_the_activation_and_the_biases() -> None:
    attention = quantized(nn.MultiheadAttention(E, HEADS, batch_first=True))

    def gradients(module: Any, dtype: torch.dtype) -> Tensor:
        module.zero_grad()
        x = batch(2, 7).to(dtype).requires_grad_()
        module(x, x, x)[0].square().sum().backward()
        biases = module.in_proj_bias.grad, module.out_proj.bias.grad
        assert x.grad is not None
        return torch.cat([x.grad.flatten(), *biases])

    assert_like_the_twin(attention, gradients)


def test_attention_by_name() -> None:
    """A parameter, the module, or a submodule with a config of its own."""

    def net() -> Any:
        return nn.ModuleDict({"attn": nn.MultiheadAttention(E, HEADS), "mlp": nn.Linear(E, E)})

    def by_name(names: dict[str, Any]) -> Any:
        return quantized(net(), None, FqnToConfig(names))

    assert int4_names(by_name({"attn.in_proj_weight": CONFIG})) == {"attn.in_proj_weight"}
    both = {"attn.in_proj_weight", "attn.out_proj.weight"}
    assert int4_names(by_name({"attn": CONFIG})) == both
    assert int4_names(by_name({"re:attn.*weight": CONFIG})) == both
    assert int4_names(by_name({"attn": CONFIG, "attn.out_proj": None})) == {"attn.in_proj_weight"}
    other = Int4WeightOnlyConfig(64)
    model = by_name({"attn": CONFIG, "attn.out_proj.weight": other})
    sizes = model["attn"].in_proj_weight.group_size, model["attn"].out_proj.weight.group_size
    assert sizes == (32, 64)


def test_a_projection_that_two_attentions_share_is_one_still() -> None:
    model: Any = nn.ModuleList([nn.MultiheadAttention(E, HEADS) for _ in range(2)])
    model[1].out_proj.weight = model[0].out_proj.weight
    model[1].in_proj_weight = model[0].in_proj_weight
    quantized(model)
    assert model[1].out_proj.weight is model[0].out_proj.weight
    assert model[1].in_proj_weight is model[0].in_proj_weight
    assert len(int4_names(model)) == 4


def test_a_nan_in_a_projection_is_named() -> None:
    model: Any = nn.Sequential(nn.MultiheadAttention(E, HEADS))
    with torch.no_grad():
        model[0].out_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^0\.out_proj\.weight: .*4-bit already: 0\.in_proj_weight"):
        quantize_(model, CONFIG, filter_fn=filter_fn)


# --- modules of torch around it -------------------------------------------------------------------


def encoder(**options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(E, HEADS, 2 * E, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, **options)


def encode(model: Any, dtype: torch.dtype) -> Tensor:
    """Without the padding: torch's own op writes zeros there, and other numbers are as good."""
    y: Tensor = model(batch(2, 7).to(dtype), src_key_padding_mask=PADDING)
    return y.detach()[~PADDING]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("first_is_dense", [False, True])
def test_an_encoder(first_is_dense: bool, grad: bool, mode: str) -> None:
    """An encoder looks at its first layer alone to see whether layers take nested tensors."""
    choose = lambda m, n: filter_fn(m, n) and not (first_is_dense and "layers.0." in n)  # noqa: E731
    model = quantized(encoder(), choose).train(mode == "train")
    assert len(int4_names(model)) == 4 * (2 if first_is_dense else 3)
    with torch.set_grad_enabled(grad):
        assert_like_the_twin(model, encode)


def test_an_encoder_layer_alone_and_with_nested_tensors_turned_off() -> None:
    layer = quantized(nn.TransformerEncoderLayer(E, HEADS, 2 * E, batch_first=True)).eval()
    with torch.no_grad():
        assert_like_the_twin(layer, encode)
        assert_like_the_twin(quantized(encoder(enable_nested_tensor=False)).eval(), encode)


def test_an_encoder_without_4_bit_weights_keeps_its_nested_tensors() -> None:
    model: Any = nn.ModuleDict({"dense": encoder(), "head": nn.Linear(E, E)})
    with pytest.warns(UserWarning, match="1 of 13 matrices is 4-bit"):
        quantize_(model, CONFIG, filter_fn=lambda module, name: name == "head")
    assert model["dense"].use_nested_tensor is True


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_whole_transformer(mode: str) -> None:
    model = nn.Transformer(E, HEADS, 1, 2, 2 * E, dropout=0.0, batch_first=True)
    quantized(model).train(mode == "train")
    # an encoder layer has 4 weights, a decoder layer a second attention more
    assert len(int4_names(model)) == 4 + 2 * 6

    def compute(module: Any, dtype: torch.dtype) -> Tensor:
        masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
        y: Tensor = module(batch(2, 7).to(dtype), batch(2, 5).to(dtype), **masks)
        return y.detach()

    with torch.no_grad():
        assert_like_the_twin(model, compute)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_attention(grad: bool) -> None:
    attention = quantized(nn.MultiheadAttention(E, HEADS, batch_first=True)).eval()
    compiled: Any = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = batch(2, 7)
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(x, x, x)[0], attention(x, x, x)[0])
        assert torch.equal(compiled(x, x + 1, x)[0], attention(x, x + 1, x)[0])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("choose", [None, filter_fn])
def test_a_compiled_encoder(choose: Any) -> None:
    """torch.compile finds no tensor subclasses in the arguments, and would take torch's own op."""
    model = encoder().eval()
    if choose is None:  # by default its linear layers only: half of the numbers
        quantize_(model, CONFIG)
    else:
        quantized(model, choose)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(2, 7)
    with torch.no_grad():
        # In eager mode attention that is dense takes torch's own op, which adds in another order, and
        # x is rounded to 16 bits after it.
        assert torch.allclose(compiled(x), model(x), rtol=0, atol=1e-3 if choose is None else 0)
        assert_like_the_twin(model, lambda module, dtype: module(x.to(dtype)).detach())


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", ["attention", "encoder", "gpt2"])
def test_compiled_by_inductor_and_exported(kind: str) -> None:
    x = batch(2, 7)
    builds: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...]]] = {
        "attention": (lambda: nn.MultiheadAttention(E, HEADS, batch_first=True), (x, x, x)),
        "encoder": (encoder, (x,)),
        "gpt2": (gpt2, (IDS,)),
    }
    build, inputs = builds[kind]
    model = quantized(build(), not_the_head).eval()

    def compute(module: Any) -> Tensor:
        with torch.no_grad():
            y: Any = module(*inputs)
        result: Tensor = y.logits if kind == "gpt2" else y[0] if kind == "attention" else y
        return result

    expected = compute(model)
    # Fused sums of float32 in another order: far below the roundings of the products to bfloat16.
    near = 1e-4 * float(expected.abs().max())
    assert torch.allclose(compute(torch.compile(model, fullgraph=True)), expected, rtol=0, atol=near)
    if kind != "gpt2":
        with torch.no_grad():
            program = torch.export.export(model, inputs).module()
        assert torch.allclose(compute(program), expected, rtol=0, atol=near)


# --- transformers' Conv1D -------------------------------------------------------------------------


def gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": E, "n_layer": 2, "n_head": HEADS, "vocab_size": 200, "n_positions": 32}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, **options)).eval()


IDS = torch.arange(14).view(2, 7) * 13 % 200


def logits(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(IDS).logits
    return y


def not_the_head(module: nn.Module, name: str) -> bool:
    return filter_fn(module, name) and name != "lm_head"


def test_gpt2(tmp_path: Path) -> None:
    model = gpt2()
    dense = copy.deepcopy(model)
    quantized(model, not_the_head)
    assert len(int4_names(model)) == 8
    for name in int4_names(model):
        weight = model.get_parameter(name)
        assert type(weight) is Int4TransposedTensor
        # the groups run along what is summed over
        expected = Int4OpaqueTensor.from_hp(dense.get_parameter(name).t(), [1, 32])
        assert torch.equal(weight.t(), expected)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_like_the_twin(model, logits)

    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = gpt2()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"), assign=True)
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (loaded, whole, copy.deepcopy(model)):
        assert int4_names(other) == int4_names(model)
        assert torch.equal(logits(other), logits(model))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    twin = dense_twin(model, torch.float32)
    assert (
        model.generate(IDS[:1], **options).shape == twin.generate(IDS[:1], **options).shape == (1, 12)
    )


def test_gpt2_trains_its_biases() -> None:
    model = quantized(gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), not_the_head)

    def gradients(module: Any, dtype: torch.dtype) -> Tensor:
        module.zero_grad()
        module(IDS, labels=IDS).loss.backward()
        biases = (p.grad for n, p in module.named_parameters() if n.endswith("bias"))
        return torch.cat([g for g in biases if g is not None])

    assert_like_the_twin(model, gradients)


def test_the_tied_head_of_gpt2_is_told() -> None:
    model = gpt2()
    embedding = model.transformer.wte.weight
    with pytest.warns(UserWarning, match=r"lm_head\.weight and transformer\.wte\.weight were one"):
        quantize_(model, CONFIG, filter_fn=filter_fn)
    assert model.transformer.wte.weight is embedding
    assert "lm_head.weight" in int4_names(model)
    assert_like_the_twin(model, logits)


def test_gpt2_with_everything() -> None:
    """The filter can be put together with others: the table and the head stay one weight."""
    model = quantized(gpt2(), lambda m, n: filter_fn(m, n) or isinstance(m, nn.Embedding))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {"lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"} <= int4_names(model)
    assert_like_the_twin(model, logits)


def test_layers_of_gpt2_by_name_and_through_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = gpt2()
    model.save_pretrained(tmp_path / "dense")
    config = FqnToConfig({r"re:.*\.(c_attn|c_proj|c_fc)\.weight": CONFIG})
    quantized(model, None, config)
    options = TorchAoConfig(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options)
    loaded.save_pretrained(tmp_path / "4-bit")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "4-bit")
    for other in (loaded, again):
        assert int4_names(other) == int4_names(model)
        assert len(int4_names(other)) == 8
        assert torch.equal(logits(other), logits(model))


def test_only_transformers_class_counts() -> None:
    """A class of that name of somebody else, or a layer of the same shape, is ``[N, K]``."""
    from transformers.pytorch_utils import Conv1D

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 48))

    Other.__name__ = "Conv1D"
    assert is_input_first(Conv1D(48, 64), torch.zeros(64, 48))
    assert not is_input_first(Other(), torch.zeros(64, 48))
    assert not filter_fn(Other())
    assert filter_fn(Conv1D(48, 64))
    transformers_conv1d._register(__import__("transformers").pytorch_utils)  # again: once is enough
    assert filter_fn(Conv1D(48, 64))


def test_a_product_of_conv1d_by_hand() -> None:
    """Few rows and many, one weight: ``x @ weight + bias``."""
    from transformers.pytorch_utils import Conv1D

    layer = quantized(nn.Sequential(Conv1D(160, E)))
    for rows in (1, 7, 64):

        def compute(module: Any, dtype: torch.dtype, rows: int = rows) -> Tensor:
            with torch.no_grad():
                y: Tensor = module(batch(1, rows).to(dtype))
            return y

        assert_like_the_twin(layer, compute)
        x = batch(1, rows)
        expected = F.linear(x, layer[0].weight.t(), layer[0].bias)
        assert torch.equal(compute(layer, torch.float32), expected)


def test_other_modules_with_the_class_of_the_projection() -> None:
    """torchao's default leaves it out, and so do we where no attention is around it."""
    model = nn.Sequential(nn.Linear(E, E), NonDynamicallyQuantizableLinear(E, E))
    quantized(model)
    assert int4_names(model) == {"0.weight"}
