"""Loading never trusts the file: thousands of damaged and hostile files, each loaded by every road.

Each ends in an exception or in a weight that is whole: its parts fit, its product is that of its codes
and scales, it can be saved again. A flip inside those bytes changes the numbers and no more.

The files (`corruptions`) are loaded in child processes, as one that crashes must not take the suite
with it. After a warm-up a child may map `MEMORY` more bytes than it has, and no file is larger than
64 KiB: an allocation that the file does not justify fails, and a failed allocation fails the test,
whatever exception it became. Kernels multiply copies that end at a page which may not be touched.

``python -m tests.test_hostile_files pt-parts 17`` loads one file, and shows what it raises.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import io
import json
import logging
import mmap
import os
import pickle
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
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
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

import torchao_int4cpu
from tests.corruptions import EITHER, FAMILIES, KEPT, RAW_PT, REFUSED, SIZES, Case
from tests.numerics import (
    assert_int4,
    assert_product,
    native,
    packed_in,
    product_bound,
    random_groupwise,
)
from tests.test_old_files import FILES, SETS, value, weight
from torchao_int4cpu import Int4OpaqueTensor, set_kernel
from torchao_int4cpu.checkpoint.safetensors import crc32
from torchao_int4cpu.format.checks import check_parts
from torchao_int4cpu.format.layout import LAYOUTS, layout_named
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference
from torchao_int4cpu.format.slicing import repack
from torchao_int4cpu.tensor.int4 import Provenance
from torchao_int4cpu.tensor.transposed import Int4TransposedTensor

Weight = Int4OpaqueTensor | Int4TransposedTensor

#: Bytes that a child may map beyond what it has before the first file, and that no file has.
MEMORY, FILE_SIZE = 32 << 20, 64 << 10

#: What a load may raise: torch, torchao and safetensors promise no less. Where our own code runs it is
#: ValueError, TypeError, or AttributeError for a weight without its parts: `_complaint` sees to that.
REFUSALS = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, EOFError),
    *(OverflowError, ImportError, OSError, pickle.UnpicklingError, struct.error, SafetensorError),
)

PACKAGE = str(Path(torchao_int4cpu.__file__).parent)

#: How many files each family has, all seeded. Two grow with the attributes of torch's tensors and with
#: the classes of torchao: so many at least.
COUNTS = {
    "pt-truncated": 1781,
    "pt-flipped": 1440,
    "pt-overwritten": 384,
    "pt-swapped": 144,
    "pt-spliced": 120,
    "pt-attributes": 387,
    "pt-attached": 700,
    "pt-parts": 879,
    "pt-relations": 35,
    "pt-wrappers": 511,
    "pt-states": 62,
    "pt-roads": 53,
    "pt-late": 6,
    "pt-sizes": 300,
    "pt-legacy": 356,
    "safetensors-truncated": 503,
    "safetensors-flipped": 960,
    "safetensors-overwritten": 192,
    "safetensors-swapped": 72,
    "safetensors-spliced": 40,
    "safetensors-metadata": 477,
    "safetensors-entries": 403,
    "safetensors-relabelled": 25,
    "safetensors-names": 44,
    "safetensors-strangers": 32,
    "safetensors-exchanged": 20,
    "safetensors-headers": 763,
    "safetensors-frames": 21,
    "pt-stacks": 158,
    "pt-views": 228,
    "pt-late-views": 72,
    "safetensors-stacks": 269,
}
AT_LEAST = ("pt-attached", "safetensors-relabelled")

#: Families of which no file can be kept, and one of which all must be.
ALL_REFUSED = (
    *("pt-truncated", "safetensors-truncated"),
    *("safetensors-entries", "safetensors-relabelled", "safetensors-headers"),
)
ALL_KEPT = ("pt-late",)

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


RESTRICTED = {"weights_only": _torch(True, False), "weights_only, mmap": _torch(True, True)}
UNRESTRICTED = {"pickle": _torch(False, False), "pickle, mmap": _torch(False, True)}


def roads(family: str) -> Mapping[str, Road]:
    if family.startswith("safetensors"):
        return {"safetensors": _safetensors}
    if family == "pt-legacy":  # cannot be mapped
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


def opaque(t: Weight) -> Int4OpaqueTensor:
    return t.untransposed() if isinstance(t, Int4TransposedTensor) else t


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


def check_whole(t: Weight, *, repacked: bool) -> None:
    """Every promise of a weight, on one that came from a file."""
    if isinstance(t, Int4TransposedTensor):
        check_whole_view(t)
        check_whole(t.untransposed(), repacked=repacked)
        return
    *stack, n, k = t.shape
    check_parts(
        t.qdata, t.scale_and_zero, t.block_size, t.shape, t.qdata_layout, t.dtype, t.act_pre_scale
    )
    assert t.provenance == Provenance()
    for matrix in [t[i] for i in range(stack[0])] if stack else [t]:
        assert_int4(matrix, (n, k), t.block_size[-1])
    assert type(t.block_size) is list
    assert [type(size) for size in t.block_size] == [int] * t.ndim
    assert t.is_contiguous()
    assert t.storage_offset() == 0
    assert t.layout == torch.strided
    assert t.data_ptr() == 0, "it has a dense tensor's memory beside its parts"
    assert not t.requires_grad
    assert t.qdata_layout == native().name or not repacked
    parts = parts_of(t)
    for part in parts:
        assert type(part) is Tensor
        assert not part.requires_grad
        assert not part.is_neg()
        assert part.device.type == t.device.type
    assert "Int4OpaqueTensor(" in repr(t)
    if t.device.type == "cpu":
        for part in parts:
            assert last_byte(part) <= part.untyped_storage().nbytes()
        check_numbers_once(t)


def check_whole_view(t: Int4TransposedTensor) -> None:
    """It shows its weight, transposed: shape and strides, and the product."""
    weight = t.untransposed()
    assert type(weight) is Int4OpaqueTensor
    assert t.shape == weight.transpose(-2, -1).shape
    assert t.stride() == weight.transpose(-2, -1).stride()
    assert t.storage_offset() == 0
    assert t.layout == torch.strided
    assert t.data_ptr() == 0
    assert not t.requires_grad
    assert "Int4TransposedTensor(" in repr(t)
    if t.device.type == "cpu":
        x = torch.linspace(-1, 1, 3 * t.shape[-2]).view(3, -1)
        y = x @ t if t.ndim == 2 else torch.bmm(x.expand(t.shape[0], -1, -1), t)
        matrices = [weight] if t.ndim == 2 else list(weight)
        expected = torch.stack([F.linear(x, matrix) for matrix in matrices])
        assert torch.equal(y.view_as(expected).nan_to_num(), expected.nan_to_num())


def parts_of(t: Int4OpaqueTensor) -> list[Tensor]:
    return [t.qdata, t.scale_and_zero] + ([] if t.act_pre_scale is None else [t.act_pre_scale])


def last_byte(part: Tensor) -> int:
    """Counted in the storage of the part: where the last of its elements ends."""
    last = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride()))
    return int(part.storage_offset() + last + 1) * part.element_size()


_checked: set[object] = set()


def check_numbers_once(t: Int4OpaqueTensor) -> None:
    """Most files and roads lead to the same few weights, and the numbers take the time."""
    content = tuple(
        bytes(part.contiguous().flatten().view(torch.uint8).tolist()) for part in parts_of(t)
    )
    described = (content, tuple(t.shape), t.block_size[-1], t.qdata_layout, t.dtype)
    if described not in _checked:
        _checked.add(described)
        check_groupwise(t)
        for matrix in [t] if t.ndim == 2 else list(t):
            check_products(matrix)
        check_saves(t)


def check_groupwise(t: Int4OpaqueTensor) -> None:
    if bool(t.scale_and_zero[..., : t.shape[-2], :].isfinite().all()):
        assert t.to_groupwise().shape == t.shape
        assert t.dequantize().dtype == t.dtype
    else:
        with pytest.raises(ValueError, match="NaN or infinite"):
            t.to_groupwise()


def check_products(t: Int4OpaqueTensor) -> None:
    """`F.linear` is x · Wᵀ within the derived bound, and touches nothing beyond the parts."""
    packed = t.packed()
    fenced = copy.deepcopy(t)
    fenced.qdata, fenced.scale_and_zero = fence(t.qdata), fence(t.scale_and_zero)
    fenced.qdata_layout = t.qdata_layout
    x = torch.linspace(-1, 1, 3 * packed.k + 1)[1:].view(3, packed.k)
    with torch.no_grad():
        y = F.linear(x, t)
        assert torch.equal(F.linear(x, fenced).isnan(), y.isnan())
        assert torch.equal(F.linear(x, fenced).nan_to_num(), y.nan_to_num())
        assert F.linear(x.bfloat16(), fenced).shape == y.shape
    qparams = t.scale_and_zero[:, : packed.n].float().abs().amax((0, 2))  # [N], NaN if one is
    assert not bool(y[:, ~qparams.isfinite()].isfinite().any()), "a number came of what is none"
    activation = x if t.act_pre_scale is None else x * t.act_pre_scale.reshape(-1)
    if not bool((activation.abs() < 1e15).all()):
        return
    moderate = qparams < 1e15  # nothing overflows in float32
    error = (y.double() - int4_mm_reference(activation, packed)).abs()
    within = error <= product_bound(activation, packed, y.dtype)
    assert bool(within[:, moderate].all()), "the product is not that of the weight"


def check_saves(t: Int4OpaqueTensor) -> None:
    """Saved and loaded again in either format, the parts are the same bytes."""
    flat, metadata = flatten_tensor_state_dict({"layer.weight": t})
    for back in (
        torch.load(saved(t), weights_only=True),
        unflatten_tensor_state_dict(flat, metadata)[0]["layer.weight"],
    ):
        assert (back.shape, back.dtype) == (t.shape, t.dtype)
        source, target = layout_named(t.qdata_layout), layout_named(back.qdata_layout)
        matrices = [t.qdata] if t.ndim == 2 else list(t.qdata)
        expected = torch.stack([repack(matrix, source, target) for matrix in matrices])
        assert torch.equal(back.qdata.view_as(expected), expected)
        for mine, other in zip(parts_of(back)[1:], parts_of(t)[1:]):
            assert crc32(mine) == crc32(other)


def saved(thing: object, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(thing, buffer, **options)
    buffer.seek(0)
    return buffer


M_ARENA_MAX = -8
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fence(part: Tensor) -> Tensor:
    """A copy that ends at a page which may not be touched."""
    size = -(-part.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = torch.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), dtype=torch.uint8)
    copy = area[size - part.nbytes : size].view(part.dtype).view(part.shape)
    copy.copy_(part)
    assert _libc.mprotect(area.data_ptr() + size, mmap.PAGESIZE, 0) == 0
    return copy


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
        repacked = family != "pt-legacy" and "constructor" not in case.what
        for road, function in roads(family).items():
            path = folder / f"{number} {road}"
            act = partial(load, case, function, path, repacked=repacked)
            yield Attempt(family, number, f"{case.what[:100]}, by {road}", case.expected, act)


def run(families: list[str], only: int | None = None) -> None:
    """Make every attempt of these families, and print a line of JSON before and after each."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the suite runs two such processes
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder))
        limit_memory()
        for family in families:
            for attempt in attempts(family, Path(folder)):
                if only in (None, attempt.number):
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


# --- the tests -----------------------------------------------------------------------------------


class Report(NamedTuple):
    """What a child said of a family.

    Attributes:
        numbers: of the files or calls that were tried.
        results: how many attempts were `REFUSED`, and how many `KEPT`.
        failures: one line each.
        finished: whether the child lived to the end of it.
    """

    numbers: set[int]
    results: Counter[str]
    failures: list[str]
    finished: bool


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """Two children share the families."""
    families = [OPS, *FAMILIES]
    command = [sys.executable, "-m", "tests.test_hostile_files"]
    children = [
        subprocess.Popen(
            [*command, *half],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        for half in (families[::2], families[1::2])
    ]
    found: dict[str, Report] = {}
    for child in children:
        out, err = child.communicate(timeout=600)
        lines = [json.loads(line) for line in out.splitlines()]
        ended = f"the child ended with {child.returncode}: {err.decode()[-2000:]}"
        read(lines or [{"started": [OPS, -1, "nothing"]}], ended, found)
    return found


def read(lines: list[dict[str, Any]], ended: str, reports: dict[str, Report]) -> None:
    """Sort the lines of a child by family. What it started last killed it, if no other line follows."""
    if "started" in lines[-1]:
        family, number, _ = lines[-1]["started"]
        lines = [*lines, {"family": family, "number": number, "failure": ended}]
    started = None
    for line in lines:
        if "started" in line:
            started = line["started"]
        elif "finished" in line:
            reports[line["finished"]] = reports[line["finished"]]._replace(finished=True)
        else:
            report = reports.setdefault(line["family"], Report(set(), Counter(), [], False))
            report.numbers.add(line["number"])
            report.results[line.get("result", "failure")] += 1
            if "failure" in line:
                report.failures.append(f"{started}: {line['failure']}")


@pytest.mark.parametrize("family", [OPS, *FAMILIES])
def test_files_are_refused_or_whole(family: str, reports: dict[str, Report]) -> None:
    assert family in reports, "the child did not live to see it"
    report = reports[family]
    assert report.failures == [], "\n".join(report.failures[:20])
    assert report.finished
    expected = COUNTS.get(family, OP_CALLS)
    assert len(report.numbers) == expected or (family in AT_LEAST and len(report.numbers) > expected)
    assert (report.results[REFUSED] == 0) == (family in ALL_KEPT)
    assert (report.results[KEPT] == 0) == (family in ALL_REFUSED)


def test_there_are_thousands_of_files(reports: dict[str, Report]) -> None:
    assert set(COUNTS) == set(FAMILIES)
    assert sum(len(reports[family].numbers) for family in FAMILIES) >= 7000


def test_a_crash_is_told_with_the_file_that_caused_it() -> None:
    lines: list[dict[str, Any]] = [
        {"started": ["pt-parts", 0, "a"]},
        {"family": "pt-parts", "number": 0, "result": KEPT},
        {"started": ["pt-parts", 1, "b"]},
    ]
    found: dict[str, Report] = {}
    read(lines, "the child ended with -11", found)
    assert found["pt-parts"].failures == ["['pt-parts', 1, 'b']: the child ended with -11"]
    assert not found["pt-parts"].finished


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("scale", [None, torch.ones(40), torch.ones(1).expand(40)])
def test_the_old_format_is_repacked_once_it_is_read(layout: str, scale: Tensor | None) -> None:
    """Torch unpickles the weight first, and fills the memory of its parts afterwards."""
    t = weight()
    t.act_pre_scale = scale
    t.qdata, t.qdata_layout = repack(t.qdata, native(), layout_named(layout)), layout
    back = torch.load(saved(t, _use_new_zipfile_serialization=False), weights_only=True)
    assert back.qdata_layout == native().name
    assert torch.equal(back.to_groupwise().codes, value().codes)


def test_parts_that_torch_is_told_not_to_read_are_not_repacked() -> None:
    t = weight()
    other = next(name for name in LAYOUTS if name != native().name)
    t.qdata, t.qdata_layout = repack(t.qdata, native(), layout_named(other)), other
    with torch.serialization.skip_data():
        back = torch.load(saved(t), weights_only=True)
    assert back.qdata_layout == other


def test_a_checksum_reads_no_more_than_there_is() -> None:
    """One float stands for 40 here: 160 bytes from its address on are not all its own."""
    assert crc32(torch.ones(1).expand(40)) == crc32(torch.ones(40))
    assert crc32(torch.arange(80.0)[::2]) == crc32(torch.arange(0, 80.0, 2))


# --- Hugging Face transformers -------------------------------------------------------------------

PROJECTION = "model.layers.0.self_attn.q_proj"
Header = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, saved by transformers."""
    from tests.hugging_face_models import llama, quantized, written

    folder = tmp_path_factory.mktemp("hostile")
    model = quantized(written(llama(num_hidden_layers=1), folder / "source"))
    model.save_pretrained(folder / "good")
    return folder / "good"


def entry(**changes: Any) -> Callable[[Header], None]:
    """Change what the metadata says of one weight."""

    def change(header: Header) -> None:
        metadata = header["__metadata__"]
        said = json.loads(metadata[f"{PROJECTION}.weight"])
        for name, new in changes.items():
            (said if name.startswith("_") else said["_data"])[name] = new
        metadata[f"{PROJECTION}.weight"] = json.dumps(said)

    return change


def tensor(part: str, **changes: Any) -> Callable[[Header], None]:
    """Change what the header says of one part."""
    return lambda header: header[f"{PROJECTION}._weight_{part}"].update(changes)


def damaged(folder: Path, good: Path, change: Callable[[Header], None], flips: bytes = b"") -> Path:
    """A copy of a checkpoint with another header; ``flips`` are applied to the first codes."""
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = (good / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    start = header[f"{PROJECTION}._weight_qdata"]["data_offsets"][0]
    for i, flip in enumerate(flips):
        data[start + i] ^= flip
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(qdata_layout="avx1024"), "layout 'avx1024' is not known; choose"),
        (entry(format_version=4), "install a newer one"),
        (entry(shape=[2**40, 64]), "qdata has shape"),
        (entry(block_size=[1, 64]), r"scale_and_zero has shape \[2, 64, 2\]; .* needs \[1, 64, 2\]"),
        (entry(_type="Int4Tensor"), "Int4Tensor"),
        (entry(_type="NoSuchTensor"), "Invalid torchao safetensors metadata"),
        (tensor("scale_and_zero", shape=[1, 64, 4]), "scale_and_zero has shape"),
        (tensor("scale_and_zero", dtype="F16"), "scale_and_zero is torch.float16; it must be"),
        (tensor("qdata", dtype="I8"), "qdata is torch.int8; it must be"),
        (tensor("qdata", data_offsets=[0, 2048]), "invalid offset"),
        (lambda header: header["__metadata__"].pop("tensor_names"), "Invalid torchao safetensors"),
    ],
)
def test_transformers_refuses(
    change: Callable[[Header], None],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is wrong is in the exception, or in the report that transformers logs before it."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = damaged(tmp_path, checkpoint, change)
    with pytest.raises((RuntimeError, ValueError, SafetensorError)) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    told = f"{caught.value}\n{caplog.text}"
    assert re.search(message, told), told[-3000:]


def test_transformers_loads_other_codes(checkpoint: Path, tmp_path: Path) -> None:
    """A flip in a code is another code; `inspect --verify` tells, loading does not."""
    from transformers import AutoModelForCausalLM

    from tests.hugging_face_models import logits

    folder = damaged(tmp_path, checkpoint, lambda header: None, flips=b"\x88" * 512)
    good, other = map(AutoModelForCausalLM.from_pretrained, (checkpoint, folder))
    weight = other.get_parameter(f"{PROJECTION}.weight")
    assert_int4(weight, (64, 64), 32)
    assert not torch.equal(weight.qdata, good.get_parameter(f"{PROJECTION}.weight").qdata)
    assert bool(logits(other).isfinite().all())
    assert not torch.equal(logits(other), logits(good))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdigit():
        run([sys.argv[1]], int(sys.argv[2]))
    else:
        run(sys.argv[1:])
