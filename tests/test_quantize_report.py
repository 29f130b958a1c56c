"""What a run of `quantize_` tells: once, to the log always, as a warning where it is a surprise."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.prototype.awq import AWQConfig
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization import Int4WeightOnlyConfig as TorchAOConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import torchao_int4cpu
from tests.hugging_face_models import llama, written
from tests.module_twins import int4_names
from tests.moe_models import written as written_experts
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu.quantize.run import uninitialized_weights

SIZE = 64
CONFIG = Int4WeightOnlyConfig(group_size=32)
OURS = "filter_fn=torchao_int4cpu.filter_fn chooses those of "
EMBEDDINGS = (
    "Embeddings are chosen by filter_fn=lambda module, name: isinstance(module, (torch.nn.Linear, "
    "torch.nn.Embedding))"
)


Log = pytest.LogCaptureFixture

#: Whether a warning is on the user's line however deep it is raised.
CAN_SKIP_FILES = sys.version_info >= (3, 12)


class Told:
    """What a call told: the log at INFO, and the warnings."""

    def __init__(self, caplog: Log, model: Any, config: Any, **options: Any) -> None:
        caplog.clear()
        with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quantize_(model, config, **options)  # HERE
        records = [r for r in caplog.records if r.name.partition(".")[0] == "torchao_int4cpu"]
        assert all(record.levelno == logging.INFO for record in records)
        self.log = [record.getMessage() for record in records]
        self.warnings = [str(w.message) for w in caught if w.category is UserWarning]
        for warning in caught if CAN_SKIP_FILES else ():
            assert warning.filename == __file__
            assert "# HERE" in Path(__file__).read_text().splitlines()[warning.lineno - 1]

    @property
    def normal(self) -> str:
        """The log, of a run without a surprise."""
        assert self.warnings == []
        (message,) = self.log
        return message

    @property
    def surprise(self) -> str:
        """The warning, which the log has, too."""
        (message,) = self.warnings
        assert self.log == [message]
        return message


def test_the_warning_is_on_the_line_of_the_call() -> None:
    with pytest.warns(UserWarning, match="is left as it was") as caught:
        quantize_(nn.Sequential(nn.Linear(8, 4096)), Int4WeightOnlyConfig())  # THIS LINE
    assert caught[0].filename == __file__
    assert "# THIS LINE" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


def test_a_model_of_linear_layers(caplog: Log) -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE))
    for config in (CONFIG, CONFIG, TorchAOConfig(group_size=32, int4_packing_format="opaque")):
        told = Told(caplog, model, config)
        assert told.normal == "2 of 2 matrices are 4-bit now, with 100.0% of the numbers"


def test_most_of_a_model(caplog: Log) -> None:
    model = nn.Sequential(nn.Embedding(40, SIZE), nn.Linear(SIZE, 3 * SIZE), nn.Linear(3 * SIZE, SIZE))
    assert Told(caplog, model, CONFIG).normal == (
        "2 of 3 matrices are 4-bit now, with 90.6% of the numbers. "
        f"Not chosen by filter_fn: 1 of Embedding (9.4%). {EMBEDDINGS}"
    )


@pytest.mark.parametrize("which", [None, torchao_int4cpu.filter_fn])
def test_less_than_half(which: Any, caplog: Log) -> None:
    model = nn.Sequential(nn.LSTM(SIZE, SIZE), nn.Conv1d(SIZE, SIZE, 1), nn.Linear(SIZE, SIZE))
    assert Told(caplog, model, CONFIG, filter_fn=which).surprise == (
        "1 of 4 matrices is 4-bit now, with 10.0% of the numbers. Not chosen by filter_fn: 2 of LSTM "
        "(80.0%), 1 of Conv1d (10.0%). LSTM and Conv1d have no 4-bit implementation"
    )


def test_the_border_of_half(caplog: Log) -> None:
    for rows, surprising in ((SIZE, False), (SIZE + 1, True)):
        told = Told(caplog, nn.Sequential(nn.Linear(SIZE, SIZE), nn.Embedding(rows, SIZE)), CONFIG)
        assert (told.warnings != []) == surprising


def test_attention_of_torch(caplog: Log) -> None:
    model = nn.Sequential(nn.MultiheadAttention(SIZE, 4), nn.Linear(SIZE, SIZE))
    assert Told(caplog, model, CONFIG).surprise == (
        "1 of 3 matrices is 4-bit now, with 20.0% of the numbers. Not chosen by filter_fn: 2 of "
        f"MultiheadAttention (80.0%). {OURS}MultiheadAttention"
    )
    assert "3 of 3 matrices" in Told(caplog, model, CONFIG, filter_fn=torchao_int4cpu.filter_fn).normal


def test_nothing_matches(caplog: Log) -> None:
    """torchao never calls the handler then."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(SIZE, SIZE), Conv1D(SIZE, SIZE))
    assert Told(caplog, model, CONFIG).surprise == (
        f"None of 2 matrices is 4-bit. Not chosen by filter_fn: 2 of Conv1D (100.0%). {OURS}Conv1D"
    )
    by_name = FqnToConfig({"layer.weight": CONFIG})  # a name that the model does not have
    assert Told(caplog, model, by_name, filter_fn=None).surprise == (
        "None of 2 matrices is 4-bit. Not named by the config: 2 of Conv1D (100.0%). "
        "An FqnToConfig can name those of Conv1D"
    )
    assert Told(caplog, nn.Sequential(nn.ReLU()), CONFIG).surprise == (
        "Nothing is 4-bit, because the model has no float matrices"
    )


@pytest.mark.parametrize("last", ["linear", "relu", "both"])
def test_by_name_one_layer_is_what_was_asked_for(last: str, caplog: Log) -> None:
    """The end of such a run is seen by its last module, chosen or not."""
    layers = [nn.Linear(SIZE, SIZE) for _ in range(4)]
    model = nn.Sequential(*layers, *([nn.ReLU()] if last != "linear" else []))
    if last == "both":
        model = nn.Sequential(nn.ReLU(), model)
    prefix = "1." if last == "both" else ""
    for name in (f"{prefix}0", f"{prefix}3", f"{prefix}1.weight", rf"re:{prefix}[2].*t"):
        told = Told(caplog, model, FqnToConfig({name: CONFIG}), filter_fn=None)
        done = len(int4_names(model))
        assert told.normal.startswith(f"{done} of 4 matri")
    assert done == 4


def test_by_default_a_small_share_is_a_surprise(caplog: Log) -> None:
    with pytest.warns(UserWarning, match="_default is deprecated"):
        config = FqnToConfig({"_default": CONFIG, "0": None})
    model = nn.Sequential(nn.Linear(SIZE, 3 * SIZE), nn.Linear(3 * SIZE, 8), nn.Linear(8, 8))
    told = Told(caplog, model, config, filter_fn=None)
    assert told.surprise == (
        "2.weight is left as it was: its shape is [8, 8], which takes 256 bytes in torch.float32 and "
        "would take 320 in 4 bits, where rows are padded to a multiple of 16 and columns to one of 32. "
        "1 of 3 matrices is 4-bit now, with 11.1% of the numbers. "
        "Not chosen by the config: 1 of Linear (88.5%)"
    )


def test_reasons_are_grouped(caplog: Log) -> None:
    small = [nn.Linear(i, i) for i in range(2, 9)]
    model = nn.Sequential(nn.Linear(SIZE, SIZE), *small, nn.Linear(SIZE, SIZE).double())
    told = Told(caplog, model, CONFIG).surprise
    assert told.startswith("1.weight is left as it was: its shape is [2, 2], which takes 16 bytes")
    assert (
        "columns to one of 32 (and so are 6 more: 2.weight, 3.weight, 4.weight, 5.weight, ...). "
        in told
    )
    assert "8.weight is left as it was: it is torch.float64, and only bfloat16" in told
    assert told.count("is left as it was") == 2
    assert "Not chosen" not in told


def test_experts_can_be_named(caplog: Log, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written_experts("qwen3_moe", tmp_path))
    told = Told(caplog, model, CONFIG)
    assert re.search(r"4 of Qwen3MoeExperts \(\d+\.\d%\)", told.log[0])
    assert "An FqnToConfig can name those of Qwen3MoeExperts" in told.log[0]


def test_other_formats_are_not_ours_to_tell(caplog: Log) -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    for config, options in (
        (Int8WeightOnlyConfig(version=2), {"filter_fn": lambda module, name: name == "0"}),
        (Int8WeightOnlyConfig(version=2), {"filter_fn": lambda module, name: False}),
        (FqnToConfig({"1": Int8WeightOnlyConfig(version=2)}), {"filter_fn": None}),
        (AWQConfig(CONFIG, step="prepare"), {"filter_fn": lambda module, name: name == "2"}),
    ):
        told = Told(caplog, model, config, **options)
        assert (told.log, told.warnings) == ([], [])
    both = FqnToConfig({"0": Int8WeightOnlyConfig(version=2), "1": CONFIG})
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    # what is in int8 was meant to be
    assert Told(caplog, model, both, filter_fn=None).normal == (
        "1 of 1 matrix is 4-bit now, with 100.0% of the numbers"
    )


def test_after_an_error_nothing_is_told_and_the_next_run_begins_anew(
    caplog: Log,
) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(SIZE, SIZE))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    by_name = FqnToConfig({r"re:\d": CONFIG})
    for config in (CONFIG, by_name):
        with pytest.raises(ValueError, match=r"^1\.weight: weight has NaN"):
            Told(caplog, model, config, filter_fn=None)
        assert not any("matrices" in record.getMessage() for record in caplog.records)
    with torch.no_grad():
        model[1].weight[0, 0] = 0
    for config in (by_name, CONFIG):
        told = Told(caplog, model, config, filter_fn=None).surprise
        assert told.count("0.weight is left as it was") == 1


def test_memory_that_is_only_allocated(caplog: Log) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(40, SIZE))
    with uninitialized_weights():
        told = Told(caplog, model, CONFIG)
    assert (told.log, told.warnings) == ([], [])


def test_while_transformers_loads(caplog: Log, tmp_path: Path) -> None:
    """It calls `quantize_` for each weight, and the model has one report."""
    source = written(llama(), tmp_path / "source")
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(4-bit|left as)")
        options = TorchAoConfig(CONFIG)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=options)
        model.save_pretrained(tmp_path / "4-bit")
        (told,) = [r.getMessage() for r in caplog.records if r.name == "torchao_int4cpu"]
        assert re.match(
            rf"^{len(int4_names(model))} of 16 matrices are 4-bit now, with \d\d\.\d% of", told
        )
        assert "Not chosen while loading: 1 of Embedding" in told
        caplog.clear()
        AutoModelForCausalLM.from_pretrained(tmp_path / "4-bit")  # nothing is quantized
        AutoModelForCausalLM.from_pretrained(source)
        options = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        AutoModelForCausalLM.from_pretrained(source, quantization_config=options)
        assert not [r for r in caplog.records if r.name == "torchao_int4cpu"]


def test_while_transformers_loads_what_has_nothing_to_quantize(tmp_path: Path) -> None:
    from tests.test_filter_fn import gpt2

    gpt2().save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"^None of 10 matrices is 4-bit\. Not chosen while loading: 8 of "
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(CONFIG))
