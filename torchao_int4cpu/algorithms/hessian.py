"""What the inputs of a weight say of its columns: ``H = sum x x^T`` over the rows x of activations.

A rounded weight changes the outputs by ``sum |(W - W') x|^2 = trace((W - W') H (W - W')^T)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to the diagonal of H, relative to its mean, before H is inverted: columns that hardly vary
#: would be changed without bounds to make up for others. The usual value of GPTQ.
DAMPING = 0.01

#: How often `Hessian.inverse_factor` tries with ten times the damping.
DAMPING_TRIES = 4


class Hessian:
    """The sum over the rows of activations that have reached a weight.

    Args:
        k: columns of the weight.

    Attributes:
        sum: float32 ``[K, K]``.
        rows: how many there were.
    """

    def __init__(self, k: int) -> None:
        self.sum = torch.zeros(k, k)
        self.rows = 0
        self._factor: tuple[float, Tensor] | None = None

    def add(self, gram: Tensor, rows: int) -> None:
        """Add ``x^T x`` of an activation x of so many rows."""
        self.sum.add_(gram)
        self.rows += rows
        self._factor = None

    def squared_outputs(self, w: Tensor) -> Tensor:
        """``|X w|^2`` for each row w of a weight ``[N, K]``, float32 ``[N]``."""
        w = w.float()
        return (w @ self.sum).mul_(w).sum(1).clamp_(min=0.0)

    def inverse_factor(self, damping: float = DAMPING) -> Tensor:
        """The upper triangular U with ``U^T U = H^-1``, H damped; of a column without inputs, 1 alone.

        Args:
            damping: see `DAMPING`; ten times as much, and so on, if H is still not positive definite.

        Raises:
            ValueError: it is not, whatever the damping, or has values that are NaN or infinite.
        """
        if self._factor is None or self._factor[0] != damping:
            self._factor = (damping, _inverse_factor(self.sum, damping))
        return self._factor[1]


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    if not bool(hessian.isfinite().all()):
        raise ValueError(
            "the inputs of the weight have NaN or infinite values, or their squares have; check the "
            "calibration data, and run a float16 model in bfloat16 or float32"
        )
    squares = hessian.diagonal()
    squares = torch.where(squares > 0, squares, 1.0)  # 1 where nothing has reached a column
    for attempt in range(DAMPING_TRIES):
        damped = hessian.clone()
        damped.diagonal().copy_(squares + damping * 10**attempt * squares.mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # it is as large as the weight, or larger
        if bool(failed):
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not bool(failed) and bool(upper.isfinite().all()):
            return upper
    raise ValueError(
        "the inputs of the weight give no positive definite matrix, whatever is added to its diagonal; "
        "check the calibration data for values that are very large"
    )
