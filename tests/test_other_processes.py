"""Weights that other processes share or are sent, and what would need memory that a weight has not."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.processes import run_child
from tests.weights import quantized
from torchao_int4cpu import Int4OpaqueTensor


@pytest.mark.slow
def test_a_model_is_shared_and_a_weight_is_sent() -> None:
    done = run_child("share_weights")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("shape", [(48, 70), (3, 48, 70)])
@pytest.mark.parametrize("transposed", [False, True])
def test_sharing_moves_the_parts(shape: tuple[int, ...], transposed: bool) -> None:
    weight = quantized(*shape)
    t: Any = weight.transpose(-2, -1) if transposed else weight
    before = t.dequantize()
    assert not t.is_shared()
    assert t.share_memory_() is t
    assert t.is_shared()
    assert all(part.is_shared() for part in t.parts().values())
    assert torch.equal(t.dequantize(), before)


MEMORY: dict[str, Callable[[Tensor], Any]] = {
    "from_dlpack": torch.utils.dlpack.from_dlpack,
    "to_dlpack": torch.utils.dlpack.to_dlpack,  # type: ignore[attr-defined]
    "numpy": lambda w: w.numpy(),
    "numpy of a parameter": lambda w: nn.Parameter(w, requires_grad=False).detach().numpy(),
    "tolist": lambda w: w.tolist(),
    "apply_": lambda w: w.apply_(lambda value: value),
    "a kernel of torch": torch.fbgemm_pack_gemm_matrix_fp16,
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", MEMORY)
def test_memory_that_there_is_not(name: str, transposed: bool) -> None:
    weight = quantized(48, 64)
    with pytest.raises(TypeError, match=r"4-bit weight.*\.dequantize\(\)"):
        MEMORY[name](weight.t() if transposed else weight)
    if name != "apply_":
        MEMORY[name](weight.dequantize())  # the cure


def test_a_weight_whose_memory_was_freed() -> None:
    weight = quantized(48, 64)
    weight.qdata.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError)):
        torch.randn(2, 64) @ weight.t()


MESSAGE = r"TorchScript cannot hold a 4-bit weight; use torch\.export\.export"
X = torch.randn(2, 64)
TORCHSCRIPT: dict[str, Callable[[nn.Module], Any]] = {
    "trace": lambda model: torch.jit.trace(model, (X,)),
    "trace of a function": lambda model: torch.jit.trace(lambda x: model(x), (X,)),
    "trace of a product": lambda model: torch.jit.trace(lambda x: x @ model[0].weight.t(), (X,)),  # type: ignore[index]
    "trace_module": lambda model: torch.jit.trace_module(model, {"forward": (X,)}),
    "script": torch.jit.script,
}


@pytest.mark.parametrize("without_grad", [False, True])
@pytest.mark.parametrize("name", TORCHSCRIPT)
def test_torchscript_is_refused(name: str, without_grad: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 48)).requires_grad_(False)
    assert isinstance(model[0], nn.Linear)
    if name.startswith("trace"):
        TORCHSCRIPT[name](model)  # dense models are none of our business
    model[0].weight = nn.Parameter(quantized(48, 64), requires_grad=False)
    with torch.set_grad_enabled(not without_grad), pytest.raises(ValueError, match=MESSAGE):
        TORCHSCRIPT[name](model)
    exported = torch.export.export(model, (X,))  # the cure
    assert torch.equal(exported.module()(X), model(X))
    assert isinstance(model[0].weight, Int4OpaqueTensor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kernel", [pytest.param("auto", marks=pytest.mark.slow), "aten"])
def test_a_forked_child_computes(kernel: str) -> None:
    """Bias, activation functions and gradients too, which are torch's own and need no threads then."""
    done = run_child("forked_model", kernel)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_pool_of_sentence_transformers() -> None:
    pytest.importorskip("sentence_transformers")
    done = run_child("encode_in_a_pool")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_script_that_gets_a_weight_is_not_saved(tmp_path: Path) -> None:
    """It computes right, by torch's dispatcher; what it would save are zeros."""
    script: Any = torch.jit.script(nn.Linear(64, 48))
    torch.jit.save(script, tmp_path / "dense.pt")
    weight = quantized(48, 64)
    script.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(script(X), nn.functional.linear(X, weight, script.bias))
    for target in (tmp_path / "4-bit.pt", io.BytesIO()):
        with pytest.raises(ValueError, match=MESSAGE):
            torch.jit.save(script, target)
    assert not (tmp_path / "4-bit.pt").exists()
