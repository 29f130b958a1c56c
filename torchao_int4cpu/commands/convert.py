"""``convert SRC OUT``: a 4-bit checkpoint of another tool as one of ours; a bar, then a table."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from torchao_int4cpu.commands.options import DTYPES, Commands
from torchao_int4cpu.commands.written import bytes_bar, bytes_of, interrupted, print_report
from torchao_int4cpu.convert.foreign import convert_directory
from torchao_int4cpu.convert.gguf import convert_gguf
from torchao_int4cpu.convert.native import to_native_layout
from torchao_int4cpu.convert.onnx_weights import convert_onnx
from torchao_int4cpu.format.groupwise import GROUP_SIZES
from torchao_int4cpu.format.layout import native_layout
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
        "out",
        type=Path,
        nargs="?",
        metavar="OUT",
        help="directory to make; of a .onnx file, a safetensors file",
    )
    command.add_argument(
        "--layout",
        choices=["native"],
        help="rewrite SRC, a directory of this package, in place for this CPU; there is no OUT then",
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
    if args.layout is not None:
        return _rewrite(args)
    if args.out is None:
        raise ValueError("there is no OUT; give the directory to make, or --layout native")
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
        with bytes_bar(bytes_of(source)) as progress:
            if source.suffix == ".gguf":
                report = convert_gguf(source, args.out, progress, dtype, rest=rest)
            else:
                report = convert_directory(source, args.out, progress, dtype)
    except KeyboardInterrupt:
        return interrupted()
    worst = report.worst
    rounded = [("SQNR", f"worst {worst.sqnr:.1f} dB ({worst.name})")] if worst.sqnr < math.inf else []
    print_report(report, args.out, *rounded)
    return 0


def _rewrite(args: argparse.Namespace) -> int:
    for option in ("out", "dtype", "rest"):
        if getattr(args, option) is not None:
            raise ValueError(f"--layout rewrites SRC in place and takes no {option}; leave it out")
    try:
        with bytes_bar(bytes_of(args.source)) as progress:
            repacked, count = to_native_layout(args.source, progress)
    except KeyboardInterrupt:
        return interrupted()
    layout = native_layout()
    assert layout is not None
    print(f"{repacked} of {count} 4-bit weights repacked; all are in layout {layout.name}")
    return 0
