"""Handlers of ops that only read the numbers: elementwise ones and reductions, some rows at a time.

They give plain tensors, equal to those of the dequantized weight. What is not for every step of a model
(a norm, a check for NaN, a comparison) may cost time, but no dense copy of the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from torchao_int4cpu.dispatch.pieces import expanded, pieces
from torchao_int4cpu.dispatch.table import implements
from torchao_int4cpu.tensor.transposed import Int4Weight

aten = torch.ops.aten

#: Like-functions, which give a plain tensor of the shape.
_CREATED = {
    aten.zeros_like.default: torch.zeros,
    aten.ones_like.default: torch.ones,
    aten.rand_like.default: torch.rand,
    aten.randn_like.default: torch.randn,
}


def is_elementwise(func: Any) -> bool:
    """Whether an op gives a new tensor, each number of which depends on those at its place only."""
    return torch.Tag.pointwise in func.tags and not func._schema.is_mutable


def elementwise(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An elementwise op on weights, plain tensors and numbers."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    if any(t.shape != shape for t in tensors if isinstance(t, Int4Weight)):
        return func(*_dense(args), **_dense(kwargs))  # the result is larger than the weight
    result: Tensor | None = None
    for index, start, stop in pieces(shape):

        def piece(leaf: Any, at: tuple[int | None, int, int] = (index, start, stop)) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                return leaf
            return expanded(leaf if isinstance(leaf, Int4Weight) else leaf.expand(shape), *at)

        part = func(*tree_map(piece, args), **tree_map(piece, kwargs))
        if not isinstance(part, Tensor):  # as `torch.frexp`
            return func(*_dense(args), **_dense(kwargs))
        if result is None:
            result = part.new_empty(shape)
            _warn_if_expanded(func, result)
        target = result if index is None else result[index]
        target[start:stop] = part
    assert result is not None
    return result


def _dense(arguments: Any) -> Any:
    return tree_map(lambda leaf: leaf.dense() if isinstance(leaf, Int4Weight) else leaf, arguments)


def _warn_if_expanded(func: Any, result: Tensor) -> None:
    """A product or a sum of a weight may be meant for every step, which a check of it is not."""
    if result.dtype.is_floating_point and func.overloadpacket not in (aten.abs, aten.neg):
        warnings.warn(
            f"{func} expands a 4-bit weight of shape {list(result.shape)} to {result.nbytes} bytes on "
            "each call; call .dequantize() once and keep the result if that is meant",
            stacklevel=2,
        )


def _created(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def handle_like(
        t: Int4Weight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
    ) -> Tensor:
        return create(t.shape, dtype=dtype or t.dtype, device=device or t.device)

    return handle_like


for _op, _create in _CREATED.items():
    implements(_op)(_created(_create))


@implements(aten.full_like.default)
def handle_full_like(
    t: Int4Weight, fill: float, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> Tensor:
    """`torch.full_like`: a plain tensor."""
    return torch.full(t.shape, fill, dtype=dtype or t.dtype, device=device or t.device)


# --- reductions ---------------------------------------------------------------------------------


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1)


def _norm(x: Tensor, ord: float = 2) -> Tensor:
    return x.count_nonzero(-1).to(x.dtype) if ord == 0 else torch.linalg.vector_norm(x, ord, dim=-1)


def _whole(t: Int4Weight, over_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """``over_rows``, which reduces the last dimension, of all rows in float64: one result a row."""
    return torch.cat([over_rows(expanded(t, *at).double()) for at in pieces(t.shape)])


def _sum_of_squares(t: Int4Weight, mean: Tensor) -> Tensor:
    return _whole(t, lambda rows: (rows - mean).square().sum(-1)).sum()


def _reduced(t: Int4Weight, name: str, arguments: Mapping[str, Any]) -> Tensor:
    """A reduction of all dimensions, in float64."""
    if name in ("sum", "mean"):
        total = _whole(t, _sum).sum()
        return total / t.numel() if name == "mean" else total
    if name in ("linalg_vector_norm", "norm"):
        ord = arguments.get("ord", arguments.get("p"))
        ord = 2 if ord is None else ord
        rows = _whole(t, lambda rows: _norm(rows, ord))
        return rows.sum() if ord == 0 else _norm(rows, ord)
    if name in ("var", "std"):
        correction = arguments.get("correction")
        count = t.numel() - (1 if correction is None else correction)
        squares = _sum_of_squares(t, _whole(t, _sum).sum() / t.numel())
        variance: Tensor = squares / max(0, count)
        return variance.sqrt() if name == "std" else variance
    if name in ("any", "all"):
        decide = torch.any if name == "any" else torch.all
        decided: Tensor = decide(_whole(t, lambda rows: decide(rows != 0, dim=-1)))
        return decided
    if name == "count_nonzero":
        return _whole(t, lambda rows: rows.count_nonzero(-1)).sum()
    extreme = torch.amax if name in ("amax", "max") else torch.amin
    return extreme(_whole(t, lambda rows: extreme(rows, dim=-1)), dim=-1)


#: Reductions, and the dtype of the result: that of the weight where it is None.
_REDUCTIONS: dict[Any, torch.dtype | None] = {
    aten.sum.default: None,
    aten.sum.dim_IntList: None,
    aten.mean.default: None,
    aten.mean.dim: None,
    aten.linalg_vector_norm.default: None,
    aten.norm.Scalar: None,
    aten.norm.ScalarOpt_dim: None,
    aten.var.correction: None,
    aten.std.correction: None,
    aten.amax.default: None,
    aten.amin.default: None,
    aten.max.default: None,
    aten.min.default: None,
    aten.max.dim: None,
    aten.min.dim: None,
    aten.any.default: torch.bool,
    aten.any.dim: torch.bool,
    aten.all.default: torch.bool,
    aten.all.dim: torch.bool,
    aten.count_nonzero.default: torch.int64,
    aten.count_nonzero.dim_IntList: torch.int64,
}


def _reduction(func: Any, result_dtype: torch.dtype | None) -> Callable[..., Any]:
    names = [argument.name for argument in func._schema.arguments]
    name = func.overloadpacket.__name__

    def handle_reduction(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args)) | kwargs
        t = arguments["self"]
        dim = arguments.get("dim")
        dims = range(t.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        reduced = {each % t.ndim if -t.ndim <= each < t.ndim else each for each in dims}
        if reduced == set(range(t.ndim)):
            dtype = arguments.get("dtype") or result_dtype or t.dtype
            whole = _reduced(t, name, arguments).to(dtype)
            return whole.reshape([1] * t.ndim) if arguments.get("keepdim") else whole
        if t.ndim == 2 and reduced == {1}:
            return _joined([func(expanded(t, *at), *args[1:], **kwargs) for at in pieces(t.shape)], 0)
        if t.ndim == 2 and reduced == {0}:
            columns = t.t()
            parts = [expanded(columns, *at).t() for at in pieces(columns.shape)]
            return _joined([func(part, *args[1:], **kwargs) for part in parts], -1)
        return func(t.dense(), *args[1:], **kwargs)  # of a stack, or an error about the dimension

    return handle_reduction


def _joined(parts: Sequence[Any], dim: int) -> Any:
    """The results of all pieces as one; some reductions give two tensors."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), dim)
    return type(parts[0])([torch.cat(list(each), dim) for each in zip(*parts)])


for _op, _dtype in _REDUCTIONS.items():
    implements(_op)(_reduction(_op, _dtype))
