"""``inspect PATH``: what a checkpoint holds and what is wrong with it; exit status 1 if anything is."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path

from torchao_int4cpu.checkpoint.inspect import Contents, Weight, inspect
from torchao_int4cpu.commands.options import Commands
from torchao_int4cpu.format.layout import native_layout
from torchao_int4cpu.importers.survey import Survey, survey_of_directory, survey_of_gguf, survey_of_onnx

#: By the end of the name, of files of other tools.
_SURVEYS = {".gguf": survey_of_gguf, ".onnx": survey_of_onnx}


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    command = commands.add_parser("inspect", help="what a checkpoint holds, without loading it")
    command.add_argument("path", type=Path, metavar="PATH", help="a file or a Hugging Face directory")
    command.add_argument("--verify", action="store_true", help="read it all and compare checksums")
    command.add_argument("--tensors", action="store_true", help="a line for every tensor")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found."""
    if args.path.suffix in _SURVEYS and args.path.is_file():
        survey = _SURVEYS[args.path.suffix](args.path)
        print(f"{'files':<14} 1, {_size([args.path])}")
        _print_survey(survey)
        return 0
    contents = inspect(args.path, verify=args.verify)
    print(f"{'files':<14} {len(contents.files)}, {_size(contents.files)}")
    if contents.quantization is not None:
        print(f"{'config.json':<14} {_quantization(contents.quantization)}")
    found = survey_of_directory(contents.quantization, [tensor.key for tensor in contents.others])
    if found is None:
        _print_weights(contents)
    else:
        _print_survey(found)
    if args.tensors:
        _print_tensors(contents)
    if args.verify:
        print(f"{'checksums':<14} {contents.verified} parts agree, {contents.unverified} have none")
    for problem in contents.problems:
        print(f"{'PROBLEM':<14} {problem}")
    return 1 if contents.problems else 0


def _print_weights(contents: Contents) -> None:
    kinds = collections.Counter(map(_kind, contents.weights))
    native = native_layout()
    for kind, count in sorted(kinds.items()):
        group_size, layout, dtype, qparams_dtype = kind
        size = sum(weight.nbytes for weight in contents.weights if _kind(weight) == kind)
        scales = "" if qparams_dtype == "bfloat16" else f" with {qparams_dtype} scales"
        here = native is not None and native.name == layout
        where = "this CPU's" if here else "repacked for this CPU when it is loaded"
        print(
            f"{'4-bit weights':<14} {count}, {size / 1e9:.3f} GB, groups of {group_size}{scales}, "
            f"{dtype}, layout {layout} ({where})"
        )
    others = sum(tensor.nbytes for tensor in contents.others)
    print(f"{'other tensors':<14} {len(contents.others)}, {others / 1e9:.3f} GB")


def _print_survey(survey: Survey) -> None:
    others = ", ".join(f"{count} {what}" for what, count in survey.others.items())
    by = "the command convert"
    if survey.format not in ("MLX", "ONNX"):
        by += ", and by transformers' from_pretrained beside this package"
    print(f"{'format':<14} {survey.format}, read by {by}")
    print(f"{'4-bit weights':<14} {survey.read}, once it is converted or loaded")
    print(f"{'other tensors':<14} {others or 'none'}")
    for line in survey.lost or ["nothing: codes, scales and zeros stay what they are"]:
        print(f"{'lost':<14} {line}")


def _kind(weight: Weight) -> tuple[int, str, str, str]:
    return weight.group_size, weight.qdata_layout, weight.dtype, weight.qparams_dtype


def _print_tensors(contents: Contents) -> None:
    for weight in contents.weights:
        what = f"4-bit {list(weight.shape)}, groups of {weight.group_size}"
        print(f"  {weight.name}  {what}, {weight.nbytes} bytes")
    for tensor in contents.others:
        dtype = str(tensor.dtype).removeprefix("torch.")
        print(f"  {tensor.key}  {dtype} {list(tensor.shape)}, {tensor.nbytes} bytes")


def _size(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e9:.3f} GB"


def _quantization(found: dict[str, object]) -> str:
    """In the words of the config where it is torchao's, else as it stands."""
    try:
        config = found["quant_type"]["default"]  # type: ignore[index]
        data = config["_data"]
        algorithm = data["int4_choose_qparams_algorithm"]
        name = algorithm["_data"].lower() if isinstance(algorithm, dict) else algorithm
        return (
            f"{config['_type']}, {data['int4_packing_format']}, groups of {data['group_size']}, {name}"
        )
    except (KeyError, TypeError, AttributeError):
        return str(found)
