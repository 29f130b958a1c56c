"""What the options of several commands have in common."""

from __future__ import annotations

import argparse
from typing import TypeAlias

import torch

#: What ``ArgumentParser.add_subparsers`` returns; a string, as the class takes no index when it runs.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

#: Values of ``--dtype``.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
