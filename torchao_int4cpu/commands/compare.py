"""``compare SRC``: what 4 bits cost a model, by group size and algorithm: a table, and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS
from torchao_int4cpu.bench.compare import Row, compare, draw, size_of
from torchao_int4cpu.bench.plot import require_matplotlib
from torchao_int4cpu.calibration.calibrate import GPTQ, progress_bar
from torchao_int4cpu.commands.environment import environment, show
from torchao_int4cpu.commands.options import Commands
from torchao_int4cpu.format.groupwise import GROUP_SIZES


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "compare", help="the loss of a language model, or of an encoder, by group size and algorithm"
    )
    command.add_argument("source", type=Path, metavar="SRC", help="a Hugging Face directory")
    command.add_argument(
        "--evaluation", type=Path, metavar="FILE", required=True, help="text to measure on"
    )
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text for gptq, another than --evaluation"
    )
    command.add_argument(
        "--group-sizes", nargs="+", type=int, default=[32, 64, 128], choices=GROUP_SIZES
    )
    names = [*ALGORITHMS, GPTQ]
    command.add_argument("--algorithms", nargs="+", default=names, choices=names)
    command.add_argument(
        "--target-bits",
        nargs="+",
        type=float,
        default=[],
        metavar="BITS",
        help="also gptq with group sizes chosen for so many bits a weight",
    )
    command.add_argument("--tokens", type=int, default=32768, help="of the calibration text")
    command.add_argument("--evaluation-tokens", type=int, default=6144, help="of the evaluation text")
    command.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the loss over the bytes (.svg, .png, .pdf)"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a row for each way."""
    if args.plot is not None:
        require_matplotlib()
    with progress_bar(True) as progress:
        rows = compare(
            args.source,
            args.evaluation,
            args.calibration,
            progress,
            group_sizes=args.group_sizes,
            algorithms=args.algorithms,
            target_bits=args.target_bits,
            tokens=args.tokens,
            evaluation_tokens=args.evaluation_tokens,
        )
    where = environment() | {
        "model": str(args.source),
        "calibration": str(args.calibration),
        "tokens": args.tokens,
        "evaluation": str(args.evaluation),
        "evaluation tokens": args.evaluation_tokens,
    }
    show(where, args.json)
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        _print_rows(rows)
    if args.plot is not None:
        draw(rows, args.plot, f"{args.source.name} in 4 bits")
    return 0


def _print_rows(rows: Sequence[Row]) -> None:
    floats = rows[0].perplexity
    loss = f"{'1 - cosine':>10}" if floats is None else f"{'perplexity':>10} {'':>7} {'KL':>8}"
    print(f"{'algorithm':<9} {'group':>5} {'bits':>6} {'MB':>8} {loss} {'SQNR dB':>7} {'seconds':>7}")
    for row in rows:
        if floats is not None and row.perplexity is not None:
            more = f"{100 * (row.perplexity / floats - 1):+.1f}%" if row.algorithm else ""
            loss = f"{row.perplexity:>10.2f} {more:>7} {row.divergence:>8.3g}"
        elif row.cosine is not None:
            loss = f"{1 - row.cosine:>10.2e}"
        quality = "-" if row.sqnr is None else f"{row.sqnr:.1f}"
        print(
            f"{row.algorithm or 'float':<9} {size_of(row):>5} {row.bits:>6.2f}"
            f" {row.nbytes / 1e6:>8.1f} {loss} {quality:>7} {row.seconds:>7.1f}"
        )
