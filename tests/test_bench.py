"""The benchmark's rows are consistent with each other. No times are asserted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from torchao_int4cpu import __main__ as cli
from torchao_int4cpu import bench
from torchao_int4cpu.bench import Row


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CYCLE_BYTES", 2**20)
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr(bench, "MAX_PASS_SECONDS", 0.01)
    monkeypatch.setattr(bench, "MIN_PASS_SECONDS", 0.0001)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_hold_together(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"group_size": 32, "dtype": dtype, "passes": 2, "bandwidth": 10.0}
    rows = list(bench.run([(100, 70)], [1, 3], compiled=True, prototype=False, **options))
    kernels = ["bf16 linear", "aten op", "ours", "ours compiled"]
    assert [(row.m, row.kernel) for row in rows] == [(m, name) for m in (1, 3) for name in kernels]
    for m in (1, 3):
        by_name = {row.kernel: row for row in rows if row.m == m}
        for row in by_name.values():
            assert (row.n, row.k, row.group_size) == (100, 70, 32)
            bytes_moved = 100 * 70 * 2 if row.kernel == "bf16 linear" else 112 * 48 + 3 * 112 * 4
            assert row.weight_gb_per_s == pytest.approx(bytes_moved / row.ms / 1e6)
            assert row.bandwidth_share == pytest.approx(row.weight_gb_per_s / 10)
            assert row.gflop_per_s == pytest.approx(2 * m * 100 * 70 / row.ms / 1e6)
            dense, op = by_name["bf16 linear"], by_name["aten op"]
            assert row.speed_vs_bf16_linear == pytest.approx(dense.ms / row.ms)
            assert 1e-8 < row.relative_error < 2.0**-7
            assert row.speed_vs_aten_op == pytest.approx(op.ms / row.ms)


def test_the_prototype_is_timed_on_request() -> None:
    rows = list(bench.run([(64, 64)], [1], group_size=32, passes=1, prototype=True, bandwidth=1.0))
    assert [row.kernel for row in rows][-1] == "torchao prototype"


def test_bandwidth_is_measured() -> None:
    assert bench.read_bandwidth(passes=1) > 0


COMMAND = ["bench", "--shapes", "64x96", "--rows", "2", "--group-size", "32", "--passes", "1"]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--json"]) == 0
    environment, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert environment["torch"] == torch.__version__
    assert environment["read GB/s"] > 0
    assert [Row(**row).kernel for row in rows] == ["bf16 linear", "aten op", "ours"]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--dtype", "fp16"]) == 0
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert "threads" in first
    assert header.split()[:6] == ["N", "K", "M", "group", "dtype", "kernel"]
    assert len(rows) == 3
    assert len({len(line) for line in (header, *rows)}) == 1


@pytest.mark.parametrize("shape", ["64", "0x64", "64x", "axb", "-1x2"])
def test_a_wrong_shape_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", f"--shapes={shape}"])
    assert "is not a shape; write NxK, as in 4096x4096" in capsys.readouterr().err
