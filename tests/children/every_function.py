"""Call torch's functions with a 4-bit weight and with its dense twin; print a line of JSON for each.

    python -m tests.children.every_function FIRST STEP

calls those from number FIRST on, each STEP-th. The number is printed before the call, so that the
parent of a child that died knows of what.
"""

from __future__ import annotations

import faulthandler
import inspect
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import get_testing_overrides, resolve_name

from torchao_int4cpu import Int4OpaqueTensor

#: Reads and changes that depend on chance, or on where memory lies: only their shape is compared.
CHANCE = (
    *(
        "bernoulli",
        "binomial",
        "cauchy",
        "dropout",
        "exponential",
        "geometric",
        "gumbel",
        "multinomial",
    ),
    *("normal", "poisson", "rand", "rrelu", "uniform", "empty", "new", "resize"),
    *("_cdata", "data_ptr", "storage", "_version", "__dir__", "__format__", "__hash__", "__repr__"),
    *("__sizeof__", "lowrank"),  # which starts from random numbers
)

#: These wait or change how torch works, or have tests of their own (pickles).
LEFT_OUT = ("set_default", "pin_memory", "record_stream", "register_hook", "lobpcg", "reduce_ex")


class Weight:
    """Stands for the weight in a pattern of arguments, and is replaced by it or by its twin."""


def functions() -> list[tuple[str, Callable[..., Any]]]:
    """Every function that torch says can be overridden, and every public method of a tensor."""
    found = {}
    for function in get_testing_overrides():
        name = resolve_name(function) or getattr(function, "__qualname__", repr(function))
        found[name] = function
    for attribute in dir(torch.Tensor):
        static = inspect.getattr_static(torch.Tensor, attribute)
        name = f"torch.Tensor.{attribute}"
        if attribute.startswith("__") or name in found or isinstance(static, property):
            continue
        if callable(getattr(torch.Tensor, attribute)):
            found[name] = getattr(torch.Tensor, attribute)
    names = sorted(name for name in found if not any(word in name for word in LEFT_OUT))
    return [(name, found[name]) for name in names]


def patterns(n: int, k: int) -> Iterator[tuple[Any, ...]]:
    """Arguments that many functions take."""
    rows, columns, square = torch.randn(5, k), torch.randn(n, 3), torch.randn(n, k)
    w = Weight()
    others: list[Any] = [rows, columns, square, torch.randn(k), torch.randn(n), w]
    numbers: list[Any] = [
        0,
        1,
        -1,
        2.0,
        True,
        (0, 1),
        torch.ones(n, k, dtype=torch.bool),
        torch.bfloat16,
    ]
    yield (w,)
    for other in (*others, *numbers, torch.tensor([0, 1]), "cpu", Int4OpaqueTensor):
        yield (w, other)
        yield (other, w)
    for other, number in itertools.product((w, square, rows, columns, 0, 1), (0, 1, 2.0, w)):
        yield (w, other, number)
        yield (other, w, number)
    yield ([w, w],)
    yield ([w, w], 0)
    yield (torch.tensor([0, 1]), w)
    yield ("nk,mk->nm", w, square)


def with_weight(pattern: Any, weight: Tensor) -> Any:
    """The arguments themselves, each tensor a copy."""
    if isinstance(pattern, Weight):
        return weight
    if isinstance(pattern, list):
        return [with_weight(each, weight) for each in pattern]
    return pattern.clone() if isinstance(pattern, Tensor) else pattern


def numbers_of(result: Any) -> Any:
    """A result without classes of ours."""
    if isinstance(result, Tensor):
        dequantize = getattr(result, "dequantize", None)
        is_ours = type(result).__module__ == "torchao_int4cpu"
        return dequantize() if is_ours and dequantize is not None else result.detach()
    if isinstance(result, (list, tuple)):
        return [numbers_of(each) for each in result]
    return result


def same(result: Any, expected: Any, shapes_only: bool) -> bool:
    """Whether two results are equal but for rounding: bfloat16 activations, 8 bits."""
    if isinstance(expected, Tensor):
        if not isinstance(result, Tensor) or result.shape != expected.shape:
            return False
        if shapes_only or not expected.numel():
            return True
        if result.dtype != expected.dtype:
            return False
        if not expected.dtype.is_floating_point:
            return bool(torch.equal(result, expected))
        # A product rounds its activation to bfloat16, each number by 2^-9 at most and at random, so the
        # sum of them by less than 5 * 2^-9 of the root mean square of such sums; the result once more.
        size = float(expected[expected.isfinite()].double().square().mean().sqrt().nan_to_num(0.0))
        return torch.allclose(
            result.double(), expected.double(), rtol=2.0**-7, atol=2.0**-6 * size, equal_nan=True
        )
    if isinstance(expected, list):
        return (
            isinstance(result, list)
            and len(result) == len(expected)
            and all(same(*pair, shapes_only) for pair in zip(result, expected))
        )
    if isinstance(expected, float) and isinstance(result, float):
        return abs(result - expected) <= 2.0**-6 * abs(expected) + 2.0**-5 or expected != expected
    return shapes_only or type(result) is not type(expected) or bool(result == expected)


def outcome(function: Callable[..., Any], name: str, weight: Tensor, n: int, k: int) -> Iterator[str]:
    """What happened for each pattern that the dense twin takes: "same", "refused", "WRONG ..."."""
    dense: Tensor = weight.dequantize()
    for pattern in patterns(n, k):
        twin, mine = dense.clone(), weight.clone()
        shown = [
            type(each).__name__ if isinstance(each, (Tensor, Weight)) else each for each in pattern
        ]
        try:
            torch.manual_seed(0)
            expected = numbers_of(function(*with_weight(list(pattern), twin)))
        except Exception:
            continue
        try:
            torch.manual_seed(0)
            result = numbers_of(function(*with_weight(list(pattern), mine)))
        except Exception as error:
            text = str(error)
            ours = "4-bit" in text or "torchao_int4cpu" in text
            unchanged = torch.equal(weight.dequantize(), mine.dequantize())
            if not unchanged:
                yield f"CHANGED by {shown}, and refused: {text[:100]}"
            yield "refused" if ours else f"UNNAMED for {shown}: {type(error).__name__}: {text[:160]}"
            continue
        by_chance = any(word in name for word in CHANCE)
        if not same(result, expected, by_chance):
            yield f"WRONG for {shown}: {str(result)[:80]} and not {str(expected)[:80]}"
        elif not by_chance and not same(mine.dequantize(), twin, False):
            yield f"WRONG for {shown}: the weight is not what the twin became"
        else:
            yield "same"


def main(first: str, step: str) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    n, k = 48, 64
    weight = Int4OpaqueTensor.from_hp(torch.randn(n, k), [1, 32])
    found = functions()
    for number in range(int(first), len(found), int(step)):
        name, function = found[number]
        print(number, name, flush=True)
        outcomes = list(outcome(function, name, weight, n, k))
        print(json.dumps(sorted(set(outcomes))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
