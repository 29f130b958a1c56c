"""Weights that padding would make larger than they are: `quantize_` leaves them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchao.prototype.awq import AWQConfig
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    TorchAoConfig,
)

import torchao_int4cpu
from tests.hugging_face_models import written
from tests.module_twins import int4_names
from tests.processes import Ranks, in_ranks
from tests.shared_weights import mesh_of
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.format.packed import packed_bytes
from torchao_int4cpu.quantize.config import quantize_module
from torchao_int4cpu.quantize.run import uninitialized_weights

CONFIG = Int4WeightOnlyConfig(group_size=128)


def bytes_of(weight: Int4OpaqueTensor) -> int:
    return sum(part.nbytes for part in weight.parts().values())


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(1, 1), (16, 256), (17, 257), (33, 100), (3, 5, 70), (2, 16, 64)])
def test_packed_bytes_are_those_of_the_tensor(shape: tuple[int, ...], group_size: int) -> None:
    weight = Int4OpaqueTensor.from_hp(torch.randn(shape), [*[1] * (len(shape) - 1), group_size])
    assert packed_bytes(shape, group_size) == bytes_of(weight)


def layer(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return nn.ModuleDict(
        {"layer": nn.Linear(k, n, dtype=dtype), "other": nn.Linear(512, 512, dtype=dtype)}
    )


#: N, K, the dtype; and whether it grows in groups of 128: 16 rows and 128 columns take 1088 bytes.
SIZES = [
    (4096, 8, torch.bfloat16, True),
    (4096, 16, torch.bfloat16, True),
    (1, 768, torch.bfloat16, True),
    (1, 768, torch.float32, True),
    (3, 768, torch.float32, False),
    (2, 272, torch.bfloat16, True),  # 1088 bytes, and three groups
    (16, 34, torch.bfloat16, False),  # 1088 bytes before and after
    (16, 33, torch.bfloat16, True),
    (16, 17, torch.float32, False),  # the same in float32
    (16, 16, torch.float32, True),
    (8, 4096, torch.bfloat16, False),
    (768, 768, torch.float16, False),
]


@pytest.mark.parametrize(("n", "k", "dtype", "grows"), SIZES)
@pytest.mark.parametrize("by_name", [False, True])
def test_by_size(n: int, k: int, dtype: torch.dtype, grows: bool, by_name: bool) -> None:
    model = layer(n, k, dtype)
    weight = model["layer"].weight
    config: Any = FqnToConfig({r"re:.*": None, "layer.weight": CONFIG, "other": CONFIG})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(model, config if by_name else CONFIG, filter_fn=None)
    made = Int4OpaqueTensor.from_hp(weight.detach(), [1, 128])  # any shape can be had this way
    assert (bytes_of(made) > weight.nbytes) == grows
    if not grows:
        assert [str(warning.message) for warning in caught] == []
        assert torch.equal(model["layer"].weight, made)
        return
    (message,) = [str(warning.message) for warning in caught]
    before, after = weight.nbytes, bytes_of(made)
    assert message.startswith(
        f"layer.weight is left as it was: its shape is [{n}, {k}], which takes {before} bytes in "
        f"{dtype} and would take {after} in 4 bits, where rows are padded to a multiple of 16 and "
        "columns to one of 128. "
    )
    assert model["layer"].weight is weight
    assert int4_names(model) == {"other.weight"}


def test_stacks_and_weights_that_are_input_first() -> None:
    """Padded is what is summed over: the columns of 4-bit weights, the rows of these."""
    from transformers.pytorch_utils import Conv1D

    model: Any = nn.Module()
    model.wide, model.tall = Conv1D(8, 512), Conv1D(512, 8)  # [512, 8] and [8, 512]
    model.experts, model.thin = nn.Module(), nn.Module()
    model.experts.is_transposed = True
    model.experts.stack = nn.Parameter(torch.randn(4, 128, 16).bfloat16())
    model.thin.stack = nn.Parameter(torch.randn(4, 128, 16).bfloat16())
    with pytest.warns(UserWarning, match=r"^tall\.weight is left as it was: its shape is \[8, 512\]"):
        quantize_(model, CONFIG, filter_fn=torchao_int4cpu.filter_fn)
    assert type(model.tall.weight) is nn.Parameter
    assert model.wide.weight.untransposed().shape == (8, 512)
    names = FqnToConfig({"experts.stack": CONFIG, "thin.stack": CONFIG})
    with pytest.warns(
        UserWarning, match=r"^thin\.stack is left as it was: its shape is \[4, 128, 16\]"
    ):
        quantize_(model, names, filter_fn=None)
    assert int4_names(model.experts) == {"stack"}


def test_a_handler_outside_of_a_run_warns_itself() -> None:
    with pytest.warns(UserWarning, match=r"^weight of Linear\(in_.*\) is left as it was: its shape"):
        module = quantize_module(nn.Linear(4, 4), CONFIG)
    assert type(module.weight) is nn.Parameter


def test_what_a_checkpoint_has_decided_is_not_asked_again() -> None:
    """vLLM allocates 4-bit weights to copy those of a checkpoint into."""
    model = nn.Sequential(nn.Linear(4, 4))
    with warnings.catch_warnings(), uninitialized_weights():
        warnings.simplefilter("error")
        quantize_(model, CONFIG)
    assert isinstance(model[0].weight, Int4OpaqueTensor)


def test_awq_gets_what_it_asks_for() -> None:
    """It hands over a stand-in for each layer, and fails if that comes back as it was."""
    model: Any = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    base = Int4WeightOnlyConfig(group_size=32)
    quantize_(model, AWQConfig(base, step="prepare"))
    model(torch.randn(4, 8))
    quantize_(model, AWQConfig(base, step="convert"))
    assert all(isinstance(layer.weight, Int4OpaqueTensor) for layer in model)


@pytest.mark.slow
@in_ranks("2", "4")
def test_all_processes_decide_by_the_whole_weight(ranks: Ranks) -> None:
    """A piece of a few rows would be smaller dense; another process might have a larger piece."""
    mesh = mesh_of(ranks)
    shapes = {"split": (16, 512), "small": (4, 96), "uneven": (21, 512)}
    model: Any = nn.ModuleDict(
        {n: nn.Linear(k, r, False, dtype=torch.bfloat16) for n, (r, k) in shapes.items()}
    )
    for module in model.values():
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]), False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(model, CONFIG)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(
        "small.weight is left as it was: its shape is [4, 96], which takes 768 bytes"
    )
    assert "2 of 3 matrices are 4-bit now, with 98.0% of the numbers" in message
    for name, module in model.items():
        weight: Any = module.weight
        assert isinstance(weight, DTensor)
        assert isinstance(weight.to_local(), Int4OpaqueTensor) == (name != "small")
    piece = model["split"].weight.to_local()
    dense = piece.shape[0] * 512 * 2
    assert (bytes_of(piece) > dense) == (ranks.world == 4)  # alone, it would have been left


def bert(dtype: torch.dtype) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    config = BertConfig(**sizes, num_attention_heads=4, num_labels=1, max_position_embeddings=32)
    return BertForSequenceClassification(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_files_of_hugging_face(dtype: torch.dtype, tmp_path: Path) -> None:
    """While loading, saved, loaded again, and shard by shard: the same layer is left."""
    source = written(bert(dtype), tmp_path / "source", dtype)
    config = Int4WeightOnlyConfig(group_size=64)
    reason = re.escape("classifier.weight is left as it was: its shape is [1, 64]")
    auto = AutoModelForSequenceClassification
    with pytest.warns(UserWarning, match=f"^{reason}") as caught:
        model = auto.from_pretrained(source, quantization_config=TorchAoConfig(config))
    assert len([w for w in caught if "matrices" in str(w.message)]) == 1
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*4-bit now")  # nothing is quantized here
        back = auto.from_pretrained(tmp_path / "saved")
    plan = make_plan(source, config)
    report = quantize_directory(plan, tmp_path / "out", lambda name, done: None)
    assert [done.name for done in report.kept["larger in 4 bits, because of padding"]] == [
        "classifier.weight"
    ]
    streamed = auto.from_pretrained(tmp_path / "out")
    ids = torch.arange(10).view(2, 5)
    for other in (back, streamed):
        assert type(other.classifier.weight) is nn.Parameter
        assert int4_names(other) == int4_names(model)
        assert len(int4_names(other)) == 2 * 6 + 1  # and the pooler
        assert all(torch.equal(other.get_parameter(n), p) for n, p in model.named_parameters())
        # Not bit by bit: a dense product adds in an order that depends on where its weight lies.
        assert torch.allclose(other(ids).logits, model(ids).logits, rtol=0, atol=1e-2)
