"""What 4 bits cost a model, by group size and algorithm: loss on a text, beside bytes and time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import quantize_

from torchao_int4cpu.algorithms.choose_qparams import algorithm_named
from torchao_int4cpu.calibration.blocks import Batch
from torchao_int4cpu.calibration.calibrate import GPTQ, calibrate
from torchao_int4cpu.calibration.run import Progress
from torchao_int4cpu.calibration.targets import set_parameter
from torchao_int4cpu.convert.directory import sqnr
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.convert.text import batches_of, read_text, token_ids, tokenizer_of
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor


@dataclass(frozen=True)
class Row:
    """One way to quantize the model; the first row is the model as it was.

    Attributes:
        algorithm: empty for the model as it was.
        group_size: 0 for the model as it was, and where weights have several.
        bits: a quantized weight, scales and zeros included.
        nbytes: of all parameters.
        perplexity: on the evaluation text; None for a model without a language model's head.
        divergence: Kullback-Leibler divergence of its next tokens from the float model's, in nats a
            token; None likewise.
        cosine: of its embedding of a sequence (the mean of the last hidden states) and the float
            model's, the mean; None for a model that has a head.
        sqnr: median over the weights, in dB; None for the model as it was.
        seconds: that quantizing took.
    """

    algorithm: str
    group_size: int
    bits: float
    nbytes: int
    perplexity: float | None
    divergence: float | None
    cosine: float | None
    sqnr: float | None
    seconds: float


@dataclass
class _Variant:
    algorithm: str
    group_size: int
    weights: dict[str, Any]
    seconds: float = 0.0
    sqnr: float | None = None


def compare(
    folder: Path,
    evaluation: Path,
    calibration: Path | None,
    progress: Progress,
    *,
    group_sizes: Sequence[int] = (32, 64, 128),
    algorithms: Sequence[str] = ("tinygemm", "hqq", "mse", GPTQ),
    target_bits: Sequence[float] = (),
    tokens: int = 32768,
    evaluation_tokens: int = 6144,
) -> list[Row]:
    """Quantize a model in each of these ways, and measure them.

    Args:
        folder: a Hugging Face directory with a tokenizer: of a causal language model, or of an encoder.
        evaluation: a text to measure on, see `read_text`.
        calibration: a text for `calibrate`, another one; None if no algorithm needs it.
        progress: told of each step.
        group_sizes: to try.
        algorithms: to try; ``"gptq"`` is `calibrate`.
        target_bits: to try, each one more way of ``"gptq"``.
        tokens: of the calibration text.
        evaluation_tokens: of the evaluation text.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: an argument breaks its rule.
    """
    for name in algorithms:
        if name != GPTQ:
            algorithm_named(name)
    if (GPTQ in algorithms or target_bits) and calibration is None:
        raise ValueError("gptq needs a text for calibration; give --calibration, or leave gptq out")
    plan = make_plan(folder, Int4WeightOnlyConfig(group_size=group_sizes[0]))
    wanted = {tensor.name for tensor in plan.tensors if not tensor.kept}
    tokenizer, model_config = tokenizer_of(folder), plan.model_config
    ids = token_ids(read_text(evaluation), tokenizer, evaluation_tokens, model_config)
    rows = [row for part in ids for row in part]
    batches: list[Batch] = []
    if calibration is not None:
        ids = token_ids(read_text(calibration), tokenizer, tokens, model_config)
        batches = list(batches_of(ids, model_config))
    transformers = import_extra("transformers", "hf")
    model_class = getattr(transformers, model_config.architectures[0])
    model = model_class.from_pretrained(folder, dtype=model_config.dtype).eval()

    def chosen(module: nn.Module, name: str) -> bool:
        return f"{name}.weight" in wanted

    ways: list[tuple[str, int, float | None]]
    ways = [(name, size, None) for size in group_sizes for name in algorithms]
    ways += [(GPTQ, 0, bits) for bits in target_bits]
    total = len(ways) + len(rows)
    variants = [_Variant("", 0, {})]
    for done, (name, size, bits) in enumerate(ways):
        progress(f"{name}, {f'groups of {size}' if bits is None else f'{bits} bits'}", done, total)
        variants.append(_quantized(model, chosen, name, size, bits, batches))
    losses = [_Losses() for _ in variants]
    with torch.no_grad():
        for number, sequence in enumerate(rows):
            progress(f"sequence {number + 1} of {len(rows)}", len(ways) + number, total)
            expected = _output(model, sequence, {})
            for variant, loss in zip(variants, losses):
                found = _output(model, sequence, variant.weights) if variant.weights else expected
                loss.add(sequence, found, expected)
    progress("done", total, total)
    return [_row(model, variant, loss) for variant, loss in zip(variants, losses)]


def _quantized(
    model: Any,
    chosen: Callable[[nn.Module, str], bool],
    name: str,
    size: int,
    bits: float | None,
    batches: list[Batch],
) -> _Variant:
    """The weights of a way by their names; the model is as it was afterwards."""
    before = {key: p for key, p in model.named_parameters() if isinstance(p, nn.Parameter)}
    config = Int4WeightOnlyConfig(
        group_size=size or 128, int4_choose_qparams_algorithm="mse" if name == GPTQ else name
    )
    start = time.perf_counter()
    if name == GPTQ:
        calibrate(model, batches, config, filter_fn=chosen, target_bits=bits, progress=False)
    else:
        quantize_(model, config, filter_fn=chosen)
    seconds = time.perf_counter() - start
    weights = {
        key: parameter
        for key, parameter in model.named_parameters()
        if isinstance(parameter, Int4OpaqueTensor)
    }
    for key in weights:
        set_parameter(model, key, before[key])
    quality = [sqnr(before[key].detach(), weight.to_groupwise()) for key, weight in weights.items()]
    return _Variant(name, size, weights, seconds, statistics.median(quality))


def _output(model: Any, sequence: Tensor, weights: dict[str, Any]) -> tuple[str, Tensor]:
    """Logits ``[T, V]`` of a language model, or the embedding ``[D]`` of another, by these weights."""
    (batch,) = batches_of([sequence[None]], model.config)
    result = torch.func.functional_call(model, weights, kwargs=batch)
    if getattr(result, "logits", None) is not None:
        return "logits", result.logits[0].float()
    return "embedding", result.last_hidden_state[0].float().mean(0)


class _Losses:
    """Of one way, summed up over sequences."""

    def __init__(self) -> None:
        self.nll: list[float] = []
        self.divergence: list[float] = []
        self.cosine: list[float] = []

    def add(self, ids: Tensor, found: tuple[str, Tensor], expected: tuple[str, Tensor]) -> None:
        kind, output = found
        if kind == "embedding":
            self.cosine.append(float(F.cosine_similarity(output, expected[1], dim=0)))
            return
        ours, theirs = output[:-1].log_softmax(-1), expected[1][:-1].log_softmax(-1)
        self.nll.append(float(F.nll_loss(ours, ids[1:])))
        self.divergence.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))


def _row(model: nn.Module, variant: _Variant, loss: _Losses) -> Row:
    numel = sum(weight.numel() for weight in variant.weights.values())
    packed = sum(
        sum(part.nbytes for part in weight.parts().values()) for weight in variant.weights.values()
    )
    dense = sum(p.nbytes for key, p in model.named_parameters() if key not in variant.weights)
    bits = 8 * packed / numel if numel else 8.0 * next(model.parameters()).element_size()

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if values else None

    return Row(
        variant.algorithm,
        variant.group_size,
        bits,
        packed + dense,
        math.exp(statistics.fmean(loss.nll)) if loss.nll else None,
        mean(loss.divergence),
        mean(loss.cosine),
        variant.sqnr,
        variant.seconds,
    )


def size_of(row: Row) -> str:
    """What a table says of the group size."""
    return str(row.group_size or ("mixed" if row.algorithm else "-"))


def _loss(row: Row) -> float:
    """What is drawn."""
    if row.divergence is not None:
        return row.divergence
    assert row.cosine is not None
    return 1 - row.cosine


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a picture of the loss over the bytes, one line for each algorithm.

    Raises:
        MissingExtra: matplotlib is not installed.
        ValueError: matplotlib does not know the ending of the path.
    """
    import_extra("matplotlib", "plot")
    from matplotlib.figure import Figure

    speaks = rows[0].perplexity is not None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(row.algorithm for row in rows if row.algorithm):
        line = sorted((row for row in rows if row.algorithm == name), key=lambda row: row.nbytes)
        panel.plot(
            [row.nbytes / 1e6 for row in line],
            [_loss(row) for row in line],
            "o-",
            label=name,
        )
        for row in line:
            panel.annotate(size_of(row), (row.nbytes / 1e6, _loss(row)), fontsize="small")
    label = "KL divergence from the float model, nats a token" if speaks else "1 - cosine"
    panel.set(xlabel="MB of weights (numbers: group size)", ylabel=label, yscale="log", title=title)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
