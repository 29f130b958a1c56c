"""The version of this package, and what differs between the torch and torchao versions it runs on.

The build reads ``__version__`` without importing torch, so torch is imported where it is used.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"

#: The newest versions that the tests were run with. The oldest are in pyproject.toml.
NEWEST_TESTED = {"torch": (2, 15), "torchao": (0, 18)}


#: transformers before this loses buffers of embeddings, and files of experts, of torchao's weights.
OLDEST_TRANSFORMERS = (5, 16)


def untested(found: dict[str, str]) -> list[str]:
    """Which of these versions, by package, are newer than `NEWEST_TESTED`."""
    newer = []
    for package, version in found.items():
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers and (int(numbers[1]), int(numbers[2])) > NEWEST_TESTED[package]:
            newer.append(f"{package} {version}")
    return newer


def warn_of_untested() -> None:
    """Warn if torch or torchao is newer than any version that was tested.

    It works as far as the self-checks at import pass: the layout is found by asking PyTorch's op, and a
    native kernel that computes a wrong number is not used. Python shows the warning once.
    """
    import torch
    import torchao

    newer = untested({"torch": torch.__version__, "torchao": torchao.__version__})
    if newer:
        warnings.warn(
            f"torchao_int4cpu {__version__} was not tested with {' and '.join(newer)}; it goes by its "
            "self-checks (python -m torchao_int4cpu info shows them), so compare an output with a "
            "known one, or install a newer torchao_int4cpu",
            stacklevel=3,
        )


def warn_of_old_transformers(version: str) -> None:
    """Warn if transformers is older than `OLDEST_TRANSFORMERS`."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        warnings.warn(
            f"transformers {version} loses buffers of 4-bit embeddings and files of 4-bit experts; "
            f"install transformers {oldest} or newer, or keep both dense",
            stacklevel=3,
        )


def hide_from_dynamo(function: Callable[..., Any]) -> None:
    """Have `torch.compile` run a function, and what it calls, as it is: it compiles no part of it.

    `torch._dynamo.disable` does so too, but imports dynamo, which takes a second. As of torch 2.13 to
    2.15; where torch has it no more, dynamo may compile parts of the function, as it may of any.
    """
    from torch._C._dynamo import eval_frame

    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)


def empty_strided() -> Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]:
    """A function ``(size, stride, dtype)`` that makes an uninitialized tensor on the CPU.

    The one that compiled programs of torch's inductor call takes 0.4 microseconds, `torch.empty` 0.7.
    """
    import torch
    from torch._C import _dynamo

    quick: Any = getattr(_dynamo.guards, "_empty_strided_cpu", None)
    if quick is not None:
        return cast("Callable[..., torch.Tensor]", quick)
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cpu")


def replace_call_of_op(op: Any, of: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Have Python's calls of an op, those of compiled graphs among them, made by another function.

    Call it as soon as the op is defined: torch 2.13 takes the hash of the op from that function.

    Args:
        op: an overload, of `torch.ops`.
        of: makes the function, of the one that calls torch's dispatcher. It must do the same, and call
            that wherever something besides the kernel is to see the call.
    """
    dispatch = getattr(op, "_op", None)  # as of torch 2.13 to 2.15, which swaps it itself
    if dispatch is not None:
        op._op = of(dispatch)
