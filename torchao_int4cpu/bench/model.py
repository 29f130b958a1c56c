"""Time a whole language model in bfloat16 and in 4 bits, eager and compiled, as rows of numbers.

Prefill is one forward pass over the prompt, decode one over a single token after it. Both fill a static
cache of keys and values, whose fixed shapes let a compiled model keep two graphs. Both compute the
logits of the last position only: that is all that generation needs of a prompt, and what llama.cpp
times. The tokens are random but the same for every variant, so that their logits can be compared. Every
variant attends by `model_variants.attend`.

A batch of several sequences is only decoded: each has a short prompt, which is not timed, in a cache
as long as the one of a single sequence, so that attention reads as much for each.

All variants stay in memory and take turns (A B C A B C ...), so that they share the machine's noise.
Needs the ``demo`` extra. Nothing here prints.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchao_int4cpu.bench.demo import Progress
from torchao_int4cpu.bench.model_variants import (
    LlamaShape,
    Text,
    check_batch_sizes,
    check_counts,
    linear_layers,
    load,
    prototype_copy,
    quantized_copy,
    quantized_layers,
    random_text,
    weight_bytes,
)
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: Names of the weights in a row.
BF16, INT4, PROTOTYPE = "bf16", "4-bit", "torchao prototype"

#: Tokens that each of several sequences begins with, unless ``prompt_tokens`` are fewer.
SHORT_PROMPT = 16


@dataclass(frozen=True)
class ModelRow:
    """One variant of the model at one batch size.

    Attributes:
        weights: `BF16`, `INT4` or `PROTOTYPE` (the bytes of `INT4` in torchao's class).
        mode: ``eager`` or ``compiled``.
        batch_size: sequences that are decoded together.
        prompt_tokens, new_tokens: of each sequence in one pass.
        prefill_ms: median milliseconds of a forward pass over the prompt; None for more sequences than
            one, as are the next two.
        prefill_tokens_per_s: tokens of the prompt, a second.
        prefill_vs_bf16: that over the one of eager bf16; above 1 is faster.
        decode_ms: median milliseconds of a forward pass over one token of each sequence, of all passes
            and positions.
        decode_tokens_per_s: tokens of all sequences, a second.
        decode_vs_bf16: that over the one of eager bf16 at this batch size.
        int4_layers, linear_layers: how many `torch.nn.Linear` are 4-bit, and how many there are.
        weight_bytes: of all parameters, exactly; with scales and zeros, without what pads a page.
        peak_bytes: ``weight_bytes`` and `resident_rise` of a pass: the cache, activations, and what
            libraries allocate. Neither the code of Python and torch (0.5 GB) nor the compiler is in it,
            nor loading and quantizing. None where it cannot be measured.
        compile_s: seconds of the first prefill (of a single sequence) and the first decode beyond the
            median ones, with inductor's caches on disk empty; None if eager. The first one has 2 s of
            imports in it.
        relative_error: of the logits after the prompt and after the first new token: norm of the
            difference over the norm of those by the same weights, multiplied in float32. Between the
            products these round as eager mode does; a graph rounds less often, so it differs more.
        difference_from_bf16: the same against the bf16 weights: what quantization changes.
    """

    weights: str
    mode: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float | None
    prefill_tokens_per_s: float | None
    prefill_vs_bf16: float | None
    decode_ms: float
    decode_tokens_per_s: float
    decode_vs_bf16: float
    int4_layers: int
    linear_layers: int
    weight_bytes: int
    peak_bytes: int | None
    compile_s: float | None
    relative_error: float
    difference_from_bf16: float


def run(
    source: str | LlamaShape,
    config: Int4WeightOnlyConfig,
    progress: Progress,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 16,
    batch_sizes: Sequence[int] = (1, 4),
    passes: int = 7,
    prototype: bool = False,
) -> list[ModelRow]:
    """Measure bf16 and 4-bit, both eager and compiled, in one run.

    Every `torch.nn.Linear` is quantized, also the one that makes the logits (``lm_head``), as
    `quantize_` does; the embedding is not.

    Args:
        source: the shape of a Llama of random weights, or the directory or hub id of a causal language
            model of transformers, which is loaded in bfloat16.
        prompt_tokens: of a single sequence; each of several has at most `SHORT_PROMPT`.
        batch_sizes: numbers of sequences that are decoded together, all in turn on the same models.
            Prefill is measured for 1 only. A size that comes twice is measured once.
        passes: prefills of each variant, each with ``new_tokens`` steps of decoding after it.
        prototype: also time torchao's prototype tensor, eager.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: a number breaks its rule, the model cannot be loaded or holds no more tokens than
            asked for, nothing of it became 4-bit, or torchao's prototype cannot hold its weights.
    """
    check_counts({"new_tokens": new_tokens, "passes": passes})
    check_batch_sizes(batch_sizes)
    if prompt_tokens < 2:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} is not supported; choose 2 or more: decode reads one"
        )
    short_prompt = min(SHORT_PROMPT, prompt_tokens)
    with torch.no_grad():
        progress("loading the model", 0, 0)
        original = load(source, prompt_tokens + new_tokens)
        quantized = quantized_copy(original, config, progress)
        models = {BF16: original, INT4: quantized}
        if prototype:
            models[PROTOTYPE] = prototype_copy(quantized)
        texts = [
            random_text(original, prompt_tokens if size == 1 else short_prompt, new_tokens, size)
            for size in dict.fromkeys(batch_sizes)
        ]
        exact: dict[tuple[str, int], Tensor] = {}
        for text in texts:
            for weights, model in ((BF16, original), (INT4, quantized)):
                progress("multiplying in float32, to compare with", len(exact), 2 * len(texts))
                exact[weights, text.batch_size] = float32_logits(model, text)
        variants = _measured(models, texts, prompt_tokens + new_tokens, passes, progress)
    baselines = {v.text.batch_size: v for v in variants if (v.weights, v.mode) == (BF16, "eager")}
    return [_row(variant, baselines[variant.text.batch_size], exact) for variant in variants]


# --- what is compared with ----------------------------------------------------------------------


class _Float32Products(TorchFunctionMode):
    """`F.linear` by float32 weights, one at a time, so that a large model needs no second copy."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_float32_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _float32_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Int4OpaqueTensor):
        dense = weight.to_groupwise().dequantize()
    else:
        dense = weight.float()
    y = F.linear(input.float(), dense, None if bias is None else bias.float())
    return y.to(input.dtype)


def float32_logits(model: Any, text: Text) -> Tensor:
    """Logits after the prompt and after the first new token, float32 ``[batch_size, 2, vocab]``.

    Every linear layer multiplies in float32, whatever its weight; activations between the layers are
    bfloat16, as they are in the model.
    """
    ids = text.ids[:, : text.prompt_tokens + 1]
    with _Float32Products():
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=2).logits
    return logits.float()


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((value.float() - expected).norm() / expected.norm())


# --- measuring ----------------------------------------------------------------------------------


class _Variant:
    """One way to run a model, and what was measured of it.

    Attributes:
        weights, compiled: which one.
        first_s: seconds of the first prefill, if that is measured, and the first decode together.
        logits: after the prompt and after the first new token, ``[batch_size, 2, vocab]``.
        peak_bytes: see `ModelRow`.
        prefill_s, decode_s: seconds of each forward pass since.
    """

    def __init__(
        self, weights: str, model: Any, text: Text, cached_tokens: int, *, compiled: bool
    ) -> None:
        self.weights, self.model, self.text, self.compiled = weights, model, text, compiled
        self._cached_tokens = cached_tokens
        self.first_s = 0.0
        self.logits = torch.empty(0)
        self.peak_bytes: int | None = None
        self.prefill_s: list[float] = []
        self.decode_s: list[float] = []
        self._forward = model.forward
        if compiled:
            # Isolated, or the guards of all variants would be tried in turn.
            compiler: Any = torch.compile  # its annotations lack isolate_recompiles
            self._forward = compiler(model.forward, dynamic=False, isolate_recompiles=True)
        self._cache: Any = None

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "eager"

    @property
    def measures_prefill(self) -> bool:
        return self.text.batch_size == 1

    def warm_up(self) -> None:
        """Run for the first time: compile, keep the logits, then measure the memory."""
        self._allocate_cache()
        prefill, decode, logits = self._read(new_tokens=1)
        self.first_s = sum(prefill + decode)
        self.logits = torch.stack(logits, dim=1)
        self._cache = None
        rise = resident_rise(self._read_with_a_new_cache)
        self.peak_bytes = None if rise is None else weight_bytes(self.model) + rise

    def take_turn(self) -> None:
        """Time one prefill, and the steps of decoding after it."""
        prefill, decode, _ = self._read(self.text.new_tokens)
        self.prefill_s += prefill
        self.decode_s += decode

    def _read(self, new_tokens: int) -> tuple[list[float], list[float], list[Tensor]]:
        """Read the prompt, then new tokens one by one.

        Returns:
            Seconds of the prefill, if it is measured, and of each decode; last logits of all of them.
        """
        self._cache.reset()
        ids, start = self.text
        # A prompt that is not measured is not worth a graph.
        prefill = self._forward if self.measures_prefill else self.model.forward
        inputs = [ids[:, :start], *(ids[:, i : i + 1] for i in range(start, start + new_tokens))]
        seconds, logits = [], []
        for i, tokens in enumerate(inputs):
            forward = prefill if i == 0 else self._forward
            begin = time.perf_counter()
            output = forward(tokens, past_key_values=self._cache, logits_to_keep=1)
            seconds.append(time.perf_counter() - begin)
            logits.append(output.logits[:, -1])
        return (seconds[:1] if self.measures_prefill else []), seconds[1:], logits

    def _read_with_a_new_cache(self) -> None:
        self._allocate_cache()
        self._read(new_tokens=1)

    def _allocate_cache(self) -> None:
        """A cache gets its memory when it is first used, which a graph must not do."""
        ids = self.text.ids
        self._cache = import_extra("transformers", "demo").StaticCache(
            self.model.config, max_cache_len=self._cached_tokens
        )
        self.model(ids[:, :1], past_key_values=self._cache, logits_to_keep=1)


def _measured(
    models: Mapping[str, Any],
    texts: Sequence[Text],
    cached_tokens: int,
    passes: int,
    progress: Progress,
) -> list[_Variant]:
    """All variants, with their samples: text by text, of each eager bf16 first."""
    variants = [
        _Variant(weights, model, text, cached_tokens, compiled=compiled)
        for text in texts
        for weights, model in models.items()
        for compiled in ((False, True) if weights != PROTOTYPE else (False,))
    ]
    torch.compiler.reset()
    try:
        _prepare_compiler()
        for variant in variants:
            size = variant.text.batch_size
            progress(f"warming up {variant.weights} {variant.mode}, batch {size}", 0, 0)
            _warm_up_with_empty_caches(variant)
        for done in range(passes):
            progress("timing", done, passes)
            for variant in variants:
                variant.take_turn()
    finally:
        torch.compiler.reset()
    return variants


def _prepare_compiler() -> None:
    """Compile something small: the first graph of a process also pays for imports and CPU probes."""
    torch.compile(lambda x: x + 1)(torch.ones(64))


def _warm_up_with_empty_caches(variant: _Variant) -> None:
    """Its own: most of the C++ that inductor writes for bf16 and for 4 bits is the same."""
    from torch._inductor.utils import fresh_cache  # importing it takes a second

    with fresh_cache():
        variant.warm_up()


def _row(variant: _Variant, baseline: _Variant, exact: Mapping[tuple[str, int], Tensor]) -> ModelRow:
    decode_s = statistics.median(variant.decode_s)
    usual_s = decode_s
    prefill: dict[str, float | None] = dict.fromkeys(
        ("prefill_ms", "prefill_tokens_per_s", "prefill_vs_bf16")
    )
    if variant.measures_prefill:
        prefill_s = statistics.median(variant.prefill_s)
        usual_s += prefill_s
        prefill = {
            "prefill_ms": prefill_s * 1e3,
            "prefill_tokens_per_s": variant.text.prompt_tokens / prefill_s,
            "prefill_vs_bf16": statistics.median(baseline.prefill_s) / prefill_s,
        }
    batch_size = variant.text.batch_size
    same_weights = BF16 if variant.weights == BF16 else INT4
    return ModelRow(
        weights=variant.weights,
        mode=variant.mode,
        batch_size=batch_size,
        prompt_tokens=variant.text.prompt_tokens,
        new_tokens=variant.text.new_tokens,
        **prefill,
        decode_ms=decode_s * 1e3,
        decode_tokens_per_s=batch_size / decode_s,
        decode_vs_bf16=statistics.median(baseline.decode_s) / decode_s,
        int4_layers=quantized_layers(variant.model),
        linear_layers=len(linear_layers(variant.model)),
        weight_bytes=weight_bytes(variant.model),
        peak_bytes=variant.peak_bytes,
        compile_s=variant.first_s - usual_s if variant.compiled else None,
        relative_error=relative_difference(variant.logits, exact[same_weights, batch_size]),
        difference_from_bf16=relative_difference(variant.logits, exact[BF16, batch_size]),
    )


def resident_rise(work: Callable[[], object]) -> int | None:
    """Do some work; return by how many bytes this process's resident memory rose at most meanwhile.

    Memory that was freed before is given back to the system first, so that it is not used again
    unseen. Exact to some megabytes: the kernel counts pages in batches, and what libraries keep from
    earlier work (our portable path up to 24 MB) is not seen to rise.

    Returns:
        None where it cannot be known: not Linux, or not with glibc.
    """
    before = _resident_bytes_with_a_fresh_peak()
    work()
    return None if before is None else max(0, _status_bytes("VmHWM") - before)


def _resident_bytes_with_a_fresh_peak() -> int | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts again from now
        return _status_bytes("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def resident_bytes() -> int | None:
    """Of this process, now; None where the system does not say."""
    try:
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(name: str) -> int:
    """A field of ``/proc/self/status``, which is in KiB."""
    with open("/proc/self/status") as file:
        values = dict(line.split(":", 1) for line in file)
    return int(values[name].split()[0]) * 1024
