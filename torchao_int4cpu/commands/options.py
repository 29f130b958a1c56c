"""What the options of several commands have in common."""

from __future__ import annotations

import argparse
from typing import TypeAlias

import torch

#: What ``ArgumentParser.add_subparsers`` returns; a string, as the class takes no index when it runs.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

#: Values of ``--dtype``.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shape(text: str) -> tuple[int, int]:
    """Read ``NxK``: the type of an option.

    Raises:
        ArgumentTypeError: it is something else.
    """
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write NxK, as in 4096x4096")
    return int(n), int(k)
