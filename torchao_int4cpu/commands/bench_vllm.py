"""``bench --vllm``: time a model in vLLM on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from torchao_int4cpu.bench import vllm as bench_vllm
from torchao_int4cpu.commands.environment import environment, show
from torchao_int4cpu.commands.progress import Steps
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

#: Options of bench that mean something only with --vllm.
VLLM_OPTIONS = ("prompts", "sequences")


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options to ``bench``."""
    group = command.add_argument_group("a model in vLLM, which this Python must have")
    group.add_argument("--vllm", type=Path, metavar="SRC", help="directory of a language model, dense")
    group.add_argument(
        "--prompts", nargs="+", type=int, default=[256, 1024], metavar="TOKENS", help="to prefill"
    )
    group.add_argument(
        "--sequences", nargs="+", type=int, default=[1, 8, 32], metavar="B", help="decoded together"
    )


def run(args: argparse.Namespace) -> int:
    """Print measured rows, and what vLLM does not load."""
    with Steps() as steps:
        served = bench_vllm.run(
            args.vllm,
            Int4WeightOnlyConfig(group_size=args.group_size),
            steps.show,
            prompts=args.prompts,
            sequences=args.sequences,
            passes=args.passes,
            compiled=args.compile,
        )
    where = environment() | {
        "vLLM": served.vllm,
        "model": str(args.vllm),
        "group": args.group_size,
        "passes": args.passes,
        "mode": "compiled" if args.compile else "eager",
        "not loaded": served.refused,
    }
    show(where, args.json)
    if not args.json:
        print(
            f"{'weights':<11} {'step':<8} {'prompt':>6} {'sequences':>9} {'ms':>9} {'tok/s':>8}"
            f" {'x bf16':>6} {'weights GB':>10} {'process GB':>10}"
        )
    for row in served.rows:
        if args.json:
            print(json.dumps(asdict(row)))
            continue
        resident = "-" if row.resident_bytes is None else f"{row.resident_bytes / 1e9:.2f}"
        faster = "-" if row.vs_bf16 is None else f"{row.vs_bf16:.2f}"
        print(
            f"{row.weights:<11} {row.step:<8} {row.prompt_tokens:>6} {row.sequences:>9} {row.ms:>9.2f}"
            f" {row.tokens_per_s:>8.1f} {faster:>6} {row.weight_bytes / 1e9:>10.3f}"
            f" {resident:>10}"
        )
    return 0
