"""`torch.onnx.export(dynamo=True)`: 4 bits in the file, and onnxruntime gives what the weight says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization import quantize_

from tests.embedding_models import assert_tied, tied
from tests.numerics import UNIT, assert_int4, random_groupwise
from tests.onnx_files import INT4, UINT8, OnnxFile, assert_product
from tests.product_forms import BATCHED, GROUPED, PRODUCTS, operands, plain
from tests.weights import ALL_LAYOUTS, random_weight, weight_in
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig, set_kernel
from torchao_int4cpu.integrations.onnx import standard_operators

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

MICROSOFTS = "com.microsoft.MatMulNBits"


class Products(nn.Module):
    """Several products in one model, and so one export: ``function(*inputs, weight)`` of each."""

    def __init__(self, products: Sequence[tuple[Callable[..., Tensor], Any]]) -> None:
        super().__init__()
        self.functions = [function for function, _ in products]
        self.weights = nn.ParameterList(
            nn.Parameter(weight, requires_grad=False) for _, weight in products
        )

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [f(*inputs, weight) for f, weight in zip(self.functions, self.weights)]


def linear(weight: Any) -> nn.Module:
    return Products([(F.linear, weight)])


def assert_linear(y: Tensor, x: Tensor, weight: Any, bias: Tensor | None = None) -> None:
    dense, unit = plain(weight)
    exact, largest = x.double() @ dense.t(), x.double().abs() @ unit.t()
    if bias is not None:
        exact, largest = exact + bias, largest + bias.abs()
    assert_product(y, exact, largest, x.shape[-1])


# --- linear layers ------------------------------------------------------------------------------


def test_any_layout_shape_and_number_of_rows(tmp_path: Path) -> None:
    """N odd, K no multiple of the group; and the bytes of the codes are half of N times K'."""
    weights = [
        weight_in(
            layout, random_groupwise(n, k, group_size, seed)
        )  # torch's optimizer joins equal ones
        for seed, layout in enumerate(ALL_LAYOUTS)
        for n, k, group_size in SHAPES
    ]
    functions = [partial(lambda k, x, w: F.linear(x[:, :k], w), w.shape[1]) for w in weights]
    model = Products(list(zip(functions, weights)))
    rows = (({0: Dim("rows", min=1, max=4096)},),)
    file = OnnxFile(tmp_path, model, (torch.randn(3, 300),), dynamic_shapes=rows)
    assert file.operators[MICROSOFTS] == len(weights)
    assert file.opsets == {"": 21, "com.microsoft": 1}
    stored = [(shape, size) for kind, shape, size in file.initializers.values() if kind == UINT8]
    for n, k, group_size in SHAPES:
        groups = -(-k // group_size)
        assert ((n, groups, group_size // 2), n * groups * group_size // 2) in stored
    for rows_now in (1, 2, 7, 64):
        x = torch.randn(rows_now, 300)
        for y, weight in zip(file(x), weights, strict=True):
            assert_linear(y, x[:, : weight.shape[1]], weight)


SHAPES = [(33, 150, 32), (7, 64, 64), (100, 300, 256), (1, 1, 128)]


def test_the_plain_call_of_a_model(tmp_path: Path) -> None:
    """Whole, with a scale on an activation and three dimensions; two of them dynamic."""
    model = nn.Sequential(nn.Linear(200, 96), nn.ReLU(), nn.Linear(96, 50, bias=False))
    quantize_(model, Int4WeightOnlyConfig(group_size=64))
    for layer, shape in ((model[0], (96, 200)), (model[2], (50, 96))):
        assert_int4(layer.weight, shape, 64)
    scale: Any = torch.rand(200) + 0.5
    weight: Any = model[0].weight
    weight.act_pre_scale = scale
    shapes = ({0: Dim("batch", max=64), 1: Dim("length", max=64)},)
    file = OnnxFile(tmp_path, model, (torch.randn(2, 3, 200),), dynamic_shapes=shapes)
    assert file.operators[MICROSOFTS] == 2
    # 4 bits, one more for scale and zero of 64 weights, act_pre_scale, the bias, and some shapes.
    weights = (96 * 256 + 50 * 128) * (4 + 1) // 8
    assert sum(size for _, _, size in file.initializers.values()) < weights + 4 * (200 + 96) + 200
    for batch, length in ((1, 1), (5, 7)):
        x = torch.randn(batch, length, 200)
        first, unit = plain(weight)  # act_pre_scale included
        bias = model.get_parameter("0.bias").detach().double()
        hidden = (x.double() @ first.t() + bias).relu()
        second, second_unit = plain(model[2].weight)
        largest = x.double().abs() @ unit.t() + bias.abs()
        assert_product(file(x)[0], hidden @ second.t(), largest @ second_unit.t(), 200 + 96 + 8)


def test_a_layer_without_zeros_has_no_second_product(tmp_path: Path) -> None:
    value = random_groupwise(48, 96, 32)
    symmetric = GroupwiseInt4(value.codes, value.scale, torch.zeros_like(value.zero), 32)
    weight = Int4OpaqueTensor.from_groupwise(symmetric)
    file, x = OnnxFile(tmp_path, linear(weight), (torch.randn(3, 96),)), torch.randn(3, 96)
    assert file.operators == {MICROSOFTS: 1}
    assert_linear(file(x)[0], x, weight)


def test_groups_of_equal_numbers(tmp_path: Path) -> None:
    """Their scale is 0, so that no zero in units of it would do."""
    value = random_groupwise(48, 96, 32)
    scale = value.scale.clone()
    scale[:, 1] = 0
    weight = Int4OpaqueTensor.from_groupwise(GroupwiseInt4(value.codes, scale, value.zero, 32))
    file, x = OnnxFile(tmp_path, linear(weight), (torch.randn(3, 96),)), torch.randn(3, 96)
    assert_linear(file(x)[0], x, weight)


def test_float16(tmp_path: Path) -> None:
    model = nn.Linear(150, 33).half()
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    assert_int4(model.weight, (33, 150), 32)
    file = OnnxFile(tmp_path, model, (torch.randn(3, 150).half(),))
    x = torch.randn(3, 150).half()
    dense, unit = plain(model.weight)
    product, bias = x.double() @ dense.t(), model.bias.detach().double()
    (y,) = file(x)
    assert y.dtype == torch.float16
    # The product is rounded to float16 before the bias is added: once more than `assert_product` knows.
    largest = x.double().abs() @ unit.t() + bias.abs()
    once_more = UNIT[torch.float16] / UNIT[torch.float32] / 300 * product.abs()
    assert_product(y, product + bias, largest + once_more, 150)


def test_bfloat16_becomes_float32_first(tmp_path: Path) -> None:
    """onnxruntime's CPU has no bfloat16: a dense layer is not run either. ``.float()`` is the cure."""
    model = nn.Linear(150, 33).bfloat16()
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    weight = copy.deepcopy(model.weight)
    file = OnnxFile(tmp_path, model.float(), (torch.randn(3, 150),))
    x = torch.randn(3, 150)
    assert_linear(file(x)[0], x, weight, model.bias.detach())


@pytest.mark.parametrize("opset", [18, 23])
def test_products_and_look_ups_are_in_every_opset(opset: int, tmp_path: Path) -> None:
    file = OnnxFile(tmp_path, tied(), (torch.arange(6),), opset_version=opset)
    assert file.opsets == {"": opset, "com.microsoft": 1}


@pytest.mark.slow
def test_the_program_of_torch_export(tmp_path: Path) -> None:
    """As it is, decomposed, and made under `set_kernel`: the same file."""
    weight = random_weight(33, 150)
    model, x = linear(weight).eval(), torch.randn(3, 150)
    with set_kernel("aten"):
        program = torch.export.export(model, (x,))
        decomposed_for_pytorch = program.run_decompositions()
    for number, given in enumerate((program, program.run_decompositions())):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = OnnxFile(folder, given, ())
        assert file.opsets[""] == 21
        assert_linear(file(x)[0], x, weight)
    with pytest.raises(
        ValueError, match=r"under set_kernel\('aten'\).*give torch.onnx.export the model"
    ):
        torch.onnx.export(decomposed_for_pytorch, dynamo=True, verbose=False)
    with set_kernel("aten"):
        assert OnnxFile(tmp_path, model, (x,)).operators[MICROSOFTS] == 1


@pytest.mark.slow
def test_torchs_own_check_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    """``verify=True`` runs the program beside the file: it is as torch decomposed it."""
    x = torch.randn(3, 64)
    program = torch.onnx.export(linear(random_weight(32, 64)).eval(), (x,), dynamo=True, verify=True)
    assert "Execute the model with ONNX Runtime... ✅" in capsys.readouterr().out
    exported: Any = program
    assert exported.exported_program.module()(x)[0].shape == (3, 32)


# --- other forms --------------------------------------------------------------------------------


def assert_forms(
    folder: Path, functions: Mapping[str, Callable[..., Tensor]], weight: Any, inputs: list[Tensor]
) -> OnnxFile:
    """Each form of a product with one weight, in one file."""
    # torch.export takes no example without rows
    kept = {name: function for name, function in functions.items() if name != "no rows"}
    file = OnnxFile(folder, Products([(f, weight) for f in kept.values()]), tuple(inputs))
    dense, unit = plain(weight)
    for (name, function), y in zip(kept.items(), file(*inputs), strict=True):
        exact = function(*(t.double() for t in inputs), dense)
        largest = function(*(t.double().abs() for t in inputs), unit)
        # y · W sums over N = 160; a scale of the result, and an alpha, are two more roundings.
        print(name)
        if name == "addmm, only the product":  # its bias is infinite, and ignored
            assert bool(y.isfinite().all())
        assert_product(y, exact, largest, 160 + 2)
    return file


def test_forms_of_products(tmp_path: Path) -> None:
    """What takes the weight as it is; ``y @ w`` takes it whole, from INT4."""
    weight = random_weight(160, 128, act_pre_scale=torch.rand(128) + 0.5)
    file = assert_forms(tmp_path, PRODUCTS, weight, operands((), torch.float32))
    assert file.operators[MICROSOFTS] > 5  # equal products are one, after torch's optimizer
    assert file.operators["DequantizeLinear"] >= 1
    kinds = {shape: (kind, size) for kind, shape, size in file.initializers.values()}
    assert kinds[160, 128] == (INT4, 160 * 128 // 2)


def test_forms_of_products_with_stacks(tmp_path: Path) -> None:
    """Experts without rows, and rows without an expert, are among the grouped ones."""
    functions = BATCHED | GROUPED
    file = assert_forms(tmp_path, functions, random_weight(3, 160, 128), operands((3,), torch.float32))
    assert file.operators[MICROSOFTS] > 20


@pytest.mark.slow
def test_standard_operators_only(tmp_path: Path) -> None:
    weight = random_weight(160, 128, act_pre_scale=torch.rand(128) + 0.5)
    with standard_operators():
        file = assert_forms(tmp_path, PRODUCTS, weight, operands((), torch.float32))
    assert set(file.opsets) == {""}
    assert file.operators["DequantizeLinear"] > 2
    assert not [s for _, s, _ in file.initializers.values() if len(s) == 3 and s[-1] == 16], "bytes too"


def test_a_wide_matrix_by_standard_operators(tmp_path: Path) -> None:
    """K no multiple of the group."""
    weight = random_weight(33, 150)
    with standard_operators():
        file = OnnxFile(tmp_path, linear(weight), (torch.randn(3, 150),))
    x = torch.randn(3, 150)
    assert_linear(file(x)[0], x, weight)


def test_views(tmp_path: Path) -> None:
    """Whatever the forward does to a weight is done when the file is written."""
    weight = random_weight(150, 128, act_pre_scale=torch.rand(128) + 0.5)
    views: list[Callable[[Any], Any]] = [
        lambda w: w[64:128],
        lambda w: w.narrow(0, 7, 64),
        lambda w: torch.cat([w[:9], w[9:30]]),
        lambda w: w[torch.tensor([5, -1, 0])],
        lambda w: w.split([64, 50, 36])[1],
        lambda w: torch.stack([w, w])[1],
        lambda w: w.to(torch.float32).clone(),
    ]
    functions = [partial(lambda view, x, w: F.linear(x, view(w)), view) for view in views]
    file = OnnxFile(tmp_path, Products([(f, weight) for f in functions]), (torch.randn(3, 128),))
    assert file.operators.keys() <= {MICROSOFTS, "Mul", "Reshape", "ReduceSum", "Gemm"}
    x = torch.randn(3, 128)
    for view, y in zip(views, file(x), strict=True):
        assert_linear(y, x, view(weight))


def test_rows_of_an_embedding_and_the_whole_weight(tmp_path: Path) -> None:
    """Copies, and so bit for bit."""
    table = random_weight(100, 70)
    functions: list[Callable[..., Tensor]] = [
        lambda i, w: F.embedding(i, w).float(),
        lambda i, w: F.embedding(i, w.to(torch.float32)),
        lambda i, w: F.embedding(i, w.to(torch.float16)),
        lambda i, w: w.dequantize().float(),
        lambda i, w: w.t().dequantize().float()[:, i[0]],
    ]
    file = OnnxFile(tmp_path, Products([(f, table) for f in functions]), (torch.tensor([[0, 5]]),))
    for indices in (torch.tensor([[99, 3]]), torch.tensor([[7, 7]])):
        for y, f in zip(file(indices), functions, strict=True):
            assert torch.equal(y, f(indices, table))


def test_a_tied_embedding_and_head_share_their_bytes(tmp_path: Path) -> None:
    model = tied()
    assert_tied(model)
    file = OnnxFile(tmp_path, model, (torch.arange(6),))
    stored = [shape for kind, shape, _ in file.initializers.values() if kind in (UINT8, INT4) and shape]
    assert sorted(stored) == [(70, 3, 16), (100, 3, 16)]
    idx = torch.tensor([99, 0, 3, 3, 98, 7])
    weights: list[Any] = [model.embed.weight, model.inner.weight]
    (table, unit), (inner, inner_unit) = (plain(weight) for weight in weights)
    bias = model.inner.bias.detach().double()
    exact = (table[idx] @ inner.t() + bias) @ table.t()
    largest = (table[idx].abs() @ inner_unit.t() + bias.abs()) @ unit.t()
    assert_product(file(idx)[0], exact, largest, 70 + 70 + 8)


# --- what is refused ----------------------------------------------------------------------------


def refusal(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> str:
    with pytest.raises(ValueError, match="4-bit weight") as caught:
        torch.onnx.export(model.eval(), inputs, **({"dynamo": True, "verbose": False} | options))
    return str(caught.value)


def test_what_is_refused_says_what_to_do(tmp_path: Path) -> None:
    whole = Products([(torch.matmul, random_weight(64, 32))])
    assert refusal(whole, (torch.randn(3, 64),), opset_version=20) == (
        "got opset_version=20, and this model needs a 4-bit weight as a whole, which ONNX has from "
        "opset 21 on (DequantizeLinear in blocks); leave opset_version out, or give 21 or more"
    )
    assert OnnxFile(tmp_path, whole, (torch.randn(3, 64),), opset_version=21).opsets == {"": 21}

    layer = linear(random_weight(64, 32))
    old = {"dynamo": False, "f": str(tmp_path / "old.onnx")}
    assert refusal(layer, (torch.randn(3, 32),), **old) == (
        "torch.onnx.export got dynamo=False and a model with 4-bit weights, which TorchScript cannot "
        "trace; export with dynamo=True"
    )


def test_a_weight_that_an_input_chooses() -> None:
    chosen = Products([(lambda x, i, w: F.linear(x, w[i]), random_weight(64, 32))])
    inputs = torch.randn(3, 32), torch.tensor([3, 7])
    assert refusal(chosen, inputs) == (
        "a 4-bit weight is computed from inputs_1, an input of the model, and in an ONNX file it must "
        "be a constant; multiply experts with F.grouped_mm (in transformers: "
        "model.set_experts_implementation('grouped_mm')), or index weight.dequantize()"
    )


def test_the_cure_for_it(tmp_path: Path) -> None:
    weight = random_weight(64, 32, dtype=torch.float32)
    cured = Products([(lambda x, i, w: F.linear(x, w.dequantize()[i]), weight)])
    x, i = torch.randn(3, 32), torch.tensor([3, 7])
    file = OnnxFile(tmp_path, cured, (x, i))
    assert_linear(file(x, i)[0], x, weight[i])
