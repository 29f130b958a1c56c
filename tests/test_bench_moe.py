"""The rows of ``bench --moe`` and ``bench --views`` are consistent. No times are asserted."""

from __future__ import annotations

import json

import pytest
import torch

from tests.printed_tables import split_row
from torchao_int4cpu import __main__ as cli
from torchao_int4cpu.bench import experts as bench_moe
from torchao_int4cpu.bench import layers as bench
from torchao_int4cpu.bench import timing
from torchao_int4cpu.bench import views as bench_views
from torchao_int4cpu.bench.experts import MoeRow, MoeShape
from torchao_int4cpu.bench.views import ViewRow

LIMITS = bench.Limits(10.0, None)
SHAPE = MoeShape(experts=6, hit=2, n=48, k=72)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench, bench_moe, bench_views):
        monkeypatch.setattr(module, "CYCLE_BYTES", 2**14)
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr(bench, "PEAK_ROUNDS", 100)
    monkeypatch.setattr(timing, "MAX_PASS_SECONDS", 0.01)
    monkeypatch.setattr(timing, "MIN_PASS_SECONDS", 0.0001)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_experts_hold_together(dtype: torch.dtype) -> None:
    rows = list(bench_moe.run(SHAPE, [2, 5], group_size=32, dtype=dtype, passes=1, limits=LIMITS))
    names = ["bf16 hit of all", "hit of hit", "hit of all", "loop w[e]"]
    expected = [(2, name) for name in [*names, "index + bmm"]] + [(5, name) for name in names]
    assert [(row.pairs, row.kernel) for row in rows] == expected
    for row in rows:
        of_the_same = {other.kernel: other for other in rows if other.pairs == row.pairs}
        of_one = 48 * 72 * 2 if row.kernel == "bf16 hit of all" else 48 * 48 + 3 * 48 * 4
        assert row.weight_gb_per_s == pytest.approx(2 * of_one / row.ms / 1e6)
        assert row.limit_ms == pytest.approx(2 * of_one / 10e9 * 1e3)
        assert row.vs_hit_only == pytest.approx(row.ms / of_the_same["hit of hit"].ms)
        assert row.speed_vs_bf16 == pytest.approx(of_the_same["bf16 hit of all"].ms / row.ms)
        assert row.experts == (2 if row.kernel == "hit of hit" else 6)
        assert 1e-8 < row.relative_error < 2.0**-7  # a product of the right experts, and rounded


def test_every_call_hits_other_experts() -> None:
    experts = bench_moe._Experts(SHAPE, 32, torch.bfloat16)
    hit = [e for chosen in experts.chosen for e in chosen]
    assert len(experts.chosen) == experts.calls > 1
    assert len(set(hit)) == len(hit)
    for chosen, small in zip(experts.chosen, experts.small):
        assert torch.equal(small.qdata, experts.stack.qdata[chosen])


@pytest.mark.parametrize(
    ("hit", "pairs", "message"), [(7, 8, "hit=7 of"), (4, 3, "3 rows cannot hit 4")]
)
def test_what_cannot_be_hit_is_refused(hit: int, pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(bench_moe.run(MoeShape(6, hit, 48, 72), [pairs], limits=LIMITS))


def test_rows_of_views_hold_together() -> None:
    rows = {row.operation: row for row in bench_views.run([(256, 128)], group_size=64, passes=1)}
    whole = 128 * 128 + 2 * 256 * 4  # qdata, scale_and_zero
    copied = {
        "transpose": 0,
        "half of N, on a block": 0,
        "half of N, in a block": whole // 2,
        "shard of N, 1 of 2": whole // 2,
        "join halves of N": whole,
        "half of K": whole // 2,
        "join halves of K": whole,
        "shard of K, 1 of 2": whole // 2,
        "embedding of 1": 128 * 2,
        "embedding of 512": 512 * 128 * 2,
    }
    assert {name: row.copied_bytes for name, row in rows.items()} == copied
    for row in rows.values():
        assert row.result == ("copy" if row.copied_bytes else "view")
        assert row.ms > 0
        assert row.dense_ms > 0


MOE = [
    "bench",
    "--moe",
    "--experts",
    "4",
    "--hit",
    "2",
    "--expert-shape",
    "48x72",
    "--group-size",
    "32",
]
VIEWS = ["bench", "--views", "--shapes", "128x128", "--group-size", "64"]


def test_the_commands_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*MOE, "--rows", "2", "--passes", "1", "--json"]) == 0
    environment, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert environment["experts"] == "MoeShape(experts=4, hit=2, n=48, k=72)"
    assert [MoeRow(**row).pairs for row in rows] == [2] * 5
    assert cli.main([*VIEWS, "--passes", "1", "--json"]) == 0
    _, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {ViewRow(**row).n for row in rows} == {128}


def test_the_commands_print_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*MOE, "--passes", "1"]) == 0
    _, *table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["pairs", "kernel"]
    names = [split_row(line, numbers=6)[0] for line in table[1:]]
    assert {pairs for pairs, *_ in names} == {"2", "8", "64"}
    assert {" ".join(kernel) for _, *kernel in names} >= {"hit of hit", "hit of all", "loop w[e]"}
    assert cli.main([*VIEWS, "--passes", "1"]) == 0
    _, *table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["N", "K", "operation"]
    names = [split_row(line, numbers=3)[0] for line in table[1:]]
    assert {(n, k, result) for n, k, *_, result in names} == {
        ("128", "128", "view"),
        ("128", "128", "copy"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*MOE, "--compile"], "--compile, which has no effect here; leave it out, or leave --moe out"),
        (["bench", "--hit", "3"], "--hit, which has no effect here; leave it out, or add --moe"),
        (
            [*VIEWS, "--rows", "3"],
            "--rows, which has no effect here; leave it out, or leave --views out",
        ),
        ([*MOE, "--hit", "5"], "hit=5 of experts=4"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options) == 1
    assert message in capsys.readouterr().err
