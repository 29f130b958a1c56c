"""Loads damaged and hostile files, one after the other, in a process that may die of it.

After a warm-up the process may map `MEMORY` more bytes than it has, and no file is larger than 64 KiB:
an allocation that the file does not justify fails, and a failed allocation is a failure, whatever
exception it became. Kernels multiply copies that end at a page which may not be touched.

``python -m tests.children.hostile_files pt-parts 17`` loads one file, and shows what it raises.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import (
    unflatten_tensor_state_dict,
)

import torchao_int4cpu
from tests.corruptions import EITHER, FAMILIES, KEPT, RAW_PT, REFUSED, SIZES, Case
from tests.corruptions.foreign import READERS, good_parts, written
from tests.numerics import (
    assert_product,
    packed_in,
    random_groupwise,
)
from tests.test_old_files import FILES, SETS
from tests.whole_weight import M_ARENA_MAX, Weight, _checked, _libc, check_whole, fence
from torchao_int4cpu import Int4OpaqueTensor, set_kernel
from torchao_int4cpu.format.layout import LAYOUTS, layout_named
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.importers.weight import as_weight
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

#: Bytes that a child may map beyond what it has before the first file, and that no file has.
MEMORY, FILE_SIZE = 32 << 20, 64 << 10

#: What a load may raise: torch, torchao and safetensors promise no less. Where our own code runs it is
#: ValueError, TypeError, or AttributeError for a weight without its parts: `_complaint` sees to that.
REFUSALS = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, EOFError),
    *(OverflowError, ImportError, OSError, pickle.UnpicklingError, struct.error, SafetensorError),
)

PACKAGE = str(Path(torchao_int4cpu.__file__).parent)

#: Calls of our ops with parts that may not fit together; no files.
OPS, OP_CALLS = "ops", 400

# --- the roads -----------------------------------------------------------------------------------

Road = Callable[[Path], object]


def _torch(weights_only: bool, mmap: bool) -> Road:
    return lambda path: torch.load(path, weights_only=weights_only, mmap=mmap)


def _safetensors(path: Path) -> object:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    return unflatten_tensor_state_dict(tensors, metadata)[0]


def _foreign(path: Path) -> object:
    """The weight of another tool that a file has, whose keys begin with the format."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        (format,) = {key.partition("/")[0] for key in keys}
        parts = {key.partition("/")[2]: file.get_tensor(key) for key in keys}
    return as_weight(READERS[format](**parts), torch.float16)


RESTRICTED = {"weights_only": _torch(True, False), "weights_only, mmap": _torch(True, True)}
UNRESTRICTED = {"pickle": _torch(False, False), "pickle, mmap": _torch(False, True)}


def roads(family: str) -> Mapping[str, Road]:
    if family.startswith("foreign"):
        return {"foreign": _foreign}
    if family.startswith("safetensors"):
        return {"safetensors": _safetensors}
    if family.startswith("pt-legacy"):  # cannot be mapped
        return {"weights_only": RESTRICTED["weights_only"]}
    if family in RAW_PT:
        return RESTRICTED  # noise must not reach an unpickler that calls whatever it is told to
    return RESTRICTED | UNRESTRICTED


# --- what becomes of a file ----------------------------------------------------------------------


def load(case: Case, road: Road, path: Path, *, repacked: bool) -> str:
    """Load one file by one road: `REFUSED` or `KEPT`, or an AssertionError that says what is wrong."""
    assert len(case.data) < FILE_SIZE
    path.write_bytes(case.data)
    try:
        found = list(weights_in(road(path)))
        for t in found:
            multiply(t)
    except Exception as error:
        complaint = _complaint(error)
        assert complaint is None, complaint
        return REFUSED
    finally:
        path.unlink()  # what is mapped stays mapped
    for t in found:
        check_whole(t, repacked=repacked)
    return KEPT if found else REFUSED


def weights_in(loaded: object) -> Iterator[Weight]:
    if isinstance(loaded, Weight):
        yield loaded
    elif isinstance(loaded, Mapping):
        for part in loaded.values():
            yield from weights_in(part)


def multiply(t: Weight) -> None:
    """What torch's unpickler made without asking us must be refused here, before it is read."""
    if t.device.type != "cpu":
        return
    with torch.no_grad():
        if t.ndim == 2:
            k = t.shape[0 if isinstance(t, Int4TransposedTensor) else 1]
            x = torch.ones(1, min(k, 4096))
            F.linear(x, t) if isinstance(t, Int4OpaqueTensor) else x @ t
        else:
            view = t if isinstance(t, Int4TransposedTensor) else t.transpose(-2, -1)
            e, k = view.shape[:2]
            torch.bmm(torch.ones(()).expand(e, 1, k), view)
            offs = torch.ones((), dtype=torch.int32).expand(e)
            F.grouped_mm(torch.ones(()).expand(1, k), view, offs=offs)


def _complaint(error: BaseException) -> str | None:
    """What is wrong with an exception that a file caused, or None."""
    chain = list(_chain(error))
    text = " from ".join(f"{type(e).__name__}: {e}" for e in chain)[:2000]
    if any(isinstance(e, MemoryError) for e in chain) or "allocate memory" in text.lower():
        return f"it asked for more memory than the file justifies: {text}"
    if not isinstance(error, REFUSALS):
        return f"not one of the exceptions that loading may raise: {text}"
    for e in chain:
        frames = traceback.extract_tb(e.__traceback__)
        # One that waits for torch to read a file, to repack what it read, lets nothing happen.
        files = [frame.filename for frame in frames if frame.name != "legacy_load"]
        if not any(name.startswith(PACKAGE) for name in files) or _is_of_an_attribute(e):
            continue
        if not isinstance(e, (ValueError, TypeError)):
            return f"our code let it happen: {text}"
        if len(str(e)) > 6000:  # a string of the file is shown whole, and those are shorter
            return f"its message has {len(str(e))} characters: {text}"
    return None


def _is_of_an_attribute(error: BaseException) -> bool:
    """A weight that torch made without its parts has none, and one attribute cannot be set."""
    names = ("'Int4OpaqueTensor' object", "'Int4TransposedTensor' object", "_packed")
    ours = any(words in str(error) for words in names)
    return isinstance(error, AttributeError) and ours


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# --- the ops, called with parts that may not fit together ----------------------------------------


def op_call(number: int) -> str:
    """One of our ops on parts of which up to two are wrong: an exception, or the right product."""
    rng = random.Random(f"op {number}")
    n, k, group_size = rng.choice(SIZES), rng.choice(SIZES), rng.choice((32, 64, 128, 256))
    layout = rng.choice(sorted(LAYOUTS))
    packed = packed_in(random_groupwise(n, k, group_size, number), layout_named(layout))
    parts: dict[str, Any] = {
        "x": torch.randn(3, k),
        "qdata": packed.qdata,
        "scale_and_zero": packed.scale_and_zero,
        "group_size": group_size,
        "layout": layout,
        "columns": n,
    }
    for _ in range(rng.randrange(3)):
        name = rng.choice(sorted(parts))
        parts[name] = wrong(parts[name], rng)
    for name in ("qdata", "scale_and_zero"):
        if parts[name].is_contiguous():
            parts[name] = fence(parts[name])
    op = rng.choice(("int4_mm", "int4_mm_differentiable", "int4_mm_grad"))
    set_kernel(rng.choice(("auto", "aten")))
    try:
        y = getattr(torch.ops.torchao_int4cpu, op)(*parts.values())
    except (*REFUSALS, ZeroDivisionError):
        return REFUSED
    finally:
        set_kernel("auto")
    assert y.shape == (parts["x"].shape[0], parts["columns"])
    if op != "int4_mm_grad":
        assert_product(y, parts["x"], said(**parts))
    return KEPT


def said(
    x: Tensor, qdata: Tensor, scale_and_zero: Tensor, group_size: int, layout: str, columns: int
) -> PackedInt4:
    """The weight that the arguments of an op describe; it takes the parts in any shape of that size."""
    padded_n, groups = -(-columns // 16) * 16, -(-x.shape[1] // group_size)
    qdata, scale_and_zero = qdata.view(padded_n, -1), scale_and_zero.view(groups, padded_n, 2)
    return PackedInt4(qdata, scale_and_zero, group_size, layout_named(layout), columns, x.shape[1])


def wrong(part: Any, rng: random.Random) -> Any:
    """Something else in the place of an argument of an op."""
    if isinstance(part, str):
        return rng.choice([*LAYOUTS, "avx1024", ""])
    if isinstance(part, int):
        return rng.choice([*SIZES, 0, -1, -32, 48, part + 1, part - 1, 2**31, 2**40, 2**62])
    choices: list[Callable[[], Tensor]] = [
        lambda: part[:-1].contiguous(),
        lambda: part[..., :-1].contiguous(),
        lambda: torch.cat([part, part]),
        lambda: part[:1].expand(part.shape),
        lambda: part.transpose(0, -1).contiguous().transpose(0, -1),
        lambda: part.transpose(0, -1).contiguous(),
        lambda: part.to(rng.choice((torch.int8, torch.float64, torch.float16, torch.uint8))),
        lambda: part[:0],
        lambda: part.flatten(),
        lambda: part[None],
    ]
    return rng.choice(choices)()


# --- the child -----------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """One load or call: its family and number, words, `expected`, and what does it."""

    family: str
    number: int
    what: str
    expected: str
    act: Callable[[], str]


def attempts(family: str, folder: Path) -> Iterator[Attempt]:
    if family == OPS:
        for number in range(OP_CALLS):
            yield Attempt(family, number, "call", EITHER, partial(op_call, number))
        return
    for number, case in enumerate(FAMILIES[family]()):
        # Torch reads the data of its old format after it has asked us, and a file that calls the
        # constructor asks for nothing: such weights keep the layout that they have.
        repacked = not family.startswith("pt-legacy") and "constructor" not in case.what
        for road, function in roads(family).items():
            path = folder / f"{number} {road}"
            act = partial(load, case, function, path, repacked=repacked)
            yield Attempt(family, number, f"{case.what[:100]}, by {road}", case.expected, act)


def run(families: list[str], *, every: int = 1, only: int | None = None) -> None:
    """Attempt the files of these families, and print a line of JSON before and after each.

    Args:
        families: of files; `OPS` for calls.
        every: one of this number of files is tried.
        only: try the file of this number, and show what it raises.
    """
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the suite runs two such processes
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder))
        limit_memory()
        for family in families:
            for attempt in attempts(family, Path(folder)):
                if only in (None, attempt.number) and attempt.number % every == 0:
                    say({"started": attempt[:3]})
                    result = result_of(attempt, show=only is not None)
                    say({"family": family, "number": attempt.number} | result)
            say({"finished": family})


def result_of(attempt: Attempt, show: bool) -> dict[str, str]:
    try:
        result = attempt.act()
    except Exception as error:
        if show:
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"failure": f"{type(error).__name__}: {error} ({place.name}: {place.line})"}
    if attempt.expected in (EITHER, result):
        return {"result": result}
    return {"failure": f"it was {result}, and had to be {attempt.expected}"}


def warm_up(folder: Path) -> None:
    """Do once what allocates once: load and multiply a good weight by every road."""
    for folder_of_set in (SETS[0], SETS[-1]):
        for family, name in (("pt", "state.pt"), ("safetensors", "model.safetensors")):
            case = Case("good", (FILES / folder_of_set / name).read_bytes(), KEPT)
            for road in roads(family).values():
                assert load(case, road, folder / name, repacked=True) == KEPT
                _checked.clear()
    for format, parts in good_parts().items():
        good = Case("good", written(format, parts), KEPT)
        assert load(good, _foreign, folder / "foreign", repacked=True) == KEPT
        _checked.clear()
    op_call(0)


def limit_memory() -> None:
    """From here on this process may map `MEMORY` bytes more, which is tried at once."""
    _libc.mallopt(M_ARENA_MAX, 1)  # else the C library reserves 64 MiB after the first failure
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for allocate in (lambda: torch.empty(MEMORY), lambda: bytes(2 * MEMORY)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert "memory" in str(_complaint(caught.value))


def say(line: dict[str, Any]) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")  # at once: the next thing may be a crash


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdigit():
        run([sys.argv[1]], only=int(sys.argv[2]))
    else:
        run(sys.argv[2:], every=int(sys.argv[1]))
