"""``bench --views``: time cuts, gathers and joins on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from torchao_int4cpu.bench import views as bench_views
from torchao_int4cpu.commands.environment import environment, show


def add_to(command: argparse.ArgumentParser) -> None:
    """Add the option to ``bench``."""
    command.add_argument("--views", action="store_true", help="time cuts, shards and gathers instead")


def run(args: argparse.Namespace) -> int:
    """Print measured rows."""
    where = environment() | {"group": args.group_size, "passes": args.passes}
    show(where, args.json)
    if not args.json:
        print(f"{'N':>6} {'K':>6} {'operation':<22} {'result':<6} {'ms':>9} {'bf16 ms':>9} {'MB':>7}")
    for row in bench_views.run(args.shapes, group_size=args.group_size, passes=args.passes):
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        print(
            f"{row.n:>6} {row.k:>6} {row.operation:<22} {row.result:<6} {row.ms:>9.4f}"
            f" {row.dense_ms:>9.4f} {row.copied_bytes / 1e6:>7.2f}",
            flush=True,
        )
    return 0
