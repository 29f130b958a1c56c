"""`calibrate`: what each weight sees, block by block; what is refused; and going on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor

from torchao_int4cpu import (
    GPTQConfig,
    Int4OpaqueTensor,
    Int4WeightOnlyConfig,
    calibrate,
)
from torchao_int4cpu.algorithms.gptq import gptq
from torchao_int4cpu.algorithms.hessian import Hessian

CONFIG = Int4WeightOnlyConfig(group_size=32)


class Block(nn.Module):
    """A residual block; the argument ``shift`` is another for each."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.number: int = number

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.relu(self.up(x) + shift))
        return found


class Blocks(nn.Module):
    """A few of them, between two linear layers."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 32)
        self.blocks = nn.ModuleList(Block(number) for number in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block(x, shift=torch.tensor(0.1) * block.number)
        found: Tensor = self.last(x)
        return found


def blocks(count: int = 2) -> Blocks:
    torch.manual_seed(0)
    return Blocks(count).eval()


def batches(count: int = 4, width: int = 32, rows: int = 60) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(width, width, generator=generator)
    return [torch.randn(2, rows, width, generator=generator) @ mix for _ in range(count)]


def by_hand(layer: nn.Linear, inputs: list[Tensor]) -> None:
    """Quantize a layer for these inputs."""
    hessian = Hessian(layer.in_features)
    for x in inputs:
        rows = x.reshape(-1, x.shape[-1])
        hessian.add(rows.t() @ rows, len(rows))
    value = gptq(layer.weight, hessian, 32).value
    layer.weight = nn.Parameter(Int4OpaqueTensor.from_groupwise(value, dtype=torch.float32), False)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """All 4-bit weights, bit for bit; there are some."""
    found = {n: p for n, p in model.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    expected = {n: p for n, p in other.named_parameters() if isinstance(p, Int4OpaqueTensor)}
    assert found.keys() == expected.keys() != set()
    for name, weight in found.items():
        assert torch.equal(weight.qdata, expected[name].qdata), name
        assert torch.equal(weight.scale_and_zero, expected[name].scale_and_zero), name


# --- what a weight sees -------------------------------------------------------------------------


def test_two_blocks_equal_doing_it_by_hand() -> None:
    """Layers within a block see what its float ones give, later blocks what the 4-bit ones give."""
    model, expected = blocks(), blocks()
    told = calibrate(model, batches(), CONFIG, progress=False)
    with torch.no_grad():
        by_hand(expected.first, batches())
        hidden = [expected.first(x) for x in batches()]
        for block in expected.blocks:
            assert isinstance(block, Block)
            shift = torch.tensor(0.1) * block.number
            middle = [torch.relu(block.up(x) + shift) for x in hidden]
            by_hand(block.up, hidden)
            by_hand(block.down, middle)
            hidden = [block(x, shift=shift) for x in hidden]
        by_hand(expected.last, hidden)
    assert_same(model, expected)
    assert [(w.name, w.rows, w.rounded) for w in told.weights] == [
        (name, 480, "")
        for name in (
            "first.weight",
            *(f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("up", "down")),
            "last.weight",
        )
    ]


def test_what_is_between_blocks_is_done() -> None:
    """Each block is then recorded by itself, in the model as it is by then."""

    class Between(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(2 * x.tanh(), shift=torch.tensor(0.0))
            found: Tensor = self.last(x)
            return found

    model, expected = Between(3).eval(), Between(3).eval()
    expected.load_state_dict(model.state_dict())
    calibrate(model, batches(), CONFIG, progress=False)
    with torch.no_grad():
        by_hand(expected.first, batches())
        hidden = [expected.first(x) for x in batches()]
        for block in expected.blocks:
            assert isinstance(block, Block)
            hidden = [2 * x.tanh() for x in hidden]
            middle = [torch.relu(block.up(x)) for x in hidden]
            by_hand(block.up, hidden)
            by_hand(block.down, middle)
            hidden = [block(x, shift=torch.tensor(0.0)) for x in hidden]
        by_hand(expected.last, hidden)
    assert_same(model, expected)


class Skipping(Blocks):
    """The last block is also given what the first one returned."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = [self.first(x)]
        for i, block in enumerate(self.blocks):
            shift = hidden[1].mean() if i == 2 else torch.tensor(0.0)
            hidden.append(block(hidden[-1], shift=shift))
        found: Tensor = self.last(hidden[-1])
        return found


def test_what_depends_on_other_blocks_is_computed() -> None:
    """Such blocks are no chain, though each takes what the one before has returned."""
    torch.manual_seed(0)
    model, expected = Skipping(3).eval(), Skipping(3).eval()
    expected.load_state_dict(model.state_dict())
    calibrate(model, batches(), CONFIG, progress=False)
    with torch.no_grad():
        by_hand(expected.first, batches())
        hidden = [expected.first(x) for x in batches()]
        seen: list[Tensor] = []
        for i, block in enumerate(expected.blocks):
            assert isinstance(block, Block)
            shifts = [x.mean() if i == 2 else torch.tensor(0.0) for x in seen or hidden]
            middle = [torch.relu(block.up(x) + shift) for x, shift in zip(hidden, shifts)]
            by_hand(block.up, hidden)
            by_hand(block.down, middle)
            hidden = [block(x, shift=shift) for x, shift in zip(hidden, shifts)]
            seen = seen or hidden
        by_hand(expected.last, hidden)
    assert_same(model, expected)


def test_what_blocks_hand_on_is_that_of_each_batch() -> None:
    """As T5's blocks do with what the first one has made of the length and the mask of the batch."""

    class Handing(Block):
        def forward(  # type: ignore[override]
            self, x: Tensor, bias: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            if bias is None:
                bias = x.mean(-1, keepdim=True)
            return super().forward(x, shift=bias), bias

    class Model(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Handing(number) for number in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x, bias = self.first(x), None
            for block in self.blocks:
                x, bias = block(x, bias)
            found: Tensor = self.last(x)
            return found

    torch.manual_seed(0)
    given = [*batches(2), *batches(2, rows=70)]  # of two lengths
    model, expected = Model().eval(), Model().eval()
    expected.load_state_dict(model.state_dict())
    calibrate(model, given, CONFIG, progress=False)
    with torch.no_grad():
        by_hand(expected.first, given)
        hidden = [expected.first(x) for x in given]
        biases: list[Tensor] = []
        for block in expected.blocks:
            assert isinstance(block, Handing)
            biases = biases or [x.mean(-1, keepdim=True) for x in hidden]
            middle = [torch.relu(block.up(x) + bias) for x, bias in zip(hidden, biases)]
            by_hand(block.up, hidden)
            by_hand(block.down, middle)
            hidden = [block(x, bias)[0] for x, bias in zip(hidden, biases)]
        by_hand(expected.last, hidden)
    assert_same(model, expected)


def test_not_sequential_is_observing_the_float_model() -> None:
    """And so are the two steps of `quantize_`."""
    model, expected = blocks(), blocks()
    calibrate(model, batches(), CONFIG, sequential=False, progress=False)
    quantize_(expected, GPTQConfig("observe", CONFIG))
    assert type(expected.last.weight) is nn.Parameter
    with torch.no_grad():
        for x in batches():
            expected(x)
    quantize_(expected, GPTQConfig("convert", CONFIG))
    assert_same(model, expected)
    sequential = blocks()
    calibrate(sequential, batches(), CONFIG, progress=False)
    with pytest.raises(AssertionError, match=r"blocks|last"):
        assert_same(sequential, expected)


# --- going on, and the same again ---------------------------------------------------------------


def test_the_same_twice_bit_for_bit() -> None:
    first, second = blocks(3), blocks(3)
    assert calibrate(first, batches(), CONFIG, progress=False) == calibrate(
        second, batches(), CONFIG, progress=False
    )
    assert_same(first, second)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("stop", [3, 9, 14, 21])
def test_an_interrupted_run_goes_on(sequential: bool, stop: int, tmp_path: Path) -> None:
    """To the same weights and the same words; before that the model is as it was."""
    expected, model = blocks(3), blocks(3)
    options: dict[str, Any] = {"sequential": sequential}
    words = calibrate(expected, batches(), CONFIG, progress=False, **options)

    def interrupt(name: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    before = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches(), CONFIG, progress=interrupt, resume=tmp_path / "a", **options)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    steps: list[tuple[int, int]] = []
    told = calibrate(
        model,
        batches(),
        CONFIG,
        progress=lambda name, done, total: steps.append((done, total)),
        resume=tmp_path / "a",
        **options,
    )
    assert told == words
    assert_same(model, expected)
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    calibrate(blocks(), batches(), CONFIG, progress=False, resume=tmp_path / "a")
    for changed in ({"batches": batches(3)}, {"damping": 0.1}):
        arguments: dict[str, Any] = {"batches": batches(), "config": CONFIG} | changed
        with pytest.raises(ValueError, match="from a run with other settings, batches or weights"):
            calibrate(blocks(), progress=False, resume=tmp_path / "a", **arguments)
    (tmp_path / "b/weights").mkdir(parents=True)
    (tmp_path / "b/weights/notes").touch()
    with pytest.raises(ValueError, match="holds other files"):
        calibrate(blocks(), batches(), CONFIG, progress=False, resume=tmp_path / "b")


# --- what is refused ----------------------------------------------------------------------------


def with_nan() -> list[Tensor]:
    found = batches()
    found[2][0, 3, 4] = torch.nan
    return found


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "there are no batches"),
        (torch.ones(4, 32), TypeError, "batches is a Tensor; give a list"),
        ("a text", TypeError, "batches is a str"),
        (["a text"], TypeError, "batch 0 is a str without a tensor.*tokenizer"),
        ([{}], TypeError, "batch 0 is a dict without a tensor"),
        (with_nan(), ValueError, "batch 2 has NaN or infinite values"),
        (batches(1, rows=5), ValueError, "the batches bring 10 rows to first.weight; give 128"),
        ([*batches()[:3], batches()[3] * 1e30], ValueError, "first.weight: the inputs .* squares"),
    ],
)
def test_batches_that_are_refused(given: Any, error: type[Exception], message: str) -> None:
    model = blocks()
    before = dict(model.named_parameters())
    with pytest.raises(error, match=message):
        calibrate(model, given, CONFIG, progress=False)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not any("extra_repr" in vars(module) for module in model.modules())


def test_nan_in_the_middle_of_a_model_leaves_it_as_it_was() -> None:
    model = blocks(3)
    with torch.no_grad():
        model.blocks[1].down.bias = nn.Parameter(torch.full((64,), torch.nan))  # type: ignore[union-attr]
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"blocks\.2\.up\.weight: the inputs of the weight have NaN"):
        calibrate(model, batches(), CONFIG, progress=False)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_batches_that_run_other_blocks_are_refused() -> None:
    class Skips(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            kept = self.blocks
            if x.shape[0] == 1:
                self.blocks = nn.ModuleList(list(kept)[:-1])
            try:
                return super().forward(x)
            finally:
                self.blocks = kept

    with pytest.raises(ValueError, match=r"batch 1 runs 2 of the 3 blocks from blocks\.0 on"):
        calibrate(Skips(3).eval(), [*batches(1), batches()[1][:1]], CONFIG, progress=False)


def test_weights_that_blocks_share() -> None:
    """They see what all of these blocks see, in the float model or what is 4-bit of it by then."""
    model = blocks(3)
    shared, own = model.blocks[0], model.blocks[2]
    assert isinstance(shared, Block)
    assert isinstance(own, Block)
    own.up.weight = shared.up.weight
    told = calibrate(model, batches(), CONFIG, progress=False)
    assert own.up.weight is shared.up.weight
    assert isinstance(own.up.weight, Int4OpaqueTensor)
    assert {weight.name: weight.rows for weight in told.weights}["blocks.0.up.weight"] == 2 * 480
    assert len(told.weights) == 7
    assert all(isinstance(p, Int4OpaqueTensor) for p in model.parameters() if p.ndim == 2)


def test_a_block_that_runs_twice() -> None:
    class Twice(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in [*self.blocks, *self.blocks]:
                x = block(x, shift=torch.tensor(0.0))
            found: Tensor = self.last(x)
            return found

    model = Twice().eval()
    told = calibrate(model, batches(), CONFIG, progress=False)
    assert {weight.name: weight.rows for weight in told.weights if "up" in weight.name} == {
        "blocks.0.up.weight": 960,
        "blocks.1.up.weight": 960,
    }
    assert told.rounded == []


def test_weights_that_are_refused() -> None:
    model = blocks()
    others = FqnToConfig({"first": CONFIG, "last": Int8WeightOnlyConfig()})
    for config, name in ((others, "last"), (Int8WeightOnlyConfig(), "config")):
        with pytest.raises(TypeError, match=f"{name} is a Int8WeightOnlyConfig; calibrate takes"):
            calibrate(model, batches(), config, progress=False)
    assert not any(isinstance(p, TorchAOBaseTensor) for p in model.parameters())
    with pytest.raises(ValueError, match="no weight of the model is chosen"):
        calibrate(model, batches(), CONFIG, filter_fn=lambda module, name: False, progress=False)
    calibrate(model, batches(), CONFIG, progress=False)
    with pytest.raises(ValueError, match="no weight of the model is chosen"):
        calibrate(model, batches(), CONFIG, progress=False)


def test_modes_and_hooks_are_left_as_they_were() -> None:
    model = blocks().train()
    model.blocks[0].eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    calibrate(model, batches(), CONFIG, progress=False)
    assert model.training
    assert not model.blocks[0].training
    assert torch.backends.mha.get_fastpath_enabled() == fast
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- in two steps -------------------------------------------------------------------------------


def test_two_steps_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="step='both' is not known; choose 'observe' or 'convert'"):
        GPTQConfig("both")
    with pytest.raises(ValueError, match="base_config is 4; give an Int4WeightOnlyConfig"):
        GPTQConfig("observe", 4)
    with pytest.raises(ValueError, match="percdamp=0 must be more than 0"):
        GPTQConfig("observe", percdamp=0)
    with pytest.raises(ValueError, match=r"first\.weight was not observed"):
        quantize_(blocks(), GPTQConfig("convert", CONFIG))
    model = blocks()
    quantize_(model, GPTQConfig("observe", CONFIG))
    with pytest.raises(ValueError, match=r"no input has reached first\.weight"):
        quantize_(model, GPTQConfig("convert", CONFIG))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 33))  # an error within a layer ends observing it for this call
    with torch.no_grad():
        model(batches()[0])
    quantize_(model, GPTQConfig("convert", CONFIG))
    assert isinstance(model.first.weight, Int4OpaqueTensor)
    assert not model.first._forward_hooks
