"""``info``: what runs here, and why."""

from __future__ import annotations

import argparse

from torchao_int4cpu.commands.environment import environment
from torchao_int4cpu.commands.options import Commands
from torchao_int4cpu.kernels.selection import kernel_choices


def add_to(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("info", help="what runs here, and why")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print versions, the CPU, the layout, and which kernel runs for how many rows."""
    for name, value in environment().items():
        print(f"{name:<16} {value}")
    print("kernel by rows of the activation (M):")
    for choice in kernel_choices():
        print(f"  {choice.rows:<40} {choice.kernel:<9} {choice.reason}")
    return 0
