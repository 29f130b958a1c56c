"""`calibrate` on models of transformers and torch: every weight is reached, outputs are nearer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.hugging_face_models import llama
from tests.test_calibrate import CONFIG, assert_same, batches
from torchao_int4cpu import (
    GPTQConfig,
    Int4OpaqueTensor,
    Int4TransposedTensor,
    Int4WeightOnlyConfig,
    calibrate,
    filter_fn,
)


def loss(model: nn.Module, reference: nn.Module, x: Any) -> float:
    """Relative error of what a model returns."""

    def output(of: Any) -> Tensor:
        with torch.no_grad():
            result = of(**x) if isinstance(x, dict) else of(x)
        found = result if isinstance(result, Tensor) else result[0]
        return found.double()

    return float((output(model) - output(reference)).norm() / output(reference).norm())


def tokens(count: int, length: int = 40, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (2, length), generator=generator)} for _ in range(count)]


def bert() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 64}
    return BertModel(BertConfig(**sizes, num_attention_heads=4)).eval()


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=64)).eval()


def t5() -> Any:
    sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


@pytest.mark.parametrize("make", [lambda: llama(num_hidden_layers=3), bert, gpt2, t5])
def test_models_of_transformers(make: Callable[[], Any]) -> None:
    """All weights are reached, and outputs are nearer than rounding has them; also unseen ones."""
    torch.manual_seed(0)
    model = make()
    rounded, reference = copy.deepcopy(model), copy.deepcopy(model)
    config = model.config
    seen, unseen = tokens(24), tokens(1, seed=9)[0]
    if config.is_encoder_decoder:
        for batch in (*seen, unseen):
            batch["decoder_input_ids"] = batch["input_ids"][:, :20]
    config.use_cache = cached = True

    def chosen(module: nn.Module, name: str) -> bool:  # a head is tied to an embedding
        return filter_fn(module, name) and name != "lm_head"

    told = calibrate(model, seen, CONFIG, filter_fn=chosen, progress=False)
    quantize_(rounded, Int4WeightOnlyConfig(32, int4_choose_qparams_algorithm="mse"), chosen)
    assert config.use_cache is cached
    left = [weight for weight in told.rounded if "pooler" not in weight.name]
    assert left == []
    kinds = (Int4OpaqueTensor, Int4TransposedTensor)
    count = sum(isinstance(p, kinds) for p in rounded.parameters())
    assert count == sum(isinstance(p, kinds) for p in model.parameters()) >= 12
    assert loss(model, reference, unseen) < 0.95 * loss(rounded, reference, unseen)


def moe() -> Any:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_have_inputs_of_their_own(implementation: str) -> None:
    """The rows of the tokens that are routed to them; with too few they are rounded, and named."""
    model = moe()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = -100.0 * model.model.layers[0].mlp.gate.weight[4]
    reference, nearest = copy.deepcopy(model), copy.deepcopy(model)
    config = FqnToConfig({r"re:.*experts\.(gate_up|down)_proj": CONFIG, r"re:.*proj\.weight": CONFIG})
    told = calibrate(model, tokens(24), config, enough_rows=200, progress=False)
    experts = [weight for weight in told.weights if "experts" in weight.name]
    assert len(experts) == 2 * 2 * 8
    for layer in range(2):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            assert isinstance(model.get_parameter(name), Int4OpaqueTensor)
            rows = [weight.rows for weight in experts if weight.name.startswith(f"{name}[")]
            assert sum(rows) == 24 * 2 * 40 * 2  # two experts a token
            assert max(rows) > 200
    few = [weight for weight in experts if weight.rows < 200]
    assert few == [weight for weight in experts if weight.rounded]
    for weight in few:
        assert weight.name in str(told)
    quantize_(nearest, config, filter_fn=None)
    unseen = tokens(1, seed=9)[0]
    assert loss(model, reference, unseen) < 0.95 * loss(nearest, reference, unseen)
    assert model.config._experts_implementation == implementation


def test_attention_of_torch() -> None:
    """Its projections are parameters of its own, and it has a fast path in one op."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    told = calibrate(model, batches(width=64), CONFIG, filter_fn=filter_fn, progress=False)
    assert len(told.calibrated) == 8
    assert isinstance(model.layers[1].self_attn.in_proj_weight, Int4OpaqueTensor)


def test_a_model_without_blocks_and_an_embedding() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look_up, self.out = nn.Embedding(64, 64), nn.Linear(64, 32)
            self.unused = nn.Linear(64, 32)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.out(self.look_up(ids))
            return found

    model = Model()
    kinds = (nn.Linear, nn.Embedding)
    told = calibrate(
        model,
        [torch.arange(64).repeat(4)],
        CONFIG,
        filter_fn=lambda module, name: isinstance(module, kinds),
        progress=False,
    )
    assert {weight.name: weight.rounded for weight in told.weights} == {
        "out.weight": "",
        "look_up.weight": "no product with it was seen",
        "unused.weight": "no product with it was seen",
    }
    assert all(isinstance(p, Int4OpaqueTensor) for p in model.parameters() if p.ndim == 2)


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model = llama(num_hidden_layers=2, tie_word_embeddings=True)
    kinds = (nn.Linear, nn.Embedding)
    told = calibrate(
        model,
        tokens(4),
        CONFIG,
        filter_fn=lambda module, name: isinstance(module, kinds),
        progress=False,
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, Int4OpaqueTensor)
    assert told.rounded == []  # it is multiplied with as the head


def test_tied_weights_in_two_steps() -> None:
    """One 4-bit weight, for what reaches it as the head."""
    torch.manual_seed(0)
    model, expected = (llama(num_hidden_layers=1, tie_word_embeddings=True).eval() for _ in range(2))
    expected.load_state_dict(model.state_dict())
    kinds = (nn.Linear, nn.Embedding)

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, kinds)

    quantize_(model, GPTQConfig("observe", CONFIG), filter_fn=chosen)
    with torch.no_grad():
        for batch in tokens(4):
            model(**batch)
    quantize_(model, GPTQConfig("convert", CONFIG), filter_fn=chosen)
    calibrate(expected, tokens(4), CONFIG, filter_fn=chosen, sequential=False, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, expected)


@pytest.mark.parametrize("in_two_steps", [True, False])
def test_a_tied_weight_that_is_half_chosen_is_told(in_two_steps: bool) -> None:
    model = llama(num_hidden_layers=1, tie_word_embeddings=True).eval()
    message = r"lm_head\.weight and model\.embed_tokens\.weight were one"
    if in_two_steps:
        quantize_(model, GPTQConfig("observe", CONFIG))
        with torch.no_grad():
            model(**tokens(4)[0])
            model(**tokens(4)[1])
        with pytest.warns(UserWarning, match=message):
            quantize_(model, GPTQConfig("convert", CONFIG))
    else:
        with pytest.warns(UserWarning, match=message):
            calibrate(model, tokens(4), CONFIG, progress=False)
    assert isinstance(model.lm_head.weight, Int4OpaqueTensor)
    assert type(model.model.embed_tokens.weight) is nn.Parameter
