"""A 4-bit directory of this package as a GGUF file for llama.cpp, tensor by tensor.

Llama and Qwen 2 and 3. Codes are exact: groups become blocks of 32 columns in Q4_1, or Q4_0 where all
zeros are 0; scale and minimum are rounded to float16. The vocabulary is that of a byte-level BPE
tokenizer. Nothing here prints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.checkpoint.safetensors import Source, read_header
from torchao_int4cpu.convert.directory import read
from torchao_int4cpu.convert.export import DENSE, Int4Source, check_exportable, int4_sources, sqnr_of
from torchao_int4cpu.convert.shards import Done, Progress, Report
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.importers.gguf import KINDS, gguf_of_groupwise

#: By ``architectures`` of config.json: the name in GGUF.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

#: What the regular expressions of Llama 3 and Qwen 2 have in common, around that of the digits.
_BEFORE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_BEHIND = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: How a text is split into words, step by step as `_steps` has it, and llama.cpp's name for that.
#: Nothing else is guessed: given other words than it learned from, a model answers worse, unnoticed.
_WORDS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_BEFORE + r"\p{N}{1,3}" + _BEHIND, "bytes"): "llama-bpe",
    (_BEFORE + r"\p{N}" + _BEHIND, "bytes"): "qwen2",
}


class _Tensor(NamedTuple):
    """What is written of one tensor: its name and kind in the file, where it is from, and its rows."""

    name: str
    kind: str
    key: str
    shape: tuple[int, ...]
    source: Source | Int4Source
    order: Tensor | None


def export_gguf(folder: Path, out: Path, progress: Progress) -> Report:
    """Write a GGUF file.

    Args:
        folder: a 4-bit directory of ours, see `export_directory`, with its tokenizer.
        out: the file to make.
        progress: told of each tensor.

    Raises:
        MissingExtra: transformers or gguf is not installed.
        ValueError: ``out`` is there already, the model is of another architecture, or the tokenizer or
            a weight is not one that can be written.
    """
    gguf = import_extra("gguf", "gguf")
    transformers = import_extra("transformers", "hf")
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; give a file that is not, or remove it")
    files = sorted(folder.glob("*.safetensors"))
    weights = int4_sources(files)
    check_exportable(folder, weights, "gguf")
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = _architecture(config)
    tokens = _Tokens(folder, config.vocab_size)
    sources = {source.key: source for file in files for source in read_header(file)}
    tensors = list(_tensors(gguf, config, architecture, weights, sources))
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, architecture)
    try:
        done = _write_file(gguf, writer, folder, config, tokens, tensors, progress)
    except BaseException:  # Ctrl-C too
        writer.close()
        part.unlink(missing_ok=True)
        raise
    writer.close()
    part.rename(out)
    return Report(done, 1, 0)


def _write_file(
    gguf: Any,
    writer: Any,
    folder: Path,
    config: Any,
    tokens: _Tokens,
    tensors: list[_Tensor],
    progress: Progress,
) -> list[Done]:
    _write_config(gguf, writer, config)
    tokens.write(writer)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size)
    special.add_special_token.pop("bos", None)  # the tokenizer was asked
    special.add_to_gguf(writer, quiet=True)
    for tensor in tensors:
        _announce(gguf, writer, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = []
    for tensor in tensors:
        progress(tensor.key, 0)
        written = _write(writer, tensor)
        done.append(written)
        progress(tensor.key, written.bytes_before)
    return done


def _architecture(config: Any) -> str:
    names = getattr(config, "architectures", None) or [""]
    if names[0] not in ARCHITECTURES:
        raise ValueError(
            f"the model is a {names[0]}; these become GGUF files: {', '.join(ARCHITECTURES)}; export "
            "it as gptq or compressed-tensors"
        )
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling != "default":
        raise ValueError(
            f"the model scales positions (rope_type {scaling!r}), which is not written to GGUF files; "
            "export it as gptq or compressed-tensors"
        )
    return ARCHITECTURES[names[0]]


def _write_config(gguf: Any, writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)


class _Tokens:
    """The vocabulary of a directory.

    Raises:
        ValueError: there is none, or it is of another kind.
    """

    def __init__(self, folder: Path, size: int) -> None:
        file = folder / "tokenizer.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        model = found.get("model", {})
        if model.get("type") != "BPE":
            kind = f"of kind {model.get('type')}" if found else "not there"
            raise ValueError(
                f"{str(file)!r} is {kind}; only byte-level BPE is written to GGUF files, so save such "
                "a tokenizer there, or export the model as gptq or compressed-tensors"
            )
        words = _WORDS.get(_steps(found.get("pre_tokenizer")))
        if words is None:
            raise ValueError(
                f"{str(file)!r} splits words in another way than GPT-2, SmolLM, Llama 3 and Qwen 2; "
                "only these are written to GGUF, so export the model as gptq or compressed-tensors"
            )
        self._words = words
        tokenizer = import_extra("transformers", "hf").AutoTokenizer.from_pretrained(folder)
        first = tokenizer("a")["input_ids"][:1]
        self._begins = first == [tokenizer.bos_token_id]
        # 1 is a word, 3 a control token, 4 one that users added, 5 an empty place.
        self._texts = [f"[PAD{i}]" for i in range(size)]
        self._kinds = [5] * size
        for text, i in model["vocab"].items():
            if i < size:
                self._texts[i], self._kinds[i] = text, 1
        for added in found.get("added_tokens", []):
            if added["id"] < size:
                self._texts[added["id"]] = added["content"]
                self._kinds[added["id"]] = 3 if added["special"] else 4

    def write(self, writer: Any) -> None:
        """Add it to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self._words)
        writer.add_token_list(self._texts)
        writer.add_token_types(self._kinds)
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(self._begins)


def _steps(splitting: Any) -> tuple[str, ...]:
    """Those of a ``pre_tokenizer``: "words" (GPT-2's), "digits", "bytes", a regular expression."""
    if not isinstance(splitting, dict):
        return ()
    kind = splitting.get("type")
    if kind == "Sequence":
        return tuple(step for each in splitting["pretokenizers"] for step in _steps(each))
    if kind == "ByteLevel" and not splitting.get("add_prefix_space"):
        return ("words" if splitting.get("use_regex", True) else "bytes",)
    if kind == "Digits" and splitting.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and splitting.get("behavior") == "Isolated" and not splitting.get("invert"):
        return (str(splitting["pattern"].get("Regex")),)
    return (f"another: {kind}",)


def _tensors(
    gguf: Any,
    config: Any,
    architecture: str,
    weights: dict[str, Int4Source],
    sources: dict[str, Source],
) -> Iterator[_Tensor]:
    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    of_weights = {source.key for weight in weights.values() for source in weight.parts.values()}
    dense = {key: source for key, source in sources.items() if key not in of_weights}
    both: dict[str, Source | Int4Source] = {**dense, **weights}
    for key, source in both.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(
                f"{key} has no name in GGUF files of {architecture}; the model is another one, so "
                "export it as gptq or compressed-tensors"
            )
        if isinstance(source, Int4Source):
            n, k = source.data["shape"]
            _check_weight(key, source)
            order = _order(config, architecture, key, n)
            yield _Tensor(name, _kind_of(source), key, (n, k), source, order)
        else:
            kind = "F32" if len(source.shape) == 1 else "F16"
            order = _order(config, architecture, key, source.shape[0])
            yield _Tensor(name, kind, key, source.shape, source, order)


def _order(config: Any, architecture: str, key: str, n: int) -> Tensor | None:
    """The row of the parameter that each row of the file is: queries and keys of Llama take turns.

    Their rotation is of neighbours in the file, and of halves in transformers.
    """
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(key.split(".")[-2])
    if architecture != "llama" or heads is None:
        return None
    return torch.arange(n).view(heads, 2, -1).transpose(1, 2).flatten()


def _check_weight(key: str, source: Int4Source) -> None:
    """Refuse what blocks of a file cannot hold, before there is a file."""
    k = source.data["shape"][1]
    if k % 32:
        raise ValueError(
            f"{key} has {k} columns, and GGUF has blocks of 32; leave it dense (quantize with --skip)"
        )
    for part, cure in (
        ("act_pre_scale", "quantize the model without it"),
        ("act_order", "export as gptq"),
    ):
        if part in source.parts:
            raise ValueError(f"{key} has {part}, which llama.cpp does not apply; {cure}")


def _kind_of(source: Int4Source) -> str:
    """Q4_0 where every zero is 0. Only those are read, which are an eighth of the weight at most."""
    pairs = read(source.parts["scale_and_zero"])
    return "Q4_1" if bool(pairs[..., 1].any()) else "Q4_0"


def _announce(gguf: Any, writer: Any, tensor: _Tensor) -> None:
    import numpy as np

    if isinstance(tensor.source, Int4Source):
        n, k = tensor.shape
        columns, of_block, _ = KINDS[tensor.kind]
        raw = getattr(gguf.GGMLQuantizationType, tensor.kind)
        size = k // columns * of_block
        writer.add_tensor_info(tensor.name, (n, size), np.dtype(np.uint8), n * size, raw)
        return
    dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.float16)
    count = math.prod(tensor.shape)
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, count * dtype.itemsize)


def _write(writer: Any, tensor: _Tensor) -> Done:
    if isinstance(tensor.source, Int4Source):
        value = tensor.source.load().to_groupwise()
        try:
            blocks, stands_for = gguf_of_groupwise(value, tensor.kind)
        except ValueError as error:
            raise ValueError(f"{tensor.key}: {error}") from error
        writer.write_tensor_data((blocks if tensor.order is None else blocks[tensor.order]).numpy())
        before = sum(part.nbytes for part in tensor.source.parts.values())
        return Done(tensor.key, before, blocks.nbytes, sqnr_of(value, stands_for), "")
    dense = read(tensor.source).to(torch.float32 if tensor.kind == "F32" else torch.float16)
    if not bool(dense.isfinite().all()):
        raise ValueError(f"{tensor.key} has numbers beyond float16; export the model as gptq")
    dense = dense if tensor.order is None else dense[tensor.order]
    writer.write_tensor_data(dense.contiguous().numpy())
    return Done(tensor.key, tensor.source.nbytes, dense.nbytes, math.inf, DENSE)
