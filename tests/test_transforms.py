"""Derivatives and transforms over the activation: as of the dense twin.

Derivatives of a product are products with the same weight, so they err as products do: the kernels
round an activation to bfloat16, each number by 2^-9 of it at most, and so every norm by 2^-9, once in
a product and once more for each further one. `BOUND` is eight of these, for up to four products and the
sines between them, whose arguments are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from torchao_int4cpu import Int4OpaqueTensor, set_kernel

BOUND = 8 * 2.0**-9
N, K = 40, 96

Form = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Callable[[Tensor], Tensor]], Any]


@pytest.fixture(scope="module", params=["auto", "aten"])
def weight(request: pytest.FixtureRequest) -> Any:
    with set_kernel(request.param):
        dense = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / 8
        yield Int4OpaqueTensor.from_hp(dense, [1, 32])


_GENERATOR = torch.Generator().manual_seed(0)
BIAS, X, V, X3 = (torch.randn(s, generator=_GENERATOR) for s in ((N,), (5, K), (5, K), (3, 5, K)))

FORMS: dict[str, Form] = {
    "linear": lambda w, x: F.linear(x, w, BIAS),
    "linear without bias": lambda w, x: F.linear(x, w),
    "matmul": lambda w, x: x @ w.t(),
    "addmm": lambda w, x: torch.addmm(BIAS, x, w.t()),
    "there and back": lambda w, x: F.linear(x, w) @ w,
}


def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (f(x) / 4).sin().sum()


def _dual(f: Callable[[Tensor], Tensor]) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(X, V))))


def _dual_without_grad(f: Callable[[Tensor], Tensor]) -> Any:
    with torch.no_grad():
        return _dual(f)


def _double_backward(f: Callable[[Tensor], Tensor]) -> Any:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(f)(x), x, create_graph=True)
    return first, torch.autograd.grad(first.square().sum(), x)[0]


def _batched_grads(f: Callable[[Tensor], Tensor]) -> Any:
    x = X.clone().requires_grad_()
    y = f(x)
    v = torch.ones(4, *y.shape) * torch.arange(1, 5).reshape(4, 1, 1)
    return torch.autograd.grad(y, x, v, is_grads_batched=True)[0]


TRANSFORMS: dict[str, Transform] = {
    "vmap": lambda f: vmap(f)(X3),
    "vmap along another dimension": lambda f: vmap(f, in_dims=1)(X3.transpose(0, 1)),
    "vmap of vmap": lambda f: vmap(vmap(f))(X3[None]),
    "grad": lambda f: grad(scalar(f))(X),
    "grad of grad": lambda f: grad(lambda x: grad(scalar(f))(x).sum())(X),
    "vjp": lambda f: vjp(f, X)[1](torch.ones_like(f(X)))[0],
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "jacrev": lambda f: jacrev(f)(X),
    "jacfwd": lambda f: jacfwd(f)(X),
    "hessian": lambda f: hessian(scalar(f))(X[:2]),
    # Torch's rules for batches expand the weight for this one.
    "hessian of a sum": lambda f: hessian(lambda x: f(x).sum().square() / 2)(X[:2]),
    "vmap of grad": lambda f: vmap(grad(scalar(f)))(X3),
    "linearize": lambda f: linearize(f, X)[1](V),
    "functionalize": lambda f: functionalize(f)(X),
    "forward mode": _dual,
    "forward mode without grad": _dual_without_grad,
    "double backward": _double_backward,
    "a batch of grads": _batched_grads,
    "hvp": lambda f: torch.autograd.functional.hvp(scalar(f), X, V)[1],
    "jacobian": lambda f: torch.autograd.functional.jacobian(f, X, vectorize=True),
    "make_fx": lambda f: make_fx(f)(X)(V),
    "make_fx of grad": lambda f: make_fx(grad(scalar(f)))(X)(V),
    "compiled vmap": lambda f: torch.compile(lambda x: vmap(f)(x), backend="aot_eager")(X3),
    "compiled grad": lambda f: torch.compile(lambda x: grad(scalar(f))(x), backend="aot_eager")(X),
}


def _cases() -> Iterator[Any]:
    """Every pair; those that take long for one form only, but in the slow tests."""
    for form in FORMS:
        for transform in TRANSFORMS:
            is_slow = transform in SLOW and form != "linear"
            yield pytest.param(form, transform, marks=[pytest.mark.slow] if is_slow else [])


SLOW = ("jacobian", "hessian", "hessian of a sum", "compiled vmap", "compiled grad")


@pytest.mark.parametrize(("form", "transform"), _cases())
def test_a_transform_is_that_of_the_dense_twin(
    weight: Int4OpaqueTensor, form: str, transform: str
) -> None:
    assert type(weight) is Int4OpaqueTensor
    assert weight.qdata.nbytes == 48 * K // 2  # N is padded to 48
    dense = weight.dequantize()
    ours = TRANSFORMS[transform](lambda x: FORMS[form](weight, x))
    twin = TRANSFORMS[transform](lambda x: FORMS[form](dense, x))
    pairs = zip(ours, twin, strict=True) if isinstance(ours, tuple) else [(ours, twin)]
    for value, expected in pairs:
        assert value.shape == expected.shape
        assert float((value - expected).norm()) <= BOUND * float(expected.norm())
        assert float(expected.norm()) > 0


def test_transforms_over_a_bias(weight: Int4OpaqueTensor) -> None:
    layer = nn.Linear(K, N)
    twin = nn.Linear(K, N)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    twin.weight = nn.Parameter(weight.dequantize())
    biases = torch.randn(7, N)

    def of(module: nn.Module) -> Tensor:
        y: Tensor = vmap(lambda bias: functional_call(module, {"bias": bias}, (X,)))(biases)
        return y

    assert float((of(layer) - of(twin)).norm()) <= BOUND * float(of(twin).norm())
    slope = grad(lambda bias: functional_call(layer, {"bias": bias}, (X,)).sum())(biases[0])
    assert torch.equal(slope, torch.full((N,), 5.0))


@pytest.mark.parametrize("wants_grad", [False, True])
def test_operations_are_counted(weight: Int4OpaqueTensor, wants_grad: bool) -> None:
    counts = []
    for w in (weight, weight.dequantize()):
        x = X.clone().requires_grad_(wants_grad)
        with FlopCounterMode(display=False) as counter:
            y = F.linear(x, w, BIAS)
            if wants_grad:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == (1 + wants_grad) * 2 * 5 * N * K


@pytest.mark.parametrize("convert", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("form", ["linear", "matmul"])
def test_an_activation_without_dense_memory_is_refused(
    weight: Int4OpaqueTensor, convert: str, form: str
) -> None:
    x = getattr(X, convert)()
    with pytest.raises((TypeError, ValueError), match=r"beside a 4-bit weight; .* call \.to_dense\(\)"):
        FORMS[form](weight, x)
    y = FORMS[form](weight, x.to_dense())
    assert torch.equal(y, FORMS[form](weight, X))


def test_nested_activations(weight: Int4OpaqueTensor) -> None:
    rows = [X, X[:2]]
    with pytest.raises(TypeError, match=r"nested activation .* layout torch\.jagged"):
        F.linear(torch.nested.nested_tensor(rows), weight)
    y = F.linear(torch.nested.nested_tensor(rows, layout=torch.jagged), weight)
    for part, x in zip(y.unbind(), rows, strict=True):
        expected = F.linear(x, weight)
        assert torch.equal(part, expected)


def test_a_mode_sees_the_op(weight: Int4OpaqueTensor) -> None:
    """Also one of functions, which a device context is."""
    with torch.device("cpu"):
        assert torch.equal(F.linear(X, weight), F.linear(X, weight))
