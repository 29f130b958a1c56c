"""The kernels for experts and rows as ops: what they refuse, and what traces see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics import native, packed_in, random_groupwise
from tests.test_expert_kernels import as_views, ends, one_of, ops, random_experts
from tests.test_kernels import apart
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.experts import grouped_mm
from torchao_int4cpu.kernels.ops.dequantize import traceable_dequantize, traceable_embedding
from torchao_int4cpu.kernels.ops.experts import (
    traceable_bmm,
    traceable_bmm_transposed,
    traceable_grouped_mm,
    traceable_grouped_mm_transposed,
)
from torchao_int4cpu.kernels.ops.products import traceable_int4_mm_transposed
from torchao_int4cpu.kernels.selection import int4_mm_transposed

# --- ops ----------------------------------------------------------------------------------------

#: Each op with arguments of which it takes (activation, experts or weight, rest).
N, K = 72, 90


def op_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments for every op, by name; parts are at 1 and 2, or at 0 and 1 for int4_dequantize."""
    experts = as_views(random_experts(N, K, 32, native(), e=3))
    weight = apart(packed_in(random_groupwise(N, K, 32), native()))
    stacked = (experts.qdata, experts.scale_and_zero)
    one = (weight.qdata, weight.scale_and_zero)
    constants = (32, native().name)
    offs = ends([2, 0, 3])
    return {
        "int4_grouped_mm": (torch.randn(6, K), *stacked, offs, *constants, N),
        "int4_grouped_mm_transposed": (torch.randn(6, N), *stacked, offs, *constants, K),
        "int4_bmm": (torch.randn(3, 4, K), *stacked, *constants, N),
        "int4_bmm_transposed": (torch.randn(3, 4, N), *stacked, *constants, K),
        "int4_embedding": (torch.tensor([[1, 2, 71]]), *one, *constants, N, K, torch.bfloat16),
        "int4_dequantize": (*one, *constants, N, K, torch.float16),
    }


every_op = pytest.mark.parametrize("op", op_calls())


@every_op
def test_ops_pass_opcheck_and_give_shapes_on_meta(op: str) -> None:
    call, arguments = getattr(ops, op), op_calls()[op]
    torch.library.opcheck(call.default, arguments)
    y = call(*arguments)
    shape = call(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
    assert shape.is_meta
    assert (shape.shape, shape.dtype, shape.stride()) == (y.shape, y.dtype, y.stride())


@every_op
def test_ops_refuse_parts_on_several_devices(op: str) -> None:
    arguments = op_calls()[op]
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    for index in tensors:
        mixed = list(arguments)
        mixed[index] = mixed[index].to("meta")
        with pytest.raises(ValueError, match="all must be on one device"):
            getattr(ops, op)(*mixed)


def _odd(pairs: Tensor) -> Tensor:
    """The stride from group to group an odd number, as no (scale, zero) has it."""
    strides = [*pairs.stride()]
    strides[-3] = 2 * pairs.shape[-2] + 1
    return torch.zeros(10**5, dtype=pairs.dtype).as_strided(pairs.shape, strides)


def _first_group(pairs: Tensor) -> Tensor:
    return pairs.narrow(-3, 0, 1).expand(pairs.shape)


WRONG: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "one row less": (0, lambda qdata: qdata.narrow(-2, 0, qdata.shape[-2] - 1)),
    "int8 codes": (0, lambda qdata: qdata.view(torch.int8)),
    "codes along N": (0, lambda qdata: qdata.transpose(-1, -2).contiguous().transpose(-1, -2)),
    "codes that lie apart": (0, lambda qdata: qdata.repeat_interleave(2, -1)[..., ::2]),
    "rows that lie apart": (0, lambda qdata: torch.cat([qdata, qdata], -1)[..., : qdata.shape[-1]]),
    "one group less": (1, lambda pairs: pairs.narrow(-3, 0, pairs.shape[-3] - 1)),
    "float32 pairs": (1, lambda pairs: pairs.float()),
    "int16 pairs": (1, lambda pairs: pairs.view(torch.int16)),
    "zeros apart": (1, lambda pairs: pairs.transpose(-1, -2).contiguous().transpose(-1, -2)),
    "overlapping groups": (1, _first_group),
    "an odd stride": (1, _odd),
}


@every_op
@pytest.mark.parametrize("wrong", WRONG)
def test_ops_refuse_parts_that_do_not_fit(op: str, wrong: str) -> None:
    """Whoever calls one may have read them from a file; a kernel would read out of bounds."""
    arguments = list(op_calls()[op])
    which, damage = WRONG[wrong]
    at = which + (op != "int4_dequantize")
    arguments[at] = damage(arguments[at])
    with pytest.raises(ValueError, match=r"so take (them|the parts) from|call .contiguous"):
        getattr(ops, op)(*arguments)


@every_op
def test_ops_refuse_other_sizes_layouts_and_activations(op: str) -> None:
    call, arguments = getattr(ops, op), op_calls()[op]
    group = next(i for i, a in enumerate(arguments) if isinstance(a, int))
    for at, value, message in (
        (group, 48, "choose 32, 64, 128 or 256"),
        (group, 64, "so take (them|the parts) from|call .contiguous"),
        (group + 1, "neon", "layout 'neon' is not known; choose"),
        (group + 2, 0, "so take (them|the parts) from|call .contiguous"),
        (group + 2, 40, "so take (them|the parts) from|call .contiguous"),
    ):
        changed = list(arguments)
        changed[at] = value
        with pytest.raises(ValueError, match=message):
            call(*changed)
    if "mm" in op:
        x, *rest = arguments
        for wrong in (x.double(), x[None], x.flatten()):
            with pytest.raises(ValueError, match=r"must be bfloat16, float16 or float32 .*so convert"):
                call(wrong, *rest)
        with pytest.raises(ValueError, match=r"so take (them|the parts) from|call .contiguous"):
            call(x[..., :-30], *rest)
    if "bmm" in op:
        with pytest.raises(ValueError, match=r"it must be .* \[3, any, .*\], so convert or reshape"):
            call(x[:2], *rest)


def test_functions_refuse_activations_that_do_not_fit() -> None:
    experts = random_experts(N, K, 32, native(), e=3)
    offs = ends([1, 1, 1])
    message = "so convert or reshape it"
    for wrong in (torch.randn(3, K + 1), torch.randn(3, K).double(), torch.randn(K)):
        with pytest.raises(ValueError, match=message):
            traceable_grouped_mm(wrong, experts, offs)
        with pytest.raises(ValueError, match=message):
            traceable_grouped_mm_transposed(wrong, experts, offs)
        with pytest.raises(ValueError, match=message):
            traceable_int4_mm_transposed(wrong, one_of(experts, 0))
    for wrong in (torch.randn(2, 4, K), torch.randn(3, 4, K + 1), torch.randn(3, K)):
        with pytest.raises(ValueError, match=message):
            traceable_bmm(wrong, experts)
        with pytest.raises(ValueError, match=message):
            traceable_bmm_transposed(wrong, experts)


def _everything(
    x: Tensor, y: Tensor, offs: Tensor, indices: Tensor, qdata: Tensor, pairs: Tensor
) -> list[Tensor]:
    """Every traceable function, on views that are taken inside of the graph."""
    experts = PackedInt4(qdata[1:, 64:], pairs[1:, :, 64:], 32, native(), N, K)
    weight = experts.expert(1)
    return [
        traceable_grouped_mm(x, experts, offs),
        traceable_grouped_mm_transposed(y, experts, offs),
        traceable_bmm(x.expand(3, -1, -1), experts),
        traceable_bmm_transposed(y.expand(3, -1, -1), experts),
        traceable_int4_mm_transposed(y, weight),
        traceable_embedding(indices, weight, torch.bfloat16),
        traceable_dequantize(weight, torch.float32),
    ]


def test_compiled_and_eager_agree_for_any_number_of_rows() -> None:
    """One graph without breaks serves every number of rows; eager calls need no op."""
    stacked = random_experts(64 + N, K, 32, native())
    compiled = torch.compile(_everything, fullgraph=True, dynamic=True)
    for rows in (6, 9, 50):
        x, y = torch.randn(rows, K), torch.randn(rows, N)
        offs, indices = ends([2, 0, rows - 3]), torch.randint(0, N, (rows,))
        arguments = (x, y, offs, indices, stacked.qdata, stacked.scale_and_zero)
        expected = _everything(*arguments)
        with torch._dynamo.config.patch(error_on_recompile=rows > 6):
            found = compiled(*arguments)
        assert all(map(torch.equal, found, expected))
        experts = PackedInt4(
            stacked.qdata[1:, 64:], stacked.scale_and_zero[1:, :, 64:], 32, native(), N, K
        )
        assert torch.equal(expected[0], grouped_mm(x, experts, offs))
        assert torch.equal(expected[4], int4_mm_transposed(y, one_of(experts, 1)))


def test_modes_see_the_ops() -> None:
    """Whoever watches or traces ops must find one, not a result out of nowhere."""

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.found: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    weight = packed_in(random_groupwise(N, K, 32), native())
    indices = torch.tensor([1])
    with Names() as names:
        traceable_embedding(indices, weight, torch.float32)
    assert names.found == ["torchao_int4cpu.int4_embedding.default"]
