"""Share a 4-bit model with a spawned process, which changes it and sends a product back."""

from __future__ import annotations

from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import torchao_int4cpu  # noqa: F401  # registers how a queue sends a weight
from torchao_int4cpu import Int4OpaqueTensor


def multiply(model: nn.Module, queue: Any, results: Any) -> None:
    """Multiply with a model and a sent weight, then double the weight of the model in shared memory."""
    weight, x = queue.get()
    results.put((model(x), x @ weight))
    layer = model.get_submodule("0")
    assert isinstance(layer.weight, Tensor)
    layer.weight.mul_(2)
    results.put(True)
    queue.get()  # what was sent is fetched from this process, so it stays until it is asked to end


def main() -> None:
    for transposed in (False, True):
        weight = Int4OpaqueTensor.from_hp(torch.randn(48, 70), [1, 32])
        model = nn.Sequential(nn.Linear(70, 48)).requires_grad_(False)
        layer = model[0]
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        assert not layer.weight.is_shared()
        assert model.share_memory() is model
        assert layer.weight.is_shared()
        sent: Any = Int4OpaqueTensor.from_hp(torch.randn(70, 40), [1, 32])
        if transposed:
            sent = Int4OpaqueTensor.from_hp(torch.randn(40, 70), [1, 32]).t()
        x = torch.randn(3, 70)
        before = model(x)

        context = mp.get_context("spawn")
        queue, results = context.Queue(), context.Queue()
        process = context.Process(target=multiply, args=(model, queue, results))
        process.start()
        queue.put((sent, x))
        product, other = results.get(timeout=120)
        assert torch.equal(product, before)
        assert torch.equal(other, x @ sent)
        assert results.get(timeout=120)
        queue.put(None)
        process.join()
        assert process.exitcode == 0
        # What the child did to shared memory is seen here.
        doubled = (before - layer.bias) * 2 + layer.bias
        assert torch.allclose(model(x), doubled, rtol=1e-6, atol=1e-5)


if __name__ == "__main__":
    main()
