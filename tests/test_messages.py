"""What users read when something is wrong, word for word: what was got, the rule, the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_

from tests.numerics import random_groupwise
from tests.weights import random_weight
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor, Int4WeightOnlyConfig


def weight(**kwargs: Any) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_groupwise(random_groupwise(40, 70, 32), **kwargs)


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def messages_of(*calls: Callable[[], object]) -> str:
    return "\n".join(message_of(call) for call in calls)


def nan_model() -> Any:
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    return model


class TestMessages(expecttest.TestCase):  # type: ignore[misc]  # has no annotations
    maxDiff = None

    def test_quantizing(self) -> None:
        self.assertExpectedInline(
            messages_of(
                lambda: Int4WeightOnlyConfig(group_size=48),
                lambda: Int4WeightOnlyConfig(packing_format="plain"),
                lambda: Int4WeightOnlyConfig(int4_choose_qparams_algorithm="gptq"),
                lambda: Int4OpaqueTensor.from_hp(torch.zeros(4, 64), [64]),
                lambda: Int4OpaqueTensor.from_hp(torch.zeros(4, 64).double(), [1, 64]),
                lambda: Int4OpaqueTensor.from_hp(torch.zeros(2, 4, 64), [1, 64]),
                lambda: quantize_(nan_model(), Int4WeightOnlyConfig(32)),
                lambda: GroupwiseInt4(
                    torch.zeros(4, 40, dtype=torch.uint8), torch.ones(4, 1), torch.ones(4, 1), 32
                ),
            ),
            """\
ValueError: group_size=48 is not supported; choose 32, 64, 128 or 256
ValueError: packing_format='plain' is not supported; choose 'opaque', or use torchao.quantization.Int4WeightOnlyConfig for torchao's own formats
ValueError: int4_choose_qparams_algorithm='gptq' is not known; choose 'tinygemm', 'hqq', 'mse'
ValueError: block_size is [64]; it must be [1, group_size] with a group_size of 32, 64, 128 or 256
TypeError: weight is torch.float64; convert it to bfloat16, float16 or float32 first
ValueError: block_size is [1, 64]; it must be [1, 1, group_size] with a group_size of 32, 64, 128 or 256
ValueError: 1.weight: weight has NaN or infinite values; every value must be finite, so check the checkpoint it came from. 4-bit already: 0.weight; every other layer is unchanged
ValueError: scale has shape [4, 1]; codes of shape [4, 40] in groups of 32 need [4, 2]""",
        )

    def test_running(self) -> None:
        self.assertExpectedInline(
            messages_of(
                lambda: F.linear(torch.zeros(3, 71), weight()),
                lambda: F.linear(torch.zeros(3, 70).double(), weight()),
                lambda: F.linear(torch.zeros(3, 70, device="meta"), weight()),
                lambda: F.linear(weight(), torch.zeros(5, 70)),
                lambda: weight().to("cuda"),
                lambda: weight().double(),
            ),
            """\
ValueError: linear got an activation of shape [3, 71] for a 4-bit weight of shape [40, 70]; the last dimension must be K=70
TypeError: linear got a torch.float64 activation; convert it to bfloat16, float16 or float32
ValueError: linear got an activation on meta and a 4-bit weight on cpu; both must be on 'cpu', so move the activation with .to('cpu')
TypeError: linear got a 4-bit tensor that is not its weight; only the weight can be one, so call .dequantize() on the other
ValueError: a 4-bit CPU weight cannot move to 'cuda'; it runs on 'cpu' only, so keep the model there, or call .dequantize() and move that
TypeError: cannot convert a 4-bit weight to torch.float64; its dtype is bfloat16, float16 or float32, so call .dequantize() and convert that""",
        )

    def test_loading(self) -> None:
        t = weight()
        parts: dict[str, Any] = {
            "qdata": t.qdata,
            "scale_and_zero": t.scale_and_zero,
            "block_size": [1, 32],
            "shape": (40, 70),
            "qdata_layout": "avx512",
            "dtype": torch.bfloat16,
        }
        self.assertExpectedInline(
            messages_of(
                lambda: Int4OpaqueTensor(
                    **(parts | {"scale_and_zero": t.scale_and_zero[:2].contiguous()})
                ),
                lambda: Int4OpaqueTensor(**(parts | {"scale_and_zero": t.scale_and_zero.float()})),
                lambda: Int4OpaqueTensor(**(parts | {"qdata": t.qdata[:16]})),
                lambda: Int4OpaqueTensor(**(parts | {"qdata_layout": "sse"})),
                lambda: Int4OpaqueTensor(**(parts | {"act_pre_scale": torch.ones(3)})),
                lambda: Int4OpaqueTensor.__new__(Int4OpaqueTensor, **parts).__setstate__({}),
                lambda: weight().copy_(torch.zeros(40, 70)),
                lambda: Int4OpaqueTensor.from_upstream(torch.zeros(2, 2), layout="avx512"),
            ),
            """\
ValueError: scale_and_zero has shape [2, 48, 2]; a weight of shape [40, 70] in groups of 32 needs [3, 48, 2], so take the parts from one Int4OpaqueTensor
TypeError: scale_and_zero is torch.float32; it must be a torch.bfloat16 or torch.float16 tensor, so make the weight with Int4OpaqueTensor.from_groupwise, which rounds them to one of the two
ValueError: qdata has shape [16, 48]; a weight of shape [40, 70] in groups of 32 needs [48, 48], so take the parts from one Int4OpaqueTensor
ValueError: layout 'sse' is not known; choose 'avx512', 'avx2', 'default'
ValueError: act_pre_scale has shape [3]; it must have one element or shape [70]
ValueError: a saved 4-bit weight has format_version=None; it must be an int from 1 to 5, so the file is damaged or was not written by torchao_int4cpu
TypeError: copy_ got a source that is torch.float32 of class Tensor and not 4-bit as the other side is; quantize_ the model before you load a 4-bit state dict, or load it with load_state_dict(..., assign=True)
TypeError: got a torch.Tensor; from_upstream converts torchao.prototype.quantization.int4.Int4OpaqueTensor, torchao.quantization.Int4Tensor, torchao.quantization.Int4TilePackedTo4dTensor, torchao.quantization.IntxUnpackedToInt8Tensor""",
        )


class TestLimits(expecttest.TestCase):  # type: ignore[misc]  # has no annotations
    """What users read when they do more with a weight than its algebra has."""

    maxDiff = None

    def check(self, expected: str, *calls: Callable[[], object]) -> None:
        self.assertExpectedInline("\n".join(map(message_of, calls)), expected, skip=1)

    def test_cuts(self) -> None:
        w, s = random_weight(100, 160, layout="avx512"), random_weight(3, 64, 64)
        self.check(
            """\
ValueError: cannot cut a 4-bit weight of shape [100, 160] along K at 40; its groups of 32 share a scale, so cut at a multiple of 32 (the nearest: 32 or 64), or quantize in smaller groups
ValueError: cannot cut a 4-bit weight of shape [100, 160] along K at 10; its groups of 32 share a scale, so cut at a multiple of 32 (the nearest: 32), or quantize in smaller groups
ValueError: cannot cut a 4-bit weight of shape [100, 160] along K at 159; its groups of 32 share a scale, so cut at a multiple of 32 (the nearest: 128), or quantize in smaller groups
ValueError: cannot cut a 4-bit weight of shape [100, 160] along K at 20; its groups of 32 share a scale, so cut at a multiple of 32 (the nearest: 32), or quantize in smaller groups
ValueError: cannot cut a 4-bit weight of shape [100, 160] along K into 2 pieces of 80; its groups of 32 share a scale, so use 1, 5 pieces (processes), or quantize in smaller groups
ValueError: split got size 0 for dimension 0 of a 4-bit weight of shape [100, 160]; every piece must have at least one, so give 1 or more
ValueError: split got sizes [50, 40] for dimension 0 of a 4-bit weight of shape [100, 160]; they must add up to 100
ValueError: got an empty cut 5:5 of dimension 0 of a 4-bit weight of shape [100, 160]; every dimension must keep at least one, so leave such a cut out
ValueError: got an empty cut 0:0 of dimension 0 of a 4-bit weight of shape [100, 160]; every dimension must keep at least one, so leave such a cut out
ValueError: cannot cut a 4-bit weight of shape [100, 160] with a step of 2; index it with a tensor (weight[torch.arange(...)]), or call .dequantize()
ValueError: cannot take one row or column of a 4-bit weight of shape [100, 160]; only a matrix of a stack [E, N, K] can be selected, so write weight[i:i + 1], or dequantize that
ValueError: cannot take one row or column of a 4-bit weight of shape [3, 64, 64]; only a matrix of a stack [E, N, K] can be selected, so write weight[i:i + 1], or dequantize that
IndexError: index 3 is out of bounds for dimension 0 with size 3
IndexError: Dimension out of range (expected to be in range of [-2, 1], but got 2)
IndexError: Dimension out of range (expected to be in range of [-2, 1], but got 5)""",
            lambda: w[:, 40:],
            lambda: w[:, :10],
            lambda: w[:, :159],
            lambda: w.t()[20:],
            lambda: w.chunk(2, 1),
            lambda: w.split(0),
            lambda: w.split([50, 40]),
            lambda: w[5:5],
            lambda: w.narrow(0, 0, 0),
            lambda: w[::2],
            lambda: w[5],
            lambda: s[:, 5],
            lambda: s[3],
            lambda: w.narrow(2, 0, 1),
            lambda: w.chunk(2, 5),
        )

    def test_choosing(self) -> None:
        w = random_weight(100, 160)
        self.check(
            """\
IndexError: index 100 is out of range; the first dimension of the 4-bit weight has 100, so choose -100 to 99
ValueError: cannot index a 4-bit weight of shape [100, 160] with tensors of shapes [None, [1]]; only the first dimension can be indexed, with one dimension
ValueError: cannot index a 4-bit weight of shape [100, 160] with tensors of shapes [[1, 1]]; only the first dimension can be indexed, with one dimension
ValueError: cannot choose columns of a 4-bit weight of shape [100, 160]; its groups share a scale, so call .dequantize()
ValueError: cannot choose columns of a 4-bit weight of shape [160, 100]; its groups share a scale, so call .dequantize()
ValueError: got an empty index into a 4-bit weight of shape [100, 160]; it must choose at least one, so leave such a call out
IndexError: a mask of 99 does not fit a 4-bit weight of shape [100, 160]; give 100 of them""",
            lambda: w[torch.tensor([100])],
            lambda: w[:, torch.tensor([1])],
            lambda: w[torch.tensor([[1]])],
            lambda: w.index_select(1, torch.tensor([1])),
            lambda: w.t()[torch.tensor([1])],
            lambda: w[torch.tensor([], dtype=torch.int64)],
            lambda: w[torch.ones(99, dtype=torch.bool)],
        )

    def test_shapes(self) -> None:
        w, s = random_weight(100, 160), random_weight(3, 64, 64)
        self.check(
            """\
ValueError: t got a 4-bit weight of shape [3, 64, 64]; it takes 2 dimensions, so write .transpose(-2, -1)
ValueError: cannot reorder the dimensions of a 4-bit weight of shape [3, 64, 64] as [1, 0, 2]; only the last two can change places, so call .dequantize() for anything else
ValueError: cannot reorder the dimensions of a 4-bit weight of shape [3, 64, 64] as [2, 0, 1]; only the last two can change places, so call .dequantize() for anything else
ValueError: cannot view a 4-bit weight of shape [100, 160] as [160, 100]; its groups run along K, so only the same shape will do, with or without a 1 in front, or call .dequantize()
ValueError: cannot view a 4-bit weight of shape [3, 64, 64] as [-1, 64]; its groups run along K, so only the same shape will do, with or without a 1 in front, or call .dequantize()
ValueError: cannot add a dimension at 1 to a 4-bit weight of shape [100, 160]; only [N, K] can become [1, N, K], by unsqueeze(0)
ValueError: cannot add a dimension at 0 to a 4-bit weight of shape [3, 64, 64]; only [N, K] can become [1, N, K], by unsqueeze(0)
ValueError: cannot squeeze a 4-bit weight of shape [1, 160]; it keeps its last two dimensions, so squeeze dimension 0 of a stack only, or call .dequantize() first
ValueError: cannot expand a 4-bit weight of shape [3, 64, 64] to [6, -1, -1]; only one matrix can become a stack of it, so multiply with torch.matmul, which broadcasts, or call .dequantize()
ValueError: cannot expand a 4-bit weight of shape [100, 160] to [2, 3, -1, -1]; only one matrix can become a stack of it, so multiply with torch.matmul, which broadcasts, or call .dequantize()
ValueError: cannot view a 4-bit weight of shape [100, 160] as [50, 160] with strides [160, 1]; it has no strides of its own, so cut it with narrow
ValueError: new_zeros got size [5]; a 4-bit weight is [N, K] or [E, N, K], and none of them 0, so leave it out
ValueError: new_zeros got size [0, 64]; a 4-bit weight is [N, K] or [E, N, K], and none of them 0, so leave it out
ValueError: cannot pad a 4-bit weight of shape [100, 160] by [1, 0] with 0.0; only zeros at the end of one dimension can be added, so call .dequantize()
ValueError: cannot pad a 4-bit weight of shape [100, 160] by [0, 1] with 2.0; only zeros at the end of one dimension can be added, so call .dequantize()
ValueError: cannot pad a 4-bit weight of shape [8, 70] along K: zeros would share a group of 32 with its last columns; K must be a multiple of the group size, so cut it without padding (distribute_tensor(..., src_data_rank=None))""",
            lambda: s.t(),
            lambda: s.transpose(0, 1),
            lambda: s.permute(2, 0, 1),
            lambda: w.view(160, 100),
            lambda: s.reshape(-1, 64),
            lambda: w.unsqueeze(1),
            lambda: s.unsqueeze(0),
            lambda: w[:1].squeeze(),
            lambda: s.expand(6, -1, -1),
            lambda: w.expand(2, 3, -1, -1),
            lambda: w.as_strided((50, 160), (160, 1)),
            lambda: w.new_zeros(5),
            lambda: w.new_zeros(0, 64),
            lambda: F.pad(w, (1, 0)),
            lambda: F.pad(w, (0, 1), value=2.0),
            lambda: F.pad(random_weight(8, 70), (0, 1)),
        )

    def test_joins(self) -> None:
        w = random_weight(64, 64)
        self.check(
            """\
TypeError: cat got a Int4OpaqueTensor and a Tensor; all must be 4-bit weights the same way round, so call .dequantize() or .t() on the others
TypeError: cat got a Int4OpaqueTensor and a Int4TransposedTensor; all must be 4-bit weights the same way round, so call .dequantize() or .t() on the others
ValueError: cat got 4-bit weights shape=[64, 64], group_size=32, dtype=torch.bfloat16 and shape=[64, 96], group_size=32, dtype=torch.bfloat16; all must agree in group_size, dtype and every dimension but 0
ValueError: cat got 4-bit weights shape=[64, 64], group_size=32, dtype=torch.bfloat16 and shape=[64, 64], group_size=64, dtype=torch.bfloat16; all must agree in group_size, dtype and every dimension but 0
ValueError: cat got 4-bit weights shape=[64, 64], group_size=32, dtype=torch.bfloat16 and shape=[64, 64], group_size=32, dtype=torch.float32; all must agree in group_size, dtype and every dimension but 0
ValueError: cat along K got a 4-bit weight of shape [64, 70] before the last; its last group of 32 is not full, so put it last, or call .dequantize()
ValueError: cat got 4-bit weights with different act_pre_scale; along N, and in a stack, they share the activation, so all must have the same, or call .dequantize()
ValueError: cannot add a dimension at 1 to a 4-bit weight of shape [64, 64]; only [N, K] can become [1, N, K], by unsqueeze(0)""",
            lambda: torch.cat([w, torch.zeros(64, 64)]),
            lambda: torch.cat([w, w.t()]),
            lambda: torch.cat([w, random_weight(64, 96)]),
            lambda: torch.cat([w, random_weight(64, 64, group_size=64)]),
            lambda: torch.cat([w, w.float()]),
            lambda: torch.cat([random_weight(64, 70), w], 1),
            lambda: torch.cat([w, random_weight(64, 64, act_pre_scale=torch.ones(64))]),
            lambda: torch.stack([w, w], 1),
        )

    def test_copies(self) -> None:
        w = random_weight(128, 64, layout="avx512")
        self.check(
            """\
ValueError: copy_ got a target of shape [67, 64] that was cut inside a block of rows or along K, so it is a repacked copy and the weight would not change; cut along N at multiples of 64, copy into the whole weight, or into a clone() if the copy is meant
ValueError: copy_ got a target of shape [128, 32] that was cut inside a block of rows or along K, so it is a repacked copy and the weight would not change; cut along N at multiples of 64, copy into the whole weight, or into a clone() if the copy is meant
ValueError: copy_ got a target of shape [2, 64, 64] that was expanded, so all its matrices are the same one; copy into the weight that was expanded, or into a clone()
TypeError: copy_ got a Int4OpaqueTensor for a Int4TransposedTensor; both must be the same way round, so call .transpose(-2, -1) on one
TypeError: copy_ got a source that is torch.float32 of class Tensor and not 4-bit as the other side is; quantize_ the model before you load a 4-bit state dict, or load it with load_state_dict(..., assign=True)
ValueError: a 4-bit CPU weight cannot be pinned; it never leaves the CPU, so leave pin_memory out
ValueError: a 4-bit CPU weight cannot move to 'cuda'; it runs on 'cpu' only, so keep the model there, or call .dequantize() and move that""",
            lambda: w[3:70].copy_(w[3:70]),
            lambda: w[:, :32].copy_(w[:, :32]),
            lambda: w[:64].expand(2, -1, -1).copy_(torch.stack([w[:64], w[:64]])),
            lambda: w[:64].t().copy_(random_weight(64, 64)),
            lambda: w[:64].copy_(torch.zeros(64, 64)),
            lambda: w.pin_memory(),
            lambda: w.t().to("cuda"),
        )

    def test_products(self) -> None:
        w, s = random_weight(64, 32), random_weight(3, 64, 32)
        offs = torch.tensor([1, 2, 3], dtype=torch.int32)
        self.check(
            """\
ValueError: matmul got shapes [5, 64] and [32, 64]; they must be [M, K] and [K, N], so check whether the 4-bit weight is to be transposed
ValueError: matmul got shapes [5, 32] and [64, 32]; they must be [M, K] and [K, N], so check whether the 4-bit weight is to be transposed
ValueError: matmul got two 4-bit weights; one side must be a plain tensor, so call .dequantize() on it
ValueError: mm got a torch.float64 tensor beside a 4-bit weight; convert it to bfloat16, float16 or float32
ValueError: mm got a tensor on meta and a 4-bit weight on cpu; both must be on 'cpu', so move the activation with .to('cpu')
ValueError: addmm got a bias of shape [5, 1] for a product of shape [1, 64]; it must be one that broadcasts to that, so check its shape
TypeError: addmm got a 4-bit tensor that is not a side of its product; only one of the sides can be one, so call .dequantize() on the other
ValueError: matmul got shapes [2, 2, 5, 32] and [3, 32, 64]; they must be [E, M, K] and [E, K, N], so check whether the 4-bit weight is to be transposed
TypeError: mm got a torch.float64 tensor beside a 4-bit weight; convert it to bfloat16, float16 or float32
ValueError: bmm got shapes [2, 5, 32] and [3, 32, 64]; they must be [E, M, K] and [E, K, N], so check whether the 4-bit weight is to be transposed
ValueError: got a stack of 4-bit weights of shape [3, 64, 32]; this takes one [N, K], so index it first (weight[e]), or multiply with F.grouped_mm or torch.bmm
ValueError: grouped_mm got x of shape [5, 64] and 4-bit experts of shape [3, 32, 64]; they must be [S, K] and [E, K, N], so transpose(-2, -1) the experts if they are [E, N, K]
ValueError: got offs torch.int32 [2]; it must be int32 or int64 [3], the row after the last one of each expert, so give the cumulative sum of the rows of each
ValueError: got offs[1] = 2 after 3; no number may be smaller than the one before it, or larger than the 5 rows of the activation, so give the cumulative sum of the rows of each expert
TypeError: embedding got a table of class Int4TransposedTensor; it must be a 4-bit weight [N, K], so transpose it back, or call .dequantize()
ValueError: got a stack of 4-bit weights of shape [3, 64, 32]; this takes one [N, K], so index it first (weight[e]), or multiply with F.grouped_mm or torch.bmm
ValueError: embedding got a 4-bit table with act_pre_scale, which scales the activations of a linear layer; quantize embeddings without AWQ or SmoothQuant
TypeError: got indices torch.float32; they must be int32 or int64, so convert them with .long()
RuntimeError: The size of tensor a (32) must match the size of tensor b (7) at non-singleton dimension 1""",
            lambda: torch.zeros(5, 64) @ w.t(),
            lambda: torch.zeros(5, 32) @ w,
            lambda: w.t() @ w,
            lambda: torch.zeros(5, 32).double() @ w.t(),
            lambda: torch.zeros(5, 32, device="meta") @ w.t(),
            lambda: torch.addmm(torch.zeros(5, 1), torch.zeros(1, 32), w.t()),
            lambda: torch.addmm(w, torch.zeros(64, 8), torch.zeros(8, 32)),
            lambda: torch.zeros(2, 2, 5, 32) @ s.mT,
            lambda: torch.matmul(torch.zeros(5, 32).double(), w.t()),
            lambda: torch.bmm(torch.zeros(2, 5, 32), s.mT),
            lambda: F.linear(torch.zeros(5, 32), s),
            lambda: F.grouped_mm(torch.zeros(5, 64), s.mT, offs=offs),
            lambda: F.grouped_mm(torch.zeros(5, 32), s.mT, offs=offs[:2]),
            lambda: F.grouped_mm(torch.zeros(5, 32), s.mT, offs=torch.tensor([3, 2, 5])),
            lambda: F.embedding(torch.tensor([1]), w.t()),
            lambda: F.embedding(torch.tensor([1]), s),
            lambda: F.embedding(torch.tensor([1]), random_weight(64, 32, act_pre_scale=torch.ones(32))),
            lambda: F.embedding(torch.tensor([1.0]), w),
            lambda: F.linear(torch.zeros(5, 64), w.t(), torch.zeros(7)),
        )
