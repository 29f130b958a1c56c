"""The language models that `torchao_int4cpu.bench.model` times: loaded or random, and their copies.

Every copy shares what it does not change with the original, so that all of them fit in memory, and
every model attends by `attend`. Needs the ``demo`` extra.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import quantize_

from torchao_int4cpu.bench.demo import Progress
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.layout import ROW_MULTIPLE, native_layout
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.quantize.report import Report
from torchao_int4cpu.quantize.run import reported_together
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: Numbers in one head of attention, and heads of queries that share keys and values: Llama 3's.
HEAD_SIZE = 128
HEADS_PER_KEY_VALUE = 4

#: transformers' name for `attend`.
ATTENTION = "torchao_int4cpu_bench"

#: Group sizes that torchao's prototype takes.
PROTOTYPE_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class LlamaShape:
    """The Llama of random weights that is timed where no model is given: a quarter of Llama 3 8B.

    Attributes:
        dim: of the hidden states, a multiple of 512: heads of 128, four of which share keys and values.
        ffn: of the hidden states inside the feed-forward layers.
        layers, vocab: how many.

    Raises:
        ValueError: a number breaks its rule.
    """

    dim: int = 4096
    ffn: int = 14336
    layers: int = 8
    vocab: int = 32000

    def __post_init__(self) -> None:
        check_counts({"dim": self.dim, "ffn": self.ffn, "layers": self.layers, "vocab": self.vocab})
        step = HEAD_SIZE * HEADS_PER_KEY_VALUE
        if self.dim % step:
            raise ValueError(
                f"dim={self.dim} is not supported; choose a multiple of {step}, because heads have "
                f"{HEAD_SIZE} numbers and keys and values are shared by {HEADS_PER_KEY_VALUE} of them"
            )


class Text(NamedTuple):
    """Tokens that every variant reads.

    Attributes:
        ids: int64 ``[batch_size, prompt_tokens + new_tokens]``, every sequence another one.
        prompt_tokens: how many of them are prefilled; each of the others is one step of decoding.
    """

    ids: Tensor
    prompt_tokens: int

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    @property
    def new_tokens(self) -> int:
        return self.ids.shape[1] - self.prompt_tokens


def load(source: str | LlamaShape, tokens: int) -> Any:
    """Return a causal language model of transformers in bfloat16, for that number of tokens.

    Random weights are the same each time.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: it cannot be loaded, is 4-bit already, or takes fewer tokens.
    """
    model = _random_llama(source, tokens) if isinstance(source, LlamaShape) else _loaded(source, tokens)
    _use_attend(model)
    return model


def _loaded(source: str, tokens: int) -> Any:
    transformers = import_extra("transformers", "demo")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    except OSError as error:
        raise ValueError(
            f"the model {source!r} cannot be loaded ({str(error).splitlines()[0]}); "
            "give a directory or the hub id of a causal language model"
        ) from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{tokens} tokens with the prompt are too many for {source!r}; it takes at most {limit}, "
            "so choose fewer"
        )
    if quantized_layers(model):
        raise ValueError(f"{source!r} is quantized already; give the model that it was made from")
    return model


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` attention, except for one token with heads that share keys and values.

    These heads become rows of one query. transformers does that too, but not in a graph: there it
    copies keys and values for each head, for longer than the 4-bit products take. 32 heads, 8 of keys,
    528 cached tokens, one thread: 0.46 ms as rows, 4.9 ms copied, 3.8 ms with ``enable_gqa``.

    Args:
        query: ``[batch, heads, tokens, size]``.
        key, value: ``[batch, heads / those that share, cached tokens, size]``.
        attention_mask: bool, True where something may be seen, ``[batch, 1, tokens, cached tokens]``.

    Returns:
        ``[batch, tokens, heads, size]``, and None for the attention's weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, tokens, size = query.shape
    same_for_all_heads = attention_mask is not None and attention_mask.shape[1] == 1
    if tokens == 1 and same_for_all_heads and options.get("position_bias") is None:
        rows = query.reshape(batch, key.shape[1], -1, size)
        y = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
        return y.reshape(batch, tokens, heads, size), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
    return result


def _use_attend(model: Any) -> None:
    """Have a model attend by `attend`, if it would by ``sdpa``."""
    transformers = import_extra("transformers", "demo")
    if model.config._attn_implementation != "sdpa":
        return
    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.AttentionMaskInterface.register(ATTENTION, transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def _random_llama(shape: LlamaShape, tokens: int) -> Any:
    transformers = import_extra("transformers", "demo")
    config = transformers.LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab,
        num_attention_heads=shape.dim // HEAD_SIZE,
        num_key_value_heads=shape.dim // HEAD_SIZE // HEADS_PER_KEY_VALUE,
        max_position_embeddings=tokens,
    )
    with torch.device("meta"):  # or torch and transformers would each draw random weights
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.to_empty(device="cpu").init_weights()
    return model.eval()


def random_text(model: Any, prompt_tokens: int, new_tokens: int, batch_size: int = 1) -> Text:
    """Tokens of the model's vocabulary, the same each time."""
    vocab = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens + new_tokens)
    ids = torch.randint(vocab, shape, generator=generator)
    return Text(ids, prompt_tokens)


def quantized_copy(original: Any, config: Int4WeightOnlyConfig, progress: Progress) -> Any:
    """Return a copy whose linear layers are 4-bit; it shares all other parameters with the original.

    Raises:
        ValueError: no layer became 4-bit.
    """
    quantized = _sharing_copy(original)
    total = len(linear_layers(original))
    visited = 0

    def is_linear(module: nn.Module, name: str) -> bool:
        nonlocal visited
        if not isinstance(module, nn.Linear):
            return False
        progress("quantizing linear layers", visited, total)
        visited += 1
        return True

    with reported_together(Report()):  # what is reported here is said by the caller
        quantize_(quantized, config, filter_fn=is_linear)
    if not any(isinstance(layer.weight, Int4OpaqueTensor) for layer in linear_layers(quantized)):
        raise ValueError(
            f"none of the {total} linear layers of {type(original).__name__} became 4-bit; "
            "there is nothing to compare, so choose a model that is made of torch.nn.Linear"
        )
    return quantized


def prototype_copy(quantized: Any) -> Any:
    """Return a copy that holds the same packed bytes in torchao's prototype class.

    Raises:
        ValueError: PyTorch's int4 op does not run here, or a weight was padded, which it cannot hold.
    """
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor as Prototype

    converted = _sharing_copy(quantized)
    for module in linear_layers(converted):
        weight = module.weight
        if isinstance(weight, Int4OpaqueTensor):
            _check_fits_prototype(weight)
            tensor = Prototype(weight.qdata, weight.scale_and_zero, weight.block_size, weight.shape)
            module.weight = nn.Parameter(tensor, requires_grad=False)
    return converted


def _check_fits_prototype(weight: Int4OpaqueTensor) -> None:
    n, k = weight.shape
    group_size = weight.group_size
    if (
        native_layout() is None
        or n % ROW_MULTIPLE
        or k % group_size
        or group_size not in PROTOTYPE_GROUP_SIZES
    ):
        raise ValueError(
            f"torchao's prototype cannot run a {n} x {k} weight in groups of {group_size} here; "
            f"it needs an x86-64 CPU, N % {ROW_MULTIPLE} == 0, K % group_size == 0 and groups of "
            "32, 64 or 128, so leave it out"
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters; one that sits at two places counts once."""
    return sum(part.nbytes for parameter in model.parameters() for part in _parts(parameter))


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: itself, if it is one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def _sharing_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Every `torch.nn.Linear` in it."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def quantized_layers(model: nn.Module) -> int:
    """How many linear layers have a weight that is no plain tensor."""
    return sum(is_traceable_wrapper_subclass(layer.weight) for layer in linear_layers(model))


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise ValueError for a number below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not supported; choose 1 or more")


def check_batch_sizes(sizes: Sequence[int]) -> None:
    """Raise ValueError for a size below 1, or for none."""
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"batch_sizes={list(sizes)} is not supported; choose one or more numbers of sequences, "
            "each 1 or more"
        )
