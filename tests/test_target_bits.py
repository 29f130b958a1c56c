"""`calibrate(target_bits=...)` and ``quantize --target-bits``: group sizes by what they cost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization import FqnToConfig
from transformers import AutoModelForCausalLM

from tests.hugging_face_models import llama
from tests.test_calibrate import CONFIG, assert_same
from tests.test_calibrated_directory import SIZES, gptq, saved, text
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig, calibrate
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.calibration.bits import Option, choose_options
from torchao_int4cpu.convert.text import batches_of, read_text, token_ids, tokenizer_of
from torchao_int4cpu.format.packed import packed_bytes

# --- the choice ---------------------------------------------------------------------------------

OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(OPTIONS, st.integers(0, 200))
def test_the_choice_is_near_the_best_of_all(given: list[list[tuple[int, int]]], left: int) -> None:
    """It fits, and loses no more than the best of all choices with one largest change less to spend:
    the bound of a greedy choice where each change brings the most for its bytes."""
    options = [
        [Option(size, nbytes, float(loss)) for size, (nbytes, loss) in enumerate(each)]
        for each in given
    ]
    least = sum(min(option.nbytes for option in each) for each in options)
    chosen = choose_options(options, least + left)
    assert all(option in each for option, each in zip(chosen, options))
    assert sum(option.nbytes for option in chosen) <= least + left
    step = max(max(o.nbytes for o in each) - min(o.nbytes for o in each) for each in options)

    def best(most: int) -> float:
        return min(
            (
                sum(option.loss for option in each)
                for each in itertools.product(*options)
                if sum(option.nbytes for option in each) <= most
            ),
            default=torch.inf,
        )

    found = sum(option.loss for option in chosen)
    assert best(least + left) <= found <= best(least + left - step)


# --- models -------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Three linear layers one after the other; groups of 32 bring something to the second alone.

    Its columns have scales of their own by groups of 32; those of the others are all alike.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(3))
        for i, layer in enumerate(self.layers):
            w = torch.randn(256, 256, generator=generator) / 16
            if i == 1:
                w = w * torch.tensor([1.0, 8.0]).repeat_interleave(32).repeat(4)
            layer.weight = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(300, 256, generator=generator) for _ in range(2)]


def sizes_of(model: nn.Module) -> dict[str, int]:
    return {
        name: parameter.group_size
        for name, parameter in model.named_parameters()
        if isinstance(parameter, Int4OpaqueTensor)
    }


def test_bits_go_where_they_bring_the_most() -> None:
    model = Layers()
    told = calibrate(model, batches(), CONFIG, target_bits=4.5, progress=False)
    sizes = sizes_of(model)
    assert sizes["layers.1.weight"] == 32
    assert sizes["layers.0.weight"] > 32
    assert sizes["layers.2.weight"] > 32
    assert 4.3 < told.bits <= 4.5
    parameters: list[Any] = list(model.parameters())
    packed = sum(sum(part.nbytes for part in p.parts().values()) for p in parameters)
    assert told.bits == 8 * packed / (3 * 256 * 256)
    assert f"; {told.bits:.3f} bits a weight" in str(told)


def test_it_is_calibrating_with_what_it_chose() -> None:
    """Bit for bit; measuring leaves no trace."""
    model, other = Layers(), Layers()
    told = calibrate(model, batches(), CONFIG, target_bits=4.4, progress=False)
    chosen = {name: Int4WeightOnlyConfig(group_size=size) for name, size in sizes_of(model).items()}
    assert told == calibrate(other, batches(), FqnToConfig(chosen), progress=False)
    assert_same(model, other)


@pytest.mark.parametrize(("bits", "size"), [(4.125, 256), (5.0, 32)])
def test_the_ends(bits: float, size: int) -> None:
    model = Layers()
    calibrate(model, batches(), CONFIG, target_bits=bits, progress=False)
    assert set(sizes_of(model).values()) == {size}


@pytest.mark.parametrize("bits", [3.0, 4.12, 5.01, 16.0])
def test_bits_that_no_choice_comes_to_are_refused(bits: float) -> None:
    model = Layers()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"these weights take 4\.125 to 5\.000 bits"):
        calibrate(model, batches(), CONFIG, target_bits=bits, progress=False)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_weight_that_nobody_sees_takes_the_least() -> None:
    class Skipping(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layers[1](x))

    model = Skipping()
    told = calibrate(model, batches(), CONFIG, target_bits=4.42, progress=False)
    assert sizes_of(model) == {f"layers.{i}.weight": size for i, size in enumerate((256, 32, 256))}
    assert len(told.calibrated) == 1


def test_a_model_without_blocks() -> None:
    """The model itself is the block."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = Layers().layers

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.third(self.second(self.first(x).tanh()).tanh())
            return found

    model = Plain()
    calibrate(model, batches(), CONFIG, target_bits=4.5, progress=False)
    assert sizes_of(model)["second.weight"] == 32
    assert max(sizes_of(model).values()) > 64


@pytest.mark.parametrize("stop", [1, 3, 6, 9])
def test_an_interrupted_run_goes_on(stop: int, tmp_path: Path) -> None:
    """While it measures or later, to the same weights and words."""
    options: dict[str, Any] = {"target_bits": 4.5, "config": CONFIG}
    expected, model = Layers(), Layers()
    words = calibrate(expected, batches(), progress=False, **options)
    steps = 0

    def interrupt(name: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt

    before = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches(), progress=interrupt, resume=tmp_path, **options)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert calibrate(model, batches(), progress=False, resume=tmp_path, **options) == words
    assert_same(model, expected)
    for changed in (batches()[:1], [batch + 1 for batch in batches()]):
        with pytest.raises(ValueError, match="from a run with other settings, batches or weights"):
            calibrate(Layers(), changed, progress=False, resume=tmp_path, **options)


# --- models of transformers ---------------------------------------------------------------------


def test_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`from_pretrained` has the sizes that were chosen, bit for bit as `calibrate` in memory."""
    (tmp_path / "text").write_text(text(8000))
    model = llama(**SIZES, hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    with torch.no_grad():  # as if some weights were worth more
        for layer in model.model.layers[1:]:
            layer.mlp.down_proj.weight[:, ::64] *= 20
    source = saved(model, tmp_path / "source")
    options = ["--target-bits", "4.5", "--embeddings"]
    assert gptq(source, tmp_path / "out", tmp_path / "text", *options) == 0
    assert "group sizes: " in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    sizes = sizes_of(found)
    blocks = {n: size for n, size in sizes.items() if ".layers." in n}
    assert len(set(blocks.values())) > 1
    assert len(blocks) == 21
    assert sizes["model.embed_tokens.weight"] == 32
    weights = [p for name, p in found.named_parameters() if name in blocks]
    bits = 8 * sum(packed_bytes(p.shape, p.group_size) for p in weights)
    assert 4.35 < bits / sum(p.numel() for p in weights) <= 4.5
    config = found.config.quantization_config
    assert sizes_of(AutoModelForCausalLM.from_pretrained(source, quantization_config=config)) == sizes
    # The same codes as in memory, and saved again and loaded again the same.
    in_memory = AutoModelForCausalLM.from_pretrained(source)
    ids = token_ids(read_text(tmp_path / "text"), tokenizer_of(source), 2048, in_memory.config)
    calibrate(
        in_memory,
        batches_of(ids, in_memory.config),
        CONFIG,
        filter_fn=lambda module, name: f"{name}.weight" in blocks,
        target_bits=4.5,
        progress=False,
    )
    assert_same(found.model.layers, in_memory.model.layers)
    found.save_pretrained(tmp_path / "again")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), found)


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(text(8000))
    source = saved(llama(**SIZES), tmp_path / "source")
    assert gptq(source, tmp_path / "out", tmp_path / "text", "--target-bits", "3") == 1
    assert "target_bits=3.0 cannot be met" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--target-bits", "4.5"]
    assert cli.main(arguments) == 1
    assert "--algorithm mse takes no --target-bits; choose --algorithm gptq" in capsys.readouterr().err
