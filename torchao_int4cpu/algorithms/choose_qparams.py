"""Quantize: float weight to `GroupwiseInt4` by min-max (``tinygemm``), ``hqq`` or ``mse``.

Each algorithm sees a chunk of groups ``[R, g]`` and returns codes ``[R, g]`` with scale and zero
``[R, 1]``; this module cuts a weight into such chunks, so that memory stays bounded, and gives the
short group at the end of each row a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _choose_qparams_and_quantize_affine_hqq,
    _quantize_affine_tinygemm,
)

from torchao_int4cpu.format.groupwise import (
    CODE_OFFSET,
    FLOAT_DTYPES,
    QPARAMS_DTYPE,
    GroupwiseInt4,
    check_group_size,
)

#: Smallest scale that torchao's min-max gives a group (its ``eps`` for this op).
TINYGEMM_MIN_SCALE = 1e-6

#: Smallest scale of ``mse``. A sixteenth of it is still a normal bfloat16.
MSE_MIN_SCALE = 2.0**-120

#: ``mse`` tries to pull each end of a group's range to these fractions of its half width. On the 36
#: linear weights of MiniLM (groups of 32 / 64 / 128) the grid of 4 x 4 gives 22.8 / 21.4 / 20.3 dB
#: SQNR, 3 x 3 gives 22.8 / 21.3 / 20.2, five symmetric fractions 22.6 / 21.2 / 20.1.
MSE_RANGE_FRACTIONS = (1.0, 0.9, 0.8, 0.7)

#: Rounds of "codes from (scale, zero), then (scale, zero) from codes" after the search.
MSE_REFIT_ROUNDS = 3

#: Elements an algorithm is given at once. Measured on a 4096 x 4096 weight, 2 cores: `mse` takes
#: 0.50 s with 2^20, 0.75 s with 2^18 (call overhead) and 3.1 s with 2^24 (out of the caches).
CHUNK_ELEMENTS = 1 << 20

GroupAlgorithm = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def choose_qparams(w: Tensor, group_size: int, algorithm: str = "tinygemm") -> GroupwiseInt4:
    """Quantize a weight.

    Args:
        w: bfloat16, float16 or float32 ``[N, K]`` on the CPU; any N >= 1 and K >= 1, all finite.
        group_size: 32, 64, 128 or 256.
        algorithm: a key of `ALGORITHMS`.

    Returns:
        Codes ``[N, K]`` with bfloat16 scale and zero ``[N, ceil(K / group_size)]``.

    Raises:
        TypeError: ``w`` has another dtype.
        ValueError: another argument breaks its rule, or a value of ``w`` is NaN or infinite.
    """
    check_group_size(group_size)
    run = algorithm_named(algorithm)
    check_weight(w)

    w = w.detach()
    n, k = w.shape
    codes = torch.empty(n, k, dtype=torch.uint8)
    scale = torch.empty(n, -(-k // group_size), dtype=QPARAMS_DTYPE)
    zero = torch.empty_like(scale)
    for rows, columns, groups, width in _chunks(n, k, group_size):
        part = w[rows, columns]
        part_codes, part_scale, part_zero = run(part.reshape(-1, width))
        codes[rows, columns] = part_codes.view(part.shape)
        scale[rows, groups] = part_scale.view(part.shape[0], -1).to(QPARAMS_DTYPE)
        zero[rows, groups] = part_zero.view(part.shape[0], -1).to(QPARAMS_DTYPE)
    return GroupwiseInt4(codes, scale, zero, group_size)


def check_weight(w: Tensor) -> None:
    """Refuse a weight that cannot be quantized.

    Raises:
        TypeError: the dtype is not bfloat16, float16 or float32.
        ValueError: rank, emptiness, device, or a NaN or infinite value.
    """
    if w.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight is {w.dtype}; convert it to bfloat16, float16 or float32 first")
    if w.ndim != 2 or w.numel() == 0:
        raise ValueError(
            f"weight has shape {list(w.shape)}; only [N, K] with N >= 1 and K >= 1 can be quantized"
        )
    if w.device.type != "cpu":
        if w.device.type == "meta":
            cure = "load its numbers first, with load_state_dict(state_dict, assign=True)"
        else:
            cure = "move it with .to('cpu')"
        raise ValueError(f"weight is on {w.device}; only CPU weights can be quantized, so {cure}")
    low, high = torch.aminmax(w.detach())  # both carry a NaN through, and need no copy of w
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        raise ValueError(
            "weight has NaN or infinite values; every value must be finite, "
            "so check the checkpoint it came from"
        )


def min_max(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torchao's own quantization for this op: the range of each group, in the dtype of the weight.

    ``scale = (max - min) / 15``, ``zero = min + 8 * scale``, codes from those before they are
    rounded for storage.
    """
    if groups.shape[1] == 1:  # torchao would take the range of the whole column for a group's
        codes, scale, zero = min_max(groups.expand(-1, 2).contiguous())
        return codes[:, :1], scale, zero
    block_size = [1, groups.shape[1]]
    scale, zero = _choose_qparams_affine_tinygemm(
        groups,
        MappingType.ASYMMETRIC,
        block_size,
        torch.int32,
        0,
        15,
        TINYGEMM_MIN_SCALE,
        None,
        groups.dtype,
    )
    codes = _quantize_affine_tinygemm(groups, block_size, scale, zero, torch.uint8, 0, 15)
    return codes, scale, zero


def hqq(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torchao's half-quadratic quantization (https://mobiusml.github.io/hqq_blog/).

    A group whose values are all equal has no range for it to divide by; min-max stands in there.
    """
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        groups,
        nbits=4,
        group_size=groups.shape[1],
        compute_dtype=torch.float32,
        device="cpu",
    )
    codes, scale, zero = (part.view(groups.shape[0], -1) for part in (codes, scale, zero))
    constant = groups.amin(1, keepdim=True) == groups.amax(1, keepdim=True)
    if bool(constant.any()):
        flat_codes, flat_scale, flat_zero = min_max(groups.float())
        codes = torch.where(constant, flat_codes, codes)
        scale = torch.where(constant, flat_scale.view(-1, 1), scale)
        zero = torch.where(constant, flat_zero.view(-1, 1), zero)
    return codes, scale, zero


class _Fit(NamedTuple):
    error: Tensor  # [R, 1], sum of squares over the group
    scale: Tensor  # [R, 1], float32 holding bfloat16 values
    zero: Tensor  # [R, 1], likewise


def mse(groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares: the (scale, zero) of each group with the smallest squared error we find.

    Args:
        groups: ``[R, g]``.
        importance: float32 ``[g]``, what the squared error of each column counts, positive; all the
            same if None.

    Both ends of the range are pulled in by `MSE_RANGE_FRACTIONS`, each against each. For given codes
    ``q`` (centred, -8..7) the best scale is ``cov(q, w) / var(q)``, and the best zero
    ``mean(w) - scale * mean(q)``; scale is rounded to the stored dtype before zero is computed from
    it, and zero before the error is, so that every error compared is the error that the stored
    numbers really have.
    """
    w = groups.float()

    def total(t: Tensor) -> Tensor:  # overwrites it
        return (t if importance is None else t.mul_(importance)).sum(1, keepdim=True)

    def average(t: Tensor) -> Tensor:
        if importance is None:
            return t.mean(1, keepdim=True)
        return (t * importance).sum(1, keepdim=True) / importance.sum()

    mean = average(w)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    centre, half = low / 2 + high / 2, high / 2 - low / 2  # halves first: the sum may overflow
    # All values equal: no range to divide, so let the scale carry what bfloat16 cuts off the value.
    constant_scale = ((centre - _stored(centre)).abs() / 7).clamp_(min=MSE_MIN_SCALE)

    def quantize(scale: Tensor, zero: Tensor) -> Tensor:
        return w.sub(zero).div_(scale).round_().clamp_(-CODE_OFFSET, 15 - CODE_OFFSET)

    def measure(codes: Tensor, scale: Tensor, zero: Tensor) -> _Fit:
        error = total(codes.mul(scale).add_(zero).sub_(w).square_())
        return _Fit(error, scale, zero)

    def refit(codes: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
        code_mean = average(codes)
        centred = codes - code_mean
        covariance = total(centred * w)
        scale = _stored(covariance / total(centred.square_()))
        usable = torch.isfinite(scale) & (scale >= MSE_MIN_SCALE)  # not if all codes are equal
        scale = torch.where(usable, scale, fallback)
        return scale, _stored(mean - scale * code_mean)

    best: _Fit | None = None
    for low_fraction in MSE_RANGE_FRACTIONS:
        for high_fraction in MSE_RANGE_FRACTIONS:
            scale = _stored(half * ((low_fraction + high_fraction) / 15))
            scale = torch.where(half > 0, scale.clamp_(min=MSE_MIN_SCALE), _stored(constant_scale))
            zero = _stored(
                torch.where(half > 0, centre - half * low_fraction + CODE_OFFSET * scale, centre)
            )
            codes = quantize(scale, zero)
            best = _better(best, measure(codes, scale, zero))
            scale, zero = refit(codes, scale)
            best = _better(best, measure(quantize(scale, zero), scale, zero))
    assert best is not None
    for _ in range(MSE_REFIT_ROUNDS):
        scale, zero = refit(quantize(best.scale, best.zero), best.scale)
        best = _better(best, measure(quantize(scale, zero), scale, zero))
    codes = quantize(best.scale, best.zero).add_(CODE_OFFSET).to(torch.uint8)
    return codes, best.scale, best.zero


def _stored(qparam: Tensor) -> Tensor:
    return qparam.to(QPARAMS_DTYPE).float()


def _better(best: _Fit | None, other: _Fit) -> _Fit:
    if best is None:
        return other
    wins = other.error < best.error
    return _Fit(*(torch.where(wins, new, old) for new, old in zip(other, best)))


ALGORITHMS: dict[str, GroupAlgorithm] = {"tinygemm": min_max, "hqq": hqq, "mse": mse}


def algorithm_named(name: object) -> GroupAlgorithm:
    """Return the function of that name; torchao's enum is a str, so it finds its entry as it is.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ValueError(
            f"int4_choose_qparams_algorithm={name!r} is not known; "
            f"choose {', '.join(map(repr, ALGORITHMS))}"
        )
    return ALGORITHMS[name]


def _chunks(n: int, k: int, group_size: int) -> Iterator[tuple[slice, slice, slice, int]]:
    """Yield (rows, columns, groups, group width) that cover the matrix once."""
    full_groups = k // group_size
    parts = []
    if full_groups:
        parts.append((slice(0, full_groups * group_size), slice(0, full_groups), group_size))
    if k % group_size:
        last = slice(full_groups, full_groups + 1)
        parts.append((slice(full_groups * group_size, k), last, k % group_size))
    for columns, groups, width in parts:
        rows = max(1, CHUNK_ELEMENTS // (columns.stop - columns.start))
        for start in range(0, n, rows):
            yield slice(start, min(n, start + rows)), columns, groups, width
