"""What the commands show that write a checkpoint: a bar over its bytes, and a table at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from torchao_int4cpu.convert.shards import Done, Progress, Report
from torchao_int4cpu.extras import import_extra


@contextlib.contextmanager
def bytes_bar(total: int) -> Iterator[Progress]:
    """Tensor, bytes, bytes a second and the time that is left; nothing where no one looks."""
    tqdm = import_extra("tqdm", "hf").tqdm
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def show(name: str, done: int) -> None:
            bar.set_description(name, refresh=not done)
            bar.update(done)

        yield show


def bytes_of(source: Path) -> int:
    """Of a file, or of the safetensors files of a directory."""
    files = [source] if source.is_file() else source.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def interrupted() -> int:
    """Say what to do after Ctrl-C; return the exit status."""
    print("interrupted; the same command goes on with what is done", file=sys.stderr)
    return 130


def print_report(report: Report, out: Path, *lines: tuple[str, str]) -> None:
    """Print how many tensors became what, and their bytes; the command's own lines; where it all is."""
    print(f"{'4-bit weights':<18} {_line(report.quantized)}")
    for reason, tensors in report.kept.items():
        print(f"{'kept':<18} {_line(tensors)}: {reason}")
    print(f"{'all':<18} {_line(report.tensors)}")
    for name, text in lines:
        print(f"{name:<18} {text}")
    earlier = f", {report.resumed} of an earlier run" if report.resumed else ""
    print(f"{'written':<18} {out}, {report.shards} files{earlier}")


def _line(tensors: list[Done]) -> str:
    before = sum(tensor.bytes_before for tensor in tensors)
    after = sum(tensor.bytes_after for tensor in tensors)
    return f"{len(tensors):>5}, {before / 1e9:.3f} GB -> {after / 1e9:.3f} GB"
