"""GPTQ (https://arxiv.org/abs/2210.17323): rounds the columns of a weight one after the other, and has
the columns that are left make up for the error of each, as far as the inputs of the weight allow it.

With U upper triangular and ``U^T U = H^-1``, each column j after a column k that is rounded to q gets
``-(w_k - q) / U[k, k] * U[k, j]`` added, which minimizes the error of the outputs that is left. Scales
and zeros of a group are chosen when its first column comes: by ``mse`` for the weight as corrected so
far, where the error of a column counts as much as the squares of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.algorithms.choose_qparams import check_weight, choose_qparams, mse
from torchao_int4cpu.algorithms.hessian import DAMPING, Hessian
from torchao_int4cpu.format.groupwise import (
    CODE_OFFSET,
    QPARAMS_DTYPE,
    GroupwiseInt4,
    check_group_size,
)

#: Columns whose errors are carried on together to all later ones, as one product of matrices; a group
#: at least, since a group's scales need all columns of it as corrected so far.
BLOCK_COLUMNS = 128

#: Of a column that no input reaches, beside 1 for the mean of all; with less, a group of such columns
#: would have no scale.
LEAST_IMPORTANCE = 1e-6

#: Elements of a weight that are rounded at once, a copy in float32.
CHUNK_ELEMENTS = 1 << 24


class Fitted(NamedTuple):
    """A quantized weight, and what that does to its outputs X w on the inputs that are known.

    Attributes:
        value: the weight.
        error: ``|X (W - W')^T| / |X W^T|``, Frobenius norms; 0 without inputs.
    """

    value: GroupwiseInt4
    error: float


def gptq(w: Tensor, hessian: Hessian, group_size: int, damping: float = DAMPING) -> Fitted:
    """Quantize a weight for the inputs that it has.

    A row whose outputs would be nearer if it were rounded to nearest, by ``mse``, is rounded so.

    Args:
        w: bfloat16, float16 or float32 ``[N, K]`` on the CPU, finite.
        hessian: of its inputs. Columns that no input has reached are rounded to nearest.
        group_size: 32, 64, 128 or 256.
        damping: see `DAMPING`.

    Returns:
        The weight as by `choose_qparams`, codes ``[N, K]`` with bfloat16 scale and zero.

    Raises:
        TypeError: ``w`` has another dtype.
        ValueError: another argument breaks its rule, or the inputs give no positive definite matrix.
    """
    check_group_size(group_size)
    check_weight(w)
    k = w.shape[1]
    if list(hessian.sum.shape) != [k, k]:
        raise ValueError(
            f"the inputs have {hessian.sum.shape[0]} columns and the weight {k}; give the Hessian of "
            "this weight"
        )
    factor = hessian.inverse_factor(damping)
    importance = _importance(hessian.sum.diagonal())
    return _fitted(w, hessian, group_size, lambda exact: _fit(exact, factor, importance, group_size))


def rounded(w: Tensor, hessian: Hessian, group_size: int) -> Fitted:
    """Round a weight to nearest by ``mse``; arguments as for `gptq`."""
    return _fitted(w, hessian, group_size, None)


def _fitted(
    w: Tensor, hessian: Hessian, group_size: int, fit: Callable[[Tensor], GroupwiseInt4] | None
) -> Fitted:
    """By ``mse``, but for the rows that ``fit`` makes better."""
    value = choose_qparams(w, group_size, "mse")
    noise = signal = 0.0
    for rows in _rows(*w.shape):
        exact, part = w.detach()[rows].float(), _part(value, rows)
        error = hessian.squared_outputs(exact - part.dequantize())
        if fit is not None:
            other = fit(exact)
            its_error = hessian.squared_outputs(exact - other.dequantize())
            better = its_error <= error
            for name in ("codes", "scale", "zero"):
                getattr(part, name)[better] = getattr(other, name)[better]
            error = torch.minimum(error, its_error)
        noise += float(error.sum())
        signal += float(hessian.squared_outputs(exact).sum())
    return Fitted(value, (noise / signal) ** 0.5 if signal > 0 else 0.0)


def _part(value: GroupwiseInt4, rows: slice) -> GroupwiseInt4:
    """Rows of a value; a view."""
    return GroupwiseInt4(value.codes[rows], value.scale[rows], value.zero[rows], value.group_size)


def _rows(n: int, k: int) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // k)
    for start in range(0, n, rows):
        yield slice(start, min(n, start + rows))


def _importance(squares: Tensor) -> Tensor:
    """What the error of each column counts, for inputs of these sums of squares; never nothing.

    Divided by its mean, as only ratios matter, and sums of what comes out must not overflow.
    """
    mean = squares.mean()
    return (squares / mean if float(mean) > 0 else torch.ones_like(squares)).clamp_(
        min=LEAST_IMPORTANCE
    )


def _fit(exact: Tensor, factor: Tensor, importance: Tensor, group_size: int) -> GroupwiseInt4:
    """GPTQ itself, for some rows of a weight, float32 ``[R, K]``."""
    w = exact.t().contiguous()  # columns are rows here, so that each lies together
    k, n = w.shape
    codes = torch.empty(k, n, dtype=torch.uint8)
    scale = torch.empty(n, -(-k // group_size), dtype=QPARAMS_DTYPE)
    zero = torch.empty_like(scale)
    block = max(BLOCK_COLUMNS, group_size)
    for start in range(0, k, block):
        stop = min(k, start + block)
        errors = torch.empty_like(w[start:stop])
        for column in range(start, stop):
            if column % group_size == 0:
                group, of_group = column // group_size, slice(column, min(k, column + group_size))
                _, s, z = mse(w[of_group].t().contiguous(), importance[of_group])
                scale[:, group], zero[:, group] = s[:, 0], z[:, 0]
                s, z = s[:, 0].contiguous(), z[:, 0].contiguous()
            code = ((w[column] - z) / s).round_().clamp_(-CODE_OFFSET, 15 - CODE_OFFSET)
            error = (w[column] - (code * s + z)).div_(factor[column, column])
            w[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
            codes[column] = code.add_(CODE_OFFSET)
        if stop < k:
            w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return GroupwiseInt4(codes.t().contiguous(), scale, zero, group_size)
