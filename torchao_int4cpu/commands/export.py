"""``export SRC OUT --format F``: a 4-bit directory of ours for another tool; a bar, then a table."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from torchao_int4cpu.commands.options import Commands
from torchao_int4cpu.commands.written import bytes_bar, bytes_of, interrupted, print_report
from torchao_int4cpu.convert.export import FORMATS, export_directory
from torchao_int4cpu.convert.gguf_export import export_gguf
from torchao_int4cpu.convert.shards import Report


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "export", help="a 4-bit directory of this package in the format of another tool"
    )
    command.add_argument("source", type=Path, metavar="SRC", help="a 4-bit directory")
    command.add_argument("out", type=Path, metavar="OUT", help="directory to make; of gguf, a file")
    command.add_argument("--format", required=True, choices=sorted([*FORMATS, "gguf"]))
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, and print what became of the tensors, and what it cost."""
    try:
        with bytes_bar(bytes_of(args.source)) as progress:
            if args.format == "gguf":
                report = export_gguf(args.source, args.out, progress)
            else:
                report = export_directory(args.source, args.out, args.format, progress)
    except KeyboardInterrupt:
        if args.format == "gguf":
            print("interrupted; nothing is written, begin again", file=sys.stderr)
            return 130
        return interrupted()
    print_report(report, args.out, ("zeros", _cost(report)))
    return 0


def _cost(report: Report) -> str:
    """Zeros become whole numbers of scales, or minima in float16; a weight that they were not moves."""
    if report.worst.sqnr == math.inf:
        return "exact"
    return (
        f"rounded: worst SQNR {report.worst.sqnr:.1f} dB ({report.worst.name}), median "
        f"{report.median_sqnr:.1f} dB"
    )
