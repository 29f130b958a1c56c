"""``python -m torchao_int4cpu demo | bench | info``: command line and printing only."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchao

from torchao_int4cpu import Int4WeightOnlyConfig, __version__, bench, demo, get_kernel, plot
from torchao_int4cpu.choose_qparams import ALGORITHMS
from torchao_int4cpu.groupwise import GROUP_SIZES
from torchao_int4cpu.kernels import kernel_choices, native_status
from torchao_int4cpu.layout import native_layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_PROMPT = (
    "The lighthouse keeper climbed the stairs every evening, because the ships that passed the cape "
    "in the dark trusted a light that had not failed in a hundred years."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; return the exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (demo.MissingExtra, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchao_int4cpu", description="4-bit weights on the CPU."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="a real model in 4 bits next to the original")
    command.add_argument("--model", help="directory or hub id of a causal language model")
    command.add_argument("--prompt", default=DEFAULT_PROMPT, help="text for --model")
    command.add_argument("--new-tokens", type=int, default=64, help="to generate with --model")
    command.add_argument("--group-size", type=int, default=64, choices=GROUP_SIZES)
    command.add_argument("--algorithm", default="mse", choices=sorted(ALGORITHMS))
    command.set_defaults(run=run_demo)

    command = commands.add_parser("bench", help="time linear layers on this machine")
    command.add_argument(
        "--shapes", nargs="+", type=_shape, default=[(4096, 4096), (14336, 4096)], metavar="NxK"
    )
    command.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024], metavar="M")
    command.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES)
    command.add_argument("--dtype", default="bf16", choices=sorted(DTYPES), help="of activations")
    command.add_argument("--passes", type=int, default=7, help="of which the median is taken")
    command.add_argument("--compile", action="store_true", help="time torch.compile as well")
    command.add_argument("--prototype", action="store_true", help="time torchao's prototype as well")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows: .svg, .png or .pdf")
    command.set_defaults(run=run_bench)

    command = commands.add_parser("info", help="what runs here, and why")
    command.set_defaults(run=run_info)
    return parser


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write NxK, as in 4096x4096")
    return int(n), int(k)


def run_info(args: argparse.Namespace) -> int:
    """Print versions, the CPU, the layout, and which kernel runs for how many rows."""
    for name, value in _environment().items():
        print(f"{name:<16} {value}")
    print("kernel by rows of the activation (M):")
    for choice in kernel_choices():
        print(f"  {choice.rows:<40} {choice.kernel:<9} {choice.reason}")
    return 0


def _environment() -> dict[str, object]:
    layout = native_layout()
    return {
        "torchao_int4cpu": __version__,
        "torch": torch.__version__,
        "torchao": torchao.__version__,
        "CPU": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "layout": layout.name if layout else "none: PyTorch's int4 op does not run here",
        "native kernels": native_status(),
        "kernel chosen": get_kernel(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def run_bench(args: argparse.Namespace) -> int:
    """Print measured rows."""
    if args.plot is not None:
        plot.require_matplotlib()
    limits = bench.measure_limits()
    environment = _environment() | {"read GB/s": round(limits.read_gb_per_s, 1)}
    if limits.gflop_per_s is not None:
        environment["peak GFLOP/s"] = round(limits.gflop_per_s, 1)
    if args.json:
        print(json.dumps(environment))
    else:
        print(", ".join(f"{name} {value}" for name, value in environment.items()))
        print(
            f"{'N':>6} {'K':>6} {'M':>5} {'group':>5} {'dtype':<8} {'kernel':<17} {'ms':>9}"
            f" {'limit':>8} {'GB/s':>6} {'of read':>7} {'GFLOP/s':>8} {'x bf16':>6} {'x op':>6}"
            f" {'error':>7}"
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
        print(
            f"{row.n:>6} {row.k:>6} {row.m:>5} {row.group_size:>5} {row.dtype:<8} {row.kernel:<17}"
            f" {row.ms:>9.4f} {row.limit_ms:>8.4f} {row.weight_gb_per_s:>6.1f}"
            f" {row.bandwidth_share:>7.0%} {row.gflop_per_s:>8.1f} {row.speed_vs_bf16_linear:>6.2f}"
            f" {row.speed_vs_aten_op:>6.2f} {row.relative_error:>7.1e}",
            flush=True,
        )
    if args.plot is not None:
        title = (
            f"{_cpu_name()}, {environment['threads']} threads, torch {torch.__version__}, "
            f"group {args.group_size}, {args.dtype} activations"
        )
        plot.draw(rows, args.plot, title)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """Print how the 4-bit model compares with the original."""
    config = Int4WeightOnlyConfig(
        group_size=args.group_size, int4_choose_qparams_algorithm=args.algorithm
    )
    with _Steps() as steps:
        if args.model is None:
            embedded = demo.embeddings(config, steps.show)
            layers = embedded.layers
        else:
            generated = demo.causal(args.model, args.prompt, args.new_tokens, config, steps.show)
            layers = generated.layers
    threads = torch.get_num_threads()
    print(f"settings           group {args.group_size}, {args.algorithm}, {threads} threads")
    print(f"layers changed     {layers.changed} of {layers.linear} linear layers")
    print(
        f"their weights      {layers.bytes_before / 1e6:.1f} MB -> {layers.bytes_after / 1e6:.1f} MB"
        f" ({layers.bytes_before / layers.bytes_after:.1f} times smaller)"
    )
    if args.model is None:
        total = len(embedded.cosines)
        for sentence, cosine in zip(demo.SENTENCES, embedded.cosines):
            print(f"cosine {cosine:.4f}      {sentence}")
        print(f"nearest neighbour  {embedded.neighbours_kept} of {total} unchanged")
        print(
            f"time per batch     {embedded.ms_original:.1f} ms original (fp32, eager), "
            f"{embedded.ms_quantized:.1f} ms 4-bit (compiled)"
        )
    else:
        print(
            f"perplexity         {generated.perplexity_original:.3f} bf16, "
            f"{generated.perplexity_quantized:.3f} 4-bit, on {generated.prompt_tokens} tokens"
        )
        print(
            f"tokens per second  {generated.tokens_per_second_original:.1f} bf16 (eager), "
            f"{generated.tokens_per_second_quantized:.1f} 4-bit (compiled)"
        )
        print(f"4-bit continuation {generated.continuation!r}")
    return 0


class _Steps:
    """The long steps of the demo: a tqdm bar on a terminal, else a line for each step."""

    def __enter__(self) -> _Steps:
        warnings.filterwarnings("ignore", module="torch|transformers")
        self._last = ""
        self._bar: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}")
        return self

    def show(self, step: str, done: int, total: int) -> None:
        if self._bar is not None:
            if step != self._last:
                self._bar.reset(total or 1)
            self._bar.set_description_str(step, refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif step != self._last:
            print(f"... {step}", file=sys.stderr, flush=True)
        self._last = step

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
