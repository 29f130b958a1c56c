"""Views of a 4-bit weight, the forms of products with them, and what each must be within."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.numerics import UNIT
from tests.weights import random_weight
from torchao_int4cpu.format.act_order import out_of_act_order

M, N, K = 5, 160, 128  # of what the products below are taken: the views of larger weights


#: Every kind of ``[160, 128]`` that there is.
VIEWS: dict[str, Callable[..., Any]] = {
    "whole": lambda **how: random_weight(N, K, **how),
    "rows, a view": lambda **how: random_weight(64 + N, K, **how)[64:],
    "rows, a copy": lambda **how: random_weight(300, K, **how).narrow(0, 7, N),
    "columns": lambda **how: random_weight(N, 256, **how)[:, 64:192],
    "of a stack": lambda **how: random_weight(3, N, K, **how)[1],
    "rows of a stack": lambda **how: random_weight(2, 64 + N, K, **how).narrow(1, 64, N)[1],
    "joined": lambda **how: torch.cat(random_weight(N, K, **how).split([60, 100])),
    "chosen": lambda **how: random_weight(200, K, **how)[torch.arange(199, 39, -1)],
    "turned twice": lambda **how: random_weight(N, K, **how).t().t(),
}

#: Every kind of ``[3, 160, 128]``.
STACKS: dict[str, Callable[..., Any]] = {
    "whole": lambda **how: random_weight(3, N, K, **how),
    "matrices": lambda **how: random_weight(5, N, K, **how)[1:4],
    "rows, a view": lambda **how: random_weight(3, 64 + N, K, **how)[:, 64:],
    "rows, a copy": lambda **how: random_weight(3, 170, K, **how)[:, 3:163],
    "columns": lambda **how: random_weight(3, N, 256, **how)[..., 64:192],
    "expanded": lambda **how: random_weight(N, K, **how).expand(3, -1, -1),
    "chosen": lambda **how: random_weight(4, N, K, **how)[torch.tensor([3, 0, 3])],
    "stacked": lambda **how: torch.stack(list(random_weight(3, N, K, **how))),
}

#: Products of x ``[5, 128]``, y ``[5, 160]``, bias z ``[160]`` and w ``[160, 128]``.
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "x w.t()": lambda x, y, z, w: torch.mm(x, w.t()),
    "x w.mT": lambda x, y, z, w: x @ w.mT,
    "y w": lambda x, y, z, w: torch.mm(y, w),
    "w x.t()": lambda x, y, z, w: torch.mm(w, x.t()),
    "w.t() y.t()": lambda x, y, z, w: w.t() @ y.t(),
    "linear": lambda x, y, z, w: F.linear(x, w, z),
    "linear of the transposed": lambda x, y, z, w: F.linear(y, w.t(), z[:K]),
    "linear of a row": lambda x, y, z, w: F.linear(x[0], w),
    "mv": lambda x, y, z, w: torch.mv(w, x[0]),
    "mv of the transposed": lambda x, y, z, w: w.t() @ y[0],
    "vector w.t()": lambda x, y, z, w: x[0] @ w.t(),
    "vector w": lambda x, y, z, w: y[0] @ w,
    "3 dimensions": lambda x, y, z, w: x.view(1, M, K) @ w.t(),
    "4 dimensions": lambda x, y, z, w: torch.matmul(x.view(1, M, 1, K), w.t()),
    "w, 3 dimensions": lambda x, y, z, w: torch.matmul(w, x.t().expand(2, K, M)),
    "w.t(), 3 dimensions": lambda x, y, z, w: w.t() @ y.t().expand(2, N, M),
    "addmm": lambda x, y, z, w: torch.addmm(z, x, w.t()),
    "addmm, scaled": lambda x, y, z, w: torch.addmm(z, x, w.t(), beta=0.5, alpha=2),
    "addmm, only the product": lambda x, y, z, w: torch.addmm(z * torch.inf, x, w.t(), beta=0),
    "addmm of w": lambda x, y, z, w: torch.addmm(z[:K], y, w),
    "addmm from the left": lambda x, y, z, w: torch.addmm(z[:, None], w, x.t(), alpha=3),
    "bmm of one": lambda x, y, z, w: torch.bmm(x[None], w.t()[None]),
    "one for all": lambda x, y, z, w: torch.bmm(x.expand(2, M, K), w.unsqueeze(0).expand(2, N, K).mT),
    "no rows": lambda x, y, z, w: x[:0] @ w.t(),
    "w, 4 dimensions": lambda x, y, z, w: w @ x.t().expand(2, 3, K, M),
    "matmul by keyword": lambda x, y, z, w: torch.matmul(input=x, other=w.t()),
}

#: Products of x ``[3, 5, 128]``, y ``[3, 5, 160]``, bias z ``[3, 5, 160]`` and w ``[3, 160, 128]``.
BATCHED: dict[str, Callable[..., Tensor]] = {
    "x w.mT": lambda x, y, z, w: torch.bmm(x, w.mT),
    "y w": lambda x, y, z, w: torch.bmm(y, w),
    "w x.mT": lambda x, y, z, w: torch.bmm(w, x.mT),
    "w.mT y.mT": lambda x, y, z, w: w.mT @ y.mT,
    "matmul": lambda x, y, z, w: x @ w.mT,
    "one x for all": lambda x, y, z, w: x[0] @ w.mT,
    "one x of 3 dimensions for all": lambda x, y, z, w: x[:1] @ w.mT,
    "baddbmm": lambda x, y, z, w: torch.baddbmm(z, x, w.mT),
    "baddbmm, scaled": lambda x, y, z, w: torch.baddbmm(z[:, :1], x, w.mT, beta=2, alpha=0.5),
    "linear of one": lambda x, y, z, w: F.linear(x[2], w[2], z[0, 0]),
    "grouped without groups": lambda x, y, z, w: (
        x @ w.mT if x.dtype == torch.float64 else F.grouped_mm(x, w.mT)
    ),
    "a vector for all": lambda x, y, z, w: x[0, 0] @ w.mT,
    "w, a vector for all": lambda x, y, z, w: w @ x[0, 0],
    "w, a matrix for all": lambda x, y, z, w: w @ x[0].t(),
    "4 dimensions": lambda x, y, z, w: x.expand(2, 3, M, K) @ w.mT,
    "4 dimensions, one for all": lambda x, y, z, w: x.view(3, 1, M, K) @ w.mT,
    "w, 4 dimensions": lambda x, y, z, w: torch.matmul(w, x.mT.expand(2, 3, K, M)),
    "a stack of one": lambda x, y, z, w: x @ w[1:2].mT,
    "a stack of one, a matrix": lambda x, y, z, w: y[0] @ w[:1],
    "no rows": lambda x, y, z, w: y[:, :0] @ w,
}

OFFS = torch.tensor([4, 4, 13], dtype=torch.int32)
#: Products of rows in groups: x ``[15, 128]``, y ``[15, 160]``.
GROUPED: dict[str, Callable[..., Tensor]] = {
    "grouped x w.mT": lambda x, y, z, w: grouped(x.view(-1, K), w.mT),
    "grouped y w": lambda x, y, z, w: grouped(y.view(-1, N), w),
}


def grouped(x: Tensor, experts: Any) -> Tensor:
    """`torch.nn.functional.grouped_mm`, or its meaning in float64, which torch does not take."""
    if x.dtype != torch.float64:
        result: Tensor = F.grouped_mm(x, experts, offs=OFFS)
        return result
    borders = itertools.pairwise([0, *OFFS.tolist()])
    parts = [x[a:b] @ experts[e] for e, (a, b) in enumerate(borders)]
    return torch.cat([*parts, x.new_zeros(len(x) - int(OFFS[-1]), experts.shape[-1])])


def operands(stack: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    x, y = torch.randn(*stack, M, K), torch.randn(*stack, M, N)
    z = torch.randn(*stack, M, N) if stack else torch.randn(N)
    return [t.to(dtype) for t in (x, y, z)]


def plain(w: Any) -> tuple[Tensor, Tensor]:
    """The matrix that multiplies, and what each of its numbers was summed up of; float64."""
    value = w.to_groupwise()
    scale, zero = (
        part.double().abs().repeat_interleave(value.group_size, -1)[..., : w.shape[-1]]
        for part in (value.scale, value.zero)
    )
    unit = 16 * scale + zero
    unit = out_of_act_order(unit, w.act_order)
    pre_scale = torch.ones(1) if w.act_pre_scale is None else w.act_pre_scale.double().reshape(-1)
    return value.dequantize(torch.float64) * pre_scale, unit * pre_scale


def assert_right(
    result: Tensor,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    w: Any,
    dtype: torch.dtype,
) -> None:
    """Within the bound that all kernels keep, elementwise; ``function`` is linear in each argument.

    With u = 2^-8: x and W rounded to bfloat16, the product rounded to bfloat16 and to ``dtype``, the
    bias added and all rounded once more, and a scale multiplied and rounded: 5u of the sum of absolute
    values. And 2^-24 for each of the K additions, of sums of the numbers that W is computed from.
    """
    dense, unit = plain(w)
    exact = function(*(t.detach().double() for t in inputs), dense)
    magnitudes = [t.detach().double().abs() for t in inputs]
    terms, largest = function(*magnitudes, dense.abs()), function(*magnitudes, unit)
    assert result.shape == exact.shape
    assert result.dtype == dtype
    u = max(UNIT[torch.bfloat16], UNIT[dtype])
    bound = 5.1 * u * terms + 2.0**-24 * (256 + 4) * largest + 1e-7
    error = (result.detach().double() - exact).abs()
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.2f} of the bound"


def assert_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], w: Any, run: Any = None
) -> None:
    """For x, y and z, as those of the same function of plain tensors; the bound as above."""
    dense, unit = plain(w)
    upstream = (
        torch.rand(function(*(t.double() for t in inputs), dense).shape, dtype=torch.float64) + 0.5
    )
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    result = (run or function)(*leaves, w)
    result.backward(upstream.to(result.dtype))

    def gradients(of: Tensor) -> list[Tensor | None]:
        # Absolute inputs have no part in it: the function is linear, and upstream is positive.
        plain_leaves = [t.detach().double().requires_grad_() for t in inputs]
        function(*plain_leaves, of).backward(upstream)
        return [leaf.grad for leaf in plain_leaves]

    for leaf, exact, terms, largest in zip(
        leaves, gradients(dense), gradients(dense.abs()), gradients(unit)
    ):
        if exact is None or terms is None or largest is None:
            assert leaf.grad is None
            continue
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        u = max(UNIT[torch.bfloat16], UNIT[leaf.dtype])
        bound = 6.1 * u * terms.abs() + 2.0**-24 * 512 * largest.abs() + 1e-7
        assert bool(((leaf.grad.double() - exact).abs() <= bound).all())
