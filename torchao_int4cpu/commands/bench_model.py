"""``bench --model``: time a whole model on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS
from torchao_int4cpu.bench import model as bench_model
from torchao_int4cpu.bench import model_variants
from torchao_int4cpu.commands.environment import environment, show
from torchao_int4cpu.commands.progress import Steps
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

#: Options of bench that mean something only with --model, and only without.
MODEL_OPTIONS = (
    *("dim", "ffn", "layers", "vocab"),
    *("prompt_tokens", "new_tokens", "batch_sizes", "algorithm"),
)
LAYER_OPTIONS = ("shapes", "rows", "dtype", "compile", "plot")


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options to ``bench``."""
    group = command.add_argument_group("a whole model instead of layers")
    group.add_argument(
        "--model",
        nargs="?",
        const="",
        metavar="PATH",
        help="directory or hub id of a causal language model; without PATH a Llama of random weights",
    )
    for size in fields(model_variants.LlamaShape):
        group.add_argument(f"--{size.name}", type=int, help=f"of the random Llama ({size.default})")
    group.add_argument("--prompt-tokens", type=int, default=512, help="to prefill")
    group.add_argument("--new-tokens", type=int, default=16, help="to decode after each prefill")
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[1, 4],
        metavar="B",
        help="sequences to decode together (1 4); prefill is timed for 1 only",
    )
    group.add_argument("--algorithm", default="tinygemm", choices=sorted(ALGORITHMS))


def run(args: argparse.Namespace) -> int:
    """Print measured rows of a whole model."""
    refuse_given(args, LAYER_OPTIONS, "leave --model out")
    sizes = {size.name: getattr(args, size.name) for size in fields(model_variants.LlamaShape)}
    if args.model:
        refuse_given(args, tuple(sizes), f"leave {args.model!r} out")
    shape = model_variants.LlamaShape(**{name: n for name, n in sizes.items() if n is not None})
    config = Int4WeightOnlyConfig(
        group_size=args.group_size, int4_choose_qparams_algorithm=args.algorithm
    )
    with Steps() as steps:
        rows = bench_model.run(
            args.model or shape,
            config,
            steps.show,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            batch_sizes=args.batch_sizes,
            passes=args.passes,
            prototype=args.prototype,
        )
    where = environment() | {
        "model": args.model or str(shape),
        "group": args.group_size,
        "algorithm": args.algorithm,
        "prompt tokens": args.prompt_tokens,
        "new tokens": args.new_tokens,
        "batch sizes": args.batch_sizes,
        "passes": args.passes,
    }
    show(where, args.json)
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        _print_model_rows(rows)
    return 0


def _print_model_rows(rows: Sequence[bench_model.ModelRow]) -> None:
    print(
        f"{'weights':<17} {'mode':<8} {'batch':>5} {'prefill ms':>10} {'tok/s':>7} {'x bf16':>6}"
        f" {'decode ms':>9} {'tok/s':>7} {'x bf16':>6} {'in 4 bits':>10} {'weights GB':>10}"
        f" {'peak GB':>7} {'compile s':>9} {'error':>7} {'to bf16':>7}"
    )
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        print(
            f"{row.weights:<17} {row.mode:<8} {row.batch_size:>5} {_number(row.prefill_ms, 1):>10}"
            f" {_number(row.prefill_tokens_per_s, 1):>7} {_number(row.prefill_vs_bf16, 2):>6}"
            f" {row.decode_ms:>9.2f} {row.decode_tokens_per_s:>7.2f}"
            f" {row.decode_vs_bf16:>6.2f} {f'{row.int4_layers} of {row.linear_layers}':>10}"
            f" {row.weight_bytes / 1e9:>10.2f} {peak:>7} {_number(row.compile_s, 1):>9}"
            f" {row.relative_error:>7.1e} {row.difference_from_bf16:>7.1e}"
        )


def _number(value: float | None, digits: int) -> str:
    """What is shown of a number that may be missing."""
    return "-" if value is None else f"{value:.{digits}f}"


def refuse_given(args: argparse.Namespace, names: Sequence[str], cure: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        ValueError: one of them was given.
    """
    given = [name for name in names if getattr(args, name) != args.default_of(name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"bench got {options}, which has no effect here; leave it out, or {cure}")
