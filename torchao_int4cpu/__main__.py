"""``python -m torchao_int4cpu demo | bench | info | quantize | inspect``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchao_int4cpu.commands import bench, demo, info, inspect, quantize
from torchao_int4cpu.extras import MissingExtra


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchao_int4cpu", description="4-bit weights on the CPU."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, bench, info, quantize, inspect):
        command.add_to(commands)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except (MissingExtra, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
