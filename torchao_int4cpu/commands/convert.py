"""``convert SRC OUT``: a 4-bit checkpoint of another tool as one of ours; a bar, then a table."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from torchao_int4cpu.commands.options import DTYPES, Commands
from torchao_int4cpu.commands.quantize import print_tensors
from torchao_int4cpu.convert.foreign import convert_directory
from torchao_int4cpu.convert.gguf import convert_gguf
from torchao_int4cpu.convert.onnx_weights import convert_onnx
from torchao_int4cpu.convert.shards import Progress, Report
from torchao_int4cpu.extras import import_extra
from torchao_int4cpu.format.groupwise import GROUP_SIZES
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "convert", help="a 4-bit checkpoint of another tool as one of this package, codes exact"
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a Hugging Face directory (GPTQ, AWQ, compressed-tensors, MLX), or a .gguf or .onnx file",
    )
    command.add_argument(
        "out", type=Path, metavar="OUT", help="directory to make; of a .onnx file, a safetensors file"
    )
    command.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="of the model; without it what config.json says, and bf16 of a .gguf file",
    )
    command.add_argument(
        "--rest",
        type=int,
        choices=GROUP_SIZES,
        metavar="GROUP_SIZE",
        help="of a .gguf file: quantize by mse the layers and embeddings that it has in more bits, too",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what became of the tensors."""
    source: Path = args.source
    dtype = DTYPES[args.dtype] if args.dtype else None
    if source.suffix == ".onnx":
        shapes = convert_onnx(source, args.out, dtype)
        print(f"{'4-bit weights':<18} {len(shapes):>5}")
        print(f"{'written':<18} {args.out}, {args.out.stat().st_size / 1e9:.3f} GB")
        return 0
    rest = None
    if args.rest is not None:
        if source.suffix != ".gguf":
            raise ValueError(f"--rest is for .gguf files, and {str(source)!r} is none; leave it out")
        rest = Int4WeightOnlyConfig(group_size=args.rest, int4_choose_qparams_algorithm="mse")
    try:
        with bar(source) as progress:
            if source.suffix == ".gguf":
                report = convert_gguf(source, args.out, progress, dtype, rest=rest)
            else:
                report = convert_directory(source, args.out, progress, dtype)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    _print(report, args.out)
    return 0


@contextlib.contextmanager
def bar(source: Path) -> Iterator[Progress]:
    """Tensor, bytes, bytes a second and the time that is left; nothing where no one looks."""
    tqdm = import_extra("tqdm", "hf").tqdm
    files = [source] if source.is_file() else source.glob("*.safetensors")
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def show(name: str, done: int) -> None:
            bar.set_description(name, refresh=not done)
            bar.update(done)

        yield show


def _print(report: Report, out: Path) -> None:
    print_tensors(report)
    if report.worst.sqnr < math.inf:
        print(f"{'SQNR':<18} worst {report.worst.sqnr:.1f} dB ({report.worst.name})")
    earlier = f", {report.resumed} of an earlier run" if report.resumed else ""
    print(f"{'written':<18} {out}, {report.shards} files{earlier}")
