"""``bench --moe``: time the experts of a layer on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields

from torchao_int4cpu.bench import experts as bench_moe
from torchao_int4cpu.bench import layers as bench
from torchao_int4cpu.commands.environment import environment, show
from torchao_int4cpu.commands.options import DTYPES, shape

#: Options of bench that mean something only with --moe.
MOE_OPTIONS = ("experts", "hit", "expert_shape")


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the options to ``bench``."""
    default = bench_moe.MoeShape()
    group = command.add_argument_group("a mixture of experts instead of layers")
    group.add_argument("--moe", action="store_true", help="a few experts of many, of random weights")
    for field in fields(bench_moe.MoeShape)[:2]:
        group.add_argument(
            f"--{field.name}", type=int, default=field.default, help=f"({field.default})"
        )
    size = (default.n, default.k)
    group.add_argument("--expert-shape", type=shape, default=size, metavar="NxK", help="of an expert")


def run(args: argparse.Namespace) -> int:
    """Print measured rows of experts; ``--rows`` are pairs of a token and an expert."""
    experts = bench_moe.MoeShape(args.experts, args.hit, *args.expert_shape)
    rows = args.rows
    if rows == args.default_of("rows"):
        rows = [experts.hit, 4 * experts.hit, 32 * experts.hit]
    limits = bench.measure_limits()
    where = environment() | {
        "read GB/s": round(limits.read_gb_per_s, 1),
        "experts": str(experts),
        "group": args.group_size,
        "dtype": args.dtype,
        "passes": args.passes,
    }
    show(where, args.json)
    if not args.json:
        print(
            f"{'pairs':>6} {'kernel':<16} {'ms':>9} {'limit':>8} {'GB/s':>6} {'x hit only':>10}"
            f" {'x bf16':>6} {'error':>7}"
        )
    for row in bench_moe.run(
        experts,
        rows,
        group_size=args.group_size,
        dtype=DTYPES[args.dtype],
        passes=args.passes,
        limits=limits,
    ):
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        print(
            f"{row.pairs:>6} {row.kernel:<16} {row.ms:>9.4f} {row.limit_ms:>8.4f}"
            f" {row.weight_gb_per_s:>6.1f} {row.vs_hit_only:>10.2f} {row.speed_vs_bf16:>6.2f}"
            f" {row.relative_error:>7.1e}",
            flush=True,
        )
    return 0
