"""``quantize SRC OUT``: a Hugging Face directory in 4 bits; a bar while it works, then a table."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS
from torchao_int4cpu.commands.options import DTYPES, Commands
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.plan import Plan, make_plan
from torchao_int4cpu.convert.shards import Done, Progress, Report
from torchao_int4cpu.extras import import_extra
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
        with _bar(plan) as progress:
            report = quantize_directory(plan, args.out, progress)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    _print(report, args.out)
    return 0


@contextlib.contextmanager
def _bar(plan: Plan) -> Iterator[Progress]:
    """Tensor, bytes, bytes a second and the time that is left; nothing where no one looks."""
    tqdm = import_extra("tqdm", "hf").tqdm
    total = sum(tensor.source.nbytes for tensor in plan.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def show(name: str, done: int) -> None:
            bar.set_description(name, refresh=not done)
            bar.update(done)

        yield show


def print_tensors(report: Report) -> None:
    """Print how many tensors became what, and their bytes."""
    print(f"{'4-bit weights':<18} {_line(report.quantized)}")
    for reason, tensors in report.kept.items():
        print(f"{'kept':<18} {_line(tensors)}: {reason}")
    print(f"{'all':<18} {_line(report.tensors)}")


def _print(report: Report, out: Path) -> None:
    print_tensors(report)
    worst = report.worst
    print(f"{'SQNR':<18} worst {worst.sqnr:.1f} dB ({worst.name}), median {report.median_sqnr:.1f} dB")
    earlier = f", {report.resumed} of an earlier run" if report.resumed else ""
    print(f"{'written':<18} {out}, {report.shards} files{earlier}")


def _line(tensors: list[Done]) -> str:
    before = sum(tensor.bytes_before for tensor in tensors)
    after = sum(tensor.bytes_after for tensor in tensors)
    return f"{len(tensors):>5}, {before / 1e9:.3f} GB -> {after / 1e9:.3f} GB"
