"""``quantize SRC OUT``: a Hugging Face directory in 4 bits; a bar while it works, then a table."""

from __future__ import annotations

import argparse
import functools
import shutil
from pathlib import Path

from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS
from torchao_int4cpu.calibration.blocks import Batch
from torchao_int4cpu.calibration.calibrate import GPTQ, Calibration, progress_bar
from torchao_int4cpu.calibration.store import Store
from torchao_int4cpu.calibration.targets import CalibratedWeight
from torchao_int4cpu.commands.options import DTYPES, Commands
from torchao_int4cpu.commands.written import bytes_bar, interrupted, print_report
from torchao_int4cpu.convert.calibrated import calibrate_directory, group_sizes_of_directory
from torchao_int4cpu.convert.directory import quantize_directory
from torchao_int4cpu.convert.plan import Plan, make_plan
from torchao_int4cpu.convert.text import batches_of, read_text, token_ids, tokenizer_of
from torchao_int4cpu.format.groupwise import GROUP_SIZES
from torchao_int4cpu.integrations.vllm_configs import torn
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.tensor.transposed import Int4Weight

#: Of a calibration text, if nothing is said.
TOKENS = 32768


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "quantize", help="a Hugging Face directory in 4 bits, without its model in memory"
    )
    command.add_argument("source", type=Path, metavar="SRC", help="directory with safetensors files")
    command.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    command.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES)
    command.add_argument(
        "--algorithm",
        default="mse",
        choices=sorted([*ALGORITHMS, GPTQ]),
        help=f"{GPTQ} is the best, needs --calibration, and minutes",
    )
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text like that the model is used on: .txt, or .jsonl with 'text' in each line",
    )
    command.add_argument("--tokens", type=int, help=f"of the calibration text ({TOKENS})")
    command.add_argument(
        "--target-bits",
        type=float,
        metavar="BITS",
        help="a weight, as 4.5: each weight in blocks gets the group size that is worth it most",
    )
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
        "--experts", action="store_true", help="quantize the experts of a mixture of experts too"
    )
    command.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of the model; without it what config.json says"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantize, and print what became of the tensors."""
    calibrates = args.algorithm == GPTQ
    if calibrates and args.calibration is None:
        raise ValueError(f"--algorithm {GPTQ} needs --calibration; give a text file")
    for option in ("calibration", "tokens", "target-bits"):
        if not calibrates and getattr(args, option.replace("-", "_")) is not None:
            raise ValueError(
                f"--algorithm {args.algorithm} takes no --{option}; choose --algorithm {GPTQ}, or "
                "leave it out"
            )
    config = Int4WeightOnlyConfig(
        group_size=args.group_size,
        int4_choose_qparams_algorithm="mse" if calibrates else args.algorithm,
    )
    dtype = DTYPES[args.dtype] if args.dtype else None
    planned = functools.partial(
        make_plan,
        args.source,
        config,
        skip=args.skip,
        head=args.head,
        embeddings=args.embeddings,
        experts=args.experts,
        dtype=dtype,
    )
    plan = planned()
    if args.out.exists():
        raise ValueError(
            f"{str(args.out)!r} is there already; give a directory that is not, or remove it"
        )
    folder = args.out.with_name(args.out.name + ".calibration")
    told: list[CalibratedWeight] = []
    store: Store | None = None

    def known(name: str) -> Int4Weight | None:
        found = None if store is None else store.find(name)
        return None if found is None else found["weight"]

    try:
        if calibrates:
            batches = _batches(plan, args.calibration, TOKENS if args.tokens is None else args.tokens)
            with progress_bar(True) as tell:
                if args.target_bits is not None:
                    sizes = group_sizes_of_directory(plan, batches, folder, tell, args.target_bits)
                    plan = planned(group_sizes=sizes)
                store, told = calibrate_directory(plan, batches, folder, tell)
        with bytes_bar(sum(tensor.nbytes for tensor in plan.tensors)) as progress:
            report = quantize_directory(plan, args.out, progress, known)
    except KeyboardInterrupt:
        return interrupted()
    worst = report.worst
    quality = f"worst {worst.sqnr:.1f} dB ({worst.name}), median {report.median_sqnr:.1f} dB"
    lines = [("SQNR", quality)]
    apart = torn(*plan.modules())
    if apart:
        lines.append(("vLLM", apart))
    if calibrates:
        lines += [("calibrated", line) for line in str(Calibration(told)).splitlines()]
        shutil.rmtree(folder)
    print_report(report, args.out, *lines)
    return 0


def _batches(plan: Plan, file: Path, tokens: int) -> list[Batch]:
    text = read_text(file)
    ids = token_ids(text, tokenizer_of(plan.folder), tokens, plan.model_config)
    return list(batches_of(ids, plan.model_config))
