"""``torchao-int4cpu COMMAND``, or ``python -m torchao_int4cpu COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torchao_int4cpu.commands import bench, compare, convert, demo, export, info, inspect, quantize
from torchao_int4cpu.extras import MissingExtra

#: The script that an installation puts on the path.
SCRIPT = "torchao-int4cpu"


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    started_by_name = Path(sys.argv[0]).stem == SCRIPT
    made = argparse.ArgumentParser(
        prog=SCRIPT if started_by_name else "python -m torchao_int4cpu",
        description="4-bit weights on the CPU.",
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, bench, info, quantize, compare, convert, export, inspect):
        command.add_to(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (MissingExtra, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
