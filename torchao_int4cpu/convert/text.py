"""Text for calibration and evaluation: a file, cut into sequences of tokens of one length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.extras import import_extra

#: Tokens of a sequence, if the model takes so many.
LENGTH = 512

#: Tokens of a batch, about: enough for products of matrices to be fast, few enough for their memory.
BATCH_TOKENS = 2048

#: Characters that make a sequence of tokens even where words are long.
_CHARACTERS_PER_TOKEN = 10

#: A text of more characters is not tokenized whole, only where sequences are taken from.
_WHOLE = 4_000_000


def read_text(file: Path) -> str:
    """A ``.txt`` file, or the ``"text"`` of each line of a ``.jsonl`` file, empty lines between them.

    Raises:
        ValueError: there is no such file, it is empty, or it is not text.
    """
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is no file; give a .txt file, or a .jsonl file with 'text'")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not text in UTF-8 ({error}); give a text file") from None
    if file.suffix == ".jsonl":
        text = "\n\n".join(_texts(file, text))
    if not text.strip():
        raise ValueError(f"{str(file)!r} is empty; give a file with text")
    return text


def _texts(file: Path, lines: str) -> list[str]:
    found = []
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f"line {number} of {str(file)!r} is no JSON object with a string 'text'; write one in "
                "each line, or give a .txt file"
            )
        found.append(text)
    return found


def tokenizer_of(folder: Path) -> Any:
    """Of a Hugging Face directory.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: there is none.
    """
    transformers = import_extra("transformers", "hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(folder)!r} has no tokenizer that transformers reads ({str(error).splitlines()[0]}); "
            "save it there, or calibrate the model in memory with torchao_int4cpu.calibrate"
        ) from None


def sequences(text: str, tokenizer: Any, tokens: int, length: int = LENGTH) -> Tensor:
    """Sequences of equal length from all over a text, each with the tokenizer's own special tokens.

    Args:
        text: as long as it may be.
        tokenizer: of transformers.
        tokens: how many all together, at most.
        length: of a sequence.

    Returns:
        int64 ``[S, length]``; one shorter sequence where the text has no more.

    Raises:
        ValueError: the text has hardly any tokens.
    """
    count = max(1, tokens // length)
    longest = length * _CHARACTERS_PER_TOKEN
    if len(text) > max(_WHOLE, 2 * count * longest):
        starts = [i * len(text) // count for i in range(count)]
        pieces = [text[start : start + longest] for start in starts]
        found = [_cut(tokenizer, piece, length)[0] for piece in pieces]
    else:
        found = _cut(tokenizer, text, length)
    whole = [ids for ids in found if len(ids) == length]
    if not whole:
        (ids,) = found[:1]
        if len(ids) < 32:
            raise ValueError(
                f"the text has {len(ids)} tokens; give a longer one, of {tokens} if that is possible"
            )
        return torch.tensor([ids])
    chosen = [whole[i * len(whole) // count] for i in range(count)] if len(whole) > count else whole
    return torch.tensor(chosen)


def _cut(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    options = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
    found: list[list[int]] = tokenizer(text, verbose=False, **options)["input_ids"]
    return found if found and isinstance(found[0], list) else [found]  # type: ignore[list-item]


def length_of(model_config: Any) -> int:
    """`LENGTH`, or what the model takes if that is less."""
    limits = (getattr(model_config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return min(LENGTH, *(limit for limit in limits if isinstance(limit, int)), LENGTH)


def batches_of(ids: Tensor, model_config: Any) -> list[dict[str, Tensor]]:
    """What the model is called with: sequences in batches of about `BATCH_TOKENS`."""
    together = max(1, BATCH_TOKENS // ids.shape[1])
    batches = [{"input_ids": part} for part in ids.split(together)]
    if getattr(model_config, "is_encoder_decoder", False):
        batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches
