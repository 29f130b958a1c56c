"""Large weights lie in huge pages where Linux has some, and nothing else is touched."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.format import huge_pages
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.format.slicing import repack

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that the middle of a tensor lies in."""
    address, found, inside = tensor.data_ptr() + tensor.nbytes // 2, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            first, last = (int(border, 16) for border in name.split("-"))
            inside = first <= address < last
        elif inside and name == "AnonHugePages:":
            found = int(values[0]) << 10
    return found


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="no transparent huge pages"
)
def test_a_large_weight_gets_some() -> None:
    if _huge_bytes(huge_pages.prefer_huge_pages(torch.empty(1 << 26)).fill_(1.0)) == 0:
        pytest.skip("the kernel had no huge page to give")
    weight = Int4OpaqueTensor.from_hp(torch.randn(4096, 4096), [1, 128])
    assert _huge_bytes(weight.qdata) > 0
    other = LAYOUTS["avx2" if weight.qdata_layout != "avx2" else "avx512"]
    repacked = repack(weight.qdata, LAYOUTS[weight.qdata_layout], other)
    assert _huge_bytes(repacked) > 0
    assert torch.equal(repack(repacked, other, LAYOUTS[weight.qdata_layout]), weight.qdata)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
def test_only_whole_pages_of_large_tensors_are_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda *call: calls.append(call))
    large = torch.empty(huge_pages.LEAST_BYTES + 100, dtype=torch.uint8)[36:]
    assert huge_pages.prefer_huge_pages(large) is large
    assert [advice for _, _, advice in calls] == [14, 25]
    for start, length, _ in calls:
        assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
        assert large.data_ptr() <= start < large.data_ptr() + mmap.PAGESIZE
        assert large.nbytes - 2 * mmap.PAGESIZE < length <= large.nbytes
        assert start + length <= large.data_ptr() + large.nbytes
    calls.clear()
    huge_pages.prefer_huge_pages(large[: huge_pages.LEAST_BYTES - 1])
    huge_pages.prefer_huge_pages(torch.empty(1 << 24, device="meta"))
    with FakeTensorMode():
        huge_pages.prefer_huge_pages(torch.empty(1 << 24))
    assert not calls
