"""The whole-model benchmark: rows that agree with each other, on a Llama of one small layer.

No time is asserted. Graphs are captured but not handed to inductor, which would take minutes; that it
compiles our layers is tested in test_compile.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.numerics import assert_int4
from tests.printed_tables import split_row
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.bench import model as bench_model
from torchao_int4cpu.bench import model_variants
from torchao_int4cpu.bench.model import ModelRow
from torchao_int4cpu.bench.model_variants import LlamaShape, Text

SHAPE = LlamaShape(dim=512, ffn=544, layers=1, vocab=304)
GROUP_SIZE = 32
CONFIG = Int4WeightOnlyConfig(group_size=GROUP_SIZE)
PROMPT, NEW = 12, 3
#: Of several sequences; shorter than PROMPT, as it is by default.
SHORT, BATCH = 5, 3

#: [N, K] of the linear layers: q, k, v, o, gate, up, down, and the logits.
LINEAR = [
    (512, 512),
    (128, 512),
    (128, 512),
    (512, 512),
    (544, 512),
    (544, 512),
    (512, 544),
    (304, 512),
]
#: The embedding and three norms.
OTHER_BYTES = 2 * (304 * 512 + 3 * 512)


def quiet(step: str, done: int, total: int) -> None:
    """No progress."""


@pytest.fixture(scope="module", autouse=True)
def _graphs_without_inductor() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        yield


@pytest.fixture(scope="module")
def rows() -> list[ModelRow]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_model, "SHORT_PROMPT", SHORT)
        return bench_model.run(
            SHAPE,
            CONFIG,
            quiet,
            prompt_tokens=PROMPT,
            new_tokens=NEW,
            batch_sizes=(1, BATCH, 1),
            passes=2,
            prototype=True,
        )


@pytest.fixture(scope="module")
def texts(original: Any) -> dict[int, Text]:
    """The texts of `rows`, by batch size."""
    return {
        1: model_variants.random_text(original, PROMPT, NEW),
        BATCH: model_variants.random_text(original, SHORT, NEW, BATCH),
    }


@pytest.fixture(scope="module")
def original() -> Any:
    """The model of `rows`."""
    return model_variants.load(SHAPE, PROMPT + NEW).requires_grad_(False)


@pytest.fixture(scope="module")
def text(texts: dict[int, Text]) -> Text:
    """The text of one sequence."""
    return texts[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a language model whose embedding is also its last layer; it takes 16 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def int4_bytes(n: int, k: int) -> int:
    """Of a padded weight: half a byte a code, four bytes a group."""
    n, k = -(-n // 16) * 16, -(-k // GROUP_SIZE) * GROUP_SIZE
    return n * k // 2 + n * k // GROUP_SIZE * 4


def test_every_variant_has_its_row(rows: list[ModelRow]) -> None:
    variants = [
        ("bf16", "eager"),
        ("bf16", "compiled"),
        ("4-bit", "eager"),
        ("4-bit", "compiled"),
        ("torchao prototype", "eager"),
    ]
    assert [(row.weights, row.mode, row.batch_size) for row in rows] == [
        (*variant, size) for size in (1, BATCH) for variant in variants
    ]
    for row in rows:
        prompt = PROMPT if row.batch_size == 1 else SHORT
        assert (row.prompt_tokens, row.new_tokens) == (prompt, NEW)
        assert row.linear_layers == len(LINEAR)
        assert row.int4_layers == (0 if row.weights == "bf16" else len(LINEAR))


def test_speeds_follow_from_times(rows: list[ModelRow]) -> None:
    for i, row in enumerate(rows):
        baseline = rows[i // 5 * 5]
        if row.batch_size == 1:
            assert row.prefill_ms is not None
            assert baseline.prefill_ms is not None
            assert row.prefill_tokens_per_s == pytest.approx(PROMPT / row.prefill_ms * 1e3)
            assert row.prefill_vs_bf16 == pytest.approx(baseline.prefill_ms / row.prefill_ms)
        else:
            assert (row.prefill_ms, row.prefill_tokens_per_s, row.prefill_vs_bf16) == (None,) * 3
        assert row.decode_tokens_per_s == pytest.approx(row.batch_size * 1e3 / row.decode_ms)
        assert row.decode_vs_bf16 == pytest.approx(baseline.decode_ms / row.decode_ms)
        assert (row.compile_s is None) == (row.mode == "eager")


def test_weights_take_the_bytes_of_their_format(rows: list[ModelRow]) -> None:
    dense = OTHER_BYTES + sum(2 * n * k for n, k in LINEAR)
    packed = OTHER_BYTES + sum(int4_bytes(n, k) for n, k in LINEAR)
    for row in rows:
        assert row.weight_bytes == (dense if row.weights == "bf16" else packed)
        assert row.peak_bytes is not None
        assert row.peak_bytes >= row.weight_bytes


def test_errors_are_of_rounding_and_of_quantization(
    rows: list[ModelRow], original: Any, texts: dict[int, Text]
) -> None:
    """What 4 bits change is found here without running a variant.

    A wrong product, mask or position would be an error at least as large. The difference from bf16 is
    the change by quantization, give or take the error (the triangle inequality).
    """
    quantized = model_variants.quantized_copy(original, CONFIG, quiet)
    for size, text in texts.items():
        dense, packed = (bench_model.float32_logits(model, text) for model in (original, quantized))
        assert dense.shape == (size, 2, 304)
        change = bench_model.relative_difference(packed, dense)
        ratio = float(packed.norm() / dense.norm())
        for row in rows:
            if row.batch_size != size:
                continue
            assert 0 <= row.relative_error < change
            if row.weights == "bf16":
                assert row.difference_from_bf16 == row.relative_error
            else:
                assert abs(row.difference_from_bf16 - change) <= row.relative_error * ratio + 2.0**-20


def test_sequences_of_a_batch_are_different_and_cached_as_long_as_one(
    original: Any, texts: dict[int, Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only decoding is timed, and only it goes through the compiled function."""
    text = texts[BATCH]
    assert len({tuple(ids) for ids in text.ids.tolist()}) == BATCH
    variant = bench_model._Variant("bf16", original, text, PROMPT + NEW, compiled=False)
    read: list[tuple[str, tuple[int, ...]]] = []
    forward = type(original).forward

    def watched(name: str) -> Any:
        def run(ids: torch.Tensor, **options: Any) -> Any:
            read.append((name, tuple(ids.shape)))
            return forward(original, ids, **options)

        return run

    variant._forward = watched("decode")
    monkeypatch.setattr(original, "forward", watched("other"))
    variant._allocate_cache()
    read.clear()
    variant.take_turn()
    assert read == [("other", (BATCH, SHORT)), *[("decode", (BATCH, 1))] * NEW]
    assert variant.prefill_s == []
    assert len(variant.decode_s) == NEW
    keys = variant._cache.layers[0].keys  # [sequences, heads, tokens, size]
    assert (keys.shape[0], keys.shape[2]) == (BATCH, PROMPT + NEW)


def test_the_quantized_copy_is_4_bit_and_shares_the_rest(original: Any) -> None:
    quantized = model_variants.quantized_copy(original, CONFIG, quiet)
    layers = [module for module in quantized.modules() if isinstance(module, nn.Linear)]
    for layer, shape in zip(layers, LINEAR, strict=True):
        assert_int4(layer.weight, shape, GROUP_SIZE)
    assert quantized.lm_head.weight is not original.lm_head.weight
    assert quantized.model.norm.weight is original.model.norm.weight
    assert quantized.model.embed_tokens.weight is original.model.embed_tokens.weight
    assert type(original.lm_head.weight) is nn.Parameter


def test_the_prototype_holds_the_same_bytes(original: Any) -> None:
    quantized = model_variants.quantized_copy(original, CONFIG, quiet)
    converted = model_variants.prototype_copy(quantized)
    mine, theirs = quantized.lm_head.weight, converted.lm_head.weight
    assert isinstance(mine, Int4OpaqueTensor)
    assert not isinstance(theirs, Int4OpaqueTensor)
    assert theirs.qdata.data_ptr() == mine.qdata.data_ptr()
    assert theirs.scale_and_zero.data_ptr() == mine.scale_and_zero.data_ptr()


def test_what_is_compared_with_is_a_model_of_float32_weights(original: Any, text: Text) -> None:
    """Bit for bit: layer by layer as `float32_logits` does, and by a model that holds them all."""
    quantized = model_variants.quantized_copy(original, CONFIG, quiet)
    dense = model_variants.quantized_copy(original, CONFIG, quiet)
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module.weight, Int4OpaqueTensor)
            module.weight = nn.Parameter(module.weight.to_groupwise().dequantize(), requires_grad=False)
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
            module.register_forward_hook(lambda _, args, y: y.bfloat16())
    expected = dense(text.ids[:, : PROMPT + 1], use_cache=False).logits[:, -2:].float()
    assert torch.equal(bench_model.float32_logits(quantized, text), expected)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("mask_heads", [0, 1, 2])
def test_attention_is_the_one_of_transformers(tokens: int, shared: int, mask_heads: int) -> None:
    """Bit for bit, in eager mode."""
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = shared, True  # type: ignore[assignment]
    query = torch.randn(1, 2 * shared, tokens, 64).bfloat16()
    key, value = torch.randn(2, 1, 2, 9, 64).bfloat16()
    seen = torch.arange(9) <= 3 + torch.arange(tokens)[:, None]
    # None for all, one for all heads, one for each head
    mask = [None, seen[None, None], seen.expand(1, 2 * shared, -1, -1)][mask_heads]
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.1)
    y, weights = model_variants.attend(module, query, key, value, mask, scaling=0.1)
    assert weights is None
    assert torch.equal(y, expected)


def test_the_model_attends_so(original: Any, text: Text) -> None:
    used: list[int] = []

    def attend(module: nn.Module, query: torch.Tensor, *args: Any, **options: Any) -> Any:
        used.append(query.shape[2])
        return model_variants.attend(module, query, *args, **options)

    transformers.AttentionInterface.register(model_variants.ATTENTION, attend)
    cache = transformers.StaticCache(original.config, max_cache_len=PROMPT + 1)
    original(text.ids[:, :PROMPT], past_key_values=cache)
    original(text.ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
    transformers.AttentionInterface.register(model_variants.ATTENTION, model_variants.attend)
    assert used == [PROMPT, 1]


def test_the_rise_of_resident_memory() -> None:
    count = 2**25
    rise = bench_model.resident_rise(lambda: torch.ones(count, dtype=torch.uint8))
    assert rise is not None
    assert rise > count * 15 / 16  # pages are counted in batches


def test_where_resident_memory_is_not_known_the_work_is_done_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # as where there is no malloc_trim
    assert bench_model.resident_rise(lambda: done.append(1)) is None
    assert done == [1]


# --- the command --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_model_is_measured(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "5", "--new-tokens", "2", "--passes", "1", "--group-size", "32"]
    sizes += ["--batch-sizes", "1"]
    assert cli.main(["bench", "--model", saved, *sizes, "--algorithm", "mse", "--json"]) == 0
    captured = capsys.readouterr()
    environment, *lines = [json.loads(line) for line in captured.out.splitlines()]
    assert environment["model"] == saved
    assert environment["algorithm"] == "mse"
    found = [ModelRow(**line) for line in lines]
    assert [(row.weights, row.mode) for row in found] == [
        (weights, mode) for weights in ("bf16", "4-bit") for mode in ("eager", "compiled")
    ]
    linear = [(64, 64), (32, 64), (32, 64), (64, 64), (72, 64), (72, 64), (64, 72)]
    embedding, norms = 2 * 96 * 64, 2 * 3 * 64
    assert found[0].weight_bytes == sum(2 * n * k for n, k in linear) + embedding + norms
    packed = [*linear, (96, 64)]  # the last layer is quantized, the embedding that it was is kept
    assert found[2].weight_bytes == sum(int4_bytes(n, k) for n, k in packed) + embedding + norms
    assert found[2].int4_layers == len(packed)
    assert "... timing" in captured.err


def test_the_command_prints_a_table(
    rows: list[ModelRow], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def run(source: object, config: object, progress: object, **options: Any) -> list[ModelRow]:
        asked.update(options, source=source, config=config)
        return rows

    monkeypatch.setattr(bench_model, "run", run)
    command = ["bench", "--model", "--layers", "3", "--dim", "512", "--group-size", "64", "--prototype"]
    command += ["--prompt-tokens", "9", "--new-tokens", "4", "--batch-sizes", "2", "1", "--passes", "2"]
    assert cli.main(command) == 0
    assert asked == {
        "source": LlamaShape(dim=512, layers=3),
        "config": Int4WeightOnlyConfig(group_size=64),
        "prompt_tokens": 9,
        "new_tokens": 4,
        "batch_sizes": [2, 1],
        "passes": 2,
        "prototype": True,
    }
    first, header, *lines = capsys.readouterr().out.splitlines()
    assert "LlamaShape(dim=512, ffn=14336, layers=3, vocab=32000), group 64" in first
    assert header.split()[:5] == ["weights", "mode", "batch", "prefill", "ms"]
    for line, row in zip(lines, rows, strict=True):
        columns = " ".join("0" if word == "-" else word for word in line.replace(" of ", " ").split())
        names, numbers = split_row(columns, numbers=14)
        assert names == [*row.weights.split(), row.mode]
        assert numbers[0] == str(row.batch_size)
        assert line.split().count("-") == 3 * (row.batch_size > 1) + (row.compile_s is None)
        assert f"{row.decode_tokens_per_s:.2f}" in line
        assert f" {row.int4_layers} of {row.linear_layers} " in line


def test_rows_survive_json(rows: list[ModelRow]) -> None:
    assert [ModelRow(**json.loads(json.dumps(asdict(row)))) for row in rows] == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "2", "--new-tokens", "3"], "got --layers, --new-tokens, .*, or add --model"),
        (["--model", "--rows", "3", "--compile"], "got --rows, --compile, .*, or leave --model out"),
        (["--model", "x", "--dim", "512"], "got --dim, which has no effect here; .* leave 'x' out"),
        (["--model", "--dim", "100"], "dim=100 is not supported; choose a multiple of 512"),
        (["--model", "--layers", "0"], "layers=0 is not supported; choose 1 or more"),
        (["--model", "--passes", "0"], "passes=0 is not supported; choose 1 or more"),
        (
            ["--model", "--batch-sizes", "4", "0"],
            r"batch_sizes=\[4, 0\] is not supported; choose one or more .*, each 1 or more",
        ),
        (["--batch-sizes", "2"], "got --batch-sizes, which has no effect here; .* add --model"),
        (["--model", "--prompt-tokens", "1"], "prompt_tokens=1 is not supported; choose 2 or more"),
        (["--model", "/nowhere"], "the model '/nowhere' cannot be loaded .* give a directory or"),
    ],
)
def test_what_the_command_refuses(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 1
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert re.search(message, error[0])
    assert captured.out == ""


def test_without_transformers_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["bench", "--model", "--layers", "1"]) == 1
    assert "pip install 'torchao_int4cpu[demo]'" in capsys.readouterr().err


# --- models that cannot be measured -------------------------------------------------------------


def test_more_tokens_than_the_model_takes_are_refused(saved: str) -> None:
    assert model_variants.load(saved, 16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"17 tokens with the prompt are too many .* at most 16"):
        model_variants.load(saved, 17)


def test_a_model_that_is_quantized_already_is_refused(
    original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = model_variants.quantized_copy(original, CONFIG, quiet)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda path, dtype: quantized
    )
    with pytest.raises(ValueError, match="'x' is quantized already; give the model that it was made"):
        model_variants.load("x", 4)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 0 linear layers of Sequential became 4-bit"):
        model_variants.quantized_copy(nn.Sequential(nn.ReLU()), CONFIG, quiet)


@pytest.mark.parametrize(("n", "k", "group_size"), [(40, 64, 32), (64, 72, 32), (64, 256, 256)])
def test_the_prototype_cannot_hold_padded_weights(n: int, k: int, group_size: int) -> None:
    config = Int4WeightOnlyConfig(group_size=group_size)
    quantized = model_variants.quantized_copy(nn.Sequential(nn.Linear(k, n)), config, quiet)
    with pytest.raises(ValueError, match=f"cannot run a {n} x {k} weight in groups of {group_size}"):
        model_variants.prototype_copy(quantized)
