"""``bench``: time linear layers on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from torchao_int4cpu.bench import layers as bench
from torchao_int4cpu.bench import plot
from torchao_int4cpu.commands import bench_model, bench_moe, bench_views, bench_vllm
from torchao_int4cpu.commands.environment import cpu_name, environment, show
from torchao_int4cpu.commands.options import DTYPES, Commands, shape
from torchao_int4cpu.format.groupwise import GROUP_SIZES


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser("bench", help="time linear layers, or a model, on this machine")
    command.add_argument(
        "--shapes", nargs="+", type=shape, default=[(4096, 4096), (14336, 4096)], metavar="NxK"
    )
    command.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024], metavar="M")
    command.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES)
    command.add_argument("--dtype", default="bf16", choices=sorted(DTYPES), help="of activations")
    command.add_argument("--passes", type=int, default=7, help="of which the median is taken")
    command.add_argument("--compile", action="store_true", help="time torch.compile as well")
    command.add_argument("--prototype", action="store_true", help="time torchao's prototype as well")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows: .svg, .png or .pdf")
    bench_model.add_to(command)
    bench_moe.add_to(command)
    bench_views.add_to(command)
    bench_vllm.add_to(command)
    command.set_defaults(run=run, default_of=command.get_default)


def run(args: argparse.Namespace) -> int:
    """Print measured rows."""
    if args.vllm is not None:
        others = ("model", "moe", "views", *bench_moe.MOE_OPTIONS, *bench_model.MODEL_OPTIONS)
        unused = ("shapes", "rows", "dtype", "prototype", "plot")
        bench_model.refuse_given(args, (*others, *unused), "leave --vllm out")
        return bench_vllm.run(args)
    bench_model.refuse_given(args, bench_vllm.VLLM_OPTIONS, "add --vllm")
    if args.model is not None:
        bench_model.refuse_given(args, ("moe", "views", *bench_moe.MOE_OPTIONS), "leave --model out")
        return bench_model.run(args)
    bench_model.refuse_given(args, bench_model.MODEL_OPTIONS, "add --model")
    if args.moe:
        bench_model.refuse_given(
            args, ("shapes", "compile", "prototype", "plot", "views"), "leave --moe out"
        )
        return bench_moe.run(args)
    bench_model.refuse_given(args, bench_moe.MOE_OPTIONS, "add --moe")
    if args.views:
        unused = ("rows", "dtype", "compile", "prototype", "plot")
        bench_model.refuse_given(args, unused, "leave --views out")
        return bench_views.run(args)
    if args.plot is not None:
        plot.require_matplotlib()
    limits = bench.measure_limits()
    where = environment() | {"read GB/s": round(limits.read_gb_per_s, 1)}
    if limits.gflop_per_s is not None:
        where["peak GFLOP/s"] = round(limits.gflop_per_s, 1)
    if limits.int8_gflop_per_s is not None:
        where["peak GFLOP/s in 8 bits"] = round(limits.int8_gflop_per_s, 1)
    show(where, args.json)
    if not args.json:
        print(
            f"{'N':>6} {'K':>6} {'M':>5} {'group':>5} {'dtype':<8} {'kernel':<17} {'ms':>9}"
            f" {'limit':>8} {'read':>8} {'GB/s':>6} {'of read':>7} {'GFLOP/s':>8} {'x bf16':>6}"
            f" {'x op':>6} {'error':>7} {'total':>7}"
        )
    rows = []
    for row in bench.run(
        args.shapes,
        args.rows,
        group_size=args.group_size,
        dtype=DTYPES[args.dtype],
        passes=args.passes,
        compiled=args.compile,
        prototype=args.prototype,
        limits=limits,
    ):
        rows.append(row)
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        read = "-" if row.read_ms is None else f"{row.read_ms:.4f}"
        print(
            f"{row.n:>6} {row.k:>6} {row.m:>5} {row.group_size:>5} {row.dtype:<8} {row.kernel:<17}"
            f" {row.ms:>9.4f} {row.limit_ms:>8.4f} {read:>8} {row.weight_gb_per_s:>6.1f}"
            f" {row.bandwidth_share:>7.0%} {row.gflop_per_s:>8.1f} {row.speed_vs_bf16_linear:>6.2f}"
            f" {row.speed_vs_aten_op:>6.2f} {row.relative_error:>7.1e} {row.total_error:>7.1e}",
            flush=True,
        )
    if args.plot is not None:
        title = (
            f"{cpu_name()}, {where['threads']} threads, torch {torch.__version__}, "
            f"group {args.group_size}, {args.dtype} activations"
        )
        plot.draw(rows, args.plot, title)
    return 0
