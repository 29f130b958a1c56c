"""Sees which activations reach which weights, whatever module or function multiplies them.

It looks at the products of torch's dispatcher: a weight is known by where its numbers lie, so a view, a
transpose or the slice of one expert is known as well.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_int4cpu.algorithms.hessian import Hessian
from torchao_int4cpu.quantize.filters import is_input_first

aten = torch.ops.aten


class Watched:
    """A weight and what was seen of its inputs.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, or the transpose of these.
        input_first: whether it is the transpose.

    Attributes:
        hessians: one, or one for each expert.
    """

    def __init__(self, weight: Tensor, input_first: bool) -> None:
        self.weight = weight
        self.k = weight.shape[-2 if input_first else -1]
        count = weight.shape[0] if weight.ndim == 3 else 1
        self.hessians = [Hessian(self.k) for _ in range(count)]

    @property
    def rows(self) -> list[int]:
        """How many rows have reached it, or each expert."""
        return [hessian.rows for hessian in self.hessians]

    def expert(self, part: Tensor) -> int:
        """Of which matrix a view begins."""
        offset = (part.data_ptr() - self.weight.data_ptr()) // self.weight.element_size()
        return offset // (self.weight.numel() // len(self.hessians))


class Observer(TorchDispatchMode):
    """``with Observer(weights) as observer:`` run the model; `Hessian` of each weight are gathered.

    Args:
        weights: plain dense parameters by name, and the module that holds each.
    """

    def __init__(self, weights: Mapping[str, tuple[torch.nn.Module, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = {
            name: Watched(weight.detach(), is_input_first(module, weight))
            for name, (module, weight) in weights.items()
        }
        self._by_address = sorted(
            (each.weight.data_ptr(), each.weight.nbytes, name) for name, each in self.watched.items()
        )
        self._last: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _MADE_OF_PRODUCTS:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        look = _PRODUCTS.get(func)
        if look is not None:
            look(self, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def share_equal(self) -> None:
        """Keep one of equal Hessians, which is factorized once; no more can be observed after it."""
        self._last = None
        kept: dict[tuple[int, int], list[Hessian]] = {}
        for watched in self.watched.values():
            for i, hessian in enumerate(watched.hessians):
                others = kept.setdefault((watched.k, hessian.rows), [])
                same = next((other for other in others if torch.equal(other.sum, hessian.sum)), None)
                if same is None:
                    others.append(hessian)
                else:
                    watched.hessians[i] = same

    def find(self, part: Tensor) -> Watched | None:
        """The weight that a tensor is, or is a part of."""
        address = part.data_ptr()
        at = bisect.bisect_right(self._by_address, (address, 2**63, "")) - 1
        if at < 0:
            return None
        start, size, name = self._by_address[at]
        return self.watched[name] if address < start + size else None

    def product(self, x: Tensor, part: Tensor) -> bool:
        """See ``x @ part``, both of two dimensions; whether ``part`` is a weight or an expert of it."""
        watched = self.find(part)
        if watched is None or x.shape[-1] != watched.k or x.shape[0] == 0:
            return False
        watched.hessians[watched.expert(part)].add(self._gram(x), x.shape[0])
        return True

    def _gram(self, x: Tensor) -> Tensor:
        """``x^T x`` in float32; computed once for weights that share an input, as q, k and v do."""
        # A tensor of inference_mode does not say whether it has been written to since.
        key = (x.data_ptr(), x.shape, x.stride(), None if x.is_inference() else x._version)
        if self._last is None or self._last[1] != key or x.is_inference():
            floats = x.detach().float()
            self._last = (x, key, floats.t() @ floats)  # x is kept, so that its address stays its own
        return self._last[2]


def _mm(observer: Observer, a: Tensor, b: Tensor, **_: Any) -> None:
    if not observer.product(a, b):
        observer.product(b.t(), a.t())


def _addmm(observer: Observer, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> None:
    _mm(observer, a, b)


def _mv(observer: Observer, a: Tensor, x: Tensor) -> None:
    observer.product(x[None], a.t())


def _bmm(observer: Observer, a: Tensor, b: Tensor, **_: Any) -> None:
    for i in range(a.shape[0]):
        _mm(observer, a[i], b[i])


def _baddbmm(observer: Observer, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> None:
    _bmm(observer, a, b)


def _grouped_mm(
    observer: Observer, a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any
) -> None:
    if offs is None or a.ndim != 2 or b.ndim != 3:
        return
    start = 0
    for i, stop in enumerate(offs.tolist()):
        observer.product(a[start:stop], b[i])
        start = stop


#: What reaches the dispatcher whole in inference_mode, and else as the products that it is made of.
_MADE_OF_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.einsum.default}

_PRODUCTS: dict[Any, Callable[..., None]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.mv.default: _mv,
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
    aten._grouped_mm.default: _grouped_mm,
}
