"""The version of this package, and what differs between the torch and torchao versions it runs on.

The build reads ``__version__`` without importing torch, so torch is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__version__ = "0.1.0"


def hide_from_dynamo(function: Callable[..., Any]) -> None:
    """Have `torch.compile` run a function, and what it calls, as it is: it compiles no part of it.

    `torch._dynamo.disable` does so too, but imports dynamo, which takes a second. As of torch 2.12 to
    2.15; where torch has it no more, dynamo may compile parts of the function, as it may of any.
    """
    from torch._C._dynamo import eval_frame

    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
