"""``quantize SRC OUT``: a Hugging Face directory in 4 bits; a bar while it works, then a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS
from torchao_int4cpu.commands.options import DTYPES, Commands
from torchao_int4cpu.commands.written import bytes_bar, interrupted, print_report
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.plan import make_plan
from torchao_int4cpu.format.groupwise import GROUP_SIZES
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "quantize", help="a Hugging Face directory in 4 bits, without its model in memory"
    )
    command.add_argument("source", type=Path, metavar="SRC", help="directory with safetensors files")
    command.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    command.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES)
    command.add_argument("--algorithm", default="mse", choices=sorted(ALGORITHMS))
    command.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="modules to leave dense: how a name begins or ends, or a regular expression; repeatable",
    )
    command.add_argument("--head", action="store_true", help="quantize the output head (lm_head) too")
    command.add_argument(
        "--embeddings",
        action="store_true",
        help="quantize the input embedding too; a head that is tied to it shares its 4-bit weight",
    )
    command.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of the model; without it what config.json says"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantize, and print what became of the tensors."""
    config = Int4WeightOnlyConfig(
        group_size=args.group_size, int4_choose_qparams_algorithm=args.algorithm
    )
    dtype = DTYPES[args.dtype] if args.dtype else None
    plan = make_plan(
        args.source,
        config,
        skip=args.skip,
        head=args.head,
        embeddings=args.embeddings,
        dtype=dtype,
    )
    try:
        with bytes_bar(sum(tensor.source.nbytes for tensor in plan.tensors)) as progress:
            report = quantize_directory(plan, args.out, progress)
    except KeyboardInterrupt:
        return interrupted()
    worst = report.worst
    quality = f"worst {worst.sqnr:.1f} dB ({worst.name}), median {report.median_sqnr:.1f} dB"
    print_report(report, args.out, ("SQNR", quality))
    return 0
