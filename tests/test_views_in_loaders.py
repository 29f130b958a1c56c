"""torchao's own checks of views, and how vLLM's loaders cut and fill 4-bit weights."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_
from torchao.testing.utils import TorchAOIntegrationTestCase

from tests.weights import random_weight
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig


class OnTheCpu(TorchAOIntegrationTestCase):  # type: ignore[misc]  # has no annotations
    """`TorchAOIntegrationTestCase` as it is, where only the device is another."""

    def setUp(self) -> None:
        class LinearOnTheCpu(nn.Linear):
            def __init__(self, *args: Any, device: object = None, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)

        for patch in (
            mock.patch("torch.accelerator.is_available", return_value=True),
            mock.patch(
                "torchao.testing.utils.get_current_accelerator_device",
                return_value=torch.device("cpu"),
            ),
            mock.patch("torch.nn.Linear", LinearOnTheCpu),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def test_slice_and_copy_similar_to_vllm(self) -> None:
        self._test_slice_and_copy_similar_to_vllm(Int4WeightOnlyConfig())

    def test_narrow_similar_to_vllm(self) -> None:
        self._test_narrow_similar_to_vllm(Int4WeightOnlyConfig())

    def test_chunk_similar_to_vllm_llama4(self) -> None:
        for shape in ((128, 256), (100, 320), (2, 128, 256)):
            for dim in range(len(shape)):
                self._test_chunk_similar_to_vllm_llama4(random_weight(*shape), dim)


def test_quantize_3d_param_similar_to_vllm() -> None:
    """Smaller than torchao's, which takes 700 MB: matrices of a checkpoint become a stack in memory."""
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.randn(6, 96, 64))
    quantize_(linear, Int4WeightOnlyConfig(group_size=32))
    weight: Any = linear.weight
    assert isinstance(weight, Int4OpaqueTensor)
    matrices = [random_weight(96, 64, dtype=torch.float32, seed=seed) for seed in range(6)]
    for expert, matrix in enumerate(matrices):
        weight.data[expert].copy_(matrix)
    for expert, matrix in enumerate(matrices):
        assert torch.equal(weight[expert].dequantize(), matrix.dequantize())


def test_fused_qkv_as_vllm_loads_it() -> None:
    """Query, key and value from checkpoints of any layout; the projection is that of each."""
    parts = [
        random_weight(n, 128, layout=layout, seed=i)
        for i, (n, layout) in enumerate([(256, "avx512"), (64, "avx2"), (64, "default")])
    ]
    fused = nn.Parameter(random_weight(384, 128, seed=9), requires_grad=False)
    start = 0
    for part in parts:
        fused.data.narrow(0, start, part.shape[0]).copy_(part)
        start += part.shape[0]
    assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))
    x = torch.randn(3, 128)
    y = F.linear(x, fused)
    assert torch.equal(y, torch.cat([F.linear(x, part) for part in fused.split([256, 64, 64])], 1))


def test_slicing_packed_bytes_along_k_mixes_up_the_weight() -> None:
    """As two published patches do. Bytes run along K inside a block: half of them are half its rows."""
    w = Int4OpaqueTensor.from_hp(torch.randn(256, 512), [1, 128])
    half = w.dequantize()[:, :256]

    def error(t: Any) -> float:
        return float((t.dequantize() - half).norm() / half.norm())

    sliced = Int4OpaqueTensor(
        w.qdata[:, :128].contiguous(),
        w.scale_and_zero[:2].contiguous(),
        [1, 128],
        (256, 256),
        w.qdata_layout,
        w.dtype,
    )
    assert error(sliced) > 1
    assert error(w.narrow(1, 0, 256)) == 0
