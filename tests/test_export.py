"""`torch.export` and AOTInductor: saved programs give the right numbers wherever they are loaded.

Or they say that they cannot: what runs a saved program is another process, perhaps with another
instruction set, and that is how it is tested.
"""

from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization import quantize_

from tests.numerics import UNIT, assert_int4, native
from tests.test_isa import CAPABILITIES, SUPPORTED, _param, readers, run
from tests.weights import random_weight
from torchao_int4cpu import Int4WeightOnlyConfig
from torchao_int4cpu.kernels.selection import decode_max_rows

K = 150  # no multiple of the group
ROWS = [1, 2, 7, 64, 300]

WHOLE = "torchao_int4cpu.linear.default"  # the op on the 4-bit weight itself
OURS = "torchao_int4cpu.int4_mm.default"
PYTORCHS = "aten._weight_int4pack_mm_for_cpu.default"
CHECK = ["aten._convert_weight_to_int4pack_for_cpu.default", "aten._assert_async.msg"]


def quantized(model: nn.Module) -> Any:
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert_int4(module.weight, (module.out_features, module.in_features), 32)
    return model


def two_layers() -> Any:
    return quantized(nn.Sequential(nn.Linear(K, 100), nn.ReLU(), nn.Linear(100, 33, bias=False)))


def targets(program: ExportedProgram) -> list[str]:
    """Names of the int4 ops and of the assertions in the graph, in order."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if "int4" in name or "assert" in name]


def assert_equal_to_eager(program: ExportedProgram, eager: Any, *inputs: Tensor) -> None:
    for module in (program.module(), program.run_decompositions().module()):
        for x in inputs:
            with torch.no_grad():
                assert torch.equal(module(x), eager(x))
            with torch.inference_mode():
                assert torch.equal(module(x), eager(x))


# --- in this process ----------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_a_static_batch(kernel: str, strict: bool) -> None:
    """Exported with gradients on, as people do, the program shows no op that has a gradient."""
    eager = two_layers()
    program = torch.export.export(eager, (torch.randn(1, K),), strict=strict)
    assert targets(program) == [WHOLE] * 2
    expected = [*CHECK, PYTORCHS] * 2 if kernel == "aten" else [OURS] * 2
    assert targets(program.run_decompositions()) == expected
    assert_equal_to_eager(program, eager, torch.randn(1, K))


@pytest.mark.parametrize("strict", [False, True])
def test_one_program_serves_every_batch(kernel: str, strict: bool) -> None:
    """From one row on; torch asks only that the example has more than one."""
    eager = two_layers()
    shapes = ({0: Dim("m", min=1)},)
    example = torch.randn(5, K)
    program = torch.export.export(eager, (example,), dynamic_shapes=shapes, strict=strict)
    assert targets(program.run_decompositions()) == [OURS] * 2
    assert_equal_to_eager(program, eager, *(torch.randn(m, K) for m in ROWS))


def test_three_dimensions_and_a_scale(kernel: str) -> None:
    eager = two_layers()
    eager[0].weight.act_pre_scale = torch.rand(K) + 0.5
    shapes = ({0: Dim("batch", max=64), 1: Dim("length", max=64)},)
    program = torch.export.export(eager, (torch.randn(2, 3, K),), dynamic_shapes=shapes)
    assert_equal_to_eager(program, eager, torch.randn(1, 1, K), torch.randn(5, 60, K))


@pytest.mark.usefixtures("aten")
def test_few_rows_at_most_show_pytorchs_op() -> None:
    """Where it is the kernel for each number of rows that the program takes, so that C++ can run it."""
    eager = two_layers()
    limit = min(decode_max_rows(eager[layer].weight.packed()) for layer in (0, 2))
    shapes = ({0: Dim("m", min=1, max=limit)},)
    program = torch.export.export(eager, (torch.randn(2, K),), dynamic_shapes=shapes)
    assert targets(program.run_decompositions()) == [*CHECK, PYTORCHS] * 2
    assert_equal_to_eager(program, eager, *(torch.randn(m, K) for m in ROWS if m <= limit))


def test_without_a_native_kernel_our_op_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on machines that PyTorch's op would misread the bytes on."""
    monkeypatch.setattr("torchao_int4cpu.kernels.selection._native_kernels", {})
    monkeypatch.setattr("torchao_int4cpu.kernels.selection._selection", "auto")
    program = torch.export.export(two_layers(), (torch.randn(1, K),))
    assert targets(program.run_decompositions()) == [OURS] * 2


def test_autocast_is_exported() -> None:
    eager, x = two_layers(), torch.randn(2, K)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            program = torch.export.export(eager, (x,))
            expected = eager(x)
        assert expected.dtype == torch.bfloat16
        for stage in (program, program.run_decompositions()):
            assert torch.equal(stage.module()(x), expected)


def test_an_exported_program_has_gradients(kernel: str) -> None:
    eager = two_layers()
    x = torch.randn(3, K, requires_grad=True)
    program: Any = torch.export.export(eager, (x.detach(),)).module()
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (eager, program)]
    assert torch.equal(*grads)
    assert float(grads[0].abs().max()) > 0


def test_a_wrong_shape_is_refused_at_export() -> None:
    with pytest.raises(ValueError, match=f"the last dimension must be K={K}"):
        torch.export.export(two_layers(), (torch.randn(2, K + 1),))


# --- programs saved under one instruction set and run under another -----------------------------

WRITERS = [name for name in CAPABILITIES if SUPPORTED[name]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export_linear` writes, under each instruction set."""
    folder = tmp_path_factory.mktemp("programs")
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda writer: run(writer, "-m", "tests.children.export_linear", str(folder), writer),
                WRITERS,
            )
        )
    return folder


@pytest.mark.slow  # what they read under another is tested fast for saved models, in test_isa
@pytest.mark.parametrize("reader", readers())
def test_a_program_from_any_instruction_set(reader: str, programs: Path) -> None:
    """All ordered pairs. Our op gives the right numbers; PyTorch's does so or the program refuses."""
    done = run(reader, "-m", "tests.children.load_linear", str(programs), reader, *WRITERS)
    assert int(done) == 10 * len(WRITERS)


# --- what else a forward does with a weight ------------------------------------------------------


class Forms(nn.Module):
    """Views, look-ups and products: whatever is recorded must be on the weight, not on its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_weight(150, 128), requires_grad=False)
        self.scaled = nn.Parameter(
            random_weight(150, 128, act_pre_scale=torch.rand(128) + 0.5), requires_grad=False
        )
        self.experts = nn.Parameter(random_weight(3, 150, 128), requires_grad=False)

    def forward(self, x: Tensor, indices: Tensor) -> list[Tensor]:
        w, s, experts = self.weight, self.scaled, self.experts
        return [
            x @ w.t(),
            torch.addmm(torch.ones(150), x, s.mT),
            w @ x.t(),
            F.embedding(indices, w),
            F.embedding(indices, w[3:]),
            F.linear(x, w.narrow(0, 64, 64)),
            F.linear(x, w.narrow(0, 7, 64)),
            F.linear(x[:, 32:], s[:, 32:]),
            torch.cat([F.linear(x, part) for part in w.split([64, 50, 36])], 1),
            F.linear(x, torch.cat([w[:9], w[9:30]])),
            F.linear(x, w[torch.tensor([5, -1, 0])]),
            F.grouped_mm(x, experts.mT, offs=torch.tensor([1, 2, 4], dtype=torch.int32)),
            torch.bmm(x.expand(3, -1, -1), experts.transpose(1, 2)),
            F.linear(x, experts[1]),
            x @ torch.stack([w, w]).mT,
            x @ w.to(torch.float32).dequantize().t(),
            x @ w.t().dequantize().float(),
        ]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_views_and_products_are_exported_whole(strict: bool, kernel: str) -> None:
    eager, inputs = Forms(), (torch.randn(4, 128), torch.tensor([[0, 5], [100, 7]]))
    program = torch.export.export(eager, inputs, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "inner_tensor" in name], "a part of a weight is in the graph"
    assert not [name for name in names if "int4_" in name or "join_rows" in name]
    with torch.no_grad():
        expected = eager(*inputs)
        for stage in (program, program.run_decompositions()):
            for y, wanted in zip(stage.module()(*inputs), expected):
                assert torch.equal(y, wanted)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    for writer in WRITERS:
        run(writer, "-m", "tests.children.export_forms", str(folder), writer)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reader", [_param(name) for name in CAPABILITIES])
def test_views_and_products_from_any_instruction_set(reader: str, forms: Path) -> None:
    done = run(reader, "-m", "tests.children.load_forms", str(forms), reader, *WRITERS)
    assert int(done) == 3 * 17 * len(WRITERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("whole", "import of torchao_int4cpu halted"),
        ("parts", "We failed to resolve torch.ops.torchao_int4cpu.int4_mm.default to an operator"),
    ],
    ids=["whole", "parts"],
)
def test_a_program_without_this_package(programs: Path, stage: str, missing: str) -> None:
    """PyTorch's op needs PyTorch only; for the others torch names what is missing."""
    here = native().name
    files = [f"{here}.samples.pt", f"{here}.aten.pt2", f"{here}.{stage}.pt2"]
    assert missing in run(
        here, "-m", "tests.children.program_without_package", *(str(programs / name) for name in files)
    )


# --- AOTInductor --------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two kinds of layers on inputs of any dtype and batch size, so that one package tests them all."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = quantized(nn.Linear(K, 33))
        self.scaled = quantized(nn.Linear(K, 16))
        self.scaled.weight.act_pre_scale = torch.rand(K) + 0.5

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for x in inputs for layer in (self.plain, self.scaled)]


def inputs_of(rows: int) -> list[Tensor]:
    """One row and ``rows`` rows, each in float32 and in bfloat16."""
    xs = [torch.randn(1, K), torch.randn(rows, K)]
    return [x.to(dtype) for x in xs for dtype in (torch.float32, torch.bfloat16)]


def compile_layers(package: Path, max_rows: int) -> int:
    """Write a package for one row and for any number up to ``max_rows``. Return the number of samples.

    They are beside it: inputs, what eager gives, and how far from that each output may be.
    """
    eager = Layers()
    m = Dim("m", min=1, max=max_rows)
    program = torch.export.export(eager, (inputs_of(5),), dynamic_shapes=([{}, {}, {0: m}, {0: m}],))
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        samples = []
        for rows in (rows for rows in ROWS if rows <= max_rows):
            inputs = inputs_of(rows)
            expected = eager(inputs)
            bounds = [
                bound
                for y, y_scaled in zip(expected[::2], expected[1::2])
                for bound in (torch.zeros_like(y), skipped_rounding(y_scaled, eager.scaled.bias))
            ]
            samples.append((inputs, expected, bounds))
    torch.save(samples, package.with_suffix(".samples"))
    return len(samples)


def skipped_rounding(y: Tensor, bias: Tensor) -> Tensor:
    """How far inductor may be from ``y``, what eager gives for a layer with an ``act_pre_scale``.

    The product p of such a layer is float32. Eager rounds it to the dtype of the activation, adds the
    bias b and rounds s = p + b; inductor rounds only s. So in bfloat16 they differ by
    u |p| + 2u |s| (1 + 2u) at most, and |p| <= |s| + |b|; in float32 by nothing.
    """
    if y.dtype == torch.float32:
        return torch.zeros_like(y)
    return UNIT[torch.bfloat16] * (4 * y.abs() + 2 * bias.abs())


def run_package(package: Path, capability: str, *imported: str) -> str:
    return run(
        capability,
        "-m",
        "tests.children.package_without_package",
        str(package),
        str(package.with_suffix(".samples")),
        *imported,
    )


def ops_called(package: Path) -> set[str]:
    """The ops that a package looks up by name when it runs."""
    with zipfile.ZipFile(package) as archive:
        files = [name for name in archive.namelist() if name.endswith(".wrapper.json")]
        (called,) = [json.loads(archive.read(name)) for name in files]
    return {node["node"]["target"] for node in called["nodes"]}


@pytest.mark.slow
def test_aotinductor(tmp_path: Path) -> None:
    """In a fresh process that imports this package; without it, and in C++, the op is missing."""
    package = tmp_path / "layers.pt2"
    samples = compile_layers(package, 10**6)
    assert ops_called(package) == {"torchao_int4cpu::int4_mm"}
    here = native().name
    assert run_package(package, here, "torchao_int4cpu").split() == ["right"] * samples
    assert "Could not find schema for torchao_int4cpu::int4_mm" in run_package(package, here)


@pytest.mark.slow
@pytest.mark.usefixtures("aten")
def test_aotinductor_without_this_package(tmp_path: Path) -> None:
    """Few rows and PyTorch's op: nothing is called that libtorch has not, so C++ can run it."""
    package = tmp_path / "layers.pt2"
    samples = compile_layers(package, 32)
    assert ops_called(package) == {"aten::_convert_weight_to_int4pack_for_cpu"}
    here = native().name
    assert run_package(package, here).split() == ["right"] * samples
    if here != "default":
        assert f"packed for '{here}'" in run_package(package, "default")
