"""Loading never trusts the file: thousands of damaged and hostile files, each loaded by every road.

Each ends in an exception or in a weight that is whole: its parts fit, its product is that of its codes
and scales, it can be saved again. A flip inside those bytes changes the numbers and no more.

The files (`corruptions`) are loaded in child processes, as one that crashes must not take the suite
with it. The fast tier tries one of `EVERY` files, the slow one all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.children.hostile_files import OP_CALLS, OPS
from tests.corruptions import FAMILIES, KEPT, REFUSED
from tests.numerics import (
    native,
)
from tests.test_old_files import value, weight
from tests.whole_weight import saved
from torchao_int4cpu.checkpoint.safetensors import crc32
from torchao_int4cpu.format.layout import LAYOUTS, layout_named
from torchao_int4cpu.format.slicing import repack

#: How many files each family has, all seeded. Two grow with the attributes of torch's tensors and with
#: the classes of torchao: so many at least.
COUNTS = {
    "pt-truncated": 5129,
    "pt-flipped": 3600,
    "pt-overwritten": 960,
    "pt-swapped": 360,
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
    "pt-orders": 47,
    "pt-legacy-orders": 47,
    "safetensors-truncated": 1667,
    "safetensors-flipped": 2400,
    "safetensors-overwritten": 480,
    "safetensors-swapped": 180,
    "safetensors-spliced": 160,
    "safetensors-metadata": 477,
    "safetensors-entries": 403,
    "safetensors-relabelled": 30,
    "safetensors-names": 44,
    "safetensors-strangers": 32,
    "safetensors-exchanged": 20,
    "safetensors-headers": 763,
    "safetensors-frames": 21,
    "pt-stacks": 158,
    "pt-views": 228,
    "pt-late-views": 72,
    "safetensors-stacks": 270,
    "foreign-truncated": 1055,
    "foreign-flipped": 540,
    "foreign-overwritten": 216,
    "foreign-swapped": 108,
    "foreign-parts": 756,
    "foreign-exchanged": 72,
}
AT_LEAST = ("pt-attached", "safetensors-relabelled")

#: Families of which no file can be kept, and one of which all must be.
ALL_REFUSED = (
    *("pt-truncated", "safetensors-truncated", "foreign-truncated"),
    *("safetensors-entries", "safetensors-relabelled", "safetensors-headers"),
)
ALL_KEPT = ("pt-late",)

#: In the fast tier one of this number of files is tried.
EVERY = 30


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


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(EVERY, id="some")],
)
def step(request: pytest.FixtureRequest) -> int:
    """One of this number of files is tried."""
    wanted: int = request.param
    return wanted


@pytest.fixture(scope="module")
def reports(step: int) -> dict[str, Report]:
    """Two children share the families."""
    families = [OPS, *FAMILIES]
    command = [sys.executable, "-m", "tests.children.hostile_files", str(step)]
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
def test_files_are_refused_or_whole(family: str, reports: dict[str, Report], step: int) -> None:
    assert family in reports, "the child did not live to see it"
    report = reports[family]
    assert report.failures == [], "\n".join(report.failures[:20])
    assert report.finished
    expected = -(-COUNTS.get(family, OP_CALLS) // step)
    assert len(report.numbers) == expected or (family in AT_LEAST and len(report.numbers) > expected)
    if step > 1:
        return  # of one file nothing follows for its family
    assert (report.results[REFUSED] == 0) == (family in ALL_KEPT)
    assert (report.results[KEPT] == 0) == (family in ALL_REFUSED)


def test_there_are_thousands_of_files(reports: dict[str, Report], step: int) -> None:
    assert set(COUNTS) == set(FAMILIES)
    assert sum(len(reports[family].numbers) for family in FAMILIES) >= 7000 / step


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
