"""The benchmark's rows are consistent with each other. No times are asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.numerics import assert_int4, native
from tests.printed_tables import split_row
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu import get_kernel
from torchao_int4cpu.bench import layers as bench
from torchao_int4cpu.bench import plot, timing
from torchao_int4cpu.bench.layers import Row
from torchao_int4cpu.extras import MissingExtra
from torchao_int4cpu.format.packed import PackedInt4, dense_reference
from torchao_int4cpu.kernels.selection import native_kernel, read_at_best

LIMITS = bench.Limits(1.0, None)

#: The line that is there only if "ours" is not PyTorch's op already.
OURS_ATEN = ["ours aten"] if native_kernel(native()) is not None else []


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CYCLE_BYTES", 2**20)
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr(bench, "PEAK_ROUNDS", 100)
    monkeypatch.setattr(timing, "MAX_PASS_SECONDS", 0.01)
    monkeypatch.setattr(timing, "MIN_PASS_SECONDS", 0.0001)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_rows_hold_together(dtype: torch.dtype, kernel: str) -> None:
    limits = bench.Limits(10.0, 50.0)
    options: dict[str, Any] = {"group_size": 32, "dtype": dtype, "passes": 2, "limits": limits}
    rows = list(bench.run([(100, 70)], [1, 3], compiled=True, prototype=False, **options))
    kernels = ["bf16 linear", "aten op", "ours", *OURS_ATEN[kernel == "aten" :], "ours compiled"]
    assert [(row.m, row.kernel) for row in rows] == [(m, name) for m in (1, 3) for name in kernels]
    for m in (1, 3):
        by_name = {row.kernel: row for row in rows if row.m == m}
        for row in by_name.values():
            assert (row.n, row.k, row.group_size) == (100, 70, 32)
            bytes_moved = 100 * 70 * 2 if row.kernel == "bf16 linear" else 112 * 48 + 3 * 112 * 4
            assert row.weight_gb_per_s == pytest.approx(bytes_moved / row.ms / 1e6)
            assert row.bandwidth_share == pytest.approx(row.weight_gb_per_s / 10)
            assert row.limit_ms == pytest.approx(max(bytes_moved / 10e9, 2 * m * 100 * 70 / 50e9) * 1e3)
            assert row.gflop_per_s == pytest.approx(2 * m * 100 * 70 / row.ms / 1e6)
            dense, op = by_name["bf16 linear"], by_name["aten op"]
            assert row.speed_vs_bf16_linear == pytest.approx(dense.ms / row.ms)
            assert 1e-8 < row.relative_error < 2.0**-7
            assert_total(row)
            assert row.speed_vs_aten_op == pytest.approx(op.ms / row.ms)
            assert row.read_ms == dense.read_ms
            assert (row.read_ms is not None) == (native_kernel(native()) is not None)
    assert get_kernel() == kernel


def assert_total(row: Row) -> None:
    """Quantization in groups of 32 normal numbers, and the error of the product.

    The numbers of a group are rounded to 16 levels from the least to the largest, which are 4.1 ± 0.7
    standard deviations apart: evenly spread errors have a standard deviation of 4.1 / 15 / sqrt(12) =
    0.08 of that of the numbers, and the least that 2.7 (two deviations closer) would give is 0.05, the
    most 0.11 for 5.5. Scales and zeros in bfloat16 and the rounding of the product (below 2^-7) add.
    """
    assert 0.05 - 2.0**-7 < row.total_error < 0.11 + 2 * 2.0**-7
    assert row.total_error > 3 * row.relative_error


@pytest.mark.parametrize("group_size", [32, 256])
def test_the_total_error_is_rounding_and_quantization(group_size: int) -> None:
    """It is what quantization changes, give or take the error of the product (triangle inequality)."""
    weights = bench._Weights(96, 512, group_size)
    original, w = weights.original.double(), weights.packed[0]
    assert_int4(w, (96, 512), group_size)
    x = torch.randn(20, 512, dtype=torch.bfloat16)
    right = x[: bench.ERROR_ROWS].double() @ original.t()
    dequantized = x[: bench.ERROR_ROWS].double() @ dense_reference(w.packed()).t()
    changed = float((dequantized - right).norm() / right.norm())
    ratio = float(dequantized.norm() / right.norm())
    relative, total = weights.exact(x).errors(F.linear(x, w))
    assert 0 < relative < 2.0**-7
    assert abs(total - changed) <= relative * ratio + 1e-12
    _, dense_total = weights.exact(x).errors(x.double() @ original.t())
    assert dense_total < 1e-12  # the float weight itself has no error


def test_reading_takes_its_turn_over_the_weights_of_the_kernels(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is read is the whole of each; None where no native kernel runs."""
    addresses = set()

    def read(weight: PackedInt4) -> int | None:
        addresses.add(weight.qdata.data_ptr())
        return read_at_best(weight)

    monkeypatch.setattr(bench, "read_at_best", read)
    rows = list(bench.run([(64, 64)], [1], group_size=32, passes=1, limits=LIMITS))
    if native_kernel(native()) is None:
        assert addresses == set()
        assert [row.read_ms for row in rows] == [None] * len(rows)
    else:
        assert len(addresses) > 1
        assert all(row.read_ms is not None and row.read_ms > 0 for row in rows)
    assert bench.READ not in {row.kernel for row in rows}


def test_the_prototype_is_timed_on_request() -> None:
    rows = list(bench.run([(64, 64)], [1], group_size=32, passes=1, prototype=True, limits=LIMITS))
    assert [row.kernel for row in rows][-1] == "torchao prototype"


def test_a_selection_holds_during_the_call_only(kernel: str) -> None:
    during: list[str] = []

    def call(i: int) -> Tensor:
        during.append(get_kernel())
        return torch.empty(0)

    timing.selected(timing.TimedCall(call, selection="aten"))(0)
    timing.selected(timing.TimedCall(call))(0)
    assert during == ["aten", kernel]
    assert get_kernel() == kernel


def test_limits_are_measured() -> None:
    limits = bench.measure_limits(passes=1)
    assert limits.read_gb_per_s > 0
    assert (limits.gflop_per_s is not None) == bool(OURS_ATEN)
    assert bench.Limits(10.0, None).ms(10**7, 10**12) == pytest.approx(1.0)


COMMAND = ["bench", "--shapes", "64x96", "--rows", "2", "--group-size", "32", "--passes", "1"]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--json"]) == 0
    environment, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert environment["torch"] == torch.__version__
    assert environment["read GB/s"] > 0
    assert [Row(**row).kernel for row in rows] == ["bf16 linear", "aten op", "ours", *OURS_ATEN]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--dtype", "fp16"]) == 0
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert "threads" in first
    assert header.split()[:6] == ["N", "K", "M", "group", "dtype", "kernel"]
    kernels = ["bf16 linear", "aten op", "ours", *OURS_ATEN]
    found = [split_row(row.replace(" - ", " 0 "), numbers=10)[0] for row in rows]
    assert [names[:4] for names in found] == [["64", "96", "2", "32"]] * len(kernels)
    assert [" ".join(kernel) for _, _, _, _, _, *kernel in found] == kernels  # after the dtype


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_command_draws(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"picture.{ending}"
    command = ["bench", "--shapes", "64x96", "96x64", "--rows", "1", "3", "--group-size", "32"]
    assert cli.main([*command, "--passes", "1", "--plot", str(file)]) == 0
    start = file.read_bytes()[:5]
    assert start == (b"<?xml" if ending == "svg" else b"\x89PNG\r")
    if ending == "svg":
        assert file.read_text().count('id="axes_') == 2


def test_drawing_needs_matplotlib_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*COMMAND, "--plot", "x.svg"]) == 1
    captured = capsys.readouterr()
    assert "pip install 'torchao_int4cpu[plot]'" in captured.err
    assert captured.out == ""
    with pytest.raises(MissingExtra):
        plot.draw([], Path("x.svg"), "")


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.draw([], Path("x.svg"), "")


@pytest.mark.parametrize("shape", ["64", "0x64", "64x", "axb", "-1x2"])
def test_a_wrong_shape_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", f"--shapes={shape}"])
    assert "is not a shape; write NxK, as in 4096x4096" in capsys.readouterr().err
