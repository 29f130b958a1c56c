"""Text for calibration and evaluation, as tokens: long sequences for language models, lines for others.

A model of sentences sees short ones, and calibrated on long ones it loses more: MiniLM in groups of 64
has a cosine of 0.976 with the float model's embeddings after sequences of 512 tokens, 0.986 after lines
of the same text (perl's documentation), rounded by ``mse`` 0.969.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchao_int4cpu.extras import import_extra

#: Tokens of a sequence, if the model takes so many.
LENGTH = 512

#: Tokens of a line, at most, and characters at least: shorter ones are headings and the like.
LINE_LENGTH, LINE_CHARACTERS = 128, 20

#: Tokens of a batch, about: enough for products of matrices to be fast, few enough for their memory.
BATCH_TOKENS = 2048

#: A text of fewer tokens says nothing.
LEAST_TOKENS = 32

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
        _check_count(len(ids), tokens)
        return torch.tensor([ids])
    chosen = [whole[i * len(whole) // count] for i in range(count)] if len(whole) > count else whole
    return torch.tensor(chosen)


def _cut(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    options = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
    found: list[list[int]] = tokenizer(text, verbose=False, **options)["input_ids"]
    return found if found and isinstance(found[0], list) else [found]  # type: ignore[list-item]


def lines(text: str, tokenizer: Any, tokens: int, length: int = LINE_LENGTH) -> list[Tensor]:
    """Lines from all over a text, each with the tokenizer's own special tokens.

    Args:
        text: as long as it may be.
        tokenizer: of transformers.
        tokens: how many all together, about.
        length: of a line, at most; it is cut off there.

    Returns:
        int64 ``[S, tokens]``, those of one length together, without padding.

    Raises:
        ValueError: the text has hardly any tokens.
    """
    found = [line.strip() for line in text.splitlines() if len(line.strip()) >= LINE_CHARACTERS]
    # A token has about four characters.
    every = max(1, sum(min(len(line), 4 * length) for line in found) // (4 * tokens))
    chosen = found[::every] or [text.strip()]
    by_length: dict[int, list[list[int]]] = {}
    count = 0
    for ids in tokenizer(chosen, truncation=True, max_length=length, verbose=False)["input_ids"]:
        if count >= tokens:
            break
        by_length.setdefault(len(ids), []).append(ids)
        count += len(ids)
    _check_count(count, tokens)
    return [torch.tensor(by_length[size]) for size in sorted(by_length)]


def _check_count(count: int, wanted: int) -> None:
    if count < LEAST_TOKENS:
        raise ValueError(
            f"the text has {count} tokens; give a longer one, of {wanted} if that is possible"
        )


def speaks(model_config: Any) -> bool:
    """Whether it is a language model, by the name of its class."""
    name = (getattr(model_config, "architectures", None) or [""])[0]
    return "LM" in name or "ConditionalGeneration" in name


def token_ids(text: str, tokenizer: Any, tokens: int, model_config: Any) -> list[Tensor]:
    """Of a text, as is right for a model: `sequences`, or `lines`; int64 ``[S, tokens]``, several.

    Raises:
        ValueError: ``tokens`` is not positive, or the text has hardly any.
    """
    if tokens < 1:
        raise ValueError(f"got {tokens} tokens to take of a text; it must be 1 or more, 32768 is usual")
    names = ("max_position_embeddings", "n_positions")
    limits = [getattr(model_config, name, None) for name in names]
    most = min([limit for limit in limits if isinstance(limit, int)], default=LENGTH)
    if speaks(model_config):
        return [sequences(text, tokenizer, tokens, min(LENGTH, most))]
    return lines(text, tokenizer, tokens, min(LINE_LENGTH, most))


def batches_of(ids: list[Tensor], model_config: Any) -> list[dict[str, Tensor]]:
    """What the model is called with: sequences in batches of about `BATCH_TOKENS`."""
    parts = [part for each in ids for part in each.split(max(1, BATCH_TOKENS // each.shape[1]))]
    batches = [{"input_ids": part} for part in parts]
    if getattr(model_config, "is_encoder_decoder", False):
        batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches
